"""The kernels of the units' summaries against their references."""

import pytest
import torch
from guard import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels.dispatch import KernelError
from kvframe_kernels.unit_index import unit_bounds, unit_mean, window_bounds, window_mean

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Of numbers near one, a step between neighbours.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


def make_rows(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows with a gap between them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape[:-1], 2, shape[-1], generator=generator)
    return rows.to(dtype)[..., 1, :]


@settings(max_examples=12)
@given(
    num_problems=st.integers(1, 3), num_tokens=st.sampled_from([0, 1, 20, 70]), num_units=st.sampled_from([1, 7, 20]),
    width=st.sampled_from([16, 48, 128, 256]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_unit_mean(
    device: torch.device, num_problems: int, num_tokens: int, num_units: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    """Equal to the reference; units without rows are zero, and rows of no unit are not looked at."""
    rows = make_rows(num_problems, num_tokens, width, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    unit_ids = torch.randint(0, num_units + 1, (num_problems, num_tokens), generator=generator).sort(1).values
    rows[unit_ids == num_units] = torch.nan
    rows, unit_ids = rows.to(device), unit_ids.to(device)
    mean = unit_mean(rows, unit_ids, num_units, backend="triton")
    expected = unit_mean(rows, unit_ids, num_units, backend="reference")
    bounds = unit_bounds(rows, unit_ids, num_units, backend="triton")

    torch.testing.assert_close(bounds, unit_bounds(rows, unit_ids, num_units, backend="reference"), rtol=0, atol=0)
    assert mean.shape == (num_problems, num_units, width) and mean.dtype == dtype
    torch.testing.assert_close(mean, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_mean_at_size(device: torch.device, dtype: torch.dtype) -> None:
    """Units of a real prompt; the same bits in every run."""
    if device.type == "cpu":
        pytest.skip("too large for the interpreter")
    rows = make_rows(8, 40_000, 128, dtype=dtype, seed=0).to(device)
    unit_ids = torch.randint(0, 3001, (8, 40_000), device=device).sort(1).values
    mean = unit_mean(rows, unit_ids, 3000)

    torch.testing.assert_close(
        mean, unit_mean(rows, unit_ids, 3000, backend="reference"), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    assert torch.equal(mean, unit_mean(rows, unit_ids, 3000, backend="triton"))
    bounds = unit_bounds(rows, unit_ids, 3000)
    torch.testing.assert_close(bounds, unit_bounds(rows, unit_ids, 3000, backend="reference"), rtol=0, atol=0)


@settings(max_examples=20)
@given(
    heads=st.sampled_from([(1, 1), (2, 3)]), num_units=st.sampled_from([1, 5]), width=st.sampled_from([16, 80, 256]),
    first=st.integers(0, 3), ring_size=st.sampled_from([1, 7, 40]), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_window_mean(
    device: torch.device, heads: tuple[int, int], num_units: int, width: int, first: int, ring_size: int,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """Equal to the reference; nothing else changes, whatever the heads that have no unit leaving say."""
    generator = torch.Generator().manual_seed(seed)
    buffer = make_rows(*heads, first + ring_size, width, dtype=dtype, seed=seed)
    buffer[:, :, :first] = torch.nan
    start = torch.randint(0, 100, heads, generator=generator)
    size = torch.randint(0, ring_size + 1, heads, generator=generator)
    columns = torch.randint(-1, num_units + 1, heads, generator=generator)
    leaves = torch.rand(heads, generator=generator) < 0.7
    size[~leaves] = -3  # means nothing there
    arguments = [tensor.to(device) for tensor in (columns, leaves, start, size, buffer)]
    with guarded(device) as guard:
        whole = guard.poisoned(*heads, num_units, 2, width, dtype=dtype)
        window_mean(whole[..., 1, :], *arguments, first, ring_size, backend="triton")
        bounds = guard.poisoned(*heads, num_units, 2, width, dtype=dtype)
        window_bounds(*bounds.unbind(-2), *arguments, first, ring_size, backend="triton")
    expected_bounds = torch.full_like(bounds, torch.nan)
    window_bounds(*expected_bounds.unbind(-2), *arguments, first, ring_size, backend="reference")
    expected = torch.full_like(whole, torch.nan)
    window_mean(expected[..., 1, :], *arguments, first, ring_size, backend="reference")

    torch.testing.assert_close(whole, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    torch.testing.assert_close(bounds, expected_bounds, rtol=0, atol=0, equal_nan=True)
    written = whole[..., 1, 0].isfinite().sum(-1).cpu()
    assert torch.equal(written, (leaves & (columns >= 0) & (columns < num_units)).long())


@pytest.mark.parametrize("dtype, width", [(torch.float64, 16), (torch.float32, 24), (torch.float32, 272)])
def test_what_is_not_served(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """The kernels, asked for by name, refuse other dtypes and widths."""
    rows = torch.ones(1, 1, 4, width, dtype=dtype, device=device)
    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    with pytest.raises(KernelError, match="kernels serve"):
        unit_mean(rows[0], one.expand(1, 4), 2, backend="triton")
    with pytest.raises(KernelError, match="kernels serve"):
        window_mean(rows, one, one.bool(), one, one, rows, 0, 4, backend="triton")
    with pytest.raises(KernelError, match="kernels serve"):
        unit_bounds(rows[0], one.expand(1, 4), 2, backend="triton")
    with pytest.raises(KernelError, match="kernels serve"):
        window_bounds(rows, rows, one, one.bool(), one, one, rows, 0, 4, backend="triton")
