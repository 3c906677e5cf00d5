"""The offload memory: fixed slots on the device, every token in the store behind them."""

import math
from typing import Any

import torch
from torch import Tensor

from kvframe.memory.base import LayerMemory
from kvframe.memory.ledger import LENGTH, Ledger
from kvframe.memory.pool import RowStore, Traffic
from kvframe.types import Candidates, LayerLayout, LeavingUnits, UnitTable
from kvframe_kernels.append_token import Slots, append_token, leave_window
from kvframe_kernels.select_units import exchange_resident
from kvframe_kernels.slot_attention import Entries, slot_attention


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
        heads = (layout.batch_size, layout.num_kv_heads)
        num_slots = ledger.sink_size + capacity + ledger.window_size + ledger.max_size
        keys, values = layout.zeros(num_slots)
        self.slots = Slots(
            keys=keys,
            values=values,
            bias=torch.full((*heads, num_slots), -math.inf, dtype=layout.dtype, device=layout.device),
            resident_rows=torch.full((*heads, capacity), -1, dtype=torch.int64, device=layout.device),
            sink_size=ledger.sink_size,
        )
        store.hold_recent(self.slots.ring_size)
        self._marks = self._make_marks()

    def _make_marks(self) -> Tensor:
        """A bit a row, which the kernels of a selection work with."""
        heads = (self._layout.batch_size, self._layout.num_kv_heads)
        num_words = -(-self._store.num_rows // 32) if self.slots.resident_rows.shape[-1] else 0
        return torch.zeros(*heads, num_words, dtype=torch.int32, device=self._layout.device)

    @property
    def traffic(self) -> Traffic:
        return self._store.traffic

    def reserve(self, num_rows: int) -> None:
        self._store.grow(num_rows)
        self._marks = self._make_marks()

    def prefetch(self, batch: int, stop: int, room: int) -> None:
        self._store.prefetch(batch, stop, room)

    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        rows = self._store.read(batch, stop, room)
        if self._store.is_partial:
            self._fill_from_slots(batch, rows[:, :stop])
        return rows

    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        return self._store.read_range(batch, start, stop)

    def reorder(self, batch: int, start: int, order: Tensor, rows: Tensor) -> None:
        held = self.slots.resident_rows[batch]
        inside = (held >= start) & (held < start + order.shape[1])
        moved = start + order.argsort(-1).gather(1, torch.where(inside, held - start, 0))
        held.copy_(torch.where(inside, moved, held))
        self._store.write(batch, start, rows)
        self._store.finish_writes()

    def _fill_from_slots(self, batch: int, rows: Tensor) -> None:
        """Rows [H, n, D + Dv] that the slots hold; the store may have let go of them."""
        places = self.slot_rows()[batch]  # [H, N]
        for head, held in enumerate(places):
            filled = ((held >= 0) & (held < rows.shape[1])).nonzero()[:, 0]
            width = self._layout.head_dim
            rows[head, held[filled], :width] = self.slots.keys[batch, head, filled]
            rows[head, held[filled], width:] = self.slots.values[batch, head, filled]

    def slot_rows(self) -> Tensor:
        """int64 [B, H, N]: the row of what lies in each slot, -1 for an empty one."""
        counts, slots = self._ledger.counts, self.slots
        sinks = torch.arange(slots.sink_size, device=self._layout.device)
        sinks = torch.where(sinks < self._ledger.sinks[..., None], sinks, -1)
        age = self._age()
        last = counts[LENGTH][..., None] - 1
        recent = torch.where(age < self._ledger.window[..., None], last - age, -1)
        return torch.cat([sinks, slots.resident_rows, recent], -1)

    def recent(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        places = self._places(start, stop)
        return self.slots.keys[batch, :, places], self.slots.values[batch, :, places]

    def stage(self, num_tokens: int) -> Tensor:
        return self._store.stage(num_tokens)

    def store_block(self, batch: int, start: int, rows: Tensor) -> None:
        self._store.write(batch, start, rows)

    def store_recent(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        rows = self._store.stage(keys.shape[1])
        rows[..., : keys.shape[-1]], rows[..., keys.shape[-1] :] = keys, values
        self._store.write_recent(batch, start, rows)
        places = self._places(start, start + keys.shape[1])
        self.slots.keys[batch, :, places] = keys
        self.slots.values[batch, :, places] = values

    def _places(self, start: int, stop: int) -> Tensor:
        return self.slots.place(torch.arange(start, stop, device=self._layout.device))

    def begin_decode(self) -> None:
        self._store.finish_writes()

    def finish_prompt(self) -> None:
        ledger = self._ledger
        self._show(slice(self.slots.ring_first, None), self._age() < ledger.window[..., None])
        sinks = torch.arange(ledger.sink_size, device=self._layout.device)
        self._show(slice(0, ledger.sink_size), sinks < ledger.sinks[..., None])

    def _age(self) -> Tensor:
        """int64 [B, H, ring size]: ring slot j holds the newest position that is j modulo the ring's size, so many
        steps before the last token."""
        ring = torch.arange(self.slots.ring_size, device=self._layout.device)
        return (self._ledger.counts[LENGTH][..., None] - 1 - ring) % self.slots.ring_size

    def _show(self, places: slice, filled: Tensor) -> None:
        bias = self.slots.bias
        bias[..., places] = torch.zeros_like(bias[..., places]).masked_fill(~filled, -math.inf)

    def append(self, keys: Tensor, values: Tensor, cut: Tensor | None, finite: Tensor | None) -> LeavingUnits:
        ledger = self._ledger
        appended = append_token(
            ledger.counts,
            ledger.unit_offsets,
            cut,
            keys,
            values,
            self.slots,
            finite,
            window_size=ledger.window_size,
            min_size=ledger.min_size,
            max_size=ledger.max_size,
        )
        self._store.append(appended.position, keys, values)
        return self._leaving(appended.leaves, appended.column, appended.start, appended.size)

    def leave(self, length: Tensor) -> LeavingUnits | None:
        ledger = self._ledger
        leaves, start, size = ledger.leaving(length)
        if not bool(leaves.any()):
            return None
        unit = self._leaving(leaves, ledger.num_units.clone(), start, size)
        leave_window(ledger.counts, self.slots, leaves, start, size, ledger.max_size)
        return unit

    def _leaving(self, leaves: Tensor, column: Tensor, start: Tensor, size: Tensor) -> LeavingUnits:
        slots = self.slots
        return LeavingUnits(
            leaves=leaves,
            column=column,
            start=start,
            size=size,
            max_size=self._ledger.max_size,
            keys=slots.keys,
            values=slots.values,
            ring_first=slots.ring_first,
            ring_size=slots.ring_size,
        )

    def recall(self, rows: Tensor, count: Tensor, due: Tensor, tallies: Tensor) -> None:
        slots = self.slots
        incoming = exchange_resident(
            slots, self._ledger.counts, rows, count, due, tallies, self._marks, self._store.num_rows
        )
        resident = slice(slots.sink_size, slots.ring_first)
        self._store.recall(incoming, slots.keys[:, :, resident], slots.values[:, :, resident])

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor] | None, entries: Entries | None = None) -> Tensor:
        slots = self.slots
        if tail is None:
            return self._attend(query, slots.keys, slots.values, slots.bias, entries)
        keys, values = torch.cat([slots.keys, tail[0]], 2), torch.cat([slots.values, tail[1]], 2)
        num_queries, num_tail = query.shape[2], tail[0].shape[2]
        hidden = torch.ones(num_queries, num_tail, dtype=torch.bool, device=query.device).triu()
        causal = slots.bias.new_zeros(num_queries, num_tail).masked_fill(hidden, -math.inf)
        heads = slots.bias.shape[:2]
        bias = torch.cat(
            [slots.bias[:, :, None].expand(*heads, num_queries, -1), causal.expand(*heads, -1, -1)], dim=-1
        )
        return self._attend(query, keys, values, bias, entries)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, entries: Entries | None) -> Tensor:
        more = {} if entries is None else {"entries": entries}
        out: Tensor = self._attention(query, keys, values, bias, self._layout.sm_scale, **more)[0]
        return out

    def attend_to_all(self, query: Tensor, lengths: list[int]) -> Tensor:
        width = self._layout.head_dim
        outs = []
        for batch, length in enumerate(lengths):
            rows = self.read(batch, length)[None]
            own = query[batch : batch + 1]
            outs.append(slot_attention(own, rows[..., :width], rows[..., width:], None, self._layout.sm_scale)[0])
        return torch.cat(outs)

    def attended(self) -> Tensor:
        rows = self.slot_rows()
        seen = torch.zeros(*rows.shape[:2], self._store.num_rows + 1, dtype=torch.bool, device=rows.device)
        seen.scatter_(-1, self._column(rows), True)
        return seen[..., :-1]

    def _column(self, rows: Tensor) -> Tensor:
        """Rows, and the column behind the last one for none."""
        return torch.where(rows >= 0, rows, self._store.num_rows)

    def weights(self, query: Tensor, full: Tensor | None, lengths: list[int]) -> Tensor:
        layout = self._layout
        dtype = torch.promote_types(query.dtype, torch.float32)
        grouped = (query * layout.sm_scale).view(layout.batch_size, layout.num_kv_heads, -1, layout.head_dim)
        scores = torch.matmul(grouped, self.slots.keys.transpose(2, 3)).to(dtype) + self.slots.bias[:, :, None]
        columns = self._column(self.slot_rows())[:, :, None].expand_as(scores)
        weights = scores.new_zeros(*scores.shape[:3], self._store.num_rows + 1)
        weights = weights.scatter_add_(-1, columns, scores.softmax(-1))[..., :-1]
        if full is None:
            return weights
        everywhere = torch.zeros_like(weights)
        for batch, length in enumerate(lengths):
            keys = self.read(batch, length)[..., : layout.head_dim]
            products = torch.matmul(grouped[batch], keys.transpose(1, 2)).to(dtype)
            everywhere[batch, :, :, :length] = products.softmax(-1)
        return torch.where(full[..., None, None], everywhere, weights)

    def unattended(self, units: UnitTable) -> Tensor:
        from kvframe_kernels.unattended_tokens import unattended_tokens

        return unattended_tokens(self.slots.resident_rows, units.offsets, units.num_units, units.max_units)

    def kept_lse(self, query: Tensor) -> Tensor:
        from kvframe_kernels.missed_share import kept_lse

        return kept_lse(query, self.slots, self._layout.sm_scale)

    def missed_share(self, candidates: Candidates) -> Tensor:
        from kvframe_kernels.missed_share import missed_share

        rows, count, shares = candidates.rows, candidates.count, candidates.shares
        return missed_share(self.slots.resident_rows, rows, count, shares, self._marks, self._store.num_rows)

    def step_is_over(self) -> None:
        self._store.step_is_over()

    def attended_rows(self, batch: int, head: int) -> Tensor:
        ledger = self._ledger
        length, window = int(ledger.counts[LENGTH, batch, head]), int(ledger.window[batch, head])
        sinks = torch.arange(int(ledger.sinks[batch, head]))
        recent = torch.arange(length - window, length)
        positions = torch.cat([sinks, recent])
        bias = self.slots.bias[batch, head]
        assert bool((bias[self.slots.place(positions.to(bias.device))] == 0).all()), "ledger and slots disagree"
        assert int((bias == 0).sum()) == len(positions) + int(ledger.resident[batch, head])
        rows = self.slots.resident_rows[batch, head]
        return torch.cat([positions, rows[rows >= 0].cpu()])

    def reset(self) -> None:
        # Attention multiplies what an empty slot holds by zero, which of NaN is NaN.
        self.slots.values.zero_()
        self.slots.bias.fill_(-math.inf)
        self.slots.resident_rows.fill_(-1)

    def device_bytes(self) -> int:
        tensors = (self.slots.keys, self.slots.values, self.slots.bias, self.slots.resident_rows)
        return sum(tensor.nbytes for tensor in tensors) + self._store.device_bytes()

    def index_bytes(self) -> int:
        return self._marks.nbytes

    def host_bytes(self) -> int:
        return self._store.host_bytes()
