"""The kernels of `kept_lse` and `missed_share` against their references."""

import math

import pytest
import torch
from guard import guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvframe_kernels.append_token import Slots
from kvframe_kernels.dispatch import is_interpreted
from kvframe_kernels.missed_share import (
    exceeds,
    exceeds_reference,
    kept_lse,
    kept_lse_reference,
    missed_share,
    missed_share_reference,
)
from kvframe_kernels.missed_share import triton_kernel as kernels

# tl.dot of bfloat16 returns garbage in the interpreter.
DTYPES = [torch.float16, torch.float32] + ([] if is_interpreted() else [torch.bfloat16])


def check_missed(device: torch.device, seed: int, heads: tuple[int, int], num_rows: int, capacity: int, num: int):
    """The same numbers; the bits are as they were, and what stands behind the count is not looked at."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(2, *heads, num_rows, generator=generator).argsort(-1)
    held = torch.nn.functional.pad(order[0], (0, capacity))[..., :capacity]
    held = torch.where(torch.rand(held.shape, generator=generator) < 0.8, held, -1)
    rows = torch.nn.functional.pad(order[1], (0, num))[..., :num]
    shares = torch.rand(rows.shape, generator=generator).softmax(-1)
    count = torch.randint(0, min(num, num_rows) + 1, heads, generator=generator)
    expected = missed_share_reference(held, rows, count, shares, num_rows)
    behind = torch.arange(num) >= count[..., None]
    marks = torch.zeros(*heads, -(-num_rows // 32), dtype=torch.int32)
    with guarded(device) as guard:
        bits = guard.copy(marks)
        missed = missed_share(
            guard.copy(held), guard.copy(rows.masked_fill(behind, 1 << 40)), guard.copy(count),
            guard.copy(shares.masked_fill(behind, math.nan)), bits, num_rows, backend="triton",
        )  # fmt: skip

    assert torch.equal(missed.cpu(), expected)
    assert not bits.cpu().any()


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16), heads=st.sampled_from([(1, 1), (2, 3)]), num_rows=st.sampled_from([1, 31, 100]),
    capacity=st.sampled_from([1, 7, 40]), num=st.sampled_from([1, 16, 50]), small=st.booleans(),
)  # fmt: skip
def test_missed_equals_reference(
    device: torch.device, seed: int, heads: tuple[int, int], num_rows: int, capacity: int, num: int, small: bool
) -> None:
    """In one tile or in several."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(kernels, "_ROWS", 16)
        check_missed(device, seed, heads, num_rows, capacity, num)


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("capacity, num", [(1024, 16_384), (512, 8192), (1000, 12_345), (4096, 20)])
def test_missed_at_scale(device: torch.device, capacity: int, num: int) -> None:
    """As many candidates as a long context has."""
    check_missed(device, 1, (2, 8), 131_072, capacity, num)


def check_kept(
    device: torch.device, seed: int, dtype: torch.dtype, heads: tuple[int, int], group_size: int, num_sinks: int,
    capacity: int, ring_size: int, width: int,
) -> None:  # fmt: skip
    """The kernel's result is the reference's in float64; NaN in resident slots, which nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = num_sinks + capacity + ring_size
    keys = torch.randn(*heads, num_slots, width, generator=generator).to(dtype)
    query = torch.randn(heads[0], heads[1] * group_size, width, generator=generator).to(dtype)
    bias = torch.zeros(*heads, num_slots).masked_fill(
        torch.rand(*heads, num_slots, generator=generator) < 0.3, -math.inf
    )
    bias[..., -1] = 0
    rows = torch.zeros(*heads, capacity, dtype=torch.int64)
    exact = Slots(keys.double(), keys, bias, rows, num_sinks)
    expected = kept_lse_reference(query.double(), exact, 0.3)
    keys[:, :, num_sinks : num_sinks + capacity] = math.nan
    with guarded(device) as guard:
        own = guard.copy(keys)
        slots = Slots(own, own, guard.copy(bias.to(dtype)), guard.copy(rows), num_sinks)
        found = kept_lse(guard.copy(query), slots, 0.3, backend="triton")

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu().double(), expected, atol=1e-4, rtol=1e-5)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES), heads=st.sampled_from([(1, 1), (2, 2)]),
    group_size=st.integers(1, 5), num_sinks=st.sampled_from([0, 3, 16]), capacity=st.sampled_from([0, 5]),
    ring_size=st.sampled_from([1, 61, 70]), width=st.sampled_from([16, 48, 80]),
)  # fmt: skip
@example(1, torch.float16, (1, 2), 19, 4, 3, 20, 32)
def test_kept_equals_reference(
    device: torch.device, seed: int, dtype: torch.dtype, heads: tuple[int, int], group_size: int, num_sinks: int,
    capacity: int, ring_size: int, width: int,
) -> None:  # fmt: skip
    """At awkward sizes."""
    check_kept(device, seed, dtype, heads, group_size, num_sinks, capacity, ring_size, width)


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [((1, 8), 4, 64, 1024, 320, 128), ((2, 4), 7, 0, 100, 513, 256)])
def test_kept_at_scale(device: torch.device, shape: tuple[tuple[int, int], int, int, int, int, int], dtype) -> None:
    """At the sizes of real layers."""
    check_kept(device, 1, dtype, *shape)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**16), heads=st.sampled_from([(1, 1), (2, 3), (9, 8)]))
def test_exceeds_equals_reference(device: torch.device, seed: int, heads: tuple[int, int]) -> None:
    """In one program or in two."""
    generator = torch.Generator().manual_seed(seed)
    missed = torch.randint(0, 4, heads, generator=generator) / 4
    first = torch.rand(heads, generator=generator) < 0.2
    with guarded(device) as guard:
        flags = guard.copy(first)
        found = exceeds(guard.copy(missed), 0.5, flags, backend="triton")

    assert torch.equal(found.cpu(), exceeds_reference(missed, 0.5, first))
    assert not flags.cpu().any()
