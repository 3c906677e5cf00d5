"""`kept_lse` and `missed_share` as Triton kernels, a program a KV head of a sequence; and `exceeds`."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe_kernels.append_token.reference import Slots

# Slots, and candidates, looked at together.
_SLOTS = 128
_ROWS = 4096


@triton.jit(do_not_specialize=["num_kept", "sink_size", "gap", "num_slots", "num_kv_heads"])
def _kept_lse_kernel(
    query, keys, bias, out, sm_scale,
    query_batch, query_head, keys_batch, keys_head, keys_slot,
    num_kept, sink_size, gap, num_slots, num_kv_heads,
    GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, SLOTS: tl.constexpr,
    USE_DOT: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0).to(tl.int64)
    batch = kv_head // num_kv_heads
    head = kv_head % num_kv_heads
    columns = tl.arange(0, WIDTH_PAD)
    for block in tl.static_range(0, GROUP_SIZE, HEADS):
        members = block + tl.arange(0, HEADS)
        is_member = members < GROUP_SIZE
        of_query = batch * query_batch + (head * GROUP_SIZE + members)[:, None] * query_head + columns[None, :]
        q = tl.load(query + of_query, mask=is_member[:, None] & (columns < WIDTH)[None, :], other=0.0)
        top = tl.full([HEADS], -1e30, tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        for first in range(0, num_kept, SLOTS):
            kept = first + tl.arange(0, SLOTS)
            exists = kept < num_kept
            # The resident slots lie in between.
            slot = tl.where(kept < sink_size, kept, kept + gap)
            filled = tl.load(bias + kv_head * num_slots + slot, mask=exists, other=float("-inf")).to(tl.float32) == 0.0
            place = batch * keys_batch + head * keys_head + slot[:, None].to(tl.int64) * keys_slot + columns[None, :]
            k = tl.load(keys + place, mask=exists[:, None] & (columns < WIDTH)[None, :], other=0.0)
            if USE_DOT:
                scores = tl.dot(q, tl.trans(k)) * sm_scale
            else:
                scores = tl.sum(q[:, None, :] * k[None, :, :], 2) * sm_scale
            scores = tl.where(filled[None, :], scores, -1e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.where(filled[None, :], tl.exp(scores - new_top[:, None]), 0.0)
            total = total * tl.exp(top - new_top) + tl.sum(weights, 1)
            top = new_top
        tl.store(out + kv_head * GROUP_SIZE + members, top + tl.log(total), mask=is_member)


def kept_lse_triton(query: Tensor, slots: Slots, sm_scale: float) -> Tensor:
    """Arguments and result as in `kept_lse_reference`, in float32."""
    if query.stride(-1) != 1:
        query = query.contiguous()
    keys = slots.keys if slots.keys.stride(-1) == 1 else slots.keys.contiguous()
    batch_size, num_kv_heads, num_slots, width = keys.shape
    group_size = query.shape[1] // num_kv_heads
    width_pad = triton.next_power_of_2(width)
    use_dot = query.dtype != torch.float32
    out = torch.empty(batch_size, query.shape[1], dtype=torch.float32, device=query.device)
    gap = slots.ring_first - slots.sink_size
    _kept_lse_kernel[(batch_size * num_kv_heads,)](
        query, keys, slots.bias.contiguous(), out, float(sm_scale),
        query.stride(0), query.stride(1), *keys.stride()[:3],
        num_slots - gap, slots.sink_size, gap, num_slots, num_kv_heads,
        GROUP_SIZE=group_size, HEADS=16 if use_dot else 1, WIDTH=width, WIDTH_PAD=width_pad, SLOTS=_SLOTS,
        USE_DOT=use_dot, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_candidates", "capacity", "num_rows", "num_words"])
def _missed_share_kernel(
    resident_rows, rows, count, shares, marks, out,
    num_candidates, capacity, num_rows, num_words,
    ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    resident_rows += head * capacity
    rows += head * num_candidates
    shares += head * num_candidates
    marks += head * num_words
    for first in range(0, capacity, ROWS):
        slots = first + tl.arange(0, ROWS)
        held = tl.load(resident_rows + slots, mask=slots < capacity, other=-1)
        real = (held >= 0) & (held < num_rows)
        bit = (tl.full((ROWS,), 1, dtype=tl.int32) << (held % 32).to(tl.int32)).to(tl.int32)
        tl.atomic_or(marks + held // 32, bit, mask=real, sem="relaxed")
    tl.debug_barrier()
    largest = tl.zeros([ROWS], tl.float32)
    num_there = tl.minimum(tl.load(count + head), num_candidates).to(tl.int32)
    for first in range(0, num_there, ROWS):
        places = first + tl.arange(0, ROWS)
        row = tl.load(rows + places, mask=places < num_there, other=-1)
        real = (row >= 0) & (row < num_rows)
        # Past the first cache, which does not see what atomics do.
        word = tl.load(marks + row // 32, mask=real, other=-1, cache_modifier=".cg")
        missing = real & (((word >> (row % 32).to(tl.int32)) & 1) == 0)
        share = tl.load(shares + places, mask=places < num_there, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.where(missing, share, 0.0))
    tl.store(out + head, tl.max(largest, 0))
    tl.debug_barrier()
    for first in range(0, capacity, ROWS):
        slots = first + tl.arange(0, ROWS)
        held = tl.load(resident_rows + slots, mask=slots < capacity, other=-1)
        real = (held >= 0) & (held < num_rows)
        tl.store(marks + held // 32, tl.zeros((ROWS,), dtype=tl.int32), mask=real)


def missed_share_triton(
    resident_rows: Tensor, rows: Tensor, count: Tensor, shares: Tensor, marks: Tensor, num_rows: int
) -> Tensor:
    """Arguments and result as in `missed_share_reference`, in float32; marks as in `missed_share`."""
    batch_size, num_kv_heads, num_candidates = rows.shape
    out = torch.empty(batch_size, num_kv_heads, dtype=torch.float32, device=rows.device)
    _missed_share_kernel[(batch_size * num_kv_heads,)](
        resident_rows.contiguous(), rows.contiguous(), count.contiguous(), shares.contiguous(), marks, out,
        num_candidates, resident_rows.shape[-1], num_rows, marks.shape[-1],
        ROWS=min(_ROWS, triton.next_power_of_2(max(1, num_candidates))), num_warps=16,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_heads"])
def _exceeds_kernel(missed, first, found, share, num_heads, HEADS: tl.constexpr):
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    inside = heads < num_heads
    is_first = tl.load(first + heads, mask=inside, other=0).to(tl.int32) > 0
    more = tl.load(missed + heads, mask=inside, other=0.0).to(tl.float32) > share
    tl.store(found + heads, more | is_first, mask=inside)
    tl.store(first + heads, tl.zeros([HEADS], tl.int1), mask=inside)


def exceeds_triton(missed: Tensor, share: float, first: Tensor) -> Tensor:
    """Arguments and result as in `exceeds_reference`; `first` is contiguous."""
    found = torch.empty(missed.shape, dtype=torch.bool, device=missed.device)
    _exceeds_kernel[(triton.cdiv(missed.numel(), 64),)](
        missed.contiguous(), first, found, float(share), missed.numel(), HEADS=64, num_warps=1
    )
    return found
