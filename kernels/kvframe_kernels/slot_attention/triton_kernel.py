"""`slot_attention` of one query as one Triton kernel: ranges of slots side by side, which the last to end merges."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

_NUM_WARPS, _NUM_STAGES = 4, 3
# Numbers of partial results that a program holds in registers when it merges them.
_MERGE_NUMBERS = 8192


@triton.jit(do_not_specialize=["num_slots", "num_splits", "num_kv_heads"])
def _attend_kernel(
    query, k_slots, v_slots, bias, lengths, extra_out, extra_lse, out, lse, parts, tops, sums, arrivals, scale,
    query_batch, query_head, k_batch, k_head, k_slot, v_batch, v_head, v_slot, bias_batch, bias_head,
    num_slots, num_splits, num_kv_heads,
    GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr,
    COVERED: tl.constexpr, MEMBERS: tl.constexpr, SPLITS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    # Grid: KV heads of all sequences, splits, blocks of HEADS query heads of a group.
    # With COUNTED, the bias says how often each slot counts, 0 for an empty one: its logarithm is what is added.
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = kv_head // num_kv_heads
    head = kv_head % num_kv_heads
    # Splits share the slots that exist, not the buffer: a short sequence in a large buffer occupies all programs too.
    length = num_slots
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch), num_slots).to(tl.int32)
    num_tiles = (length + TILE - 1) // TILE
    tiles_a_split = tl.maximum((num_tiles + num_splits - 1) // num_splits, 1)
    num_live = tl.maximum((num_tiles + tiles_a_split - 1) // tiles_a_split, 1)
    if split >= num_live:
        return
    start = split * tiles_a_split * TILE
    stop = tl.minimum(start + tiles_a_split * TILE, length)

    members = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    is_member = members < GROUP_SIZE
    keys = tl.arange(0, WIDTH_PAD)
    values = tl.arange(0, VALUE_PAD)
    offsets = tl.arange(0, TILE)
    place = batch * query_batch + (head * GROUP_SIZE + members)[:, None] * query_head + keys[None, :]
    q = tl.load(query + place, mask=is_member[:, None] & (keys < WIDTH)[None, :], other=0.0)
    k_slots += batch * k_batch + head * k_head
    v_slots += batch * v_batch + head * v_head
    if bias is not None:
        bias += batch * bias_batch + head * bias_head
        coming = _load_bias(bias, start + offsets, stop, COUNTED)

    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, VALUE_PAD], tl.float32)
    for first in range(start, stop, TILE):
        slots = first + offsets
        if bias is not None:
            # Loaded a tile ahead, since the loads of rows wait for it; two tiles ahead, Triton would not pipeline them.
            added = coming
            coming = _load_bias(bias, slots + TILE, stop, COUNTED)
            if COUNTED:
                is_full = added > 0.0
            else:
                is_full = added != float("-inf")
        else:
            is_full = slots < stop
        rows = slots.to(tl.int64)[:, None]
        # An empty slot is not read: it costs nothing, and what lies there cannot become 0 * NaN.
        k = tl.load(k_slots + rows * k_slot + keys[None, :], mask=is_full[:, None] & (keys < WIDTH)[None, :], other=0.0)
        v = tl.load(
            v_slots + rows * v_slot + values[None, :], mask=is_full[:, None] & (values < VALUE)[None, :], other=0.0
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if bias is not None:
            if COUNTED:
                scores += tl.log2(tl.maximum(added, 1.0))[None, :]
            else:
                scores += (added * _LOG2E)[None, :]
        scores = tl.where(is_full[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Over nothing but empty slots, -inf less -inf would be NaN.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    place = (kv_head * GROUP_SIZE + members) * num_splits + split
    tl.store(tops + place, top, mask=is_member)
    tl.store(sums + place, total, mask=is_member)
    inside = is_member[:, None] & (values < VALUE)[None, :]
    tl.store(parts + place[:, None] * VALUE + values[None, :], acc, mask=inside)

    # The last to arrive merges, in the order of the splits, so that the result does not depend on who that was.
    tl.debug_barrier()  # every warp has written its part before one thread says so
    arrivals += kv_head * tl.num_programs(2) + tl.program_id(2)
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == num_live - 1:
        tl.store(arrivals, 0)  # for the next launch
        for block in tl.static_range(0, COVERED, MEMBERS):
            first = tl.program_id(2) * HEADS + block
            if first < GROUP_SIZE:
                merged = first + tl.arange(0, MEMBERS)
                _merge(
                    kv_head * GROUP_SIZE + merged, merged < GROUP_SIZE, parts, tops, sums, extra_out, extra_lse, out,
                    lse, num_live, num_splits, MEMBERS, VALUE, VALUE_PAD, SPLITS,
                )  # fmt: skip


@triton.jit
def _load_bias(bias, slots, stop, COUNTED: tl.constexpr):
    if COUNTED:
        return tl.load(bias + slots, mask=slots < stop, other=0).to(tl.float32)
    else:
        return tl.load(bias + slots, mask=slots < stop, other=float("-inf")).to(tl.float32)


@triton.jit
def _merge(
    heads, is_member, parts, tops, sums, extra_out, extra_lse, out, lse, num_live, num_splits,
    MEMBERS: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # Query heads [MEMBERS] of all sequences. Parts are read past the first cache, which does not see what others wrote.
    values = tl.arange(0, VALUE_PAD)
    inside = is_member[:, None] & (values < VALUE)[None, :]
    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc = tl.zeros([MEMBERS, VALUE_PAD], tl.float32)
    if extra_out is not None:
        top = tl.load(extra_lse + heads, mask=is_member, other=float("-inf")).to(tl.float32) * _LOG2E
        is_any = top != float("-inf")
        total = tl.where(is_any, 1.0, 0.0)
        extra_out += heads[:, None] * VALUE + values[None, :]
        acc = tl.load(extra_out, mask=inside & is_any[:, None], other=0.0).to(tl.float32)
    for first in range(0, num_live, SPLITS):
        splits = first + tl.arange(0, SPLITS)
        exists = is_member[:, None] & (splits < num_live)[None, :]
        place = heads[:, None] * num_splits + splits[None, :]
        part_tops = tl.load(tops + place, mask=exists, other=float("-inf"), cache_modifier=".cg")
        part_sums = tl.load(sums + place, mask=exists, other=0.0, cache_modifier=".cg")
        part = tl.load(
            parts + place[:, :, None] * VALUE + values[None, None, :],
            mask=exists[:, :, None] & (values < VALUE)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(part_tops, 1))
        # Over nothing but empty slots, -inf less -inf would be NaN.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(part_tops - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights * part_sums, 1)
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * part, 1)
        top = new_top
    # Over nothing: out 0, lse -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    merged = (acc / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + heads[:, None] * VALUE + values[None, :], merged, mask=inside)
    if lse is not None:
        tl.store(lse + heads, (top + tl.log2(divisor)) * _LN2, mask=is_member)


def count_splits(num_programs: int, num_slots: int) -> int:
    """Into how many ranges slots are split, from static shapes alone, so that a CUDA graph can hold the launch.

    num_programs: what runs side by side without any split, KV heads of all sequences.
    About 2 programs for each of 132 multiprocessors are wanted, each with 128 slots or more: with fewer, the merge
    costs what the split gains.
    """
    return max(1, min(256 // max(num_programs, 1), -(-num_slots // 128)))


def _tile_slots(width: int, itemsize: int) -> int:
    """Slots a tile, for K and V together `width` wide: the two that the pipeline holds take 64 KiB of shared memory."""
    tile = 64
    while tile > 16 and 2 * tile * width * itemsize > 64 * 1024:
        tile //= 2
    return tile


def slot_attention_triton(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    lengths: Tensor | None,
    extra: tuple[Tensor, Tensor] | None,
    need_lse: bool,
    arrivals: Tensor | None,
    counted: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and result as in `slot_attention`, for T = 1; empty slots are not read.

    counted: the bias is of whole numbers and says how often each slot counts, 0 for an empty one, whose logarithm is
    what is added; the output is in float32 then.
    """
    batch_size, num_qo_heads, _, width = query.shape
    num_kv_heads, num_slots, value = v_slots.shape[1:]
    group_size = num_qo_heads // num_kv_heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    if bias is not None:
        bias = bias[:, :, 0] if bias.dim() == 4 else bias
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    if lengths is not None:
        lengths = lengths.contiguous()
    # tl.dot takes 16 rows or more; a larger group is cut into blocks, whose slots come from the cache.
    # 32 rows of float32, which has no tensor core, would not fit into registers.
    heads = 16 if group_size <= 16 or query.dtype == torch.float32 else 32
    blocks = triton.cdiv(group_size, heads)
    width_pad, value_pad = triton.next_power_of_2(width), triton.next_power_of_2(value)
    tile = _tile_slots(width_pad + value_pad, query.element_size())
    num_splits = count_splits(batch_size * num_kv_heads * blocks, num_slots)

    rows = batch_size * num_qo_heads
    parts = query.new_empty(rows, num_splits, value, dtype=torch.float32)
    tops, sums = query.new_empty(2, rows, num_splits, dtype=torch.float32).unbind()
    out = query.new_empty(batch_size, num_qo_heads, 1, value, dtype=torch.float32 if counted else query.dtype)
    lse = query.new_empty(batch_size, num_qo_heads, 1, dtype=torch.float32) if need_lse else None
    extra_out, extra_lse = (None, None) if extra is None else (extra[0].contiguous(), extra[1].contiguous())
    if arrivals is None:
        arrivals = torch.zeros(batch_size * num_kv_heads * blocks, dtype=torch.int32, device=query.device)
    # Heads and splits that are merged together: no more than there are, and no more numbers than registers hold.
    members = min(heads, triton.next_power_of_2(group_size), max(1, _MERGE_NUMBERS // (2 * value_pad)))
    splits = min(triton.next_power_of_2(num_splits), max(2, _MERGE_NUMBERS // (members * value_pad)))
    _attend_kernel[(batch_size * num_kv_heads, num_splits, blocks)](
        query, k_slots, v_slots, bias, lengths, extra_out, extra_lse, out, lse, parts, tops, sums, arrivals,
        float(sm_scale) * _LOG2E.value,
        query.stride(0), query.stride(1), k_slots.stride(0), k_slots.stride(1), k_slots.stride(2),
        v_slots.stride(0), v_slots.stride(1), v_slots.stride(2),
        0 if bias is None else bias.stride(0), 0 if bias is None else bias.stride(1),
        num_slots, num_splits, num_kv_heads,
        GROUP_SIZE=group_size, HEADS=heads,
        WIDTH=width, WIDTH_PAD=width_pad, VALUE=value, VALUE_PAD=value_pad, TILE=tile,
        COVERED=min(heads, group_size), MEMBERS=members, SPLITS=splits, COUNTED=counted,
        num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
    )  # fmt: skip
    return out, lse
