"""Tokens that are proposed and may be taken back."""

from typing import Self

from attrs import define
from torch import Tensor


@define(eq=False)
class Tentative:
    """Tokens of a call with several queries, behind its first: not in the ledger until the next call commits them."""

    query: Tensor  # [B, Hq, n, D]
    keys: Tensor  # [B, H, n, D]
    values: Tensor  # [B, H, n, Dv]

    @property
    def num_tokens(self) -> int:
        """How many of every sequence."""
        return self.keys.shape[2]

    def first(self, num_tokens: int) -> Self | None:
        """The first few of them; None for none."""
        if num_tokens == 0:
            return None
        parts = (self.query, self.keys, self.values)
        return type(self)(*(part[:, :, :num_tokens] for part in parts))
