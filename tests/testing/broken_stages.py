"""Stages and stores that each break one promise, and are sound otherwise."""

from typing import Any, ClassVar

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe import (
    Decision,
    HostPool,
    LayerLayout,
    LeavingUnits,
    MeanKey,
    PageUnits,
    Scorer,
    StepInputs,
    TopBudget,
    Trigger,
    Units,
    UnitTable,
)
from kvframe.memory.pool import RowPool

# ---- triggers -------------------------------------------------------------------------------------------------------


@define(eq=False)
class CountState:
    """Steps of a layer, in a tensor."""

    steps: Tensor  # int64 [B, H]


@frozen(kw_only=True)
class Counting(Trigger):
    """Every third step; the base of what goes wrong."""

    name: ClassVar[str] = "counting"
    capturable: ClassVar[bool] = True

    def init(self, layout: LayerLayout) -> CountState:
        return CountState(torch.zeros(layout.batch_size, layout.num_kv_heads, dtype=torch.int64))

    def begin(self, query: Tensor, state: CountState) -> None:
        state.steps.zero_()

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        due = state.steps % 3 == 0
        state.steps.add_(1)
        return Decision(due=due)


@frozen(kw_only=True)
class Listening(Counting):
    """Due in all rows where any row's query is large."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        loud = inputs.query.amax() > 4
        return Decision(due=super().step(inputs, state).due | loud)


@frozen(kw_only=True)
class Remembering(Counting):
    """Counts on the trigger itself, through every reset."""

    seen: list[int] = field(factory=list, eq=False, repr=False, init=False)

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        self.seen.append(1)
        state.steps.add_(1)
        return Decision(due=torch.full_like(state.steps, len(self.seen) % 3 == 0, dtype=torch.bool))


@frozen(kw_only=True)
class OneForAll(Counting):
    """One flag, where each KV head needs one."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        return Decision(due=super().step(inputs, state).due[:, :1])


@frozen(kw_only=True)
class Reading(Counting):
    """Asks the device whether anything is due."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        decision = super().step(inputs, state)
        if decision.due.any():
            decision.due.fill_(True)
        return decision


@frozen(kw_only=True)
class Listing(Counting):
    """Takes the counters to the host as a list, which no operation of torch shows."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        steps = state.steps.tolist()
        state.steps.add_(1)
        return Decision(due=torch.tensor([[step % 3 == 0 for step in row] for row in steps]))


@frozen(kw_only=True)
class Masking(Counting):
    """Indexes by a mask."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        due = state.steps % 3 == 0
        state.steps[due] = state.steps[due] + 0
        state.steps.add_(1)
        return Decision(due=due)


@frozen(kw_only=True)
class Rebinding(Counting):
    """Puts a new tensor into its state."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        due = state.steps % 3 == 0
        state.steps = state.steps + 1
        return Decision(due=due)


@define(eq=False)
class PlainState:
    """Steps of a layer, as a number."""

    steps: int = 0


@frozen(kw_only=True)
class CountingInPython(Counting):
    """Counts with a number, which a graph would not."""

    def init(self, layout: LayerLayout) -> PlainState:
        return PlainState()

    def begin(self, query: Tensor, state: PlainState) -> None:
        state.steps = 0

    def step(self, inputs: StepInputs, state: PlainState) -> Decision:
        heads = (inputs.layout.batch_size, inputs.layout.num_kv_heads)
        state.steps += 1
        return Decision(due=torch.full(heads, state.steps % 3 == 1))


_CALLS = [0]


