"""The kernels of `slot_attention` against its reference."""

import math
from typing import NamedTuple

import pytest
import torch
from guard import Guard, guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels.dispatch import KernelError, is_interpreted
from kvframe_kernels.slot_attention import Entries, make_arrivals, slot_attention, slot_attention_reference

# tl.dot of bfloat16 returns garbage in the interpreter.
DTYPES = [torch.float16, torch.float32] + ([] if is_interpreted() else [torch.bfloat16])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

STALE = 99.0
"""What an empty slot holds."""


class Case(NamedTuple):
    query: Tensor  # [B, Hq, 1, D]
    k_slots: Tensor  # [B, H, N, D]
    v_slots: Tensor  # [B, H, N, Dv]
    bias: Tensor | None
    lengths: Tensor | None
    entries: Entries | None


def make_case(
    seed: int, dtype: torch.dtype, batch_size: int, num_kv_heads: int, group_size: int, num_slots: int, width: int,
    value: int, biased: bool, limited: bool, num_entries: int,
) -> Case:  # fmt: skip
    """Numbers that the dtype holds, in float64; some slots and some heads empty."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).double()

    heads = (batch_size, num_kv_heads)
    bias = lengths = entries = None
    if biased:
        empty = torch.rand(*heads, num_slots, generator=generator) < 0.4
        empty |= torch.rand(*heads, 1, generator=generator) < 0.2
        bias = randn(*heads, num_slots).masked_fill(empty, -math.inf)
    if limited:
        lengths = torch.randint(0, num_slots + 1, (batch_size,), generator=generator)
    if num_entries:
        counts = torch.randint(0, 18, (*heads, num_entries), generator=generator).int()
        counts[torch.rand(heads, generator=generator) < 0.2] = 0
        entries = Entries(randn(*heads, num_entries, width), randn(*heads, num_entries, value), counts)
    query = randn(batch_size, num_kv_heads * group_size, 1, width)
    return Case(query, randn(*heads, num_slots, width), randn(*heads, num_slots, value), bias, lengths, entries)


def on_device(case: Case, guard: Guard, dtype: torch.dtype, *, token_major: bool) -> Case:
    """Guarded, numbers that would prevail where there is nothing, NaN where nothing may be read; the query is strided,
    with `token_major` the slots, too."""
    num_slots = case.k_slots.shape[2]
    behind = torch.zeros(case.k_slots.shape[:3], dtype=torch.bool)
    if case.lengths is not None:
        behind |= torch.arange(num_slots) >= case.lengths[:, None, None]

    def slots(clean: Tensor) -> Tensor:
        poisoned = clean.to(dtype)
        if case.bias is not None:
            poisoned = poisoned.masked_fill((case.bias == -math.inf)[..., None], STALE)
        poisoned = poisoned.masked_fill(behind[..., None], math.nan)
        return guard.copy(poisoned.transpose(1, 2)).transpose(1, 2) if token_major else guard.copy(poisoned)

    def means(clean: Tensor, counts: Tensor) -> Tensor:
        poisoned = guard.poisoned(*clean.shape[:2], clean.shape[2] + 1, clean.shape[3], dtype=dtype)
        poisoned[:, :, :-1] = clean.to(dtype).masked_fill((counts == 0)[..., None], STALE)
        return poisoned[:, :, :-1]

    entries = case.entries
    if entries is not None:
        keys, values = (means(part, entries.counts) for part in (entries.keys, entries.values))
        entries = Entries(keys, values, guard.copy(entries.counts))
    return Case(
        guard.copy(case.query.to(dtype).transpose(1, 2)).transpose(1, 2),
        slots(case.k_slots),
        slots(case.v_slots),
        None if case.bias is None else guard.copy(case.bias.masked_fill(behind, math.nan).to(dtype)),
        None if case.lengths is None else guard.copy(case.lengths),
        entries,
    )


def check(device: torch.device, case: Case, dtype: torch.dtype, *, token_major: bool = False) -> None:
    """The kernels' result is the reference's, which reads clean slots in float64."""
    scale = 1 / math.sqrt(case.query.shape[-1])
    clean = (case.query, case.k_slots, case.v_slots, case.bias, scale)
    expected, expected_lse = slot_attention_reference(*clean, lengths=case.lengths, entries=case.entries)
    with guarded(device) as guard:
        x = on_device(case, guard, dtype, token_major=token_major)
        args = (x.query, x.k_slots, x.v_slots, x.bias, scale)
        arrivals = guard.copy(make_arrivals(*x.query.shape[:2], device))
        options = {"lengths": x.lengths, "entries": x.entries, "arrivals": arrivals, "backend": "triton"}
        out, lse = slot_attention(*args, **options, need_lse=True)
        again, nothing = slot_attention(*args, **options)
        assert not arrivals.any()

    assert lse is not None and lse.dtype == torch.float32 and out.dtype == dtype
    assert torch.equal(out, again) and nothing is None
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, atol=1e-4, rtol=1e-4)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES),
    batch_size=st.integers(1, 2), num_kv_heads=st.integers(1, 3), group_size=st.integers(1, 5) | st.just(17),
    num_slots=st.sampled_from([1, 2, 15, 63, 64, 65, 127, 129, 200]),
    widths=st.sampled_from([(16, 16), (32, 16), (80, 80), (96, 64), (48, 128), (128, 128)]),
    biased=st.booleans(), limited=st.booleans(), num_entries=st.sampled_from([0, 1, 63, 64, 200]),
    token_major=st.booleans(),
)  # fmt: skip
@example(0, torch.float16, 1, 1, 33, 130, (16, 16), True, True, 70, True)
@example(0, torch.float32, 1, 1, 1, 600, (16, 32), True, False, 0, False)
def test_equals_reference(
    device: torch.device, seed: int, dtype: torch.dtype, batch_size: int, num_kv_heads: int, group_size: int,
    num_slots: int, widths: tuple[int, int], biased: bool, limited: bool, num_entries: int, token_major: bool,
) -> None:  # fmt: skip
    """At awkward sizes; what is empty does not count, and buffers keep their surroundings."""
    case = make_case(
        seed, dtype, batch_size, num_kv_heads, group_size, num_slots, *widths, biased, limited, num_entries
    )
    check(device, case, dtype, token_major=token_major)


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 4, 2048, 128, 128), (8, 8, 4, 2048, 128, 128), (2, 4, 7, 3001, 256, 256), (1, 2, 71, 515, 64, 64),
     (3, 1, 16, 5000, 192, 128), (1, 8, 4, 20_000, 128, 128)],
)  # fmt: skip
@pytest.mark.parametrize(
    "options", [(False, False, 0), (True, False, 0), (False, True, 300), (True, True, 4000), (True, False, 8300)]
)
def test_at_scale(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], options: tuple[bool, bool, int]
) -> None:
    """At the sizes of real layers."""
    check(device, make_case(1, dtype, *shape, *options), dtype)


@pytest.mark.parametrize("limited", [False, True])
def test_nothing_to_see(device: torch.device, limited: bool) -> None:
    """Over empty slots alone: zero, and a log-sum-exp of -inf."""
    query = torch.randn(1, 2, 1, 16, device=device)
    slots = torch.full((1, 1, 70, 16), math.nan if limited else STALE, device=device)
    bias = None if limited else torch.full((1, 1, 70), -math.inf, device=device)
    lengths = torch.zeros(1, dtype=torch.int64, device=device) if limited else None
    out, lse = slot_attention(query, slots, slots, bias, 0.25, lengths=lengths, need_lse=True, backend="triton")

    assert lse is not None and not out.any() and (lse == -math.inf).all()


def test_length_beyond_the_buffer(device: torch.device) -> None:
    """A length larger than the buffer, or a bias with a dimension for the query, reads what is there."""
    query, slots = torch.randn(1, 2, 1, 16, device=device), torch.randn(1, 1, 70, 16, device=device)
    bias = torch.randn(1, 1, 1, 70, device=device)
    lengths = torch.full((1,), 99, device=device)
    out, _ = slot_attention(query, slots, slots, bias, 0.25, lengths=lengths, backend="triton")
    expected, _ = slot_attention_reference(query, slots, slots, bias, 0.25)

    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "num_splits, slot_tiles, entry_tiles, expected",
    [(32, 22, 128, (26, 31)), (4, 22, 128, (4, 5)), (1, 1, 1, (1, 2)), (2, 1, 1, (1, 2)), (256, 3, 5, (5, 8))],
)
def test_share_splits(
    device: torch.device, num_splits: int, slot_tiles: int, entry_tiles: int, expected: tuple[int, int]
) -> None:
    """Slots and entries never share a split, and each has one."""
    from kvframe_kernels.slot_attention.triton_kernel import share_splits

    assert share_splits(num_splits, slot_tiles, entry_tiles) == expected


@pytest.mark.parametrize(
    "num_programs, num_slots, expected",
    [(8, 2048, 16), (64, 2048, 4), (8, 131072, 32), (1, 1, 1), (1, 131072, 256), (1000, 2048, 1)],
)
def test_count_splits(device: torch.device, num_programs: int, num_slots: int, expected: int) -> None:
    """About two programs a multiprocessor, each with enough to do."""
    from kvframe_kernels.slot_attention.triton_kernel import count_splits

    assert count_splits(num_programs, num_slots) == expected


def test_not_served(device: torch.device) -> None:
    """A kernel asked for by name says what it does not serve."""
    slots = torch.randn(1, 1, 5, 16, device=device)
    with pytest.raises(KernelError, match="serves one query, not 2"):
        slot_attention(torch.randn(1, 1, 2, 16, device=device), slots, slots, None, 1.0, backend="triton")
    query = torch.randn(1, 1, 1, 16, device=device)
    with pytest.raises(KernelError, match="not torch.float64"):
        slot_attention(query.double(), slots.double(), slots.double(), None, 1.0, backend="triton")
    with pytest.raises(KernelError, match="side by side"):
        slot_attention(query, slots.mT.contiguous().mT, slots, None, 1.0, backend="triton")


@pytest.mark.skipif(is_interpreted(), reason="needs a CUDA device")
def test_in_a_graph(device: torch.device) -> None:
    """A captured launch sees the length, the slots and the entries of its replay."""
    query = torch.randn(2, 16, 1, 128, device=device, dtype=torch.float16)
    slots = torch.randn(2, 2, 4, 4096, 128, device=device, dtype=torch.float16)
    bias = torch.randn(2, 4, 4096, device=device, dtype=torch.float16)
    limit, arrivals = torch.full((2,), 64, device=device), make_arrivals(2, 16, device)
    counts = torch.ones(2, 4, 900, dtype=torch.int32, device=device)
    entries = Entries(*torch.randn(2, 2, 4, 900, 128, device=device, dtype=torch.float16), counts)

    def attend() -> tuple[Tensor, Tensor | None]:
        return slot_attention(
            query, *slots, bias, 0.09, lengths=limit, entries=entries, need_lse=True, arrivals=arrivals,
            backend="triton",
        )  # fmt: skip

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend()
    for lengths in ([4096, 1], [3000, 4000], [0, 130]):
        limit.copy_(torch.tensor(lengths))
        counts.random_(0, 17)
        graph.replay()
        expected, expected_lse = attend()
        assert lse is not None and expected_lse is not None
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
