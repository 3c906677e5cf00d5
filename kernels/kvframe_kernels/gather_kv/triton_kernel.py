"""`gather_kv` and `store_token` in Triton."""

# What Triton compiles has no types that Python knows; nor has device_of.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots that a program looks at together, and those of them that it copies together.
_SCAN = 128
_TILE = 16
# 64 programs keep a PCIe 5 x16 link busy with rows of 8 KB. Where nothing is due a program costs next to nothing, and
# with many of them none has to look at many slots in turn.
_DEFAULT_BLOCKS = 512


@triton.jit
def _is_due(rows, first_row, num_rows):
    # first_row is not negative, so that -1 is never due.
    return (rows >= first_row) & (rows - first_row < num_rows)


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_slots"])
def _gather_kv_kernel(
    pool, incoming, keys, values,
    first_row, num_rows, num_slots, capacity, num_heads,
    pool_batch, pool_head, key_batch, key_head, value_batch, value_head,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    SCAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    key_columns = tl.arange(0, KEY_COLUMNS)
    value_columns = tl.arange(0, VALUE_COLUMNS)
    for start in range(tl.program_id(0) * SCAN, num_slots, tl.num_programs(0) * SCAN):
        scanned = start + tl.arange(0, SCAN)
        found = _is_due(tl.load(incoming + scanned, mask=scanned < num_slots, other=-1), first_row, num_rows)
        if tl.max(found.to(tl.int32), 0) > 0:
            for part in range(0, SCAN, TILE):
                slots = (start + part + tl.arange(0, TILE)).to(tl.int64)
                rows = tl.load(incoming + slots, mask=slots < num_slots, other=-1)
                due = _is_due(rows, first_row, num_rows)[:, None]
                batches = slots // capacity // num_heads
                heads = slots // capacity % num_heads
                places = slots % capacity
                source = batches * pool_batch + heads * pool_head + (rows - first_row) * (HEAD_DIM + VALUE_DIM)
                key_mask = due & (key_columns < HEAD_DIM)[None, :]
                value_mask = due & (value_columns < VALUE_DIM)[None, :]
                new_keys = tl.load(pool + source[:, None] + key_columns[None, :], mask=key_mask)
                new_values = tl.load(pool + source[:, None] + (HEAD_DIM + value_columns)[None, :], mask=value_mask)
                key_place = batches * key_batch + heads * key_head + places * HEAD_DIM
                tl.store(keys + key_place[:, None] + key_columns[None, :], new_keys, mask=key_mask)
                value_place = batches * value_batch + heads * value_head + places * VALUE_DIM
                tl.store(values + value_place[:, None] + value_columns[None, :], new_values, mask=value_mask)


def gather_kv_triton(
    pool: Tensor, incoming: Tensor, first_row: int, k_slots: Tensor, v_slots: Tensor, num_blocks: int | None
) -> None:
    """Arguments as in `gather_kv_reference`; the rows of a head dense, at least one slot."""
    _, num_heads, capacity, head_dim = k_slots.shape
    value_dim = v_slots.shape[-1]
    num_slots = incoming.numel()
    grid = min(num_blocks or _DEFAULT_BLOCKS, triton.cdiv(num_slots, _SCAN))
    with torch.cuda.device_of(k_slots):
        _gather_kv_kernel[(grid,)](
            pool, incoming.contiguous(), k_slots, v_slots,
            first_row, pool.shape[2], num_slots, capacity, num_heads,
            pool.stride(0), pool.stride(1), k_slots.stride(0), k_slots.stride(1), v_slots.stride(0), v_slots.stride(1),
            HEAD_DIM=head_dim, VALUE_DIM=value_dim,
            KEY_COLUMNS=triton.next_power_of_2(head_dim), VALUE_COLUMNS=triton.next_power_of_2(value_dim),
            SCAN=_SCAN, TILE=_TILE, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _store_token_kernel(
    pool, rows, keys, values,
    first_row, num_rows, num_heads,
    pool_batch, pool_head, row_batch, row_head, key_batch, key_head, value_batch, value_head,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    batch = line // num_heads
    head = line % num_heads
    row = tl.load(rows + batch * row_batch + head * row_head)
    if _is_due(row, first_row, num_rows):
        key_columns = tl.arange(0, KEY_COLUMNS)
        key_mask = key_columns < HEAD_DIM
        target = pool + batch * pool_batch + head * pool_head + (row - first_row) * (HEAD_DIM + VALUE_DIM)
        new_keys = tl.load(keys + batch * key_batch + head * key_head + key_columns, mask=key_mask)
        tl.store(target + key_columns, new_keys, mask=key_mask)
        value_columns = tl.arange(0, VALUE_COLUMNS)
        value_mask = value_columns < VALUE_DIM
        new_values = tl.load(values + batch * value_batch + head * value_head + value_columns, mask=value_mask)
        tl.store(target + HEAD_DIM + value_columns, new_values, mask=value_mask)


def store_token_triton(pool: Tensor, rows: Tensor, first_row: int, keys: Tensor, values: Tensor) -> None:
    """Arguments as in `store_token_reference`; the rows of a head of the pool dense, at least one head."""
    num_heads, head_dim = keys.shape[1:]
    value_dim = values.shape[-1]
    with torch.cuda.device_of(keys):
        _store_token_kernel[(rows.numel(),)](
            pool, rows, keys, values,
            first_row, pool.shape[2], num_heads,
            pool.stride(0), pool.stride(1), rows.stride(0), rows.stride(1),
            keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
            HEAD_DIM=head_dim, VALUE_DIM=value_dim,
            KEY_COLUMNS=triton.next_power_of_2(head_dim), VALUE_COLUMNS=triton.next_power_of_2(value_dim),
            num_warps=1,
        )  # fmt: skip
