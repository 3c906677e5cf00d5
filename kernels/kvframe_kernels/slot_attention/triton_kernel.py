"""`slot_attention` of one query as one Triton kernel: ranges of slots and of virtual entries side by side, which the
last to end merges."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe_kernels.slot_attention.reference import Entries

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

_NUM_WARPS, _NUM_STAGES = 4, 3
# Numbers of partial results that a program holds in registers when it merges them.
_MERGE_NUMBERS = 16384


@triton.jit(do_not_specialize=["num_slots", "num_entries", "num_splits", "entry_splits", "num_kv_heads"])
def _attend_kernel(
    query, k_slots, v_slots, bias, lengths, entry_keys, entry_values, counts, out, lse, parts, tops, sums, arrivals,
    scale, query_batch, query_head, k_batch, k_head, k_slot, v_batch, v_head, v_slot, bias_batch, bias_head,
    entry_k_batch, entry_k_head, entry_k_row, entry_v_batch, entry_v_head, entry_v_row, counts_batch, counts_head,
    num_slots, num_entries, num_splits, entry_splits, num_kv_heads,
    GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr,
    COVERED: tl.constexpr, MEMBERS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # Grid: KV heads of all sequences, splits, blocks of HEADS query heads of a group. The first `entry_splits` are of
    # virtual entries, all others of slots.
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch = kv_head // num_kv_heads
    head = kv_head % num_kv_heads
    # Splits share the slots that exist, not the buffer: a short sequence in a large buffer occupies all programs too.
    length = num_slots
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch), num_slots).to(tl.int32)
    slots_a_split = _rows_a_split(length, num_splits - entry_splits, TILE)
    num_live = entry_splits + tl.maximum((length + slots_a_split - 1) // slots_a_split, 1)
    if split >= num_live:
        return

    members = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    is_member = members < GROUP_SIZE
    keys = tl.arange(0, WIDTH_PAD)
    values = tl.arange(0, VALUE_PAD)
    place = batch * query_batch + (head * GROUP_SIZE + members)[:, None] * query_head + keys[None, :]
    q = tl.load(query + place, mask=is_member[:, None] & (keys < WIDTH)[None, :], other=0.0)
    k_slots += batch * k_batch + head * k_head
    v_slots += batch * v_batch + head * v_head
    if bias is not None:
        bias += batch * bias_batch + head * bias_head
    start = (split - entry_splits) * slots_a_split
    stop = tl.minimum(start + slots_a_split, length)
    if entry_keys is None:
        top, total, acc = _attend_rows(
            q, k_slots, v_slots, bias, k_slot, v_slot, start, stop, scale,
            HEADS, WIDTH, WIDTH_PAD, VALUE, VALUE_PAD, TILE, False,
        )  # fmt: skip
    else:
        entries_a_split = _rows_a_split(num_entries, entry_splits, TILE)
        if split < entry_splits:
            entry_keys += batch * entry_k_batch + head * entry_k_head
            entry_values += batch * entry_v_batch + head * entry_v_head
            counts += batch * counts_batch + head * counts_head
            start = split * entries_a_split
            stop = tl.minimum(start + entries_a_split, num_entries)
            top, total, acc = _attend_rows(
                q, entry_keys, entry_values, counts, entry_k_row, entry_v_row, start, stop, scale,
                HEADS, WIDTH, WIDTH_PAD, VALUE, VALUE_PAD, TILE, True,
            )  # fmt: skip
        else:
            top, total, acc = _attend_rows(
                q, k_slots, v_slots, bias, k_slot, v_slot, start, stop, scale,
                HEADS, WIDTH, WIDTH_PAD, VALUE, VALUE_PAD, TILE, False,
            )  # fmt: skip

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
                    kv_head * GROUP_SIZE + merged, merged < GROUP_SIZE, parts, tops, sums, out, lse, num_live,
                    num_splits, MEMBERS, VALUE, VALUE_PAD, SPLITS,
                )  # fmt: skip


@triton.jit
def _rows_a_split(num_rows, num_splits, TILE: tl.constexpr):
    num_tiles = (num_rows + TILE - 1) // TILE
    return tl.maximum((num_tiles + num_splits - 1) // num_splits, 1) * TILE


@triton.jit
def _attend_rows(
    q, k_rows, v_rows, weights, k_row, v_row, start, stop, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
    TILE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    # Rows [start, stop) of one KV head, not merged with others. Weights say what is added to a row's score, -inf for an
    # empty row; with COUNTED, how often a row counts, 0 for an empty one: its logarithm is what is added.
    # An empty row is read all the same, because otherwise the loads of rows would wait for that of their weights.
    keys = tl.arange(0, WIDTH_PAD)
    values = tl.arange(0, VALUE_PAD)
    offsets = tl.arange(0, TILE)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, VALUE_PAD], tl.float32)
    if weights is not None and not COUNTED:
        coming = tl.load(weights + start + offsets, mask=start + offsets < stop, other=float("-inf"))
    for first in range(start, stop, TILE):
        rows = first + offsets
        is_full = rows < stop
        place = rows.to(tl.int64)[:, None]
        k = tl.load(k_rows + place * k_row + keys[None, :], mask=is_full[:, None] & (keys < WIDTH)[None, :], other=0.0)
        v = tl.load(
            v_rows + place * v_row + values[None, :], mask=is_full[:, None] & (values < VALUE)[None, :], other=0.0
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if weights is not None:
            if COUNTED:
                count = tl.load(weights + rows, mask=is_full, other=0).to(tl.float32)
                is_full = count > 0.0
                scores += tl.log2(tl.maximum(count, 1.0))[None, :]
            else:
                # Loaded a tile ahead: the pipeline that brings rows takes no numbers of 16 bits.
                added = coming.to(tl.float32)
                coming = tl.load(weights + rows + TILE, mask=rows + TILE < stop, other=float("-inf"))
                is_full = added != float("-inf")
                scores += (added * _LOG2E)[None, :]
        scores = tl.where(is_full[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Over nothing but empty rows, -inf less -inf would be NaN.
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shares = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(shares, 1)
        acc = tl.dot(shares.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _merge(
    heads, is_member, parts, tops, sums, out, lse, num_live, num_splits,
    MEMBERS: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    # Query heads [MEMBERS] of all sequences. Parts are read past the first cache, which does not see what others wrote.
    values = tl.arange(0, VALUE_PAD)
    inside = is_member[:, None] & (values < VALUE)[None, :]
    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc = tl.zeros([MEMBERS, VALUE_PAD], tl.float32)
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


def share_splits(num_splits: int, slot_tiles: int, entry_tiles: int) -> tuple[int, int]:
    """Splits of virtual entries, none of them idle, and all splits: every one with about as many tiles."""
    tiles = -(-(slot_tiles + entry_tiles) // num_splits)
    entry_splits = -(-entry_tiles // tiles)
    return entry_splits, entry_splits + -(-slot_tiles // tiles)


def slot_attention_triton(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    lengths: Tensor | None,
    entries: Entries | None,
    need_lse: bool,
    arrivals: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and result as in `slot_attention`, for T = 1."""
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
    num_entries = 0 if entries is None else entries.keys.shape[2]
    entry_keys, entry_values, counts = entries if entries is not None and num_entries else (None, None, None)
    if counts is not None and counts.stride(-1) != 1:
        counts = counts.contiguous()
    # tl.dot takes 16 rows or more; a larger group is cut into blocks, whose slots come from the cache.
    # 32 rows of float32, which has no tensor core, would not fit into registers.
    heads = 16 if group_size <= 16 or query.dtype == torch.float32 else 32
    blocks = triton.cdiv(group_size, heads)
    width_pad, value_pad = triton.next_power_of_2(width), triton.next_power_of_2(value)
    tile = _tile_slots(width_pad + value_pad, query.element_size())
    num_splits = count_splits(batch_size * num_kv_heads * blocks, num_slots + num_entries)
    entry_splits = 0
    if num_entries:
        tiles = triton.cdiv(num_slots, tile), triton.cdiv(num_entries, tile)
        entry_splits, num_splits = share_splits(num_splits, *tiles)

    rows = batch_size * num_qo_heads
    parts = query.new_empty(rows, num_splits, value, dtype=torch.float32)
    tops, sums = query.new_empty(2, rows, num_splits, dtype=torch.float32).unbind()
    out = query.new_empty(batch_size, num_qo_heads, 1, value)
    lse = query.new_empty(batch_size, num_qo_heads, 1, dtype=torch.float32) if need_lse else None
    if arrivals is None:
        arrivals = torch.zeros(batch_size * num_kv_heads * blocks, dtype=torch.int32, device=query.device)
    # Heads and splits that are merged together: no more than there are, and no more numbers than registers hold.
    members = min(heads, triton.next_power_of_2(group_size), max(1, _MERGE_NUMBERS // (2 * value_pad)))
    splits = min(triton.next_power_of_2(num_splits), max(2, _MERGE_NUMBERS // (members * value_pad)))
    _attend_kernel[(batch_size * num_kv_heads, num_splits, blocks)](
        query, k_slots, v_slots, bias, lengths, entry_keys, entry_values, counts, out, lse, parts, tops, sums, arrivals,
        float(sm_scale) * _LOG2E.value,
        query.stride(0), query.stride(1), *k_slots.stride()[:3], *v_slots.stride()[:3], *_strides(bias, 2),
        *_strides(entry_keys, 3), *_strides(entry_values, 3), *_strides(counts, 2),
        num_slots, num_entries, num_splits, entry_splits, num_kv_heads,
        GROUP_SIZE=group_size, HEADS=heads,
        WIDTH=width, WIDTH_PAD=width_pad, VALUE=value, VALUE_PAD=value_pad, TILE=tile,
        COVERED=min(heads, group_size), MEMBERS=members, SPLITS=splits,
        num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
    )  # fmt: skip
    return out, lse


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first strides of a tensor; zeros where there is none."""
    return (0,) * count if tensor is None else tensor.stride()[:count]
