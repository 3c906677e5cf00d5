"""What policies promise, as properties: a check for every `Invariant`, of any policy that declares it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from kvframe.composition import Policy
from kvframe.report import Timeline, make_report
from kvframe.runtime import RetrievalLayer
from kvframe.testing.broken import Broken, require_close, require_equal_positions, require_equal_traces
from kvframe.testing.cases import Call, Case, Text, Turn, attended, make_call, play, unit_positions
from kvframe.testing.reference import attention_over
from kvframe.testing.tape import Tape
from kvframe.testing.watched import watched_layer
from kvframe.types import Decision, Execution, Invariant

Property = Callable[[Policy, Case, Execution], None]
"""Runs a case; raises Broken where a promise is not kept."""


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


def start(policy: Policy, case: Case, execution: Execution) -> Run:
    """A fresh layer and its text."""
    layer = case.layer(policy, execution)
    return Run(layer=layer, text=case.text(layer.layout), case=case)


def where(call: Call, batch: int, head: int) -> str:
    """A place, for messages."""
    return f"{'prompt' if call.is_prompt else 'step'} at column {call.stop - 1}, row {batch}, KV head {head}"


def units_are_disjoint(policy: Policy, case: Case, execution: Execution) -> None:
    """Units tile the rows between sinks and window, and every row has a position of its own."""
    run = start(policy, case, execution)
    for call, _ in run.calls():
        for batch, head in run.heads():
            length, units = run.length(batch, call), run.units(batch, head)
            if not all(units):
                raise Broken(f"{where(call, batch, head)}: unit {units.index([])} of {len(units)} is empty")
            covered = sorted(position for unit in units for position in unit)
            expected = list(range(min(policy.sink_size, length), length - run.window(batch, head)))
            if covered != expected:
                raise Broken(f"{where(call, batch, head)}: units cover the positions {covered}, expected {expected}")
            positions = run.layer.positions.of(batch, length)[head]
            if sorted(positions.tolist()) != list(range(length)):
                raise Broken(f"{where(call, batch, head)}: the rows hold the positions {positions.tolist()}")


def kv_is_exact(policy: Policy, case: Case, execution: Execution) -> None:
    """A row that is left holds the key and the value of its position."""
    run = start(policy, case, execution)
    for call, _ in run.calls():
        for batch in range(case.batch_size):
            length = run.length(batch, call)
            if length == 0:
                continue
            rows = run.layer.memory.read(batch, length)
            positions = run.layer.positions.of(batch, length)
            width = run.text.keys.shape[-1]
            stored = ("key", rows[..., :width], run.text.keys), ("value", rows[..., width:], run.text.values)
            for head in range(case.num_kv_heads):
                for what, states, own in stored:
                    same = (states[head] == own[batch, head, positions[head] + case.padding[batch]]).all(-1)
                    same |= ~run.layer.is_left(batch, head, length)
                    if not same.all():
                        row = int((~same).nonzero()[0])
                        raise Broken(
                            f"{where(call, batch, head)}: row {row} does not hold the {what} of its position "
                            f"{int(positions[head, row])}"
                        )


def no_token_is_lost(policy: Policy, case: Case, execution: Execution) -> None:
    """Attended and retrievable positions are all there are, and none is attended twice."""
    run = start(policy, case, execution)
    for call, _ in run.calls():
        if call.is_prompt:
            continue
        positions = attended(run.layer)
        for batch, head in run.heads():
            seen = positions[batch][head]
            retrievable = [position for unit in run.units(batch, head) for position in unit]
            twice = sorted({position for position in seen if seen.count(position) > 1})
            if twice:
                raise Broken(f"{where(call, batch, head)}: the positions {twice} are attended twice")
            lost = sorted(set(range(run.length(batch, call))) - {*seen, *retrievable})
            if lost:
                raise Broken(f"{where(call, batch, head)}: the positions {lost} are neither attended nor in a unit")


def attended_tokens_are_seen_alone(policy: Policy, case: Case, execution: Execution) -> None:
    """A step's output is attention over the positions that it says it attends to."""
    if Invariant.EXACT_KV not in policy.promises:
        return  # attention sees what the store gives back, and the text does not tell what that is
    run = start(policy, case, execution)
    for call, out in run.calls():
        if call.is_prompt:
            continue
        expected = attention_over(run.text, case, run.layer.layout, call.start, attended(run.layer))
        said = "attention over the attended positions"
        require_close([expected], [out], 1e-10, said, "the layer", f"step at column {call.start}, output")


