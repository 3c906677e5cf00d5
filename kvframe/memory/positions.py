"""Which position each row of the pool holds."""

import torch
from torch import Tensor

from kvframe.memory.link import link_of
from kvframe.memory.pinned import pinned_empty
from kvframe.types import LayerLayout


class RowPositions:
    """A row is its position, except inside prompt blocks, whose tokens lie in unit order. Kept on the host: no step of
    decoding needs it."""

    def __init__(self, layout: LayerLayout) -> None:
        self._layout = layout
        self._blocks: list[tuple[int, int, Tensor]] = []  # sequence, first row, positions int32 [H, n]

    def add_block(self, batch: int, start: int, order: Tensor) -> None:
        """Rows [start, start + n) of one sequence hold the positions start + order; order int64 [H, n], a permutation
        of range(n), on the device. Does not wait for it."""
        positions = (order + start).to(torch.int32)
        if positions.device.type == "cuda":
            on_host = pinned_empty(positions.shape, torch.int32, positions.device)
            link_of(positions.device).send_aside(positions.contiguous(), on_host)
            positions = on_host
        self._blocks.append((batch, start, positions))

    def of(self, batch: int, stop: int) -> Tensor:
        """Positions of the rows [0, stop) of one sequence, int64 [H, stop]; waits for the device."""
        if self._layout.device.type == "cuda":
            torch.cuda.synchronize(self._layout.device)
        positions = torch.arange(stop).repeat(self._layout.num_kv_heads, 1)
        for row, start, block in self._blocks:
            if row == batch:
                positions[:, start : start + block.shape[1]] = block[:, : max(0, stop - start)]
        return positions

    def forget(self) -> None:
        """Every row is its position again."""
        self._blocks.clear()
