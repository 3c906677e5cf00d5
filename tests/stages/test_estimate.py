"""EstimateRest: attention over virtual entries, by plain loops; and the case in which the estimate is exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvframe
from kvframe import EstimateRest, EveryStep, MeanKey, Policy, TokenUnits, TopBudget
from kvframe.errors import ConfigError, SlotError
from kvframe.runtime import RetrievalLayer
from kvframe.stages import UnitBuilder
from kvframe.testing.cases import Case, Text, Turn, assert_equal_traces, make_call, play, unit_positions
from kvframe.testing.reference import causal_attention_over
from kvframe.testing.strategies import ScatteredTrigger, cases
from kvframe.testing.strategies import stages as any_stage
from kvframe_baselines.stages import EstimationZone

EXECUTIONS = pytest.mark.parametrize("execution", ["dense", "offload"])


def estimating(units: UnitBuilder, token_budget: int, **sizes: int) -> Policy:
    """A policy that estimates what it does not select, at every step."""
    policy = kvframe.policy("louiskv", dense_layers=(), cluster_size=2, max_segment=3, min_segment=1, token_budget=4)
    return policy.swap(
        trigger=EveryStep(),
        units=units,
        scorer=MeanKey(keep_values=True),
        selector=EstimateRest(selector=TopBudget(token_budget=token_budget)),
        **sizes,
    )


def expected(layer: RetrievalLayer, text: Text, case: Case, column: int, batch: int, qo_head: int) -> list[float]:
    """Softmax attention of one query head over the tokens attended to, and over each unit's mean key and mean value,
    counted once for each of its tokens that is not attended to."""
    head = qo_head // case.group_size
    keys, values = (part[batch, head, case.padding[batch] :].tolist() for part in (text.keys, text.values))
    query = text.query[batch, qo_head, column].tolist()

    def weight(key: list[float]) -> float:
        return math.exp(layer.layout.sm_scale * math.fsum(x * y for x, y in zip(query, key, strict=True)))

    attended = set(layer.attended_positions(batch, head).tolist())
    entries = [(weight(keys[position]), values[position]) for position in attended]
    for unit in unit_positions(layer, batch, head, int(layer.ledger.num_units[batch, head])):
        rest = len(set(unit) - attended)
        means = (
            [math.fsum(column) / len(unit) for column in zip(*(states[position] for position in unit))]
            for states in (keys, values)
        )
        mean_key, mean_value = means
        entries.append((rest * weight(mean_key), mean_value))
    total = math.fsum(share for share, _ in entries)
    return [math.fsum(share * value[d] for share, value in entries) / total for d in range(len(entries[0][1]))]


@EXECUTIONS
@given(
    units=any_stage("units", nested=False),
    case=cases(max_turns=2, max_prompt=30, max_steps=5),
    token_budget=st.integers(4, 9),
    sink_size=st.integers(0, 2),
    window_size=st.integers(1, 4),
)
def test_the_rest_is_estimated(
    execution: str, units: UnitBuilder, case: Case, token_budget: int, sink_size: int, window_size: int
):
    """A step's output is that of one softmax over attended tokens and virtual entries."""
    policy = estimating(units, token_budget, sink_size=sink_size, window_size=window_size)
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    for call in case.calls():
        out = make_call(layer, text, case, call)
        if not call.is_prompt:
            wanted = [
                [expected(layer, text, case, call.start, batch, head) for head in range(layer.layout.num_qo_heads)]
                for batch in range(case.batch_size)
            ]
            torch.testing.assert_close(out[:, :, 0], torch.tensor(wanted, dtype=out.dtype), atol=1e-10, rtol=1e-10)


@EXECUTIONS
@given(case=cases(max_prompt=40), token_budget=st.integers(1, 9), window_size=st.integers(1, 6))
def test_units_of_one_token_are_full_attention(execution: str, case: Case, token_budget: int, window_size: int):
    """An estimate from one token is that token, so that nothing is missing whatever is selected."""
    policy = estimating(TokenUnits(), token_budget, sink_size=1, window_size=window_size)
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    full = causal_attention_over(text, case, layer.layout)
    for call in case.calls():
        out = make_call(layer, text, case, call)
        torch.testing.assert_close(out, full[:, :, call.start : call.stop], atol=1e-10, rtol=1e-10)


@EXECUTIONS
def test_where_nothing_is_selected(execution: str):
    """What was never selected is estimated all the same."""
    policy = estimating(TokenUnits(), 4, sink_size=1, window_size=3).swap(trigger=kvframe.Never())
    case = Case(padding=(0, 5), turns=(Turn(chunks=(17, 9), num_steps=12),))
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    full = causal_attention_over(text, case, layer.layout)
    for call in case.calls():
        out = make_call(layer, text, case, call)
        torch.testing.assert_close(out, full[:, :, call.start : call.stop], atol=1e-10, rtol=1e-10)


def test_a_scorer_without_means():
    """Nothing to estimate from: refused, with a scorer that has it."""
    with pytest.raises(ConfigError, match=r"EstimateRest works with mean keys.*MeanKey\(keep_values=True\)"):
        kvframe.policy("louiskv").swap(selector=EstimateRest(selector=TopBudget()))


def test_a_part_that_is_none():
    """It stands before a selector, and before nothing else."""
    with pytest.raises(SlotError, match=r"EstimateRest\.selector must be a Selector, got MeanKey"):
        EstimateRest(selector=MeanKey())


def test_units_of_a_later_turn():
    """Units that come before the next selection are estimated like any other, the same in both executions."""
    policy = estimating(TokenUnits(), 4, sink_size=0, window_size=1).swap(
        trigger=ScatteredTrigger(seed=2), selector=EstimationZone(token_budget=4, estimated_share=0.3)
    )
    turns = (Turn(chunks=(20,), num_steps=2), Turn(chunks=(20,), num_steps=9), Turn(chunks=(9,), num_steps=5))
    case = Case(padding=(0, 3), turns=turns)
    text = case.text(case.layout())
    dense, offload = (play(case.layer(policy, execution), text, case) for execution in ("dense", "offload"))

    assert_equal_traces(dense, offload, 1e-10)