def budget_is_exact(policy: Policy, case: Case, execution: Execution) -> None:
    """Where a selection is due it takes the budget or, if that is less, all there is; elsewhere nothing goes."""
    tape = Tape()
    run = start(tape.wrap(policy), case, execution)
    before: dict[tuple[int, int], list[int]] = {}
    ahead: Tensor | None = None
    for call, _ in run.calls():
        decisions = [made for made in tape.decisions if isinstance(made, Decision)]
        tape.decisions.clear()
        if call.is_prompt:
            before, ahead = {}, None
            continue
        if not decisions:
            raise Broken(f"step at column {call.start}: the trigger was not asked")
        decision = decisions[-1]  # on review, where the trigger reviews
        # What the step before asked for ahead is selected in this one.
        due = decision.due if ahead is None else decision.due | ahead
        ahead = decision.ahead
        for batch, head in run.heads():
            if decision.full is not None and decision.full[batch, head]:
                before.pop((batch, head), None)  # attends to everything, whatever is selected
                continue
            now = run.retrieved(batch, head, call)
            budget = min(policy.selector.budget_in(run.layer.layout), sum(map(len, run.units(batch, head))))
            if due[batch, head] and len(now) != budget:
                raise Broken(
                    f"{where(call, batch, head)}: a selection is due, and {len(now)} tokens are retrieved, "
                    f"expected {budget} (a budget of {policy.selector.budget_in(run.layer.layout)})"
                )
            if not due[batch, head]:
                gone = sorted(set(before.get((batch, head), [])) - set(now))
                if len(now) > policy.selector.capacity_in(run.layer.layout) or gone:
                    raise Broken(
                        f"{where(call, batch, head)}: no selection is due, but {len(now)} tokens are retrieved, the "
                        f"positions {gone} of the step before not among them"
                    )
            before[batch, head] = now


def sinks_and_window_are_attended(policy: Policy, case: Case, execution: Execution) -> None:
    """The first `sink_size` and the last `window_size` positions, at every step."""
    run = start(policy, case, execution)
    for call, _ in run.calls():
        for batch, head in run.heads() if not call.is_prompt else ():
            length = run.length(batch, call)
            must = {*range(min(policy.sink_size, length)), *range(max(0, length - policy.window_size), length)}
            missing = sorted(must - set(run.layer.attended_positions(batch, head).tolist()))
            if missing:
                raise Broken(
                    f"{where(call, batch, head)}: of {policy.sink_size} sinks and the last {policy.window_size} of "
                    f"{length} positions, {missing} are not attended"
                )


def watch(policy: Policy, case: Case) -> tuple[Run, Any, Any]:
    """An offload run, its memory and its store, which is watched."""
    layer, memory, store = watched_layer(policy, case)
    return Run(layer=layer, text=case.text(layer.layout), case=case), memory, store


def require_count(where: str, what: str, counted: float, seen: float) -> None:
    """A counter says what was seen."""
    if counted != seen:
        raise Broken(f"{where}: {counted} {what} are counted, {seen} were seen to move")


def bytes_are_counted(policy: Policy, case: Case, execution: Execution) -> None:
    """The counters, and the report, say what was seen to move; `dense` moves nothing, and counts the rows that would
    have come."""
    run, memory, store = watch(policy, case)
    # A store may pack rows; what is seen of them are unpacked ones.
    layout = run.layer.layout
    packing = policy.transfer.row_bytes(layout) / layout.row_bytes if store.host_bytes() > 0 else 0
    if execution == "dense":
        dense = case.layer(policy, execution)
        for layer in (dense, run.layer):
            play(layer, run.text, case)
        require_count("dense", "bytes to the host", dense.memory.traffic.bytes_to_host, 0)
        require_count("dense", "bytes to the device", dense.memory.traffic.bytes_to_device(1), 0)
        if not torch.equal(dense.stats.rows_recalled, run.layer.stats.rows_recalled):
            raise Broken(
                f"dense counts the recalled rows {dense.stats.rows_recalled.tolist()}, "
                f"offload {run.layer.stats.rows_recalled.tolist()}"
            )
        return
    for call, _ in run.calls():
        place = f"{'prompt' if call.is_prompt else 'step'} at column {call.stop - 1}"
        require_count(place, "bytes to the host", memory.traffic.bytes_to_host, packing * store.written)
        recalled = int(run.layer.stats.rows_recalled.sum())
        require_count(place, "recalled rows", recalled, store.recalled)
        loaded = memory.traffic.bytes_to_device(recalled)
        require_count(place, "bytes to the device", loaded, packing * store.loaded)
    report = make_report(policy, "offload", [run.layer], Timeline(), 0)
    require_count("report", "bytes to the host", report.bytes_to_host, packing * store.written)
    require_count("report", "recalled rows", report.rows_recalled, store.recalled)
    require_count("report", "bytes to the device", report.bytes_to_device, packing * store.loaded)


