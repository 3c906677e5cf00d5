"""What policies promise, as properties: one for every `Invariant`, for every registered policy that declares it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attrs import frozen
from helpers import (
    Call,
    Case,
    Tape,
    Text,
    Turn,
    assert_close,
    assert_equal_traces,
    attended,
    attention_over,
    make_call,
    model_inputs,
    play,
    play_model,
    policy_records,
    record_id,
    small_policy,
    tiny_llama,
    unit_positions,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import cases, compositions, examples, variants
from torch import Tensor

import kvframe
from kvframe import Invariant, LayerLayout, Policy, TopBudget, Transfer
from kvframe.memory.pool import RowStore
from kvframe.memory.slots import SlotMemory
from kvframe.registry import PolicyRecord
from kvframe.report import Timeline, make_report
from kvframe.runtime import RetrievalLayer

EXECUTIONS = ("dense", "offload")


@frozen(kw_only=True)
class Run:
    """A layer in the middle of a case."""

    layer: RetrievalLayer
    text: Text
    case: Case

    def calls(self) -> Iterator[tuple[Call, Tensor]]:
        """Each call, after it was made, and its output."""
        for call in self.case.calls():
            yield call, make_call(self.layer, self.text, self.case, call)

    def heads(self) -> Iterator[tuple[int, int]]:
        """Every row and KV head."""
        layout = self.layer.layout
        yield from ((batch, head) for batch in range(layout.batch_size) for head in range(layout.num_kv_heads))

    def length(self, batch: int, call: Call) -> int:
        """Tokens of a row after a call."""
        return max(0, call.stop - self.case.padding[batch])

    def window(self, batch: int, head: int) -> int:
        """Tokens in the window."""
        return int(self.layer.ledger.window[batch, head])

    def units(self, batch: int, head: int) -> list[list[int]]:
        """Units that have left the window, by the positions of their tokens."""
        return unit_positions(self.layer, batch, head, int(self.layer.ledger.num_units[batch, head]))

    def retrieved(self, batch: int, head: int, call: Call) -> list[int]:
        """Attended positions that are neither sinks nor in the window."""
        recent = self.length(batch, call) - self.window(batch, head)
        positions = self.layer.attended_positions(batch, head).tolist()
        return [position for position in positions if self.layer.policy.sink_size <= position < recent]


def start(policy: Policy, case: Case, execution: str) -> Run:
    """A fresh layer and its text."""
    layer = case.layer(policy, execution)
    return Run(layer=layer, text=case.text(layer.layout), case=case)


def units_are_disjoint(policy: Policy, case: Case, execution: str) -> None:
    """Units tile the rows between sinks and window, and every row holds a position of its own."""
    run = start(policy, case, execution)
    for call, _ in run.calls():
        for batch, head in run.heads():
            length = run.length(batch, call)
            units = run.units(batch, head)
            assert all(units)
            covered = sorted(position for unit in units for position in unit)
            assert covered == list(range(min(policy.sink_size, length), length - run.window(batch, head)))
            positions = run.layer.positions.of(batch, length)[head]
            assert sorted(positions.tolist()) == list(range(length))


def kv_comes_back_exactly(policy: Policy, case: Case, execution: str) -> None:
    """A row that is left holds the KV of its position."""
    run = start(policy, case, execution)
    width = run.text.keys.shape[-1]
    for call, _ in run.calls():
        for batch, head in run.heads():
            length = run.length(batch, call)
            if length == 0:
                continue
            columns = run.layer.positions.of(batch, length)[head] + case.padding[batch]
            rows = run.layer.memory.read(batch, length)
            survivors = run.layer._survivors
            left = slice(None) if survivors is None else survivors.alive[batch, head, :length]
            stored = rows[..., :width], rows[..., width:]
            for states, own in zip(stored, (run.text.keys, run.text.values)):
                assert torch.equal(states[head][left], own[batch, head, columns][left])


def only_the_attended_is_seen(policy: Policy, case: Case, execution: str) -> None:
    """What comes out is attention over the attended positions and nothing else."""
    run = start(policy, case, execution)
    for call, out in run.calls():
        if not call.is_prompt:
            expected = attention_over(run.text, case, run.layer.layout, call.start, attended(run.layer))
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


def no_token_is_lost(policy: Policy, case: Case, execution: str) -> None:
    """Attended and retrievable positions are all there are; none is attended twice."""
    run = start(policy, case, execution)
    for call, _ in run.calls():
        if call.is_prompt:
            continue
        positions = attended(run.layer)
        for batch, head in run.heads():
            seen = positions[batch][head]
            retrievable = [position for unit in run.units(batch, head) for position in unit]
            assert len(set(seen)) == len(seen)
            assert {*seen, *retrievable} == set(range(run.length(batch, call)))


def budget_is_exact(policy: Policy, case: Case, execution: str) -> None:
    """Where a selection is due it takes the budget or, if that is less, all there is; elsewhere nothing goes."""
    tape = Tape()
    run = start(tape.wrap(policy), case, execution)
    before: dict[tuple[int, int], list[int]] = {}
    for call, _ in run.calls():
        due = next((made.due for made in tape.decisions if isinstance(made, kvframe.Decision)), None)
        tape.decisions.clear()
        if call.is_prompt:
            before = {}
            continue
        assert due is not None
        for batch, head in run.heads():
            now = run.retrieved(batch, head, call)
            enough = sum(map(len, run.units(batch, head)))
            if due[batch, head]:
                assert len(now) == min(policy.selector.capacity, enough)
            else:
                assert len(now) <= policy.selector.capacity
                assert set(before.get((batch, head), [])) <= set(now)
            before[batch, head] = now


def sinks_and_window_are_attended(policy: Policy, case: Case, execution: str) -> None:
    """The first `sink_size` and the last `window_size` positions, at every step."""
    run = start(policy, case, execution)
    for call, _ in run.calls():
        for batch, head in run.heads() if not call.is_prompt else ():
            length = run.length(batch, call)
            must = {*range(min(policy.sink_size, length)), *range(max(0, length - policy.window_size), length)}
            assert must <= set(run.layer.attended_positions(batch, head).tolist())


class WatchedStore(RowStore):
    """Another store, and what it moves: seen from outside, by what arrives in buffers that held NaN."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.written = self.loaded = self.recalled = 0
        self.incoming: Tensor | None = None

    @property
    def traffic(self) -> Any:
        return self.store.traffic

    @property
    def is_partial(self) -> bool:
        return self.store.is_partial

    def hold_recent(self, num_tokens: int) -> None:
        self.store.hold_recent(num_tokens)

    def step_is_over(self) -> None:
        self.store.step_is_over()

    @property
    def num_rows(self) -> int:
        return self.store.num_rows

    def grow(self, num_rows: int) -> None:
        self.store.grow(num_rows)

    def stage(self, num_tokens: int) -> Tensor:
        return self.store.stage(num_tokens)

    def write(self, batch: int, start: int, rows: Tensor) -> None:
        self.written += rows.nbytes
        self.store.write(batch, start, rows)

    def write_recent(self, batch: int, start: int, rows: Tensor) -> None:
        self.written += rows.nbytes
        self.store.write_recent(batch, start, rows)

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        self.written += keys.nbytes + values.nbytes
        self.store.append(rows, keys, values)

    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        rows = self.store.read(batch, stop, room)
        self.loaded += rows[:, :stop].nbytes
        return rows

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        self.incoming = incoming.clone()
        keys, values = torch.full_like(k_slots, torch.nan), torch.full_like(v_slots, torch.nan)
        self.store.recall(incoming, keys, values)
        came = ~keys.isnan().any(-1)
        assert torch.equal(came, ~values.isnan().any(-1))
        self.recalled += int(came.sum())
        self.loaded += keys[came].nbytes + values[came].nbytes
        k_slots[came], v_slots[came] = keys[came], values[came]

    def device_bytes(self) -> int:
        return self.store.device_bytes()

    def host_bytes(self) -> int:
        return self.store.host_bytes()


