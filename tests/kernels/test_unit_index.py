"""`unit_mean` against its definition, in Python floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.unit_index import unit_mean


@given(
    num_problems=st.integers(1, 3),
    num_tokens=st.integers(0, 30) | st.sampled_from([63, 111]),
    num_units=st.integers(1, 9),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_definition(num_problems: int, num_tokens: int, num_units: int, width: int, seed: int):
    """Every unit has the mean of its rows, wherever they lie; one without rows has zero; rows of none do not count."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_problems, num_tokens, width, generator=generator, dtype=torch.float64)
    unit_ids = torch.randint(0, num_units + 1, (num_problems, num_tokens), generator=generator)
    rows[unit_ids == num_units] = torch.inf
    mean = unit_mean(rows, unit_ids, num_units)

    assert mean.shape == (num_problems, num_units, width)
    for problem in range(num_problems):
        for unit in range(num_units):
            members = [rows[problem, t].tolist() for t in range(num_tokens) if unit_ids[problem, t] == unit]
            expected = [math.fsum(column) / len(members) for column in zip(*members, strict=True)] or [0.0] * width
            assert mean[problem, unit].tolist() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    "dtype, expected", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_precision(dtype: torch.dtype, expected: torch.dtype):
    """Sums are taken in at least float32: 4,097 equal rows have that row as their mean."""
    row = torch.tensor([0.7109375, -3.0], dtype=dtype)
    mean = unit_mean(row.expand(1, 4097, 2), torch.zeros(1, 4097, dtype=torch.int64), 1)

    assert mean.dtype == expected
    torch.testing.assert_close(mean[0, 0], row.to(expected), atol=1e-4, rtol=0)
