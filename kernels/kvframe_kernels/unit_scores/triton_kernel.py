"""`unit_scores` and `box_scores` as Triton kernels: the products of every query head, then, where these are normalised
over the units, what a group makes of them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["max_units", "num_kv_heads", "num_tiles"])
def _products_kernel(
    query, centroids, lower, num_units, log_sizes, due, products, tops, sums, out, sm_scale,
    query_batch, query_head, centroid_batch, centroid_head, centroid_unit,
    max_units, num_kv_heads, num_tiles,
    GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, TILE: tl.constexpr,
    SOFTMAX: tl.constexpr, MEAN: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # Grid: KV heads of all sequences, tiles of units. With `lower`, centroids are the upper corners of boxes.
    kv_head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if due is not None:
        if tl.load(due + kv_head) == 0:
            return
    count = tl.minimum(tl.load(num_units + kv_head), max_units)
    units = tile * TILE + tl.arange(0, TILE)
    is_unit = units < count
    if tile * TILE >= count:
        if not SOFTMAX:
            nothing = tl.full([TILE], float("-inf"), tl.float32)
            tl.store(out + kv_head * max_units + units, nothing, mask=units < max_units)
        return

    batch = kv_head // num_kv_heads
    head = kv_head % num_kv_heads
    columns = tl.arange(0, WIDTH_PAD)
    is_column = columns < WIDTH
    place = batch * centroid_batch + head * centroid_head + units.to(tl.int64)[:, None] * centroid_unit
    c = tl.load(centroids + place + columns[None, :], mask=is_unit[:, None] & is_column[None, :], other=0.0)
    if lower is not None:
        low = tl.load(lower + place + columns[None, :], mask=is_unit[:, None] & is_column[None, :], other=0.0)
    if log_sizes is not None:
        sizes = tl.load(log_sizes + kv_head * max_units + units, mask=is_unit, other=0.0).to(tl.float32)
    # What a group makes of its products; with a softmax, that has to wait for the other tiles.
    if MEAN:
        reduced = tl.zeros([TILE], tl.float32)
    else:
        reduced = tl.full([TILE], float("-inf"), tl.float32)

    if USE_DOT:
        for block in tl.static_range(0, GROUP_SIZE, HEADS):
            members = block + tl.arange(0, HEADS)
            is_member = members < GROUP_SIZE
            place = batch * query_batch + (head * GROUP_SIZE + members)[:, None] * query_head + columns[None, :]
            q = tl.load(query + place, mask=is_member[:, None] & is_column[None, :], other=0.0)
            if lower is not None:
                # A positive number of the query is largest with the upper bound, a negative one with the lower.
                scores = tl.dot(tl.where(q > 0, q, 0.0), tl.trans(c))
                scores = tl.dot(tl.where(q < 0, q, 0.0), tl.trans(low), scores) * sm_scale
            else:
                scores = tl.dot(q, tl.trans(c)) * sm_scale
            if log_sizes is not None:
                scores += sizes[None, :]
            if not SOFTMAX:
                if MEAN:
                    reduced += tl.sum(tl.where(is_member[:, None], scores, 0.0), 0)
                else:
                    reduced = tl.maximum(reduced, tl.max(tl.where(is_member[:, None], scores, float("-inf")), 0))
            else:
                rows = kv_head * GROUP_SIZE + members
                inside = is_member[:, None] & is_unit[None, :]
                tl.store(products + rows[:, None] * max_units + units[None, :], scores, mask=inside)
                scores = tl.where(is_unit[None, :], scores, float("-inf"))
                top = tl.max(scores, 1)
                tl.store(tops + rows * num_tiles + tile, top, mask=is_member)
                tl.store(sums + rows * num_tiles + tile, tl.sum(tl.exp(scores - top[:, None]), 1), mask=is_member)
    else:
        # In float32 there is no tensor core, and rows that pad a group would cost what query heads cost.
        c = c.to(tl.float32)
        if lower is not None:
            low = low.to(tl.float32)
        for member in range(GROUP_SIZE):
            row = kv_head * GROUP_SIZE + member
            q_place = batch * query_batch + (head * GROUP_SIZE + member) * query_head + columns
            one = tl.load(query + q_place, mask=is_column, other=0.0).to(tl.float32)
            if lower is not None:
                line = tl.sum(tl.where(one[None, :] > 0, c, low) * one[None, :], 1) * sm_scale
            else:
                line = tl.sum(c * one[None, :], 1) * sm_scale
            if log_sizes is not None:
                line += sizes
            if not SOFTMAX:
                if MEAN:
                    reduced += line
                else:
                    reduced = tl.maximum(reduced, line)
            else:
                tl.store(products + row * max_units + units, line, mask=is_unit)
                line = tl.where(is_unit, line, float("-inf"))
                highest = tl.max(line, 0)
                tl.store(tops + row * num_tiles + tile, highest)
                tl.store(sums + row * num_tiles + tile, tl.sum(tl.exp(line - highest), 0))
    if not SOFTMAX:
        if MEAN:
            reduced = reduced / GROUP_SIZE
        tl.store(out + kv_head * max_units + units, tl.where(is_unit, reduced, float("-inf")), mask=units < max_units)


@triton.jit(do_not_specialize=["max_units", "num_tiles"])
def _reduce_kernel(
    products, num_units, due, tops, sums, besides, out,
    max_units, num_tiles,
    GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    # Grid: KV heads of all sequences, ranges of UNITS units. Normalises every query head, then reduces a group.
    kv_head = tl.program_id(0).to(tl.int64)
    if due is not None:
        if tl.load(due + kv_head) == 0:
            return
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    count = tl.minimum(tl.load(num_units + kv_head), max_units)
    is_unit = units < count
    place = kv_head * max_units + units
    if tl.program_id(1) * UNITS >= count:
        tl.store(out + place, tl.full([UNITS], float("-inf"), tl.float32), mask=units < max_units)
        return

    live_tiles = ((count + TILE - 1) // TILE).to(tl.int32)
    if MEAN:
        reduced = tl.zeros([UNITS], tl.float32)
    else:
        reduced = tl.full([UNITS], float("-inf"), tl.float32)
    for block in tl.static_range(0, GROUP_SIZE, HEADS):
        members = block + tl.arange(0, HEADS)
        is_member = members < GROUP_SIZE
        rows = kv_head * GROUP_SIZE + members
        inside = is_member[:, None] & is_unit[None, :]
        scores = tl.load(products + rows[:, None] * max_units + units[None, :], mask=inside, other=0.0)
        # Every program of a head merges the sums of all its tiles, which are few beside its own products.
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        if besides is not None:
            top = tl.load(besides + rows, mask=is_member, other=float("-inf"))
            total = tl.where(top > float("-inf"), 1.0, 0.0)
        for first in range(0, live_tiles, PARTS):
            tiles = first + tl.arange(0, PARTS)
            exists = is_member[:, None] & (tiles < live_tiles)[None, :]
            part_place = rows[:, None] * num_tiles + tiles[None, :]
            part_tops = tl.load(tops + part_place, mask=exists, other=float("-inf"))
            part_sums = tl.load(sums + part_place, mask=exists, other=0.0)
            new_top = tl.maximum(top, tl.max(part_tops, 1))
            # Rows of no query head hold nothing: -inf less -inf would be NaN.
            finite = tl.where(is_member, new_top, 0.0)
            total = total * tl.exp(top - finite) + tl.sum(part_sums * tl.exp(part_tops - finite[:, None]), 1)
            top = new_top
        top = tl.where(is_member, top, 0.0)
        total = tl.where(is_member, total, 1.0)
        scores = tl.exp(tl.where(inside, scores - top[:, None], 0.0)) / total[:, None]
        if MEAN:
            reduced += tl.sum(tl.where(inside, scores, 0.0), 0)
        else:
            reduced = tl.maximum(reduced, tl.max(tl.where(inside, scores, float("-inf")), 0))
    if MEAN:
        reduced = reduced / GROUP_SIZE
    tl.store(out + place, tl.where(is_unit, reduced, float("-inf")), mask=units < max_units)


def _tile_units(width: int, itemsize: int) -> int:
    """Units a tile: 32 KiB of centroids of a (padded) width; a program holds them in registers."""
    return max(16, min(128, 32 * 1024 // (width * itemsize)))


def unit_scores_triton(
    query: Tensor,
    centroids: Tensor,
    num_units: Tensor,
    sm_scale: float,
    reduction: str,
    softmax: bool,
    log_sizes: Tensor | None,
    due: Tensor | None,
    lower: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in `unit_scores_reference`, or, with `lower`, as in `box_scores_reference`, whose upper
    bounds the centroids then are; where not due, the result is not written."""
    batch_size, num_kv_heads, max_units, width = centroids.shape
    group_size = query.shape[1] // num_kv_heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    if lower is not None and lower.stride() != centroids.stride():
        lower, centroids = lower.contiguous(), centroids.contiguous()
    num_units = num_units.contiguous()
    log_sizes = None if log_sizes is None else log_sizes.contiguous()
    due = None if due is None else due.contiguous()
    use_dot = query.dtype == centroids.dtype != torch.float32
    width_pad = triton.next_power_of_2(width)
    tile = _tile_units(width_pad if lower is None else 2 * width_pad, 2 if use_dot else 4)
    num_tiles = triton.cdiv(max_units, tile)

    num_heads = batch_size * num_kv_heads
    rows = num_heads * group_size if softmax else 0
    products = query.new_empty(rows, max_units, dtype=torch.float32)
    tops, sums = query.new_empty(2, rows, num_tiles, dtype=torch.float32).unbind()
    out = query.new_empty(batch_size, num_kv_heads, max_units, dtype=torch.float32)
    _products_kernel[(num_heads, num_tiles)](
        query, centroids, lower, num_units, log_sizes, due, products, tops, sums, out, float(sm_scale),
        query.stride(0), query.stride(1), centroids.stride(0), centroids.stride(1), centroids.stride(2),
        max_units, num_kv_heads, num_tiles,
        GROUP_SIZE=group_size, HEADS=16, WIDTH=width, WIDTH_PAD=width_pad, TILE=tile,
        SOFTMAX=softmax, MEAN=reduction == "mean", USE_DOT=use_dot,
        num_warps=4,
    )  # fmt: skip
    if not softmax:
        return out
    return reduce_products(products, num_units, due, tops, sums, out, tile=tile, mean=reduction == "mean")


