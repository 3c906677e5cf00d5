"""`append_token` as one Triton kernel: a program a KV head of a sequence."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe_kernels.append_token.reference import Appended, Slots

# Resident slots looked at together when a unit leaves.
_TILE = 16


@triton.jit
def _append_token_kernel(
    counts, unit_offsets, cut, keys, values, k_slots, v_slots, bias, resident_rows, finite,
    position_out, leaves_out, column_out, start_out, size_out,
    num_kv_heads, num_offsets, num_slots, capacity, sink_size, ring_size, window_size, min_size, max_size,
    keys_batch, keys_head, values_batch, values_head, key_width, value_width,
    HAS_CUT: tl.constexpr, HAS_FINITE: tl.constexpr,
    KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    num_heads = tl.num_programs(0)  # of all sequences
    length = tl.load(counts + head)
    sinks = tl.load(counts + num_heads + head)
    resident = tl.load(counts + 2 * num_heads + head)
    window = tl.load(counts + 3 * num_heads + head)
    open_size = tl.load(counts + 4 * num_heads + head)
    units = tl.load(counts + 5 * num_heads + head)
    closed = tl.load(counts + 6 * num_heads + head)
    offsets = unit_offsets + head * num_offsets
    start = tl.load(offsets + tl.minimum(units, num_offsets - 1)).to(tl.int64)
    end = tl.load(offsets + tl.minimum(units + 1, num_offsets - 1)).to(tl.int64)

    # Close the open unit where that is due or where it is full.
    close = open_size >= max_size
    if HAS_CUT:
        is_cut = tl.load(cut + head).to(tl.int32) > 0
        close = close | (is_cut & (open_size >= min_size))
    # The oldest unit in the window may be the one that is closed now.
    end = tl.where(units == closed, length, end)
    proposal = closed + 1
    closed += close.to(tl.int64)
    open_size = tl.where(close, 0, open_size)

    # Take the token in.
    is_sink = length < sink_size
    in_window = (length >= sink_size).to(tl.int64)
    sinks += 1 - in_window
    window += in_window
    open_size += in_window
    ring_first = sink_size + capacity
    place = tl.where(is_sink, length, ring_first + length % ring_size)
    batch = head // num_kv_heads
    columns = tl.arange(0, KEY_WIDTH)
    key = tl.load(
        keys + batch * keys_batch + (head % num_kv_heads) * keys_head + columns, mask=columns < key_width, other=0.0
    )
    tl.store(k_slots + (head * num_slots + place) * key_width + columns, key, mask=columns < key_width)
    value_columns = tl.arange(0, VALUE_WIDTH)
    value = tl.load(
        values + batch * values_batch + (head % num_kv_heads) * values_head + value_columns,
        mask=value_columns < value_width, other=0.0,
    )  # fmt: skip
    tl.store(
        v_slots + (head * num_slots + place) * value_width + value_columns, value, mask=value_columns < value_width
    )
    tl.store(bias + head * num_slots + place, 0.0)
    if HAS_FINITE:
        # NaN is not below infinity either.
        num_finite = tl.sum((tl.abs(key.to(tl.float32)) < float("inf")).to(tl.int32), 0)
        num_finite += tl.sum((tl.abs(value.to(tl.float32)) < float("inf")).to(tl.int32), 0)
        if num_finite < KEY_WIDTH + VALUE_WIDTH:
            tl.store(finite + head, num_finite < 0)

    # The oldest unit leaves where all of it lies before the window.
    leaves = (units < closed) & (end <= length + 1 - window_size)
    tl.store(position_out + head, length)
    tl.store(leaves_out + head, leaves)
    tl.store(column_out + head, units)
    tl.store(start_out + head, start)
    tl.store(size_out + head, end - start)
    tl.debug_barrier()  # every warp has read the ledger before one writes it
    tl.store(offsets + proposal, length, mask=proposal < num_offsets)
    if leaves:
        size = end - start
        steps = tl.arange(0, UNIT)
        leaving = ring_first + (start + steps) % ring_size
        tl.store(bias + head * num_slots + leaving, float("-inf"), mask=steps < size)
        kept = tl.minimum(size, tl.maximum(capacity - resident, 0))
        rank = tl.zeros((), dtype=tl.int64)
        for first in range(0, capacity, TILE):
            if rank < kept:
                slots = first + tl.arange(0, TILE)
                rows = tl.load(resident_rows + head * capacity + slots, mask=slots < capacity, other=0)
                free = (rows < 0).to(tl.int64)
                ranks = rank + tl.cumsum(free, 0) - 1
                takes = (rows < 0) & (ranks < kept)
                source = ring_first + (start + ranks) % ring_size
                inside = takes[:, None] & (columns < key_width)[None, :]
                moved = tl.load(
                    k_slots + (head * num_slots + source)[:, None] * key_width + columns[None, :], mask=inside
                )
                target = head * num_slots + sink_size + slots
                tl.store(k_slots + target[:, None] * key_width + columns[None, :], moved, mask=inside)
                inside = takes[:, None] & (value_columns < value_width)[None, :]
                moved = tl.load(
                    v_slots + (head * num_slots + source)[:, None] * value_width + value_columns[None, :], mask=inside
                )
                tl.store(v_slots + target[:, None] * value_width + value_columns[None, :], moved, mask=inside)
                tl.debug_barrier()  # as above, of the resident rows
                tl.store(resident_rows + head * capacity + slots, start + ranks, mask=takes)
                tl.store(bias + target, 0.0, mask=takes)
                rank += tl.sum(free, 0)
        units += 1
        window -= size
        resident += kept
    tl.store(counts + head, length + 1)
    tl.store(counts + num_heads + head, sinks)
    tl.store(counts + 2 * num_heads + head, resident)
    tl.store(counts + 3 * num_heads + head, window)
    tl.store(counts + 4 * num_heads + head, open_size)
    tl.store(counts + 5 * num_heads + head, units)
    tl.store(counts + 6 * num_heads + head, closed)


def append_token_triton(
    counts: Tensor, unit_offsets: Tensor, cut: Tensor | None, keys: Tensor, values: Tensor, slots: Slots,
    finite: Tensor | None, window_size: int, min_size: int, max_size: int,
) -> Appended:  # fmt: skip
    """Arguments and result as in `append_token_reference`; all but keys and values are contiguous."""
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    values = values if values.stride(-1) == 1 else values.contiguous()
    batch_size, num_kv_heads, key_width = keys.shape
    value_width = values.shape[-1]
    numbers = torch.empty(4, batch_size, num_kv_heads, dtype=torch.int64, device=keys.device)
    leaves = torch.empty(batch_size, num_kv_heads, dtype=torch.bool, device=keys.device)
    position, column, start, size = numbers
    _append_token_kernel[(batch_size * num_kv_heads,)](
        counts, unit_offsets, leaves if cut is None else cut.contiguous(), keys, values, slots.keys, slots.values,
        slots.bias, slots.resident_rows, leaves if finite is None else finite,
        position, leaves, column, start, size,
        num_kv_heads, unit_offsets.shape[-1], slots.bias.shape[-1], slots.resident_rows.shape[-1],
        slots.sink_size, slots.ring_size, window_size, min_size, max_size,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), key_width, value_width,
        HAS_CUT=cut is not None, HAS_FINITE=finite is not None, KEY_WIDTH=triton.next_power_of_2(key_width),
        VALUE_WIDTH=triton.next_power_of_2(value_width), UNIT=triton.next_power_of_2(max_size), TILE=_TILE,
        num_warps=4,
    )  # fmt: skip
    return Appended(position, leaves, column, start, size)