@frozen(kw_only=True)
class WatchedTransfer(Transfer):
    name = "watched"
    stage: Transfer

    @property
    def drops(self) -> bool:
        return self.stage.drops

    def codec(self, layout: LayerLayout) -> Any:
        return self.stage.codec(layout)

    def row_bytes(self, layout: LayerLayout) -> int:
        return self.stage.row_bytes(layout)

    def init(self, layout: LayerLayout, num_rows: int) -> RowStore:
        return WatchedStore(self.stage.init(layout, num_rows))

    def host_bytes(self, layout: LayerLayout, num_rows: int) -> int:
        return self.stage.host_bytes(layout, num_rows)


def watch(policy: Policy, case: Case) -> tuple[Run, SlotMemory, WatchedStore]:
    """An offload run whose store is watched."""
    run = start(policy.swap(transfer=WatchedTransfer(stage=policy.transfer)), case, "offload")
    memory = run.layer.memory
    assert isinstance(memory, SlotMemory) and isinstance(memory._store, WatchedStore)
    return run, memory, memory._store


def bytes_are_counted(policy: Policy, case: Case, execution: str) -> None:
    """The counters, and the report, say what was seen to move; `dense` moves nothing, and counts the rows that would
    have come."""
    run, memory, store = watch(policy, case)
    crosses_link = store.host_bytes() > 0
    if execution == "dense":
        dense = case.layer(policy, execution)
        for layer in (dense, run.layer):
            play(layer, run.text, case)
        traffic = dense.memory.traffic
        assert (traffic.bytes_to_host, traffic.bytes_to_device(1)) == (0, 0)
        assert torch.equal(dense.stats.rows_recalled, run.layer.stats.rows_recalled)
        return
    for _ in run.calls():
        assert memory.traffic.bytes_to_host == crosses_link * store.written
        recalled = int(run.layer.stats.rows_recalled.sum())
        assert recalled == store.recalled
        assert memory.traffic.bytes_to_device(recalled) == crosses_link * store.loaded
    report = make_report(policy, "offload", [run.layer], Timeline(), 0)

    assert (report.bytes_to_host, report.rows_recalled) == (crosses_link * store.written, store.recalled)
    assert report.bytes_to_device == crosses_link * store.loaded


