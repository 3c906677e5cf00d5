"""The kernels of `unattended_tokens` and `rest_attention` against their references."""

import math

import pytest
import torch
from guard import guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvframe_kernels.dispatch import KernelError, is_interpreted
from kvframe_kernels.rest_attention import (
    rest_attention,
    rest_attention_reference,
    unattended_tokens,
    unattended_tokens_reference,
)
from kvframe_kernels.rest_attention import triton_kernel as kernels
from kvframe_kernels.slot_attention import make_arrivals, slot_attention

# tl.dot of bfloat16 returns garbage in the interpreter.
DTYPES = [torch.float16, torch.float32] + ([] if is_interpreted() else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def check_counts(
    device: torch.device, seed: int, heads: tuple[int, int], num_units: int, capacity: int, offsets_dtype: torch.dtype
) -> None:
    """The same numbers, and nothing behind them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0 if seed % 3 == 0 else 1, 7, (*heads, num_units), generator=generator)
    offsets = torch.zeros(*heads, num_units + 2, dtype=offsets_dtype)
    offsets[..., 1:-1] = sizes.cumsum(-1)
    offsets += 2
    last = int(offsets.max())
    counted = torch.randint(0, num_units + 1, heads, generator=generator)
    counted[0, 0] = num_units
    # Rows of units, of units that do not exist, of none, and empty slots.
    drawn = torch.rand(*heads, last + 5 + capacity, generator=generator).argsort(-1)[..., :capacity]
    rows = torch.where(drawn < last + 5, drawn, -1)
    offsets[torch.arange(num_units + 2) > counted[..., None]] = 4
    expected = unattended_tokens_reference(rows, offsets, counted, num_units)
    with guarded(device) as guard:
        rest = unattended_tokens(
            guard.copy(rows), guard.copy(offsets), guard.copy(counted), num_units, backend="triton"
        )

    assert rest.dtype == expected.dtype == torch.int32
    assert torch.equal(rest.cpu(), expected)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16), heads=st.sampled_from([(1, 1), (2, 3)]),
    num_units=st.sampled_from([1, 2, 15, 33, 70]), capacity=st.sampled_from([1, 7, 16, 50]),
    offsets_dtype=st.sampled_from([torch.int32, torch.int64]), small=st.booleans(),
)  # fmt: skip
def test_counts_equal_reference(
    device: torch.device, seed: int, heads: tuple[int, int], num_units: int, capacity: int,
    offsets_dtype: torch.dtype, small: bool,
) -> None:  # fmt: skip
    """In one range of units or in several, whose bounds rows lie at."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(kernels, "_UNITS", 16)
            patch.setattr(kernels, "_ROWS", 16)
        check_counts(device, seed, heads, num_units, capacity, offsets_dtype)


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("num_units, capacity", [(8192, 1024), (8300, 1000), (40_000, 5000), (511, 4096)])
def test_counts_at_scale(device: torch.device, num_units: int, capacity: int) -> None:
    """As many units as a long context has."""
    check_counts(device, 1, (2, 8), num_units, capacity, torch.int32)


def check_attention(
    device: torch.device, seed: int, dtype: torch.dtype, batch_size: int, num_kv_heads: int, group_size: int,
    num_units: int, width: int, value: int,
) -> None:  # fmt: skip
    """The kernel's result is the reference's in float64; NaN where there is no entry, which is not read."""
    generator = torch.Generator().manual_seed(seed)
    heads = (batch_size, num_kv_heads)
    query = torch.randn(batch_size, num_kv_heads * group_size, 1, width, generator=generator).to(dtype)
    keys, values = (torch.randn(*heads, num_units, size, generator=generator).to(dtype) for size in (width, value))
    rest = torch.randint(0, 18, (*heads, num_units), generator=generator).clamp(min=1).int()
    rest[torch.rand(rest.shape, generator=generator) < 0.3] = 0
    rest[torch.rand(heads, generator=generator) < 0.2] = 0
    scale = 1 / math.sqrt(width)
    expected, expected_lse = rest_attention_reference(query.double(), keys.double(), values.double(), rest, scale)

    nothing = (rest == 0)[..., None]
    with guarded(device) as guard:
        k, v = (guard.poisoned(*heads, num_units + 1, size, dtype=dtype) for size in (width, value))
        k[:, :, :-1], v[:, :, :-1] = keys.masked_fill(nothing, math.nan), values.masked_fill(nothing, math.nan)
        arrivals = guard.copy(make_arrivals(*query.shape[:2], device))
        arguments = (guard.copy(query), k[:, :, :-1], v[:, :, :-1], guard.copy(rest), scale)
        out, lse = rest_attention(*arguments, arrivals=arrivals, backend="triton")
        again, _ = rest_attention(*arguments, backend="triton")
        assert not arrivals.any()

    assert out.dtype == lse.dtype == torch.float32 and torch.equal(out, again)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=1e-4, rtol=1e-4)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES),
    batch_size=st.integers(1, 2), num_kv_heads=st.integers(1, 2), group_size=st.integers(1, 5),
    num_units=st.sampled_from([1, 15, 63, 65, 129]), widths=st.sampled_from([(16, 16), (80, 80), (48, 128)]),
)  # fmt: skip
@example(0, torch.float16, 1, 1, 19, 130, (16, 32))
def test_attention_equals_reference(
    device: torch.device, seed: int, dtype: torch.dtype, batch_size: int, num_kv_heads: int, group_size: int,
    num_units: int, widths: tuple[int, int],
) -> None:  # fmt: skip
    """At awkward sizes; a head without any entry gives 0 and -inf."""
    check_attention(device, seed, dtype, batch_size, num_kv_heads, group_size, num_units, *widths)


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 8, 4, 8192, 128, 128), (8, 8, 4, 8300, 128, 128), (2, 4, 7, 3001, 256, 256), (1, 2, 71, 515, 64, 64)]
)
def test_attention_at_scale(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """At the sizes of real layers."""
    check_attention(device, 1, dtype, *shape)


def test_merged_with_slots(device: torch.device) -> None:
    """Slots and virtual entries, one after the other with the same scratch, are one softmax over both."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(1, 2, *shape, generator=generator).to(device)

    query, slots, entries = torch.randn(1, 6, 1, 32, generator=generator).to(device), randn(70, 32), randn(90, 32)
    rest = torch.randint(0, 9, (1, 2, 90), generator=generator, dtype=torch.int32).to(device)
    arrivals = make_arrivals(1, 6, device)
    extra = rest_attention(query, entries, entries, rest, 0.2, arrivals=arrivals, backend="triton")
    out, _ = slot_attention(query, slots, slots, None, 0.2, extra=extra, arrivals=arrivals, backend="triton")
    everything = torch.cat([slots, entries], 2)
    bias = torch.cat([torch.zeros(1, 2, 70, device=device), rest.log()], -1)
    expected, _ = slot_attention(query, everything, everything, bias, 0.2, backend="reference")

    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_not_served(device: torch.device) -> None:
    """A kernel asked for by name says what it does not serve."""
    means, rest = torch.randn(1, 1, 5, 16, device=device), torch.ones(1, 1, 5, dtype=torch.int32, device=device)
    with pytest.raises(KernelError, match="serves one query, not 2"):
        rest_attention(torch.randn(1, 1, 2, 16, device=device), means, means, rest, 1.0, backend="triton")


@pytest.mark.skipif(is_interpreted(), reason="needs a CUDA device")
def test_in_a_graph(device: torch.device) -> None:
    """Captured launches see the resident rows, units and queries of their replay."""
    query = torch.randn(2, 16, 1, 128, device=device, dtype=torch.float16)
    means = torch.randn(2, 2, 4, 4096, 128, device=device, dtype=torch.float16)
    offsets = (16 * torch.arange(4098, device=device, dtype=torch.int32)).expand(2, 4, -1).contiguous()
    rows = torch.full((2, 4, 300), -1, dtype=torch.int64, device=device)
    num_units = torch.full((2, 4), 4096, device=device)
    arrivals = make_arrivals(2, 16, device)

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        rest = unattended_tokens(rows, offsets, num_units, 4096, backend="triton")
        return rest_attention(query, *means, rest, 0.09, arrivals=arrivals, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend()
    for units in (4096, 1, 0, 777):
        num_units.fill_(units)
        rows.copy_(torch.rand(2, 4, 65_536).argsort(-1)[..., :300])
        query.normal_()
        graph.replay()
        expected, expected_lse = attend()
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
