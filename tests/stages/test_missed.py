"""MissedShare: where it retrieves, recounted from the tokens and their attention."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvframe
from kvframe import Drop, EveryStep, FixedStride, LayerLayout, MissedShare, Once, Policy, SelectNothing, StepInputs
from kvframe.errors import ConfigError, SlotError
from kvframe.memory.dense import DenseMemory
from kvframe.registry import default_registry
from kvframe.runtime import RetrievalLayer
from kvframe.testing.altered import altered
from kvframe.testing.cases import Case, make_call, make_layout, make_text
from kvframe.testing.strategies import cases, examples, variants
from kvframe.types import Candidates
from kvframe_kernels.select_units import SELECTIONS


def state_of(trigger: MissedShare) -> tuple[Any, StepInputs]:
    """A state behind a prompt, and what a step sees."""
    layout = make_layout(batch_size=1, num_kv_heads=3)
    query = torch.ones(1, layout.num_qo_heads, layout.head_dim, dtype=layout.dtype)
    state = trigger.init(layout)
    trigger.begin(query, state)
    return state, StepInputs(query=query, layout=layout)


def test_review():
    """The first step after a prompt retrieves in every head, the others where more than the share is missed."""
    trigger = MissedShare(share=0.25)
    state, inputs = state_of(trigger)
    reviewed = []
    for missed in ([0.0, 0.0, 0.0], [0.25, 0.2500001, 1.0], [0.0, 0.5, 0.1]):
        assert trigger.step(inputs, state).due.all()
        reviewed.append(trigger.review(inputs, torch.tensor([missed], dtype=torch.float64), state)[0].tolist())
    trigger.begin(inputs.query, state)

    assert reviewed == [[True, True, True], [False, True, True], [False, True, False]]
    assert trigger.review(inputs, torch.zeros(1, 3), state).all()


@given(stride=st.integers(1, 5))
def test_events(stride: int):
    """Segments are cut where the other trigger says, whatever is retrieved."""
    trigger = MissedShare(events=FixedStride(stride=stride))
    state, inputs = state_of(trigger)
    found = [trigger.step(inputs, state).event for _ in range(7)]

    assert [bool(event.all()) for event in found] == [step % stride == 0 for step in range(7)]


def small_policy(share: float) -> Policy:
    """louiskv-plus at the size of a test."""
    return kvframe.policy(
        "louiskv-plus", token_budget=6, oversample=3, bits=8, sink_size=2, window_size=3, cluster_size=3,
        min_segment=2, max_segment=3, missed_share=share, dense_layers=(),
    )  # fmt: skip


def missed_by_hand(memory: DenseMemory, layout: LayerLayout, candidates: Candidates, query: Tensor) -> float:
    """Of row 0 and head 0: softmax over candidates, sinks and window by their exact keys, the mean over query heads;
    the largest of a candidate that is not resident."""
    rows = candidates.rows[0, 0, : int(candidates.count[0, 0])].tolist()
    resident = memory.resident[0, 0].tolist()
    attended = memory.attended()[0, 0].nonzero()[:, 0].tolist()
    keys = memory.keys[0, 0, [*rows, *(row for row in attended if not resident[row])]]
    shares = (query[0, : layout.group_size] @ keys.T * layout.sm_scale).softmax(-1).mean(0)
    return max((float(share) for row, share in zip(rows, shares, strict=False) if not resident[row]), default=0.0)


@examples(0.3)
@given(case=cases(), share=st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_missed_is_of_all_attention(case: Case, share: float):
    """What is reviewed is nearly the share by exact keys, of attention to candidates, sinks and window; where it is
    above the option, the head retrieves."""
    policy, candidates = small_policy(share), []
    num_reviews = 0

    def note(original: Any, *args: Any) -> Any:
        candidates[:] = [original(*args)]
        return candidates[0]

    def watch(original: Any, inputs: StepInputs, missed: Tensor, state: Any) -> Tensor:
        nonlocal num_reviews
        num_reviews += 1
        assert isinstance(layer.memory, DenseMemory)
        exact = missed_by_hand(layer.memory, layer.layout, candidates[0], inputs.query)
        first = state.first.clone()
        made = original(inputs, missed, state)
        assert float(missed[0, 0]) == pytest.approx(exact, abs=0.02)  # the sketch has 8 bits of a number
        assert torch.equal(made, (missed > share) | first)
        return made

    watched = policy.swap(
        trigger=altered(policy.trigger, review=watch), selector=altered(policy.selector, candidates=note)
    )
    layer = case.layer(watched, "dense")
    text = case.text(layer.layout)
    for call in case.calls():
        make_call(layer, text, case, call)

    assert num_reviews <= sum(not call.is_prompt for call in case.calls())


@examples(0.3)
@given(policy=variants(default_registry().policy_spec("louiskv-plus")), case=cases())
def test_limit(policy: Policy, case: Case):
    """No token gets more than all attention: at a share of 1 heads retrieve at the first step of a turn and no more."""
    found = []
    for trigger in (MissedShare(share=1.0, events=Once()), Once()):
        layer = case.layer(policy.swap(trigger=trigger), "dense")
        text = case.text(layer.layout)
        for call in case.calls():
            make_call(layer, text, case, call)
        found.append(layer.stats.tallies[SELECTIONS])

    assert torch.equal(*found)


@pytest.mark.parametrize("share", [-0.1, 1.1, "3", None, True])
def test_share_that_is_none(share: object):
    """A share is a number from 0 to 1."""
    with pytest.raises(ConfigError, match=r"MissedShare\.share must be a number from 0 to 1, got"):
        MissedShare(share=share)


def test_events_that_are_none():
    """Events come from a trigger."""
    with pytest.raises(SlotError, match=r"MissedShare\.events must be a Trigger"):
        MissedShare(events=Drop())


def test_refused_compositions():
    """A selector that weighs no tokens, and a store that drops what is missed, are refused when composed."""
    plus = kvframe.policy("louiskv-plus")
    with pytest.raises(ConfigError, match="does not weigh tokens; use a selector that does, such as SketchRerank"):
        kvframe.policy("louiskv").swap(trigger=MissedShare())
    with pytest.raises(ConfigError, match="does not weigh tokens"):
        plus.swap(selector=SelectNothing())
    with pytest.raises(ConfigError, match="drops what it misses for good; use a transfer that keeps everything"):
        plus.swap(transfer=Drop())


def test_a_query_that_stays():
    """What it attends to is there after the first step: nothing is retrieved again, where every step would."""
    layout = make_layout(batch_size=1, num_kv_heads=2)
    text = make_text(layout, 80, seed=3)
    query, keys, values = text.span(0, 60)
    found = []
    for trigger in (MissedShare(share=0.05), EveryStep()):
        layer = RetrievalLayer(layout, small_policy(0.05).swap(trigger=trigger), 80, "offload")
        layer.prompt(query, keys, values, [60], 60)
        for step in range(60, 70):
            layer.decode(query[:, :, -1:], *text.span(step, step + 1)[1:])
        found.append(layer.stats.tallies[SELECTIONS].tolist())

    assert found == [[[1, 1]], [[10, 10]]]