def resident_rows_stay(policy: Policy, case: Case, execution: str) -> None:
    """A recall brings what is wanted and not there, and what is wanted and there keeps its slot; only `offload` has
    slots."""
    run, memory, store = watch(policy, case)
    original = memory.recall

    def recall(rows: Tensor, count: Tensor, due: Tensor, tallies: Tensor) -> None:
        before = memory.slots.resident_rows.clone()
        original(rows, count, due, tallies)
        for batch, head in run.heads():
            held, now = before[batch, head].tolist(), memory.slots.resident_rows[batch, head].tolist()
            assert store.incoming is not None
            came = [row for row in store.incoming[batch, head].tolist() if row >= 0]
            if not due[batch, head]:
                assert not came and now == held
                continue
            wanted = [row for row in rows[batch, head].tolist() if row >= 0]
            assert sorted(came) == sorted(set(wanted) - set(held))
            assert sorted(row for row in now if row >= 0) == sorted(wanted)
            assert all(now[slot] == row for slot, row in enumerate(held) if row in wanted)

    memory.recall = recall  # type: ignore[method-assign]
    for _ in run.calls():
        pass


def reset_repeats(policy: Policy, case: Case, execution: str) -> None:
    """After a reset, with another text in between, outputs, positions and counts are the same, bit by bit."""
    layer = case.layer(policy, execution)
    layer.reserve(case.num_tokens)
    text, other = case.text(layer.layout), case.text(layer.layout, seed=case.seed + 1)
    first = play(layer, text, case)
    report = counters(layer)
    layer.reset()
    assert counters(layer) == counters(case.layer(policy, execution))
    play(layer, other, case)
    layer.reset()

    assert_equal_traces(first, play(layer, text, case), 0)
    assert counters(layer) == report


def counters(layer: RetrievalLayer) -> dict[str, Any]:
    """Everything that a layer reports, but for what it holds."""
    report = make_report(layer.policy, "any", [layer], Timeline(), 0).to_dict()
    return {key: value for key, value in report.items() if not key.endswith(("kv_bytes", "index_bytes"))}


def rows_are_independent(policy: Policy, case: Case, execution: str) -> None:
    """A row alone and without padding has the positions and outputs that it has in the batch."""
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    together = play(layer, text, case)
    for batch, padding in enumerate(case.padding):
        single = case.alone(batch)
        alone = play(single.layer(policy, execution), text.row(batch, padding), single)
        assert alone.attended == [[rows[batch]] for rows in together.attended]
        assert_close(alone.outputs, [out[batch : batch + 1] for out in together.outputs], 1e-10)
        whole = torch.cat(together.prompts, 2)[batch : batch + 1]
        assert_close([torch.cat(alone.prompts, 2)], [whole[:, :, padding:]], 1e-10)
        assert not whole[:, :, :padding].any()


