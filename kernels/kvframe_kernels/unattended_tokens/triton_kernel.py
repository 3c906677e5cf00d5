"""`unattended_tokens` as a Triton kernel."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Units of a program, and resident rows that it looks at together.
_UNITS = 512
_ROWS = 1024


@triton.jit(do_not_specialize=["max_units", "num_offsets", "capacity"])
def _unattended_tokens_kernel(
    resident_rows, unit_offsets, num_units, rest,
    max_units, num_offsets, capacity,
    UNITS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Grid: KV heads of all sequences, ranges of UNITS units.
    head = tl.program_id(0).to(tl.int64)
    unit_offsets += head * num_offsets
    resident_rows += head * capacity
    rest += head * max_units
    count = tl.minimum(tl.load(num_units + head), max_units).to(tl.int32)
    first = tl.program_id(1) * UNITS
    units = first + tl.arange(0, UNITS)
    exists = units < count
    starts = tl.load(unit_offsets + units, mask=exists, other=0)
    ends = tl.load(unit_offsets + units + 1, mask=exists, other=0)
    tl.store(rest + units, (ends - starts).to(tl.int32), mask=units < max_units)
    if first < count:
        stop = tl.minimum(first + UNITS, count)
        first_row = tl.load(unit_offsets + first)
        stop_row = tl.load(unit_offsets + stop)
        tl.debug_barrier()  # every warp has written its sizes before one takes from them
        for begin in range(0, capacity, ROWS):
            slots = begin + tl.arange(0, ROWS)
            row = tl.load(resident_rows + slots, mask=slots < capacity, other=-1)
            inside = (row >= first_row) & (row < stop_row)
            # The last unit of the range that begins at or before the row.
            low = tl.zeros([ROWS], tl.int32) + first
            high = tl.zeros([ROWS], tl.int32) + stop
            for _ in tl.static_range(STEPS):
                middle = (low + high) // 2
                is_before = tl.load(unit_offsets + middle, mask=inside, other=0) <= row
                low = tl.where(is_before, middle, low)
                high = tl.where(is_before, high, middle)
            tl.atomic_add(rest + low, tl.full([ROWS], -1, tl.int32), mask=inside, sem="relaxed")


def unattended_tokens_triton(resident_rows: Tensor, unit_offsets: Tensor, num_units: Tensor, max_units: int) -> Tensor:
    """Arguments and result as in `unattended_tokens_reference`."""
    resident_rows, unit_offsets = resident_rows.contiguous(), unit_offsets.contiguous()
    batch_size, num_kv_heads, capacity = resident_rows.shape
    rest = torch.empty(batch_size, num_kv_heads, max_units, dtype=torch.int32, device=resident_rows.device)
    _unattended_tokens_kernel[(batch_size * num_kv_heads, triton.cdiv(max_units, _UNITS))](
        resident_rows, unit_offsets, num_units.contiguous(), rest,
        max_units, unit_offsets.shape[-1], capacity,
        UNITS=_UNITS, STEPS=_UNITS.bit_length() - 1, ROWS=_ROWS,
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return rest