@frozen(kw_only=True)
class Alternating(Counting):
    """Does something else every other time, by a counter that nobody sees."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        _CALLS[0] += 1
        due = super().step(inputs, state).due
        return Decision(due=due if _CALLS[0] % 2 else due.clone())


@frozen(kw_only=True)
class Failing(Counting):
    """Fails at the third step."""

    def step(self, inputs: StepInputs, state: CountState) -> Decision:
        if int(state.steps.max()) >= 5:
            raise IndexError("five is enough")
        return super().step(inputs, state)


# ---- units ----------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Forgetting(PageUnits):
    """Puts a token of each block into two units, and another into none."""

    name: ClassVar[str] = "forgetting"

    def build(self, keys: Tensor) -> Units:
        units = super().build(keys)
        order = units.order.clone()
        order[:, -1] = 0
        return Units(order=order, sizes=units.sizes)


# ---- scorers --------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Comparing(MeanKey):
    """Scores relative to the best of all rows of the batch, which reorders some."""

    name: ClassVar[str] = "comparing"

    def score(self, inputs: StepInputs, index: Any, units: UnitTable) -> Tensor:
        scores = super().score(inputs, index, units)
        best = scores.amax(dim=(0, 1), keepdim=True)
        return torch.where(scores == -torch.inf, scores, (scores - 0.5 * best).abs())


@frozen(kw_only=True)
class ScoringNothing(MeanKey):
    """Gives units that do not exist a score."""

    name: ClassVar[str] = "scoring-nothing"

    def score(self, inputs: StepInputs, index: Any, units: UnitTable) -> Tensor:
        return super().score(inputs, index, units).clamp(min=-1e9)


@frozen(kw_only=True)
class ExtendingBadly(MeanKey):
    """What leaves the window is indexed by its first key."""

    name: ClassVar[str] = "extending-badly"

    def extend(self, index: Any, unit: LeavingUnits) -> None:
        Scorer.extend(self, index, unit)
        for tensor in index.values():
            tensor.mul_(1.01)


# ---- selectors ------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Half(TopBudget):
    """Takes half of what it may."""

    name: ClassVar[str] = "half"

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        rows, count = super().select(inputs, scores, units)
        count = (count + 1) // 2
        return rows.masked_fill(torch.arange(rows.shape[-1]) >= count[..., None], -1), count


@frozen(kw_only=True)
class Twice(TopBudget):
    """Takes its best row a second time, in the place of the last one."""

    name: ClassVar[str] = "twice"

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        rows, count = super().select(inputs, scores, units)
        last = (count - 1).clamp(min=0)[..., None]
        return rows.scatter(-1, last, rows[..., :1]), count


@frozen(kw_only=True)
class Unplain(TopBudget):
    """Has an option that plain data cannot hold."""

    name: ClassVar[str] = "unplain"
    heads: frozenset[int] = frozenset({1})


@frozen(kw_only=True)
class Renaming(TopBudget):
    """Has an option that is another one after the way through plain data."""

    name: ClassVar[str] = "renaming"
    heads: list[int] = field(factory=lambda: [1])


# ---- transfers ------------------------------------------------------------------------------------------------------


class Rounding(RowPool):
    """Keeps rows in fewer bits than it says."""

    def write(self, batch: int, start: int, rows: Tensor) -> None:
        super().write(batch, start, rows.bfloat16().to(rows.dtype))


class Cheap(RowPool):
    """Counts half of what it writes."""

    def write(self, batch: int, start: int, rows: Tensor) -> None:
        before = self.traffic.rows_written
        super().write(batch, start, rows)
        self.traffic.rows_written = before + (self.traffic.rows_written - before) // 2


class Overwriting(RowPool):
    """Clears the slots that nothing was asked for."""

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        super().recall(incoming, k_slots, v_slots)
        k_slots.masked_fill_((incoming < 0)[..., None], 0.0)


class Neighbour(RowPool):
    """Brings the row behind the one that was asked for."""

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        super().recall(torch.where(incoming > 0, incoming - 1, incoming), k_slots, v_slots)


@frozen(kw_only=True)
class Pool(HostPool):
    """Any of these."""

    name: ClassVar[str] = "pool"
    kind: type[RowPool]

    def init(self, layout: LayerLayout, num_rows: int) -> RowPool:
        return self.kind(layout, num_rows, torch.device("cpu"), crosses_link=True)