PROPERTIES: dict[Invariant, Callable[[Policy, Case, str], None]] = {
    Invariant.UNITS_DISJOINT: units_are_disjoint,
    Invariant.NO_TOKEN_LOST: no_token_is_lost,
    Invariant.EXACT_BUDGET: budget_is_exact,
    Invariant.ALWAYS_ATTENDED: sinks_and_window_are_attended,
    Invariant.BYTES_COUNTED: bytes_are_counted,
    Invariant.RESIDENT_STAYS: resident_rows_stay,
    Invariant.RESET_REPEATS: reset_repeats,
    Invariant.ROW_INDEPENDENT: rows_are_independent,
    Invariant.EXACT_KV: kv_comes_back_exactly,
    Invariant.ATTENDED_ONLY: only_the_attended_is_seen,
}


def promises() -> list[Any]:
    """Every policy with every invariant that it promises."""
    return [
        pytest.param(record, invariant, id=f"{record.name}-{invariant.name.lower()}")
        for record in policy_records()
        for invariant in small_policy(record).promises
    ]


def test_every_invariant_has_a_property():
    """Nothing can be promised that is not tested."""
    assert PROPERTIES.keys() == set(Invariant)


@pytest.mark.parametrize("record", policy_records(), ids=record_id)
def test_fixed_budgets_promise_everything(record: PolicyRecord):
    """LouisKV and every other policy that selects by a fixed budget waive nothing."""
    policy = small_policy(record)
    if isinstance(policy.selector, TopBudget):
        assert policy.promises == tuple(Invariant)


@pytest.mark.parametrize("record, invariant", promises())
@examples(0.4)
@given(data=st.data(), case=cases(), execution=st.sampled_from(EXECUTIONS))
def test_promise(record: PolicyRecord, invariant: Invariant, data: st.DataObject, case: Case, execution: str):
    """A policy keeps what it promises, at every step and in both executions; bytes move in one of them alone."""
    policy = data.draw(variants(record))
    PROPERTIES[invariant](policy, case, execution)


@pytest.mark.parametrize("invariant", Invariant, ids=lambda invariant: invariant.name.lower())
@given(policy=compositions(), case=cases(), execution=st.sampled_from(EXECUTIONS))
def test_promise_of_any_composition(invariant: Invariant, policy: Policy, case: Case, execution: str):
    """So do compositions of other stages, and of a trigger whose heads decide on their own."""
    assume(invariant in policy.promises)
    PROPERTIES[invariant](policy, case, execution)


every_policy = pytest.mark.parametrize("record", policy_records(), ids=record_id)


@every_policy
def test_rows_of_a_model_are_independent(record: PolicyRecord):
    """Logits and positions of a row are the same alone and in a batch with padding, through a whole model."""
    turns = (Turn(chunks=(20, 14), num_steps=8), Turn(chunks=(9,), num_steps=4))
    case = Case(batch_size=3, padding=(5, 0, 19), turns=turns)
    policy, model, inputs = small_policy(record), tiny_llama(), model_inputs(case)
    together = play_model(model, policy, case, "offload", inputs)
    for batch, padding in enumerate(case.padding):
        alone = play_model(model, policy, case.alone(batch), "offload", inputs.row(batch, padding))
        assert alone.attended == [[[layer[batch]] for layer in layers] for layers in together.attended]
        own = torch.cat(together.logits, 1)[batch : batch + 1, padding:]
        assert_close([torch.cat(alone.logits, 1)], [own], 1e-8)


@every_policy
@torch.no_grad()
def test_generate_on_a_reset_cache(record: PolicyRecord):
    """A second `generate` on a reset cache gives the same tokens and scores, bit by bit, and the same report."""
    model, generator = tiny_llama(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (2, 30), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    with kvframe.attach(model, small_policy(record)) as run:
        first = model.generate(ids, attention_mask=mask, **options)
        counted = run.report()
        cache = run.cache
        cache.reset()
        model.generate(ids.flip(1), past_key_values=cache, **options)
        cache.reset()
        second = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)

    assert run.cache is cache
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(one, other) for one, other in zip(first.scores, second.scores))
    assert cache.report().layers == counted.layers
