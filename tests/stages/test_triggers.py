"""The core's triggers: at which steps a selection is due."""

import pytest
import torch
from helpers import stage_id, step_inputs
from hypothesis import given
from hypothesis import strategies as st

from kvframe import EveryStep, FixedStride, Never, Once, StepInputs, Trigger
from kvframe.errors import ConfigError
from kvframe.testing.cases import make_layout
from kvframe.testing.small import small_stages


def fire(trigger: Trigger, turns: list[int]) -> list[list[bool]]:
    """Whether each step of each turn is due; the decision is the same for every row and head."""
    layout = make_layout(batch_size=2, num_kv_heads=3)
    state = trigger.init(layout)
    query = torch.ones(2, layout.num_qo_heads, layout.head_dim, dtype=layout.dtype)
    fired = []
    for num_steps in turns:
        trigger.begin(query, state)
        fired.append([])
        for _ in range(num_steps):
            due = trigger.step(StepInputs(query=query, layout=layout), state).due
            assert due.shape == (2, 3) and due.dtype == torch.bool
            assert due.all() or not due.any()
            fired[-1].append(bool(due.all()))
    return fired


turns = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@given(turns=turns)
def test_every_step(turns: list[int]):
    """Every step."""
    assert fire(EveryStep(), turns) == [[True] * num for num in turns]


@given(turns=turns)
def test_never(turns: list[int]):
    """No step."""
    assert fire(Never(), turns) == [[False] * num for num in turns]


@given(turns=turns)
def test_once(turns: list[int]):
    """The first step of every turn."""
    assert fire(Once(), turns) == [[step == 0 for step in range(num)] for num in turns]


@given(turns=turns, stride=st.integers(1, 14))
def test_fixed_stride(turns: list[int], stride: int):
    """The first step of every turn, and every `stride`-th from there."""
    assert fire(FixedStride(stride=stride), turns) == [[step % stride == 0 for step in range(num)] for num in turns]


@pytest.mark.parametrize("trigger", small_stages("trigger"), ids=stage_id)
def test_states_are_apart(trigger: Trigger):
    """Two layers under one trigger, which is a setting and holds no state, decide on their own."""
    layout = make_layout()
    query = torch.ones(2, layout.num_qo_heads, layout.head_dim, dtype=layout.dtype)
    inputs = step_inputs(layout, query=query)
    first, second = trigger.init(layout), trigger.init(layout)
    trigger.begin(query, first)
    trigger.begin(query, second)
    alone = [trigger.step(inputs, first).due.clone() for _ in range(3)]
    later = [trigger.step(inputs, second).due.clone() for _ in range(3)]

    assert all(torch.equal(one, other) for one, other in zip(alone, later, strict=True))


@pytest.mark.parametrize("stride", [0, -1, 1.5, "3", None, True])
def test_stride_that_is_none(stride: object):
    """A stride is a whole number of at least one; the message names field and value."""
    with pytest.raises(ConfigError, match=r"FixedStride\.stride must be an integer >= 1, got"):
        FixedStride(stride=stride)
