"""Segments of the output."""

import math

import pytest
import torch
from helpers import unit_lists
from hypothesis import given
from hypothesis import strategies as st

from kvframe import Decision, StepInputs
from kvframe.errors import ConfigError
from kvframe.testing.cases import make_layout
from kvframe_louis import SegmentUnits


@given(num_tokens=st.integers(1, 60), min_segment=st.integers(1, 9), max_segment=st.integers(1, 9))
def test_segments_of_a_prompt(num_tokens: int, min_segment: int, max_segment: int):
    """A prompt is cut into runs of the longest segment."""
    units = SegmentUnits(min_segment=min_segment, max_segment=max_segment).build(torch.zeros(1, num_tokens, 2))
    sizes = [len(unit) for unit in unit_lists(units, 0)]

    assert sizes == [max_segment] * (num_tokens // max_segment) + [num_tokens % max_segment] * (
        num_tokens % max_segment > 0
    )
    assert len(sizes) == math.ceil(num_tokens / max_segment)


def test_segments_end_where_the_trigger_is_due():
    """The boundary is the trigger's decision."""
    layout = make_layout()
    due = torch.tensor([[True, False], [False, True]])
    units = SegmentUnits()
    inputs = StepInputs(query=torch.ones(2, 4, 8), layout=layout)

    assert torch.equal(units.boundary(inputs, Decision(due=due), units.init(layout)), due)


@pytest.mark.parametrize("name", ["min_segment", "max_segment"])
@pytest.mark.parametrize("value", [0, -1, 4.0, "4", None])
def test_segment_options_that_are_none(name: str, value: object):
    """A segment has at least one token."""
    with pytest.raises(ConfigError, match=rf"SegmentUnits\.{name} must be an integer >= 1, got"):
        SegmentUnits(**{name: value})