def resident_rows_stay(policy: Policy, case: Case, execution: Execution) -> None:
    """A recall brings what is wanted and not there, and what is wanted and there keeps its slot; only `offload` has
    slots."""
    run, memory, store = watch(policy, case)
    original = memory.recall

    def recall(rows: Tensor, count: Tensor, due: Tensor, *others: Any, **named: Any) -> None:
        before = memory.slots.resident_rows.clone()
        original(rows, count, due, *others, **named)
        for batch, head in run.heads():
            held, now = before[batch, head].tolist(), memory.slots.resident_rows[batch, head].tolist()
            came = sorted(row for row in store.incoming[batch, head].tolist() if row >= 0)
            place = f"row {batch}, KV head {head}"
            if not due[batch, head]:
                if came or now != held:
                    raise Broken(f"{place}: no selection is due, but rows {came} came, and {held} became {now}")
                continue
            wanted = [row for row in rows[batch, head].tolist() if row >= 0]
            missing = sorted(set(wanted) - set(held))
            if came != missing:
                raise Broken(f"{place}: of the rows {wanted}, {missing} are not resident; {came} came")
            if sorted(row for row in now if row >= 0) != sorted(wanted):
                raise Broken(f"{place}: the rows {wanted} were selected, {now} are resident")
            moved = [row for slot, row in enumerate(held) if row in wanted and now[slot] != row]
            if moved:
                raise Broken(f"{place}: the rows {moved} were resident, and lost their slots")

    memory.recall = recall
    for _ in run.calls():
        pass


def reset_repeats(policy: Policy, case: Case, execution: Execution) -> None:
    """After a reset, with another text in between, outputs, positions and counts are the same, bit by bit."""
    layer = case.layer(policy, execution)
    layer.reserve(case.num_tokens)
    text = case.text(layer.layout)
    # Where tokens were generated one by one, it has a prompt; and no padding.
    turns = (Turn(chunks=(max(1, case.num_tokens - 1),), num_steps=1),)
    between = evolve(case, turns=turns, padding=(0,) * case.batch_size, seed=case.seed + 1)
    first = play(layer, text, case)
    report = counters(layer)
    layer.reset()
    require_counters(counters(case.layer(policy, execution)), counters(layer), "a new layer", "one that was reset")
    layer.reserve(between.num_tokens)
    play(layer, between.text(layer.layout), between)
    layer.reset()
    require_equal_traces(first, play(layer, text, case), 0, "the first run", "the run after a reset")
    require_counters(report, counters(layer), "the first run", "the run after a reset")


def counters(layer: RetrievalLayer) -> dict[str, Any]:
    """Everything that a layer reports, but for what it holds."""
    report = make_report(layer.policy, "any", [layer], Timeline(), 0).to_dict()
    return {key: value for key, value in report.items() if not key.endswith(("kv_bytes", "index_bytes"))}


def require_counters(expected: dict[str, Any], actual: dict[str, Any], who: str, other: str) -> None:
    """The same report."""
    for key, value in expected.items():
        if actual[key] != value:
            raise Broken(f"{key}: {who} reports {value}, {other} {actual[key]}")


def rows_are_independent(policy: Policy, case: Case, execution: Execution) -> None:
    """A row alone and without padding has the positions and outputs that it has in the batch."""
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    together = play(layer, text, case)
    for batch, padding in enumerate(case.padding):
        single = case.alone(batch)
        alone = play(single.layer(policy, execution), text.row(batch, padding), single)
        who, other = f"row {batch} alone (below: row 0)", "the same row in the batch"
        require_equal_positions(alone.attended, [[rows[batch]] for rows in together.attended], who, other)
        outputs = [out[batch : batch + 1] for out in together.outputs]
        require_close(alone.outputs, outputs, 1e-10, who, other, "output of decode step")
        whole = torch.cat(together.prompts, 2)[batch : batch + 1]
        own = torch.cat(alone.prompts, 2)
        require_close([own], [whole[:, :, padding:]], 1e-10, who, other, "output of the prompts")
        if whole[:, :, :padding].any():
            raise Broken(f"row {batch}: the output at padding is not zero")


PROPERTIES: dict[Invariant, Property] = {
    Invariant.UNITS_DISJOINT: units_are_disjoint,
    Invariant.NO_TOKEN_LOST: no_token_is_lost,
    Invariant.EXACT_BUDGET: budget_is_exact,
    Invariant.ALWAYS_ATTENDED: sinks_and_window_are_attended,
    Invariant.BYTES_COUNTED: bytes_are_counted,
    Invariant.RESIDENT_STAYS: resident_rows_stay,
    Invariant.RESET_REPEATS: reset_repeats,
    Invariant.ROW_INDEPENDENT: rows_are_independent,
    Invariant.EXACT_KV: kv_is_exact,
    Invariant.ATTENDED_ONLY: attended_tokens_are_seen_alone,
}
