"""The store behind the slots: every token's K and V, a row each."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor

from kvframe.memory.link import Parcel, link_of
from kvframe.memory.pinned import pinned_empty
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
    """Holds every token of one layer under its row number, K and V side by side.

    `append` and `recall` are steps of decoding: they read no device value from the host, and a CUDA graph may repeat
    them. The other methods belong to prompts.
    """

    traffic: Traffic
    is_partial: bool = False
    """Whether it holds some rows only; `read` leaves the others as they are, and whoever reads finds them in the
    slots."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows there is room for."""

    @abstractmethod
    def grow(self, num_rows: int) -> None:
        """Make room for at least `num_rows` rows; what is stored stays where it is."""

    @abstractmethod
    def stage(self, num_tokens: int) -> Tensor:
        """Room on the device for rows of one sequence, [H, num_tokens, D + Dv], uninitialised; valid until they have
        been handed to `write`."""

    @abstractmethod
    def write(self, batch: int, start: int, rows: Tensor) -> None:
        """Rows [start, start + n) of one sequence; rows [H, n, D + Dv], on the device, best from `stage`.

        May return before they have arrived. Other prompt methods find them; `append`, `recall` and whoever looks at the
        host's memory do so after `finish_writes`.
        """

    def write_recent(self, batch: int, start: int, rows: Tensor) -> None:
        """The same for sinks and for the end of a prompt, which stay on the device and may be written again."""
        self.write(batch, start, rows)

    def hold_recent(self, num_tokens: int) -> None:  # noqa: B027, a store that keeps everything holds them anyway
        """The window can hold so many tokens: of a store that drops, a recall may ask for one in the step in which it
        leaves. Called once, before anything is stored."""

    def step_is_over(self) -> None:  # noqa: B027, a store that keeps everything has nothing to do
        """A decode step has attended; whatever it neither attended to nor holds in the window is not asked for again by
        a policy whose transfer `drops`."""

    def finish_writes(self) -> None:  # noqa: B027, a store that writes at once has nothing to do
        """The prompt is over: let the steps of decoding that follow find what was written. The host does not wait."""

    @abstractmethod
    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """One token of every head at its row.

        Not counted as traffic: where a graph repeats the step, nobody comes by here, so the caller counts.

        rows: int64 [B, H], on the device: no host has to know them. keys: [B, H, D], values: [B, H, Dv].
        """

    def prefetch(self, batch: int, stop: int, room: int = 0) -> None:  # noqa: B027, a hint may be ignored
        """A hint that `read` will be called with these arguments before it is with others."""

    @abstractmethod
    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        """Rows [0, stop) of one sequence on the device, and behind them room for more: [H, stop + room, D + Dv].

        The last `room` rows are uninitialised, for the caller to fill. Valid until the read after the next one is made
        or prefetched, of whichever layer.
        """

    @abstractmethod
    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one sequence on the device, [H, stop - start, D + Dv]. Valid until the next read."""

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
    """Rows as they are, in slabs [B, H, R, D + Dv], on the host or on the device.

    Room that was not planned for comes as further slabs, so that nothing already stored has to move.
    """

    def __init__(
        self, layout: LayerLayout, num_rows: int, device: torch.device, *, crosses_link: bool, zero: bool = False
    ) -> None:
        """zero: rows that were never written are zero, instead of whatever lies there."""
        self._layout = layout
        self._zero = zero
        self._device = device
        self._crosses_link = crosses_link
        self._slabs: list[tuple[int, Tensor]] = []
        self.traffic = Traffic(row_bytes=layout.row_bytes if crosses_link else 0)
        # What was fetched ahead goes by this name, and by another one once the rows may have changed.
        self._content = object()
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
            slab = self._allocate(missing)
            self._slabs.append((self.num_rows, slab.zero_() if self._zero else slab))

    def _allocate(self, num_rows: int) -> Tensor:
        layout = self._layout
        shape = (layout.batch_size, layout.num_kv_heads, num_rows, layout.head_dim + layout.value_dim)
        if self._device.type == "cpu" and layout.device.type == "cuda":
            return pinned_empty(shape, layout.dtype, layout.device)
        return torch.empty(shape, dtype=layout.dtype, device=self._device)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def _rows_shape(self, num_tokens: int) -> tuple[int, int, int]:
        return self._layout.num_kv_heads, num_tokens, self._layout.head_dim + self._layout.value_dim

    def stage(self, num_tokens: int) -> Tensor:
        shape, layout = self._rows_shape(num_tokens), self._layout
        if self._crosses_link:
            return link_of(layout.device).stage(shape, layout.dtype)
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)

    def write(self, batch: int, start: int, rows: Tensor) -> None:
        self._content = object()
        if self._crosses_link:
            link = link_of(self._layout.device)
            if not link.is_staged(rows):
                # Whose memory it is might be used again before it has been read.
                rows = self.stage(rows.shape[1]).copy_(rows)
            link.send(rows, self._heads(batch, start, rows))
        else:
            for part, place in self._parts(batch, start, rows):
                place.copy_(part)
        self.traffic.rows_written += rows.shape[0] * rows.shape[1]

    def finish_writes(self) -> None:
        if self._crosses_link:
            link_of(self._layout.device).finish_sends()

    def prefetch(self, batch: int, stop: int, room: int = 0) -> None:
        if self._crosses_link:
            link_of(self._layout.device).fetch(self._parcel(batch, stop, room))

    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        if self._crosses_link:
            rows = link_of(self._layout.device).take(self._parcel(batch, stop, room))
        else:
            rows = self.stage(stop + room)
            for part, place in self._parts(batch, 0, rows[:, :stop]):
                part.copy_(place)
        self.traffic.rows_read += rows.shape[0] * stop
        return rows

    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        if self._crosses_link:
            rows = link_of(self._layout.device).take(self._parcel(batch, stop, 0, start))
        else:
            rows = self.stage(stop - start)
            for part, place in self._parts(batch, start, rows):
                part.copy_(place)
        self.traffic.rows_read += rows.shape[0] * rows.shape[1]
        return rows

    def _parcel(self, batch: int, stop: int, room: int, start: int = 0) -> Parcel:
        shape = self._rows_shape(stop - start + room)
        return Parcel(
            key=(self._content, batch, start, stop, room),
            shape=shape,
            dtype=self._layout.dtype,
            pieces=lambda rows: self._heads(batch, start, rows[:, : stop - start]),
            planned_bytes=shape[0] * self.num_rows * self._layout.row_bytes,
        )

    def _parts(self, batch: int, start: int, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows [H, n, D + Dv] of a sequence from `start` on, cut where a slab ends; each part with its place there."""
        parts, stop = [], start + rows.shape[1]
        for first, slab in self._slabs:
            low, high = max(start, first), min(stop, first + slab.shape[2])
            if low < high:
                parts.append((rows[:, low - start : high - start], slab[batch, :, low - first : high - first]))
        return parts

    def _heads(self, batch: int, start: int, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same, cut by heads: each part contiguous on both sides."""
        return [pair for part, place in self._parts(batch, start, rows) for pair in zip(part, place, strict=True)]

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        from kvframe_kernels.gather_kv import store_token

        self._content = object()
        for first, slab in self._slabs:
            store_token(slab, rows, first, keys, values)

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        from kvframe_kernels.gather_kv import gather_kv

        for first, slab in self._slabs:
            gather_kv(slab, incoming, first, k_slots, v_slots)

    # ---- the whole --------------------------------------------------------------------------------------------------

    def _held(self) -> int:
        return sum(slab.nbytes for _, slab in self._slabs)

    def device_bytes(self) -> int:
        return 0 if self._crosses_link else self._held()

    def host_bytes(self) -> int:
        return self._held() if self._crosses_link else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowPool":
        # A plain deep copy would lose the page lock.
        twin = RowPool(self._layout, 0, self._device, crosses_link=self._crosses_link, zero=self._zero)
        if self._crosses_link:
            link_of(self._layout.device).drain()  # the host is about to look
        for first, slab in self._slabs:
            twin._slabs.append((first, twin._allocate(slab.shape[2]).copy_(slab)))
        twin.traffic = evolve(self.traffic)
        return twin
