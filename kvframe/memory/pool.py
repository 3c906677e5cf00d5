"""The store behind the slots: every token's K and V, a row each."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor

from kvframe.types import LayerLayout


@define(eq=False)
class Traffic:
    """What has crossed the link between host and device, in rows: one token of one KV head."""

    row_bytes: int
    """Bytes of a row on its way; 0 where the store is on the device and nothing crosses."""
    rows_written: int = 0
    rows_read: int = 0
    """Read back as a whole, for the full attention of a later turn or after a crop."""

    @property
    def bytes_to_host(self) -> int:
        """Bytes written."""
        return self.rows_written * self.row_bytes

    def bytes_to_device(self, rows_recalled: int) -> int:
        """Bytes read and recalled; the layer's tallies know how many rows were recalled."""
        return (self.rows_read + rows_recalled) * self.row_bytes

    def clear(self) -> None:
        """Start to count anew."""
        self.rows_written = self.rows_read = 0


class RowStore(ABC):
    """Holds every token of one layer under its row number, and counts what it reads and writes.

    `append` and `recall` are steps of decoding: they read no device value from the host.
    """

    traffic: Traffic

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows there is room for."""

    @abstractmethod
    def grow(self, num_rows: int) -> None:
        """Make room for at least `num_rows` rows; what is stored stays where it is."""

    @abstractmethod
    def write(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Rows [start, start + n) of one sequence; keys [H, n, D], values [H, n, Dv]."""

    @abstractmethod
    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """One token of every head at its row.

        rows: int64 [B, H], on the device: no host has to know them. keys: [B, H, D], values: [B, H, Dv].
        """

    @abstractmethod
    def read(self, batch: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [0, stop) of one sequence on the device: keys [H, stop, D], values [H, stop, Dv]."""

    @abstractmethod
    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        """Load rows into slots, in place.

        incoming: int64 [B, H, C], the row to load into each slot, -1 where the slot stays as it is.
        k_slots: [B, H, C, D], v_slots: [B, H, C, Dv].
        """

    @abstractmethod
    def device_bytes(self) -> int:
        """Device memory held."""

    @abstractmethod
    def host_bytes(self) -> int:
        """Host memory held."""


class RowPool(RowStore):
    """Rows as they are, in slabs [B, H, R, D + Dv] with K and V of a token adjacent, on the host or on the device.

    Room that was not planned for comes as further slabs, so that nothing already stored has to move.
    """

    def __init__(self, layout: LayerLayout, num_rows: int, device: torch.device, *, crosses_link: bool) -> None:
        self._layout = layout
        self._device = device
        self._crosses_link = crosses_link
        self._slabs: list[tuple[int, Tensor]] = []
        self.traffic = Traffic(row_bytes=layout.row_bytes if crosses_link else 0)
        self.grow(num_rows)

    @property
    def num_rows(self) -> int:
        if not self._slabs:
            return 0
        first, slab = self._slabs[-1]
        return first + slab.shape[2]

    def grow(self, num_rows: int) -> None:
        missing = num_rows - self.num_rows
        if missing > 0:
            self._slabs.append((self.num_rows, self._allocate(missing)))

    def _allocate(self, num_rows: int) -> Tensor:
        layout = self._layout
        shape = (layout.batch_size, layout.num_kv_heads, num_rows, layout.head_dim + layout.value_dim)
        # Zero-copy kernels read the pool over the link, which needs page-locked memory.
        pinned = self._device.type == "cpu" and layout.device.type == "cuda"
        return torch.empty(shape, dtype=layout.dtype, device=self._device, pin_memory=pinned)

    def write(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        stop = start + keys.shape[1]
        for first, slab in self._slabs:
            low, high = max(start, first), min(stop, first + slab.shape[2])
            if low < high:
                rows, source = slice(low - first, high - first), slice(low - start, high - start)
                slab[batch, :, rows, : self._layout.head_dim].copy_(keys[:, source])
                slab[batch, :, rows, self._layout.head_dim :].copy_(values[:, source])
        self.traffic.rows_written += keys.shape[0] * keys.shape[1]

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        from kvframe_kernels.gather_kv import store_token

        for first, slab in self._slabs:
            store_token(slab, rows, first, keys, values)
        self.traffic.rows_written += keys.shape[0] * keys.shape[1]

    def read(self, batch: int, stop: int) -> tuple[Tensor, Tensor]:
        parts = [slab[batch, :, : stop - first] for first, slab in self._slabs if first < stop]
        rows = torch.cat([part.to(self._layout.device) for part in parts], dim=1)
        self.traffic.rows_read += rows.shape[0] * rows.shape[1]
        return rows[..., : self._layout.head_dim], rows[..., self._layout.head_dim :]

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        from kvframe_kernels.gather_kv import gather_kv

        for first, slab in self._slabs:
            gather_kv(slab, incoming, first, k_slots, v_slots)

    def _held(self) -> int:
        return sum(slab.nbytes for _, slab in self._slabs)

    def device_bytes(self) -> int:
        return self._held() if self._device.type == self._layout.device.type and not self._crosses_link else 0

    def host_bytes(self) -> int:
        return self._held() if self._crosses_link else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowPool":
        # A plain deep copy would lose the page lock.
        twin = RowPool(self._layout, 0, self._device, crosses_link=self._crosses_link)
        for first, slab in self._slabs:
            twin._slabs.append((first, twin._allocate(slab.shape[2]).copy_(slab)))
        twin.traffic = evolve(self.traffic)
        return twin
