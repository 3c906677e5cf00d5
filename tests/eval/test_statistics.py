"""Means and their confidence intervals."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvframe.errors import ConfigError
from kvframe.eval import mean_interval

numbers = st.floats(-100, 100)


@given(st.lists(numbers, min_size=2, max_size=9), st.sampled_from([0.5, 0.9, 0.95]))
def test_against_scipy(values: list[float], confidence: float):
    """scipy's own interval of a mean."""
    stats = pytest.importorskip("scipy.stats")
    found = mean_interval(values, confidence)
    error = stats.sem(values)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=sum(values) / len(values), scale=error or 1e-300)

    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert found.low <= found.mean + 1e-9 and found.mean <= found.high + 1e-9


def test_too_few():
    """One value says nothing of its spread; no value has no mean."""
    found = mean_interval([3.0])

    assert (found.low, found.mean, found.high) == (-math.inf, 3.0, math.inf)
    with pytest.raises(ConfigError, match="at least one value"):
        mean_interval([])
