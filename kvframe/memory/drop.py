"""The store of policies that evict: what is not kept is gone."""

import torch
from torch import Tensor

from kvframe.memory.pool import RowPool, RowStore, Traffic
from kvframe.types import LayerLayout


class DropStore(RowStore):
    """A prompt's rows, on the device, until the first decode step after it is over; then the most recent tokens alone,
    which a recall may ask for in the step in which they leave the window.

    Everything else that is left lies in the slots. Nothing crosses the link.
    """

    is_partial = True

    def __init__(self, layout: LayerLayout, num_rows: int) -> None:
        self._layout = layout
        self._num_rows = num_rows
        self._prompt: RowPool | None = self._make_pool()
        self.traffic = Traffic(row_bytes=0)
        self.hold_recent(0)

    def _make_pool(self) -> RowPool:
        return RowPool(self._layout, self._num_rows, self._layout.device, crosses_link=False, zero=True)

    def hold_recent(self, num_tokens: int) -> None:
        layout = self._layout
        heads = (layout.batch_size, layout.num_kv_heads, num_tokens)
        width = layout.head_dim + layout.value_dim
        self._recent = torch.zeros(*heads, width, dtype=layout.dtype, device=layout.device)
        self._recent_rows = torch.full(heads, -1, dtype=torch.int64, device=layout.device)

    @property
    def num_rows(self) -> int:
        return self._num_rows

    def grow(self, num_rows: int) -> None:
        self._num_rows = max(self._num_rows, num_rows)
        if self._prompt is not None:
            self._prompt.grow(self._num_rows)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def stage(self, num_tokens: int) -> Tensor:
        layout = self._layout
        shape = (layout.num_kv_heads, num_tokens, layout.head_dim + layout.value_dim)
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)

    def write(self, batch: int, start: int, rows: Tensor) -> None:
        if self._prompt is None:
            self._prompt = self._make_pool()
        self._prompt.write(batch, start, rows)
        held = self._recent_rows[batch]
        # A block reorders tokens that were held in the window before.
        held.masked_fill_((held >= start) & (held < start + rows.shape[1]), -1)
        self.traffic.rows_written += rows.shape[0] * rows.shape[1]

    def write_recent(self, batch: int, start: int, rows: Tensor) -> None:
        self.write(batch, start, rows)
        size = self._recent.shape[2]
        if size == 0:
            return
        positions = torch.arange(start, start + rows.shape[1], device=rows.device)[-size:]
        self._recent[batch, :, positions % size] = rows[:, rows.shape[1] - len(positions) :]
        self._recent_rows[batch, :, positions % size] = positions

    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        self.traffic.rows_read += self._layout.num_kv_heads * stop
        if self._prompt is not None:
            return self._prompt.read(batch, stop, room)
        return self.stage(stop + room).zero_()

    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        return self.read(batch, stop)[:, start:]

    def step_is_over(self) -> None:
        self._prompt = None

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        if self._prompt is not None:
            self._prompt.append(rows, keys, values)
        if self._recent.shape[2] == 0:
            return
        place = (rows % self._recent.shape[2])[..., None]
        self._recent_rows.scatter_(2, place, rows[..., None])
        both = torch.cat([keys, values], -1)[:, :, None]
        self._recent.scatter_(2, place[..., None].expand_as(both), both)

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        if self._prompt is not None:
            self._prompt.recall(incoming, k_slots, v_slots)
        if self._recent.shape[2] == 0:
            return
        place = incoming.clamp(min=0) % self._recent.shape[2]
        there = ((incoming >= 0) & (self._recent_rows.gather(2, place) == incoming))[..., None]
        found = self._recent.gather(2, place[..., None].expand(*place.shape, self._recent.shape[-1]))
        width = k_slots.shape[-1]
        k_slots.copy_(torch.where(there, found[..., :width], k_slots))
        v_slots.copy_(torch.where(there, found[..., width:], v_slots))

    # ---- the whole --------------------------------------------------------------------------------------------------

    def device_bytes(self) -> int:
        held = 0 if self._prompt is None else self._prompt.device_bytes()
        return held + self._recent.nbytes + self._recent_rows.nbytes

    def host_bytes(self) -> int:
        return 0
