"""`unit_mean`, `unit_bounds`, and the same for the unit that leaves the window, as Triton kernels."""

# Triton reads a kernel's source; Python types mean nothing in it.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _unit_mean_kernel(
    rows_ptr, offsets_ptr, mean_ptr, stride_rows_n, stride_rows_t, num_units, num_tiles,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_U: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    problem = program // num_tiles
    units = (program % num_tiles) * BLOCK_U + tl.arange(0, BLOCK_U)
    columns = tl.arange(0, WIDTH_PAD)
    is_unit = units < num_units
    offsets_ptr += problem * (num_units + 1)
    start = tl.load(offsets_ptr + units, mask=is_unit, other=0)
    size = tl.load(offsets_ptr + units + 1, mask=is_unit, other=0) - start
    rows_ptr += problem * stride_rows_n
    total = tl.zeros([BLOCK_U, WIDTH_PAD], dtype=tl.float32)
    longest = tl.max(size, 0).to(tl.int32)
    for step in range(0, longest, UNROLL):
        # The loads of one step do not wait for each other; the additions keep the order of the rows.
        for i in tl.static_range(UNROLL):
            inside = (step + i < size)[:, None] & (columns < WIDTH)[None, :]
            row = (start + step + i)[:, None] * stride_rows_t
            total += tl.load(rows_ptr + row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = total / tl.maximum(size, 1).to(tl.float32)[:, None]
    mean_ptr += problem * num_units * WIDTH
    tl.store(
        mean_ptr + units[:, None] * WIDTH + columns[None, :], mean.to(mean_ptr.dtype.element_ty),
        mask=is_unit[:, None] & (columns < WIDTH)[None, :],
    )  # fmt: skip


def unit_mean_triton(rows: Tensor, unit_ids: Tensor, num_units: int) -> Tensor:
    """Arguments and result as in `unit_mean_reference`; the last stride of the rows is 1."""
    num_problems, _, width = rows.shape
    mean = torch.empty(num_problems, num_units, width, dtype=rows.dtype, device=rows.device)
    if mean.numel() == 0:
        return mean
    offsets = _offsets(unit_ids, num_units)
    block = 8
    num_tiles = triton.cdiv(num_units, block)
    _unit_mean_kernel[(num_problems * num_tiles,)](
        rows, offsets, mean, rows.stride(0), rows.stride(1), num_units, num_tiles,
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), BLOCK_U=block, UNROLL=4,
        num_warps=2,
    )  # fmt: skip
    return mean


def _offsets(unit_ids: Tensor, num_units: int) -> Tensor:
    """int64 [N, num_units + 1]: unit u of a problem is its rows [offsets[u], offsets[u + 1])."""
    wanted = torch.arange(num_units + 1, device=unit_ids.device).repeat(unit_ids.shape[0], 1)
    return torch.searchsorted(unit_ids.contiguous(), wanted)


