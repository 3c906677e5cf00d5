"""Which units a selection estimates."""

import torch
from torch import Tensor

from kvframe.types import LeavingUnits


class EstimatedUnits:
    """bool [B, H, U]; all of them until a selection says otherwise, and every unit that comes after it."""

    def __init__(self) -> None:
        self._flags: Tensor | None = None

    def reserve(self, max_units: int) -> None:
        """Make room for at least this many units a head."""
        if self._flags is not None and self._flags.shape[-1] <= max_units:
            missing = max_units + 1 - self._flags.shape[-1]
            self._flags = torch.cat([self._flags, self._flags.new_ones(*self._flags.shape[:2], missing)], -1)

    def choose(self, estimated: Tensor, due: Tensor, max_units: int) -> None:
        """The units [B, H, n] that a selection estimates from now on, where it was `due` [B, H]."""
        if self._flags is None:
            self._flags = torch.ones(*due.shape, max_units + 1, dtype=torch.bool, device=due.device)
        own = self._flags[..., : estimated.shape[-1]]
        own.copy_(torch.where(due[..., None], estimated, own))

    def extend(self, unit: LeavingUnits) -> None:
        """The unit of each head that leaves the window, where one does."""
        if self._flags is not None:
            column = unit.column.clamp(max=self._flags.shape[-1] - 1)[..., None]
            before = self._flags.gather(-1, column)
            self._flags.scatter_(-1, column, before | unit.leaves[..., None])

    def regroup(self, batch: int, sources: Tensor, is_new: Tensor) -> None:
        """Units of one sequence are replaced: new ones where `is_new` [H, columns], elsewhere what was in column
        `sources`."""
        if self._flags is not None:
            # An earlier turn may have had room for more units than there is now.
            own = self._flags[batch, :, : sources.shape[1]]
            moved = own.gather(1, sources[:, : own.shape[1]].clamp(max=own.shape[1] - 1))
            own.copy_(moved | is_new[:, : own.shape[1]])

    def limit(self, rest: Tensor) -> Tensor:
        """Of tokens to estimate, int64 [B, H, n], those in units that are estimated; 0 for the others."""
        return rest if self._flags is None else rest.masked_fill(~self._flags[..., : rest.shape[-1]], 0)

    def forget(self) -> None:
        """As before the first selection."""
        self._flags = None