def reduce_products(
    products: Tensor,
    count: Tensor,
    due: Tensor | None,
    tops: Tensor,
    sums: Tensor,
    out: Tensor,
    *,
    tile: int,
    mean: bool,
    besides: Tensor | None = None,
) -> Tensor:
    """Products of query heads, normalised over the entries of each, then reduced over every group.

    products: float32 [B * Hq, N]; count: int64 [B, H], entries behind it do not exist; due: bool [B, H] or None.
    tops, sums: float32 [B * Hq, ceil(N / tile)], of every `tile` entries that are not all behind the count the largest
    product, and the sum of exp(product - largest).
    besides: float32 [B, Hq] or None, the log-sum-exp of further entries over which query heads are normalised.
    out: float32 [B, H, N], which is filled and returned: the mean over a group, or else its largest; -inf behind the
    count. Where not due it is not written. All is contiguous.
    """
    batch_size, num_kv_heads, num_entries = out.shape
    num_heads, num_tiles = batch_size * num_kv_heads, tops.shape[1]
    group_size = products.shape[0] // num_heads
    # With one row a tile, what ptxas makes of it spills kilobytes, after minutes.
    heads = min(16, max(2, triton.next_power_of_2(group_size)))
    units = 4096 // max(4, heads)
    _reduce_kernel[(num_heads, triton.cdiv(num_entries, units))](
        products, count, due, tops, sums, besides, out,
        num_entries, num_tiles,
        GROUP_SIZE=group_size, HEADS=heads, UNITS=units, PARTS=min(units, triton.next_power_of_2(num_tiles)),
        TILE=tile, MEAN=mean,
        num_warps=4,
    )  # fmt: skip
    return out
