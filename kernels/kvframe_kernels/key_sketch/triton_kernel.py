"""`sketch_scores` and `window_sketch` as Triton kernels."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe_kernels.key_sketch.reference import Centres, Sketch
from kvframe_kernels.unit_scores.triton_kernel import reduce_products

# Candidates a tile, and warps: few of these, each of which then reads many bytes at once.
_TILE = 128
_WARPS = 2
# Rows of a leaving unit looked at together.
_ROWS = 16


@triton.jit(do_not_specialize=["capacity", "num_tiles", "num_kv_heads"])
def _sketch_products_kernel(
    query, rows, count, codes, step, channels, mean_keys, unit_ids, due, products, tops, sums, sm_scale,
    query_batch, query_head, codes_batch, codes_head, codes_row, step_batch, step_head, step_row,
    mean_batch, mean_head, mean_unit,
    capacity, num_tiles, num_kv_heads,
    GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BITS: tl.constexpr,
    TILE: tl.constexpr, USE_DOT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # Grid: KV heads of all sequences, tiles of candidates.
    kv_head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if due is not None:
        if tl.load(due + kv_head).to(tl.int32) == 0:
            return
    num_candidates = tl.minimum(tl.load(count + kv_head), capacity).to(tl.int32)
    if tile * TILE >= num_candidates:
        return
    batch = kv_head // num_kv_heads
    head = kv_head % num_kv_heads
    places = tile * TILE + tl.arange(0, TILE)
    exists = places < num_candidates
    row = tl.load(rows + kv_head * capacity + places, mask=exists, other=0)

    PER_BYTE: tl.constexpr = 8 // BITS
    MOST: tl.constexpr = 2**BITS - 1
    columns = tl.arange(0, WIDTH_PAD)
    inside = exists[:, None] & (columns < WIDTH)[None, :]
    place = batch * codes_batch + head * codes_head + row * codes_row
    if SPLIT:
        # Bytes side by side, so that a thread reads many at once; their first numbers meet the queries' columns 0,
        # PER_BYTE, 2 PER_BYTE ..., and so on.
        bytes = tl.arange(0, WIDTH_PAD // PER_BYTE)
        has_byte = exists[:, None] & (bytes < WIDTH // PER_BYTE)[None, :]
        packed = tl.load(codes + place[:, None] + bytes[None, :], mask=has_byte, other=0).to(tl.int32)
    else:
        packed = tl.load(codes + place[:, None] + (columns // PER_BYTE)[None, :], mask=inside, other=0).to(tl.int32)
        levels = (packed >> (columns % PER_BYTE * BITS)[None, :]) & MOST
        # Multiples of a half up to 127.5: float16 and bfloat16 hold them exactly.
        levels = (levels.to(tl.float32) - MOST / 2).to(query.dtype.element_ty)
    steps = tl.load(step + batch * step_batch + head * step_head + row * step_row, mask=exists, other=0.0)
    steps = steps.to(tl.float32)
    if channels is not None:
        sizes = tl.load(channels + kv_head * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    if mean_keys is not None:
        unit = tl.load(unit_ids + kv_head * capacity + places, mask=exists, other=0).to(tl.int64)
        place = batch * mean_batch + head * mean_head + unit * mean_unit
        means = tl.load(mean_keys + place[:, None] + columns[None, :], mask=inside, other=0.0)

    if USE_DOT:
        for block in tl.static_range(0, GROUP_SIZE, HEADS):
            members = block + tl.arange(0, HEADS)
            is_member = members < GROUP_SIZE
            place = batch * query_batch + (head * GROUP_SIZE + members)[:, None] * query_head + columns[None, :]
            q = tl.load(query + place, mask=is_member[:, None] & (columns < WIDTH)[None, :], other=0.0)
            if SPLIT:
                scores = tl.zeros([HEADS, TILE], tl.float32)
                for part in tl.static_range(PER_BYTE):
                    own = bytes * PER_BYTE + part
                    of_part = batch * query_batch + (head * GROUP_SIZE + members)[:, None] * query_head + own[None, :]
                    scaled = tl.load(query + of_part, mask=is_member[:, None] & (own < WIDTH)[None, :], other=0.0)
                    if channels is not None:
                        # What keys were divided by, their queries are multiplied with.
                        size = tl.load(channels + kv_head * WIDTH + own, mask=own < WIDTH, other=0.0).to(tl.float32)
                        scaled = (scaled.to(tl.float32) * size[None, :]).to(scaled.dtype)
                    levels = ((packed >> (part * BITS)) & MOST).to(tl.float32) - MOST / 2
                    scores += tl.dot(scaled, tl.trans(levels.to(query.dtype.element_ty)))
            else:
                scaled = q
                if channels is not None:
                    scaled = (q.to(tl.float32) * sizes[None, :]).to(q.dtype)
                scores = tl.dot(scaled, tl.trans(levels))
            scores *= steps[None, :]
            if mean_keys is not None:
                scores += tl.dot(q, tl.trans(means))
            scores = scores * sm_scale
            line = kv_head * GROUP_SIZE + members
            known = is_member[:, None] & exists[None, :]
            tl.store(products + line[:, None] * capacity + places[None, :], scores, mask=known)
            scores = tl.where(exists[None, :], scores, float("-inf"))
            top = tl.max(scores, 1)
            tl.store(tops + line * num_tiles + tile, top, mask=is_member)
            tl.store(sums + line * num_tiles + tile, tl.sum(tl.exp(scores - top[:, None]), 1), mask=is_member)
    else:
        # In float32 there is no tensor core, and rows that pad a group would cost what query heads cost.
        keys = levels * steps[:, None]
        if channels is not None:
            keys = keys * sizes[None, :]
        if mean_keys is not None:
            keys = keys + means
        for member in range(GROUP_SIZE):
            of_query = batch * query_batch + (head * GROUP_SIZE + member) * query_head + columns
            one = tl.load(query + of_query, mask=columns < WIDTH, other=0.0)
            row_scores = tl.sum(keys * one[None, :], 1) * sm_scale
            number = kv_head * GROUP_SIZE + member
            tl.store(products + number * capacity + places, row_scores, mask=exists)
            row_scores = tl.where(exists, row_scores, float("-inf"))
            highest = tl.max(row_scores, 0)
            tl.store(tops + number * num_tiles + tile, highest)
            tl.store(sums + number * num_tiles + tile, tl.sum(tl.exp(row_scores - highest), 0))


def sketch_scores_triton(
    query: Tensor,
    rows: Tensor,
    count: Tensor,
    sketch: Sketch,
    bits: int,
    sm_scale: float,
    channels: Tensor | None,
    centres: Centres | None,
    kept_lse: Tensor | None,
    due: Tensor | None,
) -> Tensor:
    """Arguments and result as in `sketch_scores_reference`; where not due, the result is not written."""
    batch_size, num_kv_heads, capacity = rows.shape
    num_heads, width = batch_size * num_kv_heads, query.shape[-1]
    group_size = query.shape[1] // num_kv_heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    count, due = count.contiguous(), _contiguous(due)
    codes, step = sketch
    means = unit_ids = None
    mean_strides: tuple[int, ...] = (0, 0, 0)
    if centres is not None:
        means, unit_ids = centres.mean_keys, centres.unit_ids.contiguous()
        mean_strides = means.stride()[:3]
    width_pad = triton.next_power_of_2(width)
    use_dot = query.dtype != torch.float32
    # Without tensor cores keys are in registers, 32 KiB of a program.
    tile = _TILE if use_dot else min(_TILE, 8192 // width_pad)
    num_tiles = triton.cdiv(capacity, tile)
    products = query.new_empty(num_heads * group_size, capacity, dtype=torch.float32)
    tops, sums = query.new_empty(2, num_heads * group_size, num_tiles, dtype=torch.float32).unbind()
    _sketch_products_kernel[(num_heads, num_tiles)](
        query, rows.contiguous(), count, codes, step, _contiguous(channels), means, unit_ids, due, products,
        tops, sums, float(sm_scale),
        query.stride(0), query.stride(1), *codes.stride()[:3], *step.stride()[:3], *mean_strides,
        capacity, num_tiles, num_kv_heads,
        GROUP_SIZE=group_size, HEADS=16, WIDTH=width, WIDTH_PAD=width_pad, BITS=bits, TILE=tile, USE_DOT=use_dot,
        # A product of matrices is over 16 columns at least.
        SPLIT=use_dot and width_pad * bits // 8 >= 16, num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
    out = query.new_empty(rows.shape, dtype=torch.float32)
    if kept_lse is not None:
        kept_lse = kept_lse.float().contiguous()
    return reduce_products(products, count, due, tops, sums, out, tile=tile, mean=True, besides=kept_lse)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_kv_heads", "first", "ring_size"])
def _window_sketch_kernel(
    codes, step, leaves, start, size, buffer, channels,
    codes_batch, codes_head, codes_row, step_batch, step_head, step_row, buffer_batch, buffer_head, buffer_slot,
    num_rows, num_slots, num_kv_heads, first, ring_size,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    # Grid: KV heads of all sequences.
    kv_head = tl.program_id(0).to(tl.int64)
    if tl.load(leaves + kv_head).to(tl.int32) == 0:
        return
    batch = kv_head // num_kv_heads
    head = kv_head % num_kv_heads
    first_row = tl.load(start + kv_head)
    num_tokens = tl.load(size + kv_head).to(tl.int32)
    columns = tl.arange(0, WIDTH_PAD)
    lanes = tl.arange(0, ROWS)
    buffer += batch * buffer_batch + head * buffer_head
    codes += batch * codes_batch + head * codes_head
    step += batch * step_batch + head * step_head

    centre = tl.zeros([WIDTH_PAD], tl.float32)
    if CENTRED:
        total = tl.zeros([ROWS, WIDTH_PAD], tl.float32)
        for begin in range(0, num_tokens, ROWS):
            total += _ring_rows(
                buffer, first_row, begin + lanes, num_tokens, first, ring_size, num_slots, buffer_slot, columns, WIDTH
            )
        centre = tl.div_rn(tl.sum(total, 0), tl.zeros([WIDTH_PAD], tl.float32) + tl.maximum(num_tokens, 1))
        # As the index holds it.
        centre = centre.to(buffer.dtype.element_ty).to(tl.float32)

    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WIDTH_PAD // PER_BYTE
    MOST: tl.constexpr = 2**BITS - 1
    places = tl.arange(0, BYTES)
    if channels is not None:
        sizes = tl.load(channels + kv_head * WIDTH + columns, mask=columns < WIDTH, other=1.0).to(tl.float32)
        sizes = sizes[None, :] + tl.zeros([ROWS, WIDTH_PAD], tl.float32)
    for begin in range(0, num_tokens, ROWS):
        tokens = begin + lanes
        numbers = _ring_rows(
            buffer, first_row, tokens, num_tokens, first, ring_size, num_slots, buffer_slot, columns, WIDTH
        )
        numbers = tl.where((columns < WIDTH)[None, :], numbers - centre[None, :], 0.0)
        if channels is not None:
            numbers = tl.div_rn(numbers, sizes)
        steps = (tl.max(tl.abs(numbers), 1) * (2 / MOST)).to(step.dtype.element_ty)
        rounded = steps.to(tl.float32)
        divisor = tl.where(rounded == 0.0, 1.0, rounded)[:, None] + tl.zeros([ROWS, WIDTH_PAD], tl.float32)
        levels = _nearest_even(tl.div_rn(numbers, divisor) + MOST / 2)
        levels = tl.minimum(tl.maximum(levels, 0.0), MOST * 1.0).to(tl.int32)
        # Codes of one byte lie in different bits, so that their sum is the byte.
        levels = tl.reshape(levels << (columns % PER_BYTE * BITS)[None, :], [ROWS, BYTES, PER_BYTE])
        packed = tl.sum(levels, 2).to(tl.uint8)
        row = first_row + tokens
        writes = (tokens < num_tokens) & (row >= 0) & (row < num_rows)
        tl.store(step + row * step_row, steps, mask=writes)
        tl.store(
            codes + (row * codes_row)[:, None] + places[None, :], packed,
            mask=writes[:, None] & (places < WIDTH // PER_BYTE)[None, :],
        )  # fmt: skip


@triton.jit
def _ring_rows(
    buffer, first_row, tokens, num_tokens, first, ring_size, num_slots, buffer_slot, columns, WIDTH: tl.constexpr
):
    # Keys of some tokens of a unit, in float32; 0 behind its last.
    slots = first + (first_row + tokens) % ring_size
    valid = (tokens < num_tokens) & (slots >= 0) & (slots < num_slots)
    inside = valid[:, None] & (columns < WIDTH)[None, :]
    return tl.load(buffer + slots[:, None] * buffer_slot + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _nearest_even(numbers):
    # Of float32 numbers below 2^22 in size: behind this sum there are no bits for fractions.
    return (numbers + 12582912.0) - 12582912.0


def window_sketch_triton(
    sketch: Sketch,
    bits: int,
    leaves: Tensor,
    start: Tensor,
    size: Tensor,
    buffer: Tensor,
    first: int,
    ring_size: int,
    centred: bool,
    channels: Tensor | None,
) -> None:
    """Arguments as in `window_sketch_reference`; the last stride of codes and buffer is 1."""
    codes, step = sketch
    batch_size, num_kv_heads, num_rows = codes.shape[:3]
    if num_rows == 0:
        return
    width = buffer.shape[-1]
    _window_sketch_kernel[(batch_size * num_kv_heads,)](
        codes, step, leaves.contiguous(), start.contiguous(), size.contiguous(), buffer, _contiguous(channels),
        *codes.stride()[:3], *step.stride()[:3], *buffer.stride()[:3],
        num_rows, buffer.shape[2], num_kv_heads, first, ring_size,
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), BITS=bits, ROWS=_ROWS, CENTRED=centred,
        num_warps=4, num_stages=1,
    )  # fmt: skip
