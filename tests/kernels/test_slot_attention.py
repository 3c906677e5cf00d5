"""`slot_attention`, its reference and its fused twin against the definition."""

import math
from typing import NamedTuple

import pytest
import torch
from helpers import dot
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels.dispatch import KernelError, is_interpreted
from kvframe_kernels.slot_attention import Entries, slot_attention, slot_attention_reference, slot_attention_sdpa


class Inputs(NamedTuple):
    query: Tensor  # [B, Hq, T, D]
    k_slots: Tensor  # [B, H, N, D]
    v_slots: Tensor  # [B, H, N, Dv]
    bias: Tensor | None


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    """Any shape; a bias for all queries, for each query, or none; some slots empty, others weighted."""
    batch_size, num_kv_heads, group_size = (draw(st.integers(1, 3)) for _ in range(3))
    num_queries = draw(st.integers(1, 3))
    num_slots = draw(st.integers(1, 12) | st.sampled_from([63, 111]))
    head_dim, value_dim = draw(st.sampled_from([(1, 1), (4, 4), (7, 3), (8, 16)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    heads = (batch_size, num_kv_heads)
    shape = draw(st.sampled_from([None, (*heads, num_slots), (*heads, num_queries, num_slots)]))
    bias = None
    if shape is not None:
        bias = randn(*shape)
        empty = torch.rand(shape, generator=generator) < 0.4
        empty[..., int(torch.randint(num_slots, (), generator=generator))] = False
        bias = bias.masked_fill(empty, -math.inf)
    return Inputs(
        query=randn(batch_size, num_kv_heads * group_size, num_queries, head_dim),
        k_slots=randn(*heads, num_slots, head_dim),
        v_slots=randn(*heads, num_slots, value_dim),
        bias=bias,
    )


def attend(query: list[float], keys: list[list[float]], values: list[list[float]], bias: list[float], sm_scale: float):
    """Output and log-sum-exp of one query, in Python floats."""
    scores = [sm_scale * dot(query, key) + b for key, b in zip(keys, bias)]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    out = [sum(w * v for w, v in zip(weights, column, strict=True)) / total for column in zip(*values, strict=True)]
    return out, top + math.log(total)


def expected_attention(x: Inputs, sm_scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) for every query head and query."""
    batch_size, num_qo_heads, num_queries, _ = x.query.shape
    group_size = num_qo_heads // x.k_slots.shape[1]
    out = torch.empty(batch_size, num_qo_heads, num_queries, x.v_slots.shape[-1], dtype=torch.float64)
    lse = torch.empty(batch_size, num_qo_heads, num_queries, dtype=torch.float64)
    for batch in range(batch_size):
        for qo_head in range(num_qo_heads):
            head = qo_head // group_size
            for t in range(num_queries):
                if x.bias is None:
                    bias = [0.0] * x.k_slots.shape[2]
                else:
                    bias = x.bias[batch, head, t] if x.bias.dim() == 4 else x.bias[batch, head]
                    bias = bias.tolist()
                one, scale = attend(
                    x.query[batch, qo_head, t].tolist(),
                    x.k_slots[batch, head].tolist(),
                    x.v_slots[batch, head].tolist(),
                    bias,
                    sm_scale,
                )
                out[batch, qo_head, t], lse[batch, qo_head, t] = torch.tensor(one, dtype=torch.float64), scale
    return out, lse


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@given(x=inputs(), sm_scale=st.sampled_from([1.0, 0.3, -0.5]))
def test_definition(x: Inputs, sm_scale: float):
    """Reference, fused twin and the op that chooses between them give the softmax over scaled products plus bias."""
    before = [None if part is None else part.clone() for part in x]
    out, lse = expected_attention(x, sm_scale)
    reference_out, reference_lse = slot_attention_reference(*x, sm_scale)
    chosen, nothing = slot_attention(*x, sm_scale)
    asked, asked_lse = slot_attention(*x, sm_scale, need_lse=True)

    assert_close(reference_out, out)
    assert_close(reference_lse, lse)
    assert_close(slot_attention_sdpa(*x, sm_scale), out)
    assert_close(chosen, out)
    assert_close(asked, out)
    assert asked_lse is not None and nothing is None
    assert_close(asked_lse, lse)
    assert all(one is other or torch.equal(one, other) for one, other in zip(before, x, strict=True))


def make_entries(x: Inputs, num_entries: int, seed: int) -> Entries:
    """Beside the slots; some do not exist."""
    generator = torch.Generator().manual_seed(seed)
    heads = x.k_slots.shape[:2]
    counts = torch.randint(0, 5, (*heads, num_entries), generator=generator)
    return Entries(
        torch.randn(*heads, num_entries, x.k_slots.shape[-1], generator=generator, dtype=x.k_slots.dtype),
        torch.randn(*heads, num_entries, x.v_slots.shape[-1], generator=generator, dtype=x.v_slots.dtype),
        counts,
    )


@given(x=inputs(), num_entries=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_entries(x: Inputs, num_entries: int, seed: int):
    """An entry is as many slots as it counts, all with its key and value: one softmax over all."""
    entries = make_entries(x, num_entries, seed)
    out, lse = slot_attention(*x, 0.4, entries=entries, need_lse=True)
    chosen, nothing = slot_attention(*x, 0.4, entries=entries)
    most = int(entries.counts.max())
    missing = torch.arange(most) >= entries.counts[..., None]
    added = torch.zeros(missing.shape, dtype=torch.float64).masked_fill(missing, -math.inf).flatten(-2)
    slots = [
        torch.cat([own, part.repeat_interleave(most, 2)], 2)
        for own, part in ((x.k_slots, entries.keys), (x.v_slots, entries.values))
    ]
    bias = torch.zeros(x.k_slots.shape[:3], dtype=torch.float64) if x.bias is None else x.bias
    if bias.dim() == 4:
        added = added[:, :, None].expand(*bias.shape[:3], -1)
    expected, expected_lse = expected_attention(Inputs(x.query, *slots, torch.cat([bias, added], -1)), 0.4)

    assert lse is not None and nothing is None
    for found in (out, chosen):
        assert_close(found, expected)
    assert_close(lse, expected_lse)


def test_entries_that_do_not_exist():
    """Entries that count nothing change nothing."""
    x = Inputs(torch.randn(1, 2, 1, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4), None)
    nothing = Entries(torch.full((1, 1, 3, 4), 9.0), torch.full((1, 1, 3, 4), 9.0), torch.zeros(1, 1, 3))
    out, lse = slot_attention_reference(*x, 0.5)
    with_them, with_them_lse = slot_attention_reference(*x, 0.5, entries=nothing)

    torch.testing.assert_close(out, with_them)
    torch.testing.assert_close(lse, with_them_lse)


@given(x=inputs(), share=st.floats(0, 1))
def test_lengths(x: Inputs, share: float):
    """Slots behind a sequence's length do not exist."""
    batch_size, num_slots = x.k_slots.shape[0], x.k_slots.shape[2]
    x = x._replace(bias=None if x.bias is None else x.bias.clamp(min=-50))  # no query sees nothing
    lengths = torch.tensor([max(1, round(share * num_slots)), num_slots, 1][:batch_size])
    out, lse = slot_attention_reference(*x, 0.4, lengths=lengths)
    chosen, _ = slot_attention(*x, 0.4, lengths=lengths)
    _, asked_lse = slot_attention(*x, 0.4, lengths=lengths, need_lse=True)

    for batch, length in enumerate(lengths.tolist()):
        row = slice(batch, batch + 1)
        bias = None if x.bias is None else x.bias[row, ..., :length]
        short = Inputs(x.query[row], x.k_slots[row, :, :length], x.v_slots[row, :, :length], bias)
        expected, expected_lse = expected_attention(short, 0.4)
        assert_close(out[row], expected)
        assert_close(lse[row], expected_lse)
    assert_close(chosen, out)
    assert asked_lse is not None
    assert_close(asked_lse, lse)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("limited", [False, True])
def test_nothing_to_see(num_queries: int, limited: bool):
    """Over empty slots alone, and entries that do not exist, the output is 0 and the log-sum-exp -inf; with one that
    does, it is that one's value."""
    query, slots = torch.randn(1, 2, num_queries, 4), torch.randn(1, 1, 6, 4)
    bias = None if limited else torch.full((1, 1, 6), -math.inf)
    lengths = torch.tensor([0]) if limited else None
    out, lse = slot_attention_reference(query, slots, slots, bias, 0.5, lengths=lengths)
    chosen, _ = slot_attention(query, slots, slots, bias, 0.5, lengths=lengths)
    entry = torch.randn(1, 1, 1, 4)

    def with_entry(count: int) -> tuple[Tensor, Tensor | None]:
        entries = Entries(entry, entry, torch.full((1, 1, 1), count))
        return slot_attention(query, slots, slots, bias, 0.5, lengths=lengths, entries=entries, need_lse=True)

    twice, twice_lse = with_entry(0)
    alone, alone_lse = with_entry(3)

    assert not out.any() and (lse == -math.inf).all()
    assert not chosen.any()
    assert twice_lse is not None and not twice.any() and (twice_lse == -math.inf).all()
    torch.testing.assert_close(alone, entry.expand_as(alone))
    torch.testing.assert_close(alone_lse, (0.5 * query * entry).sum(-1) + math.log(3))


def test_backend():
    """The reference by name is the reference; a kernel that cannot run here is an error."""
    query, slots = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 6, 16)
    expected, expected_lse = slot_attention_reference(query, slots, slots, None, 0.5)
    out, nothing = slot_attention(query, slots, slots, None, 0.5, backend="reference")
    _, lse = slot_attention(query, slots, slots, None, 0.5, need_lse=True, backend="reference")

    assert torch.equal(out, expected) and nothing is None and lse is not None and torch.equal(lse, expected_lse)
    if not is_interpreted():
        with pytest.raises(KernelError, match="its tensors lie on the CPU"):
            slot_attention(query, slots, slots, None, 0.5, backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype):
    """The output has the query's dtype, the log-sum-exp at least float32."""
    generator = torch.Generator().manual_seed(0)
    x = Inputs(
        torch.randn(2, 4, 2, 8, generator=generator).to(dtype),
        torch.randn(2, 2, 63, 8, generator=generator).to(dtype),
        torch.randn(2, 2, 63, 8, generator=generator).to(dtype),
        torch.zeros(2, 2, 63, dtype=dtype),
    )
    out, lse = expected_attention(x, 0.35)
    for actual in (slot_attention_reference(*x, 0.35), slot_attention(*x, 0.35, need_lse=True)):
        assert actual[0].dtype == dtype and actual[1] is not None and actual[1].dtype == torch.float32
        torch.testing.assert_close(actual[0].double(), out, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(actual[1].double(), lse, atol=2e-2, rtol=2e-2)
    assert slot_attention_sdpa(*x, 0.35).dtype == dtype
