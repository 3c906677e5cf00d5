"""When a layer asks its stages, and what it tells them."""

from typing import Any

import pytest
import torch
from attrs import evolve, field, frozen
from torch import Tensor

from kvframe import (
    Decision,
    FixedStride,
    LayerLayout,
    MeanKey,
    Scorer,
    StepInputs,
    TokenUnits,
    TopBudget,
    Trigger,
    UnitTable,
)
from kvframe import policy as make_policy
from kvframe.stages import UnitBuilder
from kvframe.testing.cases import Case, Turn, make_call

EXECUTIONS = pytest.mark.parametrize("execution", ["dense", "offload"])
CASE = Case(padding=(0, 4), turns=(Turn(chunks=(13, 9), num_steps=7), Turn(chunks=(5,), num_steps=4)))


@frozen(kw_only=True, eq=False)
class Log:
    """What stages were told, in order."""

    entries: list[tuple[str, Any]] = field(factory=list)

    def of(self, name: str) -> list[Any]:
        """What one method was told."""
        return [told for which, told in self.entries if which == name]


@frozen(kw_only=True)
class LoggedTrigger(Trigger):
    name = "logged"
    log: Log
    stage: Trigger

    def init(self, layout: LayerLayout) -> Any:
        return self.stage.init(layout)

    def begin(self, query: Tensor, state: Any) -> None:
        self.log.entries.append(("begin", query.clone()))
        self.stage.begin(query, state)

    def step(self, inputs: StepInputs, state: Any) -> Decision:
        decision = self.stage.step(inputs, state)
        self.log.entries.extend([("step", inputs.query.clone()), ("decision", decision)])
        return decision


@frozen(kw_only=True)
class LoggedScorer(Scorer):
    name = "logged"
    log: Log

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        return MeanKey().index(keys, values, unit_ids, num_units)

    def score(self, inputs: StepInputs, index: Any, units: UnitTable) -> Tensor:
        self.log.entries.append(("score", inputs.query.clone()))
        return MeanKey().score(inputs, index, units)


@frozen(kw_only=True)
class LoggedUnits(TokenUnits):
    name = "logged"
    log: Log

    def boundary(self, inputs: StepInputs, decision: Decision, state: Any) -> Tensor | None:
        self.log.entries.append(("boundary", decision))
        return None


def run(log: Log, execution: str, case: Case = CASE) -> Any:
    """A layer under logged stages after all calls of a case, and its text."""
    units: UnitBuilder = LoggedUnits(log=log)
    policy = make_policy("louiskv", sink_size=2, window_size=4).swap(
        trigger=LoggedTrigger(log=log, stage=FixedStride(stride=3)),
        units=units,
        scorer=LoggedScorer(log=log),
        selector=TopBudget(token_budget=6),
    )
    layer = case.layer(policy, execution)
    text = evolve(case, turns=(*case.turns, Turn(chunks=(10,), num_steps=0))).text(layer.layout)
    for call in case.calls():
        make_call(layer, text, case, call)
    return layer, text


def assert_queries(told: list[Tensor], text: Any, columns: list[int]) -> None:
    """These are the queries of these columns; padding is nobody's."""
    assert len(told) == len(columns)
    for query, column in zip(told, columns):
        torch.testing.assert_close(query, text.query[:, :, column], atol=0, rtol=0, equal_nan=True)


@EXECUTIONS
def test_trigger_sees_every_query(execution: str):
    """`begin` gets the query of a chunk's last token, `step` that of every generated one."""
    log = Log()
    _, text = run(log, execution)

    assert_queries(log.of("begin"), text, [12, 21, 33])
    assert_queries(log.of("step"), text, [*range(22, 29), *range(34, 38)])


@EXECUTIONS
def test_nothing_is_scored_where_nothing_is_due(execution: str):
    """The scorer is asked at the trigger's steps and at no other, about the query of that step."""
    log = Log()
    _, text = run(log, execution)

    assert_queries(log.of("score"), text, [22, 25, 28, 34, 37])


@EXECUTIONS
def test_units_hear_of_the_decision(execution: str):
    """A step's boundary follows from its own decision."""
    log = Log()
    run(log, execution)
    heard, made = log.of("boundary"), log.of("decision")

    assert len(heard) == len(made) == 11
    assert all(one is other for one, other in zip(heard, made))


@EXECUTIONS
def test_proposed_tokens(execution: str):
    """The trigger hears of proposed tokens once they are kept; a prompt's proposed tokens do not end it."""
    log = Log()
    layer, text = run(log, execution)
    log.entries.clear()
    layer.decode(*text.span(38, 43))
    assert_queries(log.of("step"), text, [38])
    layer.crop(2)
    layer.decode(*text.span(41, 42))
    assert_queries(log.of("step"), text, [38, 39, 40, 41])
    layer.prompt(*text.span(42, 48), [6, 6], 4)

    assert_queries(log.of("begin"), text, [45])
