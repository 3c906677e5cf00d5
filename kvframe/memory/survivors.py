"""Which tokens a store that drops still has."""

import torch
from torch import Tensor

from kvframe.types import LayerLayout, LeavingUnits


class Survivors:
    """bool [B, H, R]; rows that hold no token yet count as alive."""

    def __init__(self, layout: LayerLayout, num_rows: int) -> None:
        heads = (layout.batch_size, layout.num_kv_heads)
        self.alive = torch.ones(*heads, num_rows, dtype=torch.bool, device=layout.device)

    def reserve(self, num_rows: int) -> None:
        """Make room for at least this many tokens a sequence."""
        missing = num_rows - self.alive.shape[-1]
        if missing > 0:
            self.alive = torch.cat([self.alive, self.alive.new_ones(*self.alive.shape[:2], missing)], -1)

    def keep(self, attended: Tensor, lengths: Tensor) -> None:
        """A step has attended to the rows of a mask [B, H, R]; all others of the `lengths` [B, H] rows are gone."""
        to_come = torch.arange(self.alive.shape[-1], device=lengths.device) >= lengths[..., None]
        self.alive &= attended | to_come

    def lose(self, unit: LeavingUnits, attended: Tensor) -> None:
        """Units leave the window outside of a step; what of them is not in a mask [B, H, R] is gone."""
        rows = torch.arange(self.alive.shape[-1], device=attended.device)
        inside = (rows >= unit.start[..., None]) & (rows < (unit.start + unit.size)[..., None]) & unit.leaves[..., None]
        self.alive &= attended | ~inside

    def units(self, offsets: Tensor, num_units: int) -> Tensor:
        """bool [B, H, num_units]: units of which something is left; unit u is the rows [offsets[u], offsets[u + 1])."""
        before = torch.nn.functional.pad(self.alive.cumsum(-1), (1, 0))
        bounds = before.gather(-1, offsets[..., : num_units + 1].long().clamp(0, self.alive.shape[-1]))
        return bounds[..., 1:] > bounds[..., :-1]

    def among(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows [B, H, C], -1 for none, those that are left, in their order and without gaps; and how many."""
        left = (rows >= 0) & self.alive.gather(-1, rows.clamp(min=0))
        order = (~left).to(torch.uint8).sort(dim=-1, stable=True).indices
        count = left.sum(-1)
        places = torch.arange(rows.shape[-1], device=rows.device)
        return rows.gather(-1, order).masked_fill(places >= count[..., None], -1), count

    def of(self, batch: int, stop: int) -> Tensor | None:
        """bool [H, stop], the first rows of one sequence; None where all of them are left. Reads the device."""
        alive = self.alive[batch, :, :stop]
        return None if bool(alive.all()) else alive

    def forget(self) -> None:
        """As at the start, in place."""
        self.alive.fill_(True)

    def nbytes(self) -> int:
        """Device memory held."""
        return self.alive.nbytes
