"""Copies of a layer in the middle of a run go their own ways."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe import Policy
from kvframe.testing.cases import Case, attended, make_call
from kvframe.testing.strategies import cases, compositions, examples


@pytest.mark.parametrize("execution", ["dense", "offload", "shadow"])
@examples(0.5)
@given(policy=compositions(), case=cases(), place=st.floats(0, 1))
def test_deep_copy(execution: str, policy: Policy, case: Case, place: float):
    """The original goes on as if it had not been copied, whatever its twin reads; and so does a twin of its own."""
    plain, layer = case.layer(policy, execution), case.layer(policy, execution)
    text, other = case.text(layer.layout), case.text(layer.layout, seed=case.seed + 1)
    calls = list(case.calls())
    middle = round(place * (len(calls) - 1))
    for number, call in enumerate(calls):
        if number == middle:
            twin, stray = copy.deepcopy(layer), copy.deepcopy(layer)
        expected, out = make_call(plain, text, case, call), make_call(layer, text, case, call)
        assert torch.equal(out, expected)
        if number >= middle:
            make_call(stray, other, case, call)
            assert torch.equal(make_call(twin, text, case, call), expected)
            if not call.is_prompt:
                assert attended(twin) == attended(layer) == attended(plain)
