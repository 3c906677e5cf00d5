"""The store behind the slots: every token's K and V, a row each."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from kvframe.types import LayerLayout


@define(eq=False)
class Traffic:
    """What a store has moved. Rows count one token of one KV head."""

    rows_recalled: Tensor
    """int64 [B, H], rows brought into slots."""
    bytes_to_host: int = 0
    bytes_to_device: Tensor = field(factory=lambda: torch.zeros((), dtype=torch.int64))

    def clear(self) -> None:
        """Start to count anew, in place."""
        self.rows_recalled.zero_()
        self.bytes_to_device.zero_()
        self.bytes_to_host = 0


class RowStore(ABC):
    """Holds every token of one layer under its row number, and counts what it moves."""

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
        heads = (layout.batch_size, layout.num_kv_heads)
        self.traffic = Traffic(rows_recalled=torch.zeros(heads, dtype=torch.int64, device=layout.device))
        self.traffic.bytes_to_device = self.traffic.bytes_to_device.to(layout.device)
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
        self._count_to_host(keys.shape[0] * keys.shape[1])

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        token = torch.cat([keys, values], -1)[:, :, None].to(self._device)
        rows = rows.to(self._device)
        for first, slab in self._slabs:
            local = (rows - first)[..., None, None]
            place = local.clamp(0, slab.shape[2] - 1).expand_as(token)
            if len(self._slabs) > 1:
                # A row of another slab leaves this one as it is.
                inside = (local >= 0) & (local < slab.shape[2])
                slab.scatter_(2, place, torch.where(inside, token, slab.gather(2, place)))
            else:
                slab.scatter_(2, place, token)
        self._count_to_host(keys.shape[0] * keys.shape[1])

    def read(self, batch: int, stop: int) -> tuple[Tensor, Tensor]:
        parts = [slab[batch, :, : stop - first] for first, slab in self._slabs if first < stop]
        rows = torch.cat([part.to(self._layout.device) for part in parts], dim=1)
        if self._crosses_link:
            self.traffic.bytes_to_device += rows.shape[0] * rows.shape[1] * self._layout.row_bytes
        return rows[..., : self._layout.head_dim], rows[..., self._layout.head_dim :]

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        from kvframe_kernels.gather_kv import gather_kv

        for first, slab in self._slabs:
            gather_kv(slab, incoming, first, k_slots, v_slots)
        moved = (incoming >= 0).sum(-1)
        self.traffic.rows_recalled += moved
        if self._crosses_link:
            self.traffic.bytes_to_device += moved.sum() * self._layout.row_bytes

    def _count_to_host(self, num_rows: int) -> None:
        if self._crosses_link:
            self.traffic.bytes_to_host += num_rows * self._layout.row_bytes

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
        twin.traffic.rows_recalled.copy_(self.traffic.rows_recalled)
        twin.traffic.bytes_to_device.copy_(self.traffic.bytes_to_device)
        twin.traffic.bytes_to_host = self.traffic.bytes_to_host
        return twin
