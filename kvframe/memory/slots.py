"""The offload memory: fixed slots on the device, every token in the store behind them."""

import math
from typing import Any

import torch
from torch import Tensor

from kvframe.memory.base import LayerMemory
from kvframe.memory.ledger import LENGTH, Ledger
from kvframe.memory.pool import RowStore, Traffic
from kvframe.types import LayerLayout
from kvframe_kernels.select_units import resident_difference


class SlotMemory(LayerMemory):
    """Slots [B, H, sinks | resident | ring, D], sized once.

    The token at position p is slot p while it is a sink, and slot p modulo the ring's size, inside the ring, while it
    lies in the window. A resident row may lie in any resident slot. `bias` [B, H, N] is 0 in a slot that holds
    something and -inf in an empty one; attention adds it.
    """

    def __init__(self, layout: LayerLayout, ledger: Ledger, store: RowStore, capacity: int, attention: Any) -> None:
        self._layout = layout
        self._ledger = ledger
        self._store = store
        self._attention = attention
        self._capacity = capacity
        self._ring_first = ledger.sink_size + capacity
        self._ring_size = ledger.window_size + ledger.max_size
        heads, num_slots = (layout.batch_size, layout.num_kv_heads), self._ring_first + self._ring_size
        self.k_slots, self.v_slots = layout.zeros(num_slots)
        self.bias = torch.full((*heads, num_slots), -math.inf, dtype=layout.dtype, device=layout.device)
        self.resident_rows = torch.full((*heads, capacity), -1, dtype=torch.int64, device=layout.device)

    @property
    def traffic(self) -> Traffic:
        return self._store.traffic

    def reserve(self, num_rows: int) -> None:
        self._store.grow(num_rows)

    def read(self, batch: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._store.read(batch, stop)

    def recent(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        slots = self._slots_of(start, stop)
        return self.k_slots[batch, :, slots], self.v_slots[batch, :, slots]

    def store_block(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        self._store.write(batch, start, keys, values)

    def store_recent(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        self._store.write(batch, start, keys, values)
        slots = self._slots_of(start, start + keys.shape[1])
        self.k_slots[batch, :, slots] = keys
        self.v_slots[batch, :, slots] = values

    def _slots_of(self, start: int, stop: int) -> Tensor:
        return self._slot(torch.arange(start, stop, device=self._layout.device))

    def _slot(self, positions: Tensor) -> Tensor:
        in_ring = self._ring_first + positions % self._ring_size
        return torch.where(positions < self._ledger.sink_size, positions, in_ring)

    def finish_prompt(self) -> None:
        ledger, ring = self._ledger, torch.arange(self._ring_size, device=self._layout.device)
        # Ring slot j holds the newest position that is j modulo the ring's size: `age` steps before the last token.
        age = (ledger.counts[LENGTH][..., None] - 1 - ring) % self._ring_size
        self._show(slice(self._ring_first, None), age < ledger.window[..., None])
        sinks = torch.arange(ledger.sink_size, device=self._layout.device)
        self._show(slice(0, ledger.sink_size), sinks < ledger.sinks[..., None])

    def _show(self, slots: slice, filled: Tensor) -> None:
        self.bias[..., slots] = torch.zeros_like(self.bias[..., slots]).masked_fill(~filled, -math.inf)

    def append(self, keys: Tensor, values: Tensor) -> None:
        position = self._ledger.counts[LENGTH] - 1
        slot = self._slot(position)[..., None]
        self.bias.scatter_(2, slot, 0.0)
        slot = slot[..., None]
        self.k_slots.scatter_(2, slot.expand(-1, -1, -1, keys.shape[-1]), keys[:, :, None])
        self.v_slots.scatter_(2, slot.expand(-1, -1, -1, values.shape[-1]), values[:, :, None])
        self._store.append(position, keys, values)

    def unit(self, start: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return self._read_slots(self._slot(self._run(start, width)))

    def _run(self, start: Tensor, width: int) -> Tensor:
        return start[..., None] + torch.arange(width, device=start.device)

    def _read_slots(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        slots = slots[..., None]
        keys = self.k_slots.gather(2, slots.expand(-1, -1, -1, self._layout.head_dim))
        return keys, self.v_slots.gather(2, slots.expand(-1, -1, -1, self._layout.value_dim))

    def leave(self, leaves: Tensor, start: Tensor, size: Tensor, width: int, room: Tensor) -> None:
        positions = self._run(start, width)
        slots = self._slot(positions)
        inside = leaves[..., None] & (positions < (start + size)[..., None])
        self.bias.scatter_(2, slots, self.bias.gather(2, slots).masked_fill_(inside, -math.inf))
        if self._capacity:
            kept = inside & (positions < (start + torch.minimum(size, room))[..., None])
            self._keep(kept, positions, *self._read_slots(slots))

    def _keep(self, kept: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """The i-th kept row goes to the i-th free resident slot; [B, H, width] each."""
        free = self.resident_rows < 0
        # Slots in the order of being free: the first ones are those that take a row.
        places = (~free).to(torch.uint8).sort(dim=-1, stable=True).indices
        taken = torch.where(kept, kept.cumsum(-1) - 1, 0).clamp(max=self._capacity - 1)
        batch, head, entry = kept.nonzero(as_tuple=True)
        slot = places[batch, head, taken[batch, head, entry]]
        self.resident_rows[batch, head, slot] = rows[batch, head, entry]
        slot = slot + self._ledger.sink_size
        self.k_slots[batch, head, slot] = keys[batch, head, entry]
        self.v_slots[batch, head, slot] = values[batch, head, entry]
        self.bias[batch, head, slot] = 0.0

    def recall(self, rows: Tensor, due: Tensor) -> None:
        updated, incoming = resident_difference(self.resident_rows, rows, due, self._store.num_rows)
        self.resident_rows.copy_(updated)
        resident = slice(self._ledger.sink_size, self._ring_first)
        self._store.recall(incoming, self.k_slots[:, :, resident], self.v_slots[:, :, resident])
        self._show(resident, updated >= 0)

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor] | None) -> Tensor:
        sm_scale = self._layout.sm_scale
        if tail is None:
            out: Tensor = self._attention(query, self.k_slots, self.v_slots, self.bias, sm_scale)[0]
            return out
        keys, values = torch.cat([self.k_slots, tail[0]], 2), torch.cat([self.v_slots, tail[1]], 2)
        num_queries, num_tail = query.shape[2], tail[0].shape[2]
        hidden = torch.ones(num_queries, num_tail, dtype=torch.bool, device=query.device).triu()
        causal = self.bias.new_zeros(num_queries, num_tail).masked_fill(hidden, -math.inf)
        heads = self.bias.shape[:2]
        bias = torch.cat([self.bias[:, :, None].expand(*heads, num_queries, -1), causal.expand(*heads, -1, -1)], dim=-1)
        out = self._attention(query, keys, values, bias, sm_scale)[0]
        return out

    def attended_rows(self, batch: int, head: int) -> Tensor:
        ledger = self._ledger
        length, window = int(ledger.counts[LENGTH, batch, head]), int(ledger.window[batch, head])
        sinks = torch.arange(int(ledger.sinks[batch, head]))
        recent = torch.arange(length - window, length)
        positions = torch.cat([sinks, recent])
        slots = self._slot(positions.to(self._layout.device))
        assert bool((self.bias[batch, head, slots] == 0).all()), "ledger and slots disagree"
        assert int((self.bias[batch, head] == 0).sum()) == len(positions) + int(ledger.resident[batch, head])
        rows = self.resident_rows[batch, head]
        return torch.cat([positions, rows[rows >= 0].cpu()])

    def reset(self) -> None:
        self.bias.fill_(-math.inf)
        self.resident_rows.fill_(-1)

    def device_bytes(self) -> int:
        slots = self.k_slots.nbytes + self.v_slots.nbytes + self.bias.nbytes + self.resident_rows.nbytes
        return slots + self._store.device_bytes()

    def host_bytes(self) -> int:
        return self._store.host_bytes()
