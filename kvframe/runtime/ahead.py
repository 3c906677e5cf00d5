"""Selections that wait for the next step."""

from typing import Self

import torch
from attrs import define
from torch import Tensor

from kvframe.types import Decision, LayerLayout


@define(eq=False)
class Ahead:
    """Heads that select for the step to come, and the query that they select with; written in place."""

    query: Tensor  # [B, Hq, D]
    due: Tensor  # bool [B, H]

    @classmethod
    def none(cls, layout: LayerLayout) -> Self:
        """No head does."""
        query = torch.zeros(
            layout.batch_size, layout.num_qo_heads, layout.head_dim, dtype=layout.dtype, device=layout.device
        )
        return cls(query, torch.zeros(layout.batch_size, layout.num_kv_heads, dtype=torch.bool, device=layout.device))

    def forget(self) -> None:
        """No head does any more, in place."""
        self.due.zero_()

    def exchange(self, probe: Tensor, decision: Decision) -> tuple[Tensor, Tensor]:
        """Heads that are not due now select with the query of the step before, where that asked for it; keeps what
        this step asks for.

        probe: [B, Hq, D], this step's query. Returns the queries and the heads of this step's selection, [B, Hq, D]
        and bool [B, H].
        """
        now = decision.due.repeat_interleave(probe.shape[1] // decision.due.shape[1], 1)[..., None]
        query, due = torch.where(now, probe, self.query), decision.due | self.due
        self.query.copy_(probe)
        if decision.ahead is None:
            self.due.zero_()
        else:
            self.due.copy_(decision.ahead)
        return query, due
