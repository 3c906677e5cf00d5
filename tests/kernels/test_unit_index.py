"""The summaries of units against their definitions, in Python floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.unit_index import unit_bounds, unit_mean, window_bounds, window_mean


@given(
    num_problems=st.integers(1, 3),
    num_tokens=st.integers(0, 30) | st.sampled_from([63, 111]),
    num_units=st.integers(1, 9),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_definition(num_problems: int, num_tokens: int, num_units: int, width: int, seed: int):
    """Every unit has the mean of its rows; one without rows has zero; rows of none do not count."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_problems, num_tokens, width, generator=generator, dtype=torch.float64)
    unit_ids = torch.randint(0, num_units + 1, (num_problems, num_tokens), generator=generator).sort(1).values
    rows[unit_ids == num_units] = torch.inf
    mean = unit_mean(rows, unit_ids, num_units)
    lower, upper = unit_bounds(rows, unit_ids, num_units)

    assert mean.shape == lower.shape == upper.shape == (num_problems, num_units, width)
    for problem in range(num_problems):
        for unit in range(num_units):
            members = [rows[problem, t].tolist() for t in range(num_tokens) if unit_ids[problem, t] == unit]
            expected = [math.fsum(column) / len(members) for column in zip(*members, strict=True)] or [0.0] * width
            assert mean[problem, unit].tolist() == pytest.approx(expected, abs=1e-14)
            assert lower[problem, unit].tolist() == ([min(column) for column in zip(*members)] or [0.0] * width)
            assert upper[problem, unit].tolist() == ([max(column) for column in zip(*members)] or [0.0] * width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision(dtype: torch.dtype):
    """Sums are taken in at least float32: 4,097 equal rows have that row as their mean, in their own dtype."""
    row = torch.tensor([0.7109375, -3.0], dtype=dtype)
    mean = unit_mean(row.expand(1, 4097, 2), torch.zeros(1, 4097, dtype=torch.int64), 1)

    assert mean.dtype == dtype
    torch.testing.assert_close(mean[0, 0], row, atol=1e-4, rtol=0)


@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    num_units=st.integers(0, 4),
    width=st.integers(1, 5),
    first=st.integers(0, 3),
    ring_size=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_window_definition(heads: tuple[int, int], num_units: int, width: int, first: int, ring_size: int, seed: int):
    """The unit that leaves has the mean and the bounds of its rows in the ring; nothing else is written."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(*heads, 2 * (first + ring_size), width, generator=generator, dtype=torch.float64)[:, :, ::2]
    index = torch.randn(*heads, 2 * num_units, width, generator=generator, dtype=torch.float64)[:, :, ::2]
    before = index.clone()
    leaves = torch.rand(heads, generator=generator) < 0.6
    start = torch.randint(0, 50, heads, generator=generator)
    size = torch.randint(1, ring_size + 1, heads, generator=generator)
    columns = torch.randint(-1, num_units + 1, heads, generator=generator)
    used = set()
    for head in torch.cartesian_prod(*map(torch.arange, heads)).tolist():
        b, h = head
        if leaves[b, h]:
            used |= {(b, h, first + (int(start[b, h]) + i) % ring_size) for i in range(int(size[b, h]))}
    for b, h, n in torch.cartesian_prod(*map(torch.arange, buffer.shape[:3])).tolist():
        if (b, h, n) not in used:
            buffer[b, h, n] = torch.nan
    lower, upper = index.clone(), index.clone()
    window_mean(index, columns, leaves, start, size, buffer, first, ring_size)
    window_bounds(lower, upper, columns, leaves, start, size, buffer, first, ring_size)

    for b, h, u in torch.cartesian_prod(*map(torch.arange, index.shape[:3])).tolist():
        if leaves[b, h] and columns[b, h] == u:
            members = [slot for batch, head, slot in used if (batch, head) == (b, h)]
            columns_of_rows = list(zip(*(buffer[b, h, slot].tolist() for slot in members), strict=True))
            expected = [math.fsum(column) / len(members) for column in columns_of_rows]
            assert index[b, h, u].tolist() == pytest.approx(expected, abs=1e-14)
            assert lower[b, h, u].tolist() == [min(column) for column in columns_of_rows]
            assert upper[b, h, u].tolist() == [max(column) for column in columns_of_rows]
        else:
            assert all(torch.equal(one[b, h, u], before[b, h, u]) for one in (index, lower, upper))


def test_window_precision():
    """Sums are taken in float32, the mean is rounded once."""
    row = torch.tensor([0.7109375, -3.0]).bfloat16()
    index = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
    one = torch.ones(1, 1, dtype=torch.int64)
    window_mean(index, one - 1, one.bool(), one, one * 999, row.expand(1, 1, 999, 2), 0, 999)

    assert torch.equal(index[0, 0, 0], row)
