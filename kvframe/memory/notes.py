"""What a scorer has noted of every token, by row."""

import torch
from torch import Tensor

from kvframe.types import LayerLayout


class TokenNotes:
    """float32 [F, B, H, R]; 0 for a token of which nothing has been noted. Rows move with their tokens."""

    def __init__(self, layout: LayerLayout, num_notes: int, num_rows: int) -> None:
        heads = (layout.batch_size, layout.num_kv_heads)
        self.tensor = torch.zeros(num_notes, *heads, num_rows, dtype=torch.float32, device=layout.device)

    def reserve(self, num_rows: int) -> None:
        """Make room for at least this many tokens a sequence."""
        missing = num_rows - self.tensor.shape[-1]
        if missing > 0:
            more = self.tensor.new_zeros(*self.tensor.shape[:3], missing)
            self.tensor = torch.cat([self.tensor, more], -1)

    def of(self, batch: int, start: int, stop: int) -> Tensor:
        """[F, H, stop - start], a view of the rows of one sequence."""
        return self.tensor[:, batch, :, start:stop]

    def reorder(self, batch: int, start: int, order: Tensor) -> None:
        """A prompt block was stored in unit order: row start + i of a head holds the token that was order[i] of it;
        order int64 [H, n]."""
        block = self.of(batch, start, start + order.shape[-1])
        block.copy_(block.gather(-1, order.expand_as(block)))

    def forget(self) -> None:
        """As at the start, in place."""
        self.tensor.zero_()

    def nbytes(self) -> int:
        """Device memory held."""
        return self.tensor.nbytes