@triton.jit
def _unit_bounds_kernel(
    rows_ptr, offsets_ptr, lower_ptr, upper_ptr, stride_rows_n, stride_rows_t, num_units, num_tiles,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_U: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    problem = program // num_tiles
    units = (program % num_tiles) * BLOCK_U + tl.arange(0, BLOCK_U)
    columns = tl.arange(0, WIDTH_PAD)
    is_unit = units < num_units
    offsets_ptr += problem * (num_units + 1)
    start = tl.load(offsets_ptr + units, mask=is_unit, other=0)
    size = tl.load(offsets_ptr + units + 1, mask=is_unit, other=0) - start
    rows_ptr += problem * stride_rows_n
    lower = tl.full([BLOCK_U, WIDTH_PAD], float("inf"), dtype=tl.float32)
    upper = tl.full([BLOCK_U, WIDTH_PAD], float("-inf"), dtype=tl.float32)
    longest = tl.max(size, 0).to(tl.int32)
    for step in range(0, longest, UNROLL):
        for i in tl.static_range(UNROLL):
            inside = (step + i < size)[:, None] & (columns < WIDTH)[None, :]
            row = (start + step + i)[:, None] * stride_rows_t
            numbers = tl.load(rows_ptr + row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            lower = tl.minimum(lower, tl.where(inside, numbers, float("inf")))
            upper = tl.maximum(upper, tl.where(inside, numbers, float("-inf")))
    is_any = (size > 0)[:, None]
    place = problem * num_units * WIDTH + units[:, None] * WIDTH + columns[None, :]
    inside = is_unit[:, None] & (columns < WIDTH)[None, :]
    tl.store(lower_ptr + place, tl.where(is_any, lower, 0.0).to(lower_ptr.dtype.element_ty), mask=inside)
    tl.store(upper_ptr + place, tl.where(is_any, upper, 0.0).to(upper_ptr.dtype.element_ty), mask=inside)


def unit_bounds_triton(rows: Tensor, unit_ids: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `unit_bounds_reference`; the last stride of the rows is 1."""
    num_problems, _, width = rows.shape
    lower = torch.empty(num_problems, num_units, width, dtype=rows.dtype, device=rows.device)
    upper = torch.empty_like(lower)
    if lower.numel() == 0:
        return lower, upper
    block = 8
    num_tiles = triton.cdiv(num_units, block)
    _unit_bounds_kernel[(num_problems * num_tiles,)](
        rows, _offsets(unit_ids, num_units), lower, upper, rows.stride(0), rows.stride(1), num_units, num_tiles,
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), BLOCK_U=block, UNROLL=4,
        num_warps=4,
    )  # fmt: skip
    return lower, upper


@triton.jit
def _window_mean_kernel(
    index_ptr, columns_ptr, leaves_ptr, start_ptr, size_ptr, buffer_ptr,
    stride_index_b, stride_index_h, stride_index_u, stride_buffer_b, stride_buffer_h, stride_buffer_n,
    num_kv_heads, num_units, num_slots, first, ring_size,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.load(columns_ptr + program)
    leaves = tl.load(leaves_ptr + program).to(tl.int32) > 0
    if leaves & (column >= 0) & (column < num_units):
        batch = program // num_kv_heads
        head = program % num_kv_heads
        start = tl.load(start_ptr + program)
        size = tl.load(size_ptr + program)
        columns = tl.arange(0, WIDTH_PAD)
        steps = tl.arange(0, BLOCK_N)
        rows_ptr = buffer_ptr + batch * stride_buffer_b + head * stride_buffer_h
        total = tl.zeros([BLOCK_N, WIDTH_PAD], dtype=tl.float32)
        for step in range(0, size.to(tl.int32), BLOCK_N):
            slots = first + (start + step + steps) % ring_size
            valid = (step + steps < size) & (slots >= 0) & (slots < num_slots)
            inside = valid[:, None] & (columns < WIDTH)[None, :]
            rows = tl.load(rows_ptr + slots[:, None] * stride_buffer_n + columns[None, :], mask=inside, other=0.0)
            total += rows.to(tl.float32)
        mean = tl.sum(total, 0) / tl.maximum(size, 1).to(tl.float32)
        mean_ptr = index_ptr + batch * stride_index_b + head * stride_index_h + column * stride_index_u
        tl.store(mean_ptr + columns, mean.to(index_ptr.dtype.element_ty), mask=columns < WIDTH)


def window_mean_triton(
    index: Tensor,
    columns: Tensor,
    leaves: Tensor,
    start: Tensor,
    size: Tensor,
    buffer: Tensor,
    first: int,
    ring_size: int,
) -> None:
    """Arguments as in `window_mean_reference`; the last stride of index and buffer is 1."""
    batch_size, num_kv_heads, num_units, width = index.shape
    if index.numel() == 0:
        return
    width_pad = triton.next_power_of_2(width)
    _window_mean_kernel[(batch_size * num_kv_heads,)](
        index, columns.contiguous(), leaves.contiguous(), start.contiguous(), size.contiguous(), buffer,
        index.stride(0), index.stride(1), index.stride(2), buffer.stride(0), buffer.stride(1), buffer.stride(2),
        num_kv_heads, num_units, buffer.shape[2], first, ring_size,
        WIDTH=width, WIDTH_PAD=width_pad, BLOCK_N=16,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _window_bounds_kernel(
    lower_ptr, upper_ptr, columns_ptr, leaves_ptr, start_ptr, size_ptr, buffer_ptr,
    lower_b, lower_h, lower_u, upper_b, upper_h, upper_u, stride_buffer_b, stride_buffer_h, stride_buffer_n,
    num_kv_heads, num_units, num_slots, first, ring_size,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.load(columns_ptr + program)
    leaves = tl.load(leaves_ptr + program).to(tl.int32) > 0
    if leaves & (column >= 0) & (column < num_units):
        batch = program // num_kv_heads
        head = program % num_kv_heads
        start = tl.load(start_ptr + program)
        size = tl.load(size_ptr + program)
        columns = tl.arange(0, WIDTH_PAD)
        steps = tl.arange(0, BLOCK_N)
        rows_ptr = buffer_ptr + batch * stride_buffer_b + head * stride_buffer_h
        lower = tl.full([BLOCK_N, WIDTH_PAD], float("inf"), dtype=tl.float32)
        upper = tl.full([BLOCK_N, WIDTH_PAD], float("-inf"), dtype=tl.float32)
        for step in range(0, size.to(tl.int32), BLOCK_N):
            slots = first + (start + step + steps) % ring_size
            valid = (step + steps < size) & (slots >= 0) & (slots < num_slots)
            inside = valid[:, None] & (columns < WIDTH)[None, :]
            rows = tl.load(rows_ptr + slots[:, None] * stride_buffer_n + columns[None, :], mask=inside, other=0.0)
            lower = tl.minimum(lower, tl.where(inside, rows.to(tl.float32), float("inf")))
            upper = tl.maximum(upper, tl.where(inside, rows.to(tl.float32), float("-inf")))
        low, up = tl.min(lower, 0), tl.max(upper, 0)
        low, up = tl.where(size > 0, low, 0.0), tl.where(size > 0, up, 0.0)
        place = batch * lower_b + head * lower_h + column * lower_u + columns
        tl.store(lower_ptr + place, low.to(lower_ptr.dtype.element_ty), mask=columns < WIDTH)
        place = batch * upper_b + head * upper_h + column * upper_u + columns
        tl.store(upper_ptr + place, up.to(upper_ptr.dtype.element_ty), mask=columns < WIDTH)


def window_bounds_triton(
    lower: Tensor,
    upper: Tensor,
    columns: Tensor,
    leaves: Tensor,
    start: Tensor,
    size: Tensor,
    buffer: Tensor,
    first: int,
    ring_size: int,
) -> None:
    """Arguments as in `window_bounds_reference`; the last stride of bounds and buffer is 1."""
    batch_size, num_kv_heads, num_units, width = lower.shape
    if lower.numel() == 0:
        return
    _window_bounds_kernel[(batch_size * num_kv_heads,)](
        lower, upper, columns.contiguous(), leaves.contiguous(), start.contiguous(), size.contiguous(), buffer,
        lower.stride(0), lower.stride(1), lower.stride(2), upper.stride(0), upper.stride(1), upper.stride(2),
        buffer.stride(0), buffer.stride(1), buffer.stride(2),
        num_kv_heads, num_units, buffer.shape[2], first, ring_size,
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), BLOCK_N=16,
        num_warps=4,
    )  # fmt: skip
