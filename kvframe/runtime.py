"""One layer's step: calls the five stages in order. It has no policy of its own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor

from kvframe.attention import causal_attention
from kvframe.composition import Policy
from kvframe.layer import LayerRuntime
from kvframe.memory.base import LayerMemory
from kvframe.memory.dense import DenseMemory, ShadowMemory
from kvframe.memory.index import UnitIndex
from kvframe.memory.ledger import Ledger
from kvframe.memory.positions import RowPositions
from kvframe.memory.slots import SlotMemory
from kvframe.stats import RetrievalStats
from kvframe.types import Execution, LayerLayout, LeavingUnits, StepInputs, UnitTable
from kvframe_kernels.kmeans import write_in_order
from kvframe_kernels.slot_attention import make_arrivals, slot_attention

_SLAB_ROWS = 1024


@define(eq=False)
class Tentative:
    """Tokens of a call with several queries, behind its first: not in the ledger until the next call commits them."""

    query: Tensor  # [B, Hq, n, D]
    keys: Tensor  # [B, H, n, D]
    values: Tensor  # [B, H, n, Dv]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    def first(self, num_tokens: int) -> "Tentative | None":
        """The first few of them; None for none."""
        if num_tokens == 0:
            return None
        return Tentative(self.query[:, :, :num_tokens], self.keys[:, :, :num_tokens], self.values[:, :, :num_tokens])


class RetrievalLayer(LayerRuntime):
    """A layer under a policy: ledger, memory, index, and the running state of the stages.

    backend: attention over slots, called as `kvframe_kernels.slot_attention.slot_attention`, which it replaces.
    """

    def __init__(
        self, layout: LayerLayout, policy: Policy, capacity: int, execution: Execution, backend: Any = None
    ) -> None:
        super().__init__(layout)
        self.policy = policy
        self.ledger = Ledger(
            layout,
            sink_size=policy.sink_size,
            window_size=policy.window_size,
            min_size=min(policy.units.min_size, policy.units.max_size),
            max_size=policy.units.max_size,
        )
        self.memory = _make_memory(layout, policy, self.ledger, capacity, execution, backend)
        # Where nothing can be selected, nothing is scored.
        self._index = UnitIndex(layout, policy.scorer) if policy.selector.capacity else None
        self.stats = RetrievalStats(layout)
        self.positions = RowPositions(layout)
        self._capacity = capacity
        self._trigger_state: Any = policy.trigger.init(layout)
        self._units_state: Any = policy.units.init(layout)
        self._tail: Tentative | None = None
        self._num_forgotten = 0
        self._on_cpu = layout.device.type == "cpu"

    @property
    def lengths(self) -> list[int]:
        tail = 0 if self._tail is None else self._tail.num_tokens
        return [length + tail for length in self.ledger.lengths]

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return self._capacity

    def reserve(self, num_rows: int) -> None:
        if num_rows <= self.capacity:
            return
        # More than was planned: in steps that are large enough to be rare.
        before = self._capacity
        self._capacity = max(num_rows, before + _SLAB_ROWS)
        self.memory.reserve(self._capacity)
        if not self.ledger.in_prompt:
            self._reserve_units(self.ledger.max_units + (self._capacity - before) // self.ledger.min_size + 1)

    # ---- the prompt -------------------------------------------------------------------------------------------------

    def prefetch(self, num_real: list[int]) -> None:
        if self.ledger.lengths[0] and num_real[0]:
            self.memory.prefetch(0, self.ledger.lengths[0], num_real[0])

    def prompt(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        num_real: list[int],
        num_committed: int,
        ahead: Callable[[], None] | None = None,
    ) -> Tensor:
        self.check_finite(keys, values, num_real)
        self._commit_tail()
        self.reserve(max(length + num for length, num in zip(self.ledger.lengths, num_real, strict=True)))
        out = self._attend_in_full(query, keys, values, num_real, ahead)
        num_tail = keys.shape[2] - num_committed
        committed = [max(0, num - num_tail) for num in num_real]
        self._take_in(keys[:, :, :num_committed], values[:, :, :num_committed], committed)
        self.policy.trigger.begin(query[:, :, num_committed - 1], self._trigger_state)
        if num_tail:
            self._tail = Tentative(
                query[:, :, num_committed:], keys[:, :, num_committed:], values[:, :, num_committed:]
            )
        return out

    def _attend_in_full(
        self, query: Tensor, keys: Tensor, values: Tensor, num_real: list[int], ahead: Callable[[], None] | None
    ) -> Tensor:
        """Full causal attention of the real tokens over everything stored and themselves."""
        num_queries, past, width = query.shape[2], self.ledger.lengths, keys.shape[-1]
        if max(past) == 0 and min(num_real) == num_queries:
            return causal_attention(query, keys, values, self.layout.sm_scale)
        out = query.new_zeros(*query.shape[:3], values.shape[-1])
        for batch, (num, length) in enumerate(zip(num_real, past, strict=True)):
            if num:
                row, own = slice(batch, batch + 1), slice(num_queries - num, num_queries)
                row_keys, row_values = keys[row, :, own], values[row, :, own]
                if length:
                    # Rows lie in unit order, which the full attention of later tokens does not mind.
                    rows = self.memory.read(batch, length, num)
                    rows[:, length:, :width], rows[:, length:, width:] = row_keys[0], row_values[0]
                    row_keys, row_values = rows[None, ..., :width], rows[None, ..., width:]
                # What is read next comes while this is attended to.
                if batch + 1 < len(past):
                    if past[batch + 1] and num_real[batch + 1]:
                        self.memory.prefetch(batch + 1, past[batch + 1], num_real[batch + 1])
                elif ahead is not None:
                    ahead()
                out[row, :, own] = causal_attention(query[row, :, own], row_keys, row_values, self.layout.sm_scale)
        return out

    def _take_in(self, keys: Tensor, values: Tensor, num_real: list[int]) -> None:
        """Store prompt tokens, the last `num_real` of each sequence; those before the window become prompt units."""
        ledger = self.ledger
        ledger.begin_prompt()
        ahead = [length + num for length, num in zip(ledger.lengths, num_real, strict=True)]
        if ledger.has_decoded:
            # Units still in the window from an earlier turn make room first; the index may have none for them yet.
            self._reserve_units(max(map(ledger.most_closed, range(len(num_real)))))
            length = torch.tensor(ahead, device=self.layout.device)[:, None].expand_as(ledger.num_units)
            while (unit := self.memory.leave(length)) is not None:
                self._extend_index(unit)
        for batch, num in enumerate(num_real):
            own = slice(keys.shape[2] - num, keys.shape[2])
            self._take_in_row(batch, keys[batch, :, own], values[batch, :, own])
        self.memory.finish_prompt()
        ledger.end_prompt()

    def _take_in_row(self, batch: int, keys: Tensor, values: Tensor) -> None:
        ledger, memory = self.ledger, self.memory
        num, length = keys.shape[1], ledger.lengths[batch]
        start, stop = ledger.prompt_block(batch, num)
        if start < stop:
            # Of the block, the first tokens may have been held back in the window; the others have just come.
            split = min(stop, max(start, length))
            fresh = slice(split - length, stop - length)
            block_keys, block_values = keys[:, fresh], values[:, fresh]
            if start < split:
                held_keys, held_values = memory.recent(batch, start, split)
                block_keys, block_values = (
                    torch.cat([held_keys, block_keys], 1),
                    torch.cat([held_values, block_values], 1),
                )
            self._add_block(batch, start, block_keys, block_values)
        # Sinks come before the block, the window behind it.
        for low, high in ((length, min(length + num, ledger.sink_size)), (max(stop, length), length + num)):
            if low < high:
                part = slice(low - length, high - length)
                memory.store_recent(batch, low, keys[:, part], values[:, part])
        ledger.finish_prompt(batch, num, stop)

    def _add_block(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        units = self.policy.units.build(keys)
        rows = self.memory.stage(keys.shape[1])
        write_in_order(keys, values, units.order, rows)
        num_heads, num_units = units.sizes.shape
        self._reserve_units(self.ledger.most_closed(batch) + num_units)
        columns = self.ledger.add_prompt_units(batch, start, units)
        if self._index is not None:
            width = keys.shape[-1]
            unit_ids = torch.arange(num_units, device=keys.device).repeat(num_heads)
            unit_ids = unit_ids.repeat_interleave(units.sizes.flatten(), output_size=units.order.numel())
            entries = self.policy.scorer.index(
                rows[..., :width], rows[..., width:], unit_ids.view(num_heads, -1), num_units
            )
            self._index.write(batch, columns, entries)
        self.memory.store_block(batch, start, rows)
        self.positions.add_block(batch, start, units.order)

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def prepare_decode(self, num_tokens: int) -> None:
        self._commit_tail()
        self._begin_decode()
        self.reserve(max(self.ledger.lengths) + num_tokens)

    def step(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self._on_cpu or query.shape[2] > 1:
            self.check_finite(keys, values, [keys.shape[2]] * keys.shape[0])
        inputs = self._append(query[:, :, 0], keys[:, :, 0], values[:, :, 0])
        if self._index is not None and self._worth_doing(inputs.due):
            self._select(self._index, inputs)
        if query.shape[2] > 1:
            self._tail = Tentative(query[:, :, 1:], keys[:, :, 1:], values[:, :, 1:])
        self.stats.add(self.ledger.counts)
        return self.memory.attend(query, None if self._tail is None else (self._tail.keys, self._tail.values))

    def count_decoded(self, num_tokens: int) -> None:
        self._count_token()  # what is behind the first token waits in the tail
        self.stats.num_steps += 1

    def _count_token(self) -> None:
        self.ledger.count_token()
        self.memory.traffic.rows_written += self.layout.batch_size * self.layout.num_kv_heads

    def addresses(self) -> list[int]:
        # The memory grows with the rows; states of stages are made anew when all is forgotten.
        index = [] if self._index is None else self._index.addresses()
        return [id(self), self.capacity, self._num_forgotten, self.ledger.unit_offsets.data_ptr(), *index]

    def steps_left(self) -> int:
        return self.capacity - max(self.ledger.lengths)

    def _begin_decode(self) -> None:
        if self.ledger.in_prompt:
            # Room for all units that the planned rows can still give, so that nothing is allocated while decoding; and
            # no more than that, now that the prompt's units are counted.
            num_closed, num_left = self.ledger.most_units(self.capacity)
            self.ledger.fit_units(num_closed)
            if self._index is not None:
                self._index.fit(num_left)
            self.ledger.begin_decode()

    def _reserve_units(self, num_units: int) -> None:
        self.ledger.reserve_units(num_units)
        if self._index is not None:
            self._index.reserve(num_units)

    def _append(self, query: Tensor, keys: Tensor, values: Tensor) -> StepInputs:
        """Trigger, ledger and memory for one token of every sequence; says where a selection is due."""
        inputs = StepInputs(query=query, layout=self.layout)
        decision = self.policy.trigger.step(inputs, self._trigger_state)
        cut = self.policy.units.boundary(inputs, decision, self._units_state)
        unit = self.memory.append(keys, values, cut, None if self._on_cpu else self._finite)
        if self._worth_doing(unit.leaves):
            self._extend_index(unit)
        return evolve(inputs, due=decision.due)

    def _extend_index(self, unit: LeavingUnits) -> None:
        if self._index is not None:
            self.policy.scorer.extend(self._index.tensors, unit)

    def _select(self, index: UnitIndex, inputs: StepInputs) -> None:
        ledger, policy = self.ledger, self.policy
        num_units = max(1, min(ledger.visible_units(), index.max_units))
        units = UnitTable(offsets=ledger.unit_offsets, num_units=ledger.num_units, max_units=num_units)
        scores = policy.scorer.score(inputs, index.view(num_units), units)
        rows, count = policy.selector.select(inputs, scores, units)
        assert inputs.due is not None
        self.memory.recall(rows, count, inputs.due, self.stats.tallies)

    def _worth_doing(self, mask: Tensor | None) -> bool:
        """Whether a mask is set anywhere, where the host may look for free; elsewhere the work is predicated by the
        mask."""
        return not self._on_cpu or (mask is not None and bool(mask.any()))

    # ---- proposed tokens --------------------------------------------------------------------------------------------

    def _commit_tail(self) -> None:
        """What was proposed and not cropped is part of the text: it enters the ledger as if decoded one by one."""
        tail, self._tail = self._tail, None
        if tail is not None:
            self._begin_decode()
            self.reserve(max(self.ledger.lengths) + tail.num_tokens)
            for token in range(tail.num_tokens):
                self._append(tail.query[:, :, token], tail.keys[:, :, token], tail.values[:, :, token])
                self._count_token()

    def crop(self, num_tokens: int) -> None:
        num_tail = 0 if self._tail is None else self._tail.num_tokens
        if self._tail is not None:
            self._tail = self._tail.first(max(0, num_tail - num_tokens))
        if num_tokens > num_tail:
            self._rebuild([length - (num_tokens - num_tail) for length in self.ledger.lengths])

    def _rebuild(self, lengths: list[int]) -> None:
        """Forget everything but the first tokens of each sequence, which are taken in again as a prompt."""
        longest = max(lengths)
        keys, values = self.layout.zeros(longest)
        width = keys.shape[-1]
        for batch, (old, new) in enumerate(zip(self.ledger.lengths, lengths, strict=True)):
            rows = self.memory.read(batch, old)
            place = self.positions.of(batch, old).argsort(-1)[:, :new, None].to(rows.device)
            rows = rows.gather(1, place.expand(-1, -1, rows.shape[-1]))
            keys[batch, :, longest - new :], values[batch, :, longest - new :] = rows[..., :width], rows[..., width:]
        self._forget()
        self._take_in(keys, values, lengths)

    # ---- the whole --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self._forget()
        self.stats.reset()
        self.memory.clear_traffic()

    def _forget(self) -> None:
        self._tail = None
        self._num_forgotten += 1
        self.ledger.reset()
        self.memory.reset()
        self.positions.forget()
        self._trigger_state = self.policy.trigger.init(self.layout)
        self._units_state = self.policy.units.init(self.layout)

    def attended_positions(self, batch: int, head: int) -> Tensor:
        positions = self.positions.of(batch, self.capacity)[head][self.memory.attended_rows(batch, head)]
        return positions.sort().values.long()

    def unit_sizes(self, *, prompt: bool) -> Tensor:
        """Sizes of all closed prompt units, or of all closed segments, of every head; reads the device."""
        offsets, closed = self.ledger.unit_offsets, self.ledger.num_closed
        sizes = offsets[..., 1:-1] - offsets[..., :-2]
        columns = torch.arange(sizes.shape[-1], device=sizes.device)
        is_prompt = self.ledger.is_prompt_unit[..., : sizes.shape[-1]]
        return sizes[(columns < closed[..., None]) & (is_prompt == prompt)].cpu()

    def device_bytes(self) -> int:
        return self.memory.device_bytes()

    def host_bytes(self) -> int:
        return self.memory.host_bytes()

    def index_bytes(self) -> int:
        held = self.ledger.nbytes() + self.memory.index_bytes()
        return held + (0 if self._index is None else self._index.nbytes())


def host_bytes_needed(layout: LayerLayout, policy: Policy, num_rows: int) -> int:
    """Host memory that an offloading `RetrievalLayer` takes for `num_rows` tokens a sequence."""
    positions = layout.batch_size * layout.num_kv_heads * num_rows * torch.int32.itemsize
    return policy.transfer.host_bytes(layout, num_rows) + positions


def _make_memory(
    layout: LayerLayout, policy: Policy, ledger: Ledger, capacity: int, execution: Execution, backend: Any
) -> LayerMemory:
    if execution == "offload":
        store = policy.transfer.init(layout, capacity)
        if backend is None:
            arrivals = make_arrivals(layout.batch_size, layout.num_qo_heads, layout.device)
            backend = functools.partial(slot_attention, arrivals=arrivals)
        return SlotMemory(layout, ledger, store, policy.selector.capacity, backend)
    if execution == "dense":
        return DenseMemory(layout, ledger, capacity, policy.selector.capacity)
    return ShadowMemory(layout, ledger, capacity, policy.selector.capacity)
