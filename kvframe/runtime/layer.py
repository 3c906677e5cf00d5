"""One layer under a policy: the order of the stages in a step."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from kvframe.composition import Policy
from kvframe.errors import UnsupportedCallError
from kvframe.layer import LayerRuntime
from kvframe.memory.base import LayerMemory
from kvframe.memory.catalog import Catalog
from kvframe.memory.dense import DenseMemory, ShadowMemory
from kvframe.memory.ledger import LENGTH, Ledger
from kvframe.memory.positions import RowPositions
from kvframe.memory.slots import SlotMemory
from kvframe.memory.survivors import Survivors
from kvframe.memory.token_ids import TokenIds
from kvframe.runtime.ahead import Ahead
from kvframe.runtime.blocks import OutputBlocks, units_of_regrouping
from kvframe.runtime.prompts import PromptReader
from kvframe.runtime.proposed import Tentative
from kvframe.runtime.states import StageStates
from kvframe.stages import SLOTS, Stage
from kvframe.stages.selector import only_due
from kvframe.stats import RetrievalStats
from kvframe.types import BlockInputs, Board, Decision, Execution, LayerLayout, Selection, StepInputs
from kvframe_kernels.kmeans import write_in_order
from kvframe_kernels.slot_attention import Entries, make_arrivals, slot_attention

_SLAB_ROWS = 1024


class RetrievalLayer(LayerRuntime):
    """A layer under a policy: ledger, memory, index, and the running state of the stages.

    backend: attention over slots, called as `kvframe_kernels.slot_attention.slot_attention`, which it replaces.
    board: what layers publish for each other; token_ids: the ids of all tokens, where a stage asks for them.
    """

    def __init__(
        self,
        layout: LayerLayout,
        policy: Policy,
        capacity: int,
        execution: Execution,
        backend: Any = None,
        *,
        board: Board | None = None,
        token_ids: TokenIds | None = None,
    ) -> None:
        super().__init__(layout)
        if token_ids is None and policy.needs_token_ids:
            raise UnsupportedCallError(
                f"{_asking_for_ids(policy)!r} asks for token ids, which only the model inside a `kvframe.attach` block "
                "gives; call it there, with input_ids"
            )
        self.policy = policy
        self._board: Board = {} if board is None else board
        self._token_ids = token_ids
        self._row_bytes = policy.transfer.row_bytes(layout)
        self.ledger = Ledger(
            layout,
            sink_size=policy.sink_size,
            window_size=policy.window_size,
            min_size=min(policy.units.min_size, policy.units.max_size),
            max_size=policy.units.max_size,
        )
        self.memory = _make_memory(layout, policy, self.ledger, capacity, execution, backend)
        self.catalog = Catalog(layout, policy.scorer, policy.selector, self.ledger, capacity)
        drops = policy.transfer.drops and execution != "shadow"
        self._survivors = Survivors(layout, capacity) if drops else None
        self._ahead = Ahead.none(layout) if policy.trigger.selects_ahead else None
        self._full: Tensor | None = None  # bool [B, H], heads that attended to everything in the last step
        self.stats = RetrievalStats(layout)
        self.positions = RowPositions(layout)
        self._capacity = capacity
        self._has_selected = False  # since the last prompt
        self._blocks = OutputBlocks(policy.units.regroup_size, policy.window_size)
        self._states = StageStates.init(policy, layout)
        self._reader = PromptReader(
            layout, policy, self.ledger, self.memory, self.positions,
            notes=self.catalog.notes, survivors=self._survivors, board=self._board,
        )  # fmt: skip
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
        self.catalog.reserve_rows(self._capacity)
        if self._survivors is not None:
            self._survivors.reserve(self._capacity)
        if not self.ledger.in_prompt:
            more = self._capacity - before
            units = more // self.ledger.min_size + 1 + units_of_regrouping(self.policy.units, more)
            self._reserve_units(self.ledger.max_units + units)

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
        self._has_selected = False
        num_tail = keys.shape[2] - num_committed
        out = self._reader.attend(query, keys, values, num_real, num_tail, self._states, ahead)
        committed = [max(0, num - num_tail) for num in num_real]
        self._take_in(keys[:, :, :num_committed], values[:, :, :num_committed], committed)
        self.policy.trigger.begin(query[:, :, num_committed - 1], self._states.trigger)
        self.policy.scorer.begin(query[:, :, num_committed - 1], self._states.scorer)
        if self._ahead is not None:
            self._ahead.forget()
        if num_tail:
            self._tail = Tentative(
                query[:, :, num_committed:], keys[:, :, num_committed:], values[:, :, num_committed:]
            )
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
                self.catalog.extend(unit)
                if self._survivors is not None:
                    self._survivors.lose(unit, self.memory.attended())
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
        units = self.policy.units.build_block(keys, self._block_inputs(batch, start, start + keys.shape[1]))
        rows = self.memory.stage(keys.shape[1])
        write_in_order(keys, values, units.order, rows)
        num_units = units.sizes.shape[1]
        self._reserve_units(self.ledger.most_closed(batch) + num_units)
        columns = self.ledger.add_prompt_units(batch, start, units)
        self.catalog.add_block(batch, start, rows, units, columns)
        self.memory.store_block(batch, start, rows)
        self.positions.add_block(batch, start, units.order)

    def _block_inputs(self, batch: int, start: int, stop: int) -> BlockInputs:
        return BlockInputs(
            layout=self.layout,
            token_ids=None if self._token_ids is None else self._token_ids.span(batch, start, stop),
            notes=None if self.catalog.notes is None else self.catalog.notes.of(batch, start, stop),
        )

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def prepare_decode(self, num_tokens: int) -> None:
        self._commit_tail()
        self._begin_decode()
        self.reserve(max(self.ledger.lengths) + num_tokens)
        self._close_blocks()
        self._regroup_blocks()

    def step(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if self._on_cpu or query.shape[2] > 1:
            self.check_finite(keys, values, [keys.shape[2]] * keys.shape[0])
        # The host counts the token when the step is over.
        lengths = [length + 1 for length in self.ledger.lengths]
        inputs, decision = self._append(query[:, :, 0], keys[:, :, 0], values[:, :, 0], lengths)
        if self.catalog.index is not None and self._worth_doing(inputs.due):
            self._select(inputs)
        if query.shape[2] > 1:
            self._tail = Tentative(query[:, :, 1:], keys[:, :, 1:], values[:, :, 1:])
        self.stats.add(self.ledger.counts)
        out = self._attend(query, decision.full, lengths)
        # Attention was by the step's own query, whatever units were scored with.
        self._observe(evolve(inputs, query=query[:, :, 0]), lengths)
        return out

    def _attend(self, query: Tensor, full: Tensor | None, lengths: list[int]) -> Tensor:
        tail = None if self._tail is None else (self._tail.keys, self._tail.values)
        out = self.memory.attend(query, tail, self._estimated())
        self._full = full
        if full is not None and self._worth_doing(full):
            everything = self.memory.attend_to_all(query[:, :, :1], lengths)
            heads = full.repeat_interleave(self.layout.group_size, 1)[..., None, None]
            out[:, :, :1] = torch.where(heads, everything, out[:, :, :1])
        return out

    def _estimated(self) -> Entries | None:
        """What is not attended to otherwise, one virtual entry a unit; None where nothing is estimated."""
        if not self.policy.selector.estimates or self.catalog.index is None:
            return None
        units = self.catalog.units()
        if units.means is None:
            return None
        return Entries(*units.means, self.catalog.estimated.limit(self.memory.unattended(units)))

    def _observe(self, inputs: StepInputs, lengths: list[int]) -> None:
        """Let the scorer look back at the step."""
        scorer = self.policy.scorer
        if scorer.reads_attention:
            scorer.observe(inputs, self.memory.weights(inputs.query, inputs.full, lengths), self._states.scorer)
        self._has_selected = True
        self._let_go()

    def _let_go(self) -> None:
        """What is neither attended to nor in the window is gone, once a step has selected from the prompt."""
        if self._survivors is not None and self._has_selected:
            self._survivors.keep(self.memory.attended(), self.ledger.counts[LENGTH])

    def count_decoded(self, num_tokens: int) -> None:
        self._count_token()  # what is behind the first token waits in the tail
        self.stats.num_steps += 1
        self.memory.step_is_over()

    def _count_token(self) -> None:
        self.ledger.count_token()
        self.memory.traffic.rows_written += self.layout.batch_size * self.layout.num_kv_heads

    def addresses(self) -> list[int]:
        # The memory grows with the rows; states of stages are made anew when all is forgotten.
        places = (self.ledger.unit_offsets.data_ptr(), *self.catalog.addresses())
        return [id(self), self.capacity, self._num_forgotten, *places]

    def steps_left(self) -> int:
        left = self.capacity - max(self.ledger.lengths)
        of_block = self._blocks.steps_left(self.ledger.lengths)
        return left if of_block is None else min(left, of_block)

    def _begin_decode(self) -> None:
        if self.ledger.in_prompt:
            # Room for all units that the planned rows can still give, so that nothing is allocated while decoding; and
            # no more than that, now that the prompt's units are counted.
            num_closed, num_left = self.ledger.most_units(self.capacity)
            more = units_of_regrouping(self.policy.units, self.capacity - min(self.ledger.open_starts))
            self.ledger.fit_units(num_closed + more)
            self.catalog.fit_units(num_left + more)
            starts = list(self.ledger.open_starts)
            self.ledger.begin_decode()
            self.memory.begin_decode()
            self.catalog.begin_decode()
            self._blocks.begin(starts, self.ledger.lengths)

    def _close_blocks(self) -> None:
        """The end of a block is the end of a unit."""
        for batch in self._blocks.closing(self.ledger.lengths):
            self.ledger.close_open(batch)

    def _regroup_blocks(self) -> None:
        """Group generated tokens anew, where a whole block of them has left the window."""
        for batch, start, stop in self._blocks.complete(self.ledger.lengths):
            self._regroup(batch, start, stop)

    def _regroup(self, batch: int, start: int, stop: int) -> None:
        memory, width = self.memory, self.layout.head_dim
        read = memory.read_range(batch, start, stop)
        units = self.policy.units.regroup(read[..., :width])
        rows = memory.stage(stop - start)
        write_in_order(read[..., :width], read[..., width:], units.order, rows)
        self.catalog.regroup(batch, start, rows, units, self.ledger.regroup(batch, start, stop, units))
        memory.reorder(batch, start, units.order, rows)
        self.positions.add_block(batch, start, units.order)

    def _reserve_units(self, num_units: int) -> None:
        self.ledger.reserve_units(num_units)
        self.catalog.reserve_units(num_units)

    def _append(self, query: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> tuple[StepInputs, Decision]:
        """Trigger, ledger and memory for one token of every sequence, the last of `lengths`; says who selects, and with
        which query."""
        inputs = StepInputs(
            query=query,
            layout=self.layout,
            key=keys,
            num_tokens=self.ledger.counts[LENGTH],
            alive=None if self._survivors is None else self._survivors.alive,
            notes=None if self.catalog.notes is None else self.catalog.notes.tensor,
            token_ids=None if self._token_ids is None else self._token_ids.at([length - 1 for length in lengths]),
            row_bytes=self._row_bytes,
            board=self._board,
        )
        decision = self.policy.trigger.step(inputs, self._states.trigger)
        cut = self.policy.units.boundary(inputs, decision, self._states.units)
        unit = self.memory.append(keys, values, cut, None if self._on_cpu else self._finite)
        if self._worth_doing(unit.leaves):
            self.catalog.extend(unit)
        due = decision.due
        probe = self.policy.scorer.probe(inputs, self._states.scorer)
        if self._ahead is not None:
            probe, due = self._ahead.exchange(probe, decision)
        return evolve(inputs, query=probe, due=due, full=decision.full, state=self._states.scorer), decision

    def _select(self, inputs: StepInputs) -> None:
        policy, units = self.policy, self.catalog.units()
        scores = policy.scorer.score(inputs, units.index, units)
        if self._survivors is not None:
            gone = ~self._survivors.units(units.offsets, units.max_units)
            scores = scores.masked_fill(gone, -math.inf)
        if policy.trigger.reviews:
            inputs = evolve(inputs, kept_lse=self.memory.kept_lse(inputs.query))
            candidates = policy.selector.candidates(inputs, scores, units)
            missed = self.memory.missed_share(candidates)
            inputs = evolve(inputs, due=policy.trigger.review(inputs, missed, self._states.trigger))
            if not self._worth_doing(inputs.due):
                return
            selection = Selection.of(policy.selector.choose(inputs, candidates, scores, units))
        else:
            selection = Selection.of(policy.selector.select(inputs, scores, units))
        rows, count = selection.rows, selection.count
        if self._survivors is not None:
            rows, count = self._survivors.among(only_due(rows, count, inputs.due)[0])
        assert inputs.due is not None
        if selection.estimated is not None:
            self.catalog.estimated.choose(selection.estimated, inputs.due, self.ledger.max_units)
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
                self._close_blocks()
                lengths = [length + 1 for length in self.ledger.lengths]
                self._append(tail.query[:, :, token], tail.keys[:, :, token], tail.values[:, :, token], lengths)
                self._let_go()
                self._count_token()

    def crop(self, num_tokens: int) -> None:
        num_tail = 0 if self._tail is None else self._tail.num_tokens
        if self._tail is not None:
            self._tail = self._tail.first(max(0, num_tail - num_tokens))
        if num_tokens > num_tail:
            self._rebuild([length - (num_tokens - num_tail) for length in self.ledger.lengths])

    def _rebuild(self, lengths: list[int]) -> None:
        """Forget everything but the first tokens of each sequence, which are taken in again as a prompt."""
        if self._survivors is not None:
            raise UnsupportedCallError(
                f"{type(self.policy.transfer).__name__} has dropped tokens, so the cache cannot go back to "
                f"{min(lengths)} tokens; start again from the prompt (reset), or use a transfer that keeps everything, "
                "such as HostPool"
            )
        longest = max(lengths)
        keys, values = self.layout.zeros(longest)
        width = keys.shape[-1]
        noted: list[Tensor] = []
        for batch, (old, new) in enumerate(zip(self.ledger.lengths, lengths, strict=True)):
            rows = self.memory.read(batch, old)
            place = self.positions.of(batch, old).argsort(-1)[:, :new].to(rows.device)
            if self.catalog.notes is not None:
                notes = self.catalog.notes.of(batch, 0, old)
                noted.append(notes.gather(-1, place.expand(notes.shape[0], -1, -1)))
            rows = rows.gather(1, place[..., None].expand(-1, -1, rows.shape[-1]))
            keys[batch, :, longest - new :], values[batch, :, longest - new :] = rows[..., :width], rows[..., width:]
        self._forget()
        for batch, notes in enumerate(noted):
            assert self.catalog.notes is not None
            self.catalog.notes.of(batch, 0, notes.shape[-1]).copy_(notes)
        self._take_in(keys, values, lengths)

    # ---- the whole --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        self._forget()
        for kind, layer_idx in list(self._board):
            if layer_idx == self.layout.layer_idx:
                del self._board[kind, layer_idx]
        self.stats.reset()
        self.memory.clear_traffic()

    def _forget(self) -> None:
        self._tail = None
        self._num_forgotten += 1
        self.ledger.reset()
        self.memory.reset()
        self.positions.forget()
        self.catalog.forget()
        self._blocks.forget()
        for kept in (self._survivors, self._ahead):
            if kept is not None:
                kept.forget()
        self._full = None
        self._states = StageStates.init(self.policy, self.layout)

    def attended_positions(self, batch: int, head: int) -> Tensor:
        if self._full is not None and bool(self._full[batch, head]):
            return torch.arange(self.ledger.lengths[batch])
        positions = self.positions.of(batch, self.capacity)[head][self.memory.attended_rows(batch, head)]
        return positions.sort().values.long()

    def is_left(self, batch: int, head: int, stop: int) -> Tensor:
        """bool [stop]: the first rows of a head that a transfer has not dropped."""
        if self._survivors is None:
            return torch.ones(stop, dtype=torch.bool)
        return self._survivors.alive[batch, head, :stop].cpu()

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
        survivors = 0 if self._survivors is None else self._survivors.nbytes()
        return self.memory.index_bytes() + self.ledger.nbytes() + self.catalog.nbytes() + survivors


def host_bytes_needed(layout: LayerLayout, policy: Policy, num_rows: int) -> int:
    """Host memory that an offloading `RetrievalLayer` takes for `num_rows` tokens a sequence."""
    positions = layout.batch_size * layout.num_kv_heads * num_rows * torch.int32.itemsize
    return policy.transfer.host_bytes(layout, num_rows) + positions


def _asking_for_ids(policy: Policy) -> Stage:
    """A stage that is to be told the ids of tokens."""
    return next(part for slot in SLOTS for part in policy.stage(slot).with_parts() if part.needs_token_ids)


def _make_memory(
    layout: LayerLayout, policy: Policy, ledger: Ledger, capacity: int, execution: Execution, backend: Any
) -> LayerMemory:
    num_resident = policy.selector.capacity_in(layout)
    if execution == "offload":
        store = policy.transfer.init(layout, capacity)
        if backend is None:
            arrivals = make_arrivals(layout.batch_size, layout.num_qo_heads, layout.device)
            backend = functools.partial(slot_attention, arrivals=arrivals)
        return SlotMemory(layout, ledger, store, num_resident, backend)
    memory = DenseMemory if execution == "dense" else ShadowMemory
    return memory(layout, ledger, capacity, num_resident, policy.transfer.codec(layout))
