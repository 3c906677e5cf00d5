"""`select_units` and `exchange_resident` as Triton kernels: a program a KV head of a sequence."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe_kernels.append_token.reference import RESIDENT, Slots
from kvframe_kernels.select_units.reference import ROWS_RECALLED, ROWS_SELECTED, SELECTIONS

# Scores of so many units stay in a program's registers; those of more are read again in every step of the bisection.
_MAX_TILE = 16384
# Slots looked at together.
_SLOT_TILE = 1024

_SELECTIONS = tl.constexpr(SELECTIONS)
_ROWS_SELECTED = tl.constexpr(ROWS_SELECTED)
_ROWS_RECALLED = tl.constexpr(ROWS_RECALLED)
_RESIDENT = tl.constexpr(RESIDENT)


@triton.jit
def _keys_and_sizes(scores, offsets, units, num_units):
    """Integers in the order of the scores, and the units' tokens; a unit that does not exist has none."""
    exists = units < num_units
    score = tl.load(scores + units, mask=exists, other=float("-inf")).to(tl.float32) + 0.0  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    keys = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    starts = tl.load(offsets + units, mask=exists, other=0)
    ends = tl.load(offsets + units + 1, mask=exists, other=0)
    sizes = tl.where(score == float("-inf"), 0, ends - starts).to(tl.int32)
    return keys, sizes


@triton.jit
def _select_units_kernel(
    scores, unit_offsets, due, rows, count,
    num_units, num_offsets, scores_head, budget,
    HAS_DUE: tl.constexpr, TILE: tl.constexpr, NUM_TILES: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    is_due = True
    if HAS_DUE:
        is_due = tl.load(due + head).to(tl.int32) > 0
    if is_due:
        scores += head * scores_head
        offsets = unit_offsets + head * num_offsets
        rows += head * budget
        lanes = tl.arange(0, TILE)

        # The range of the scores, and whether there is any choice.
        keys, sizes = _keys_and_sizes(scores, offsets, lanes, num_units)
        total = tl.sum(sizes, 0)
        high = tl.max(tl.where(sizes > 0, keys, -2147483648), 0)
        low = tl.min(tl.where(sizes > 0, keys, 2147483647), 0)
        for tile in range(1, NUM_TILES):
            keys, sizes = _keys_and_sizes(scores, offsets, tile * TILE + lanes, num_units)
            total += tl.sum(sizes, 0)
            high = tl.maximum(high, tl.max(tl.where(sizes > 0, keys, -2147483648), 0))
            low = tl.minimum(low, tl.min(tl.where(sizes > 0, keys, 2147483647), 0))
        if NUM_TILES > 1:
            keys, sizes = _keys_and_sizes(scores, offsets, lanes, num_units)

        # The highest score such that the units at or above it fill the budget, by bisection: no sort.
        high = high.to(tl.int64)
        low = low.to(tl.int64)
        if total <= budget:
            high = low
        while low < high:
            middle = low + (high - low + 1) // 2
            threshold = middle.to(tl.int32)
            above = tl.sum(tl.where(keys >= threshold, sizes, 0), 0)
            for tile in range(1, NUM_TILES):
                more_keys, more_sizes = _keys_and_sizes(scores, offsets, tile * TILE + lanes, num_units)
                above += tl.sum(tl.where(more_keys >= threshold, more_sizes, 0), 0)
            if above >= budget:
                low = middle
            else:
                high = middle - 1

        # Units above it are taken whole, those at it in their order until the budget is filled.
        last = low.to(tl.int32)
        whole = tl.sum(tl.where(keys > last, sizes, 0), 0)
        for tile in range(1, NUM_TILES):
            more_keys, more_sizes = _keys_and_sizes(scores, offsets, tile * TILE + lanes, num_units)
            whole += tl.sum(tl.where(more_keys > last, more_sizes, 0), 0)
        room = budget - whole
        tied_before = tl.zeros((), dtype=tl.int32)
        taken_before = tl.zeros((), dtype=tl.int32)
        for tile in range(NUM_TILES):
            if NUM_TILES > 1:
                keys, sizes = _keys_and_sizes(scores, offsets, tile * TILE + lanes, num_units)
            tied = tl.where(keys == last, sizes, 0)
            tied_sum = tl.cumsum(tied, 0)
            left = tl.maximum(room - (tied_before + tied_sum - tied), 0)
            taken = tl.where(keys > last, sizes, tl.minimum(tied, left))
            taken_sum = tl.cumsum(taken, 0)
            place = taken_before + taken_sum - taken
            units = tile * TILE + lanes
            starts = tl.load(offsets + units, mask=taken > 0, other=0)
            for step in range(tl.max(taken, 0)):
                tl.store(rows + place + step, starts + step, mask=step < taken)
            tied_before += tl.sum(tied, 0)
            taken_before += tl.sum(taken, 0)
        tl.store(count + head, taken_before.to(tl.int64))
        for first in range(0, budget, FILL):
            empty = first + tl.arange(0, FILL)
            nothing = tl.full((FILL,), -1, dtype=tl.int64)
            tl.store(rows + empty, nothing, mask=(empty >= taken_before) & (empty < budget))


def select_units_triton(
    scores: Tensor, unit_offsets: Tensor, token_budget: int, due: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `select_units_reference`, the rows in the units' order."""
    scores = scores.contiguous()
    batch_size, num_kv_heads, num_units = scores.shape
    rows = torch.empty(batch_size, num_kv_heads, token_budget, dtype=torch.int64, device=scores.device)
    count = torch.empty(batch_size, num_kv_heads, dtype=torch.int64, device=scores.device)
    tile = min(_MAX_TILE, triton.next_power_of_2(num_units))
    _select_units_kernel[(batch_size * num_kv_heads,)](
        scores, unit_offsets, count if due is None else due.contiguous(), rows, count,
        num_units, unit_offsets.shape[-1], num_units, token_budget,
        HAS_DUE=due is not None, TILE=tile, NUM_TILES=triton.cdiv(num_units, tile),
        FILL=min(1024, triton.next_power_of_2(token_budget)),
        num_warps=min(32, max(4, tile // 512)),
    )  # fmt: skip
    return rows, count


@triton.jit
def _exchange_resident_kernel(
    resident_rows, bias, counts, rows, count, due, tallies, marks, incoming, compact,
    num_heads, num_slots, capacity, sink_size, num_rows, num_words,
    TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    resident_rows += head * capacity
    rows += head * capacity
    incoming += head * capacity
    compact += head * capacity
    marks += head * num_words
    bias += head * num_slots + sink_size
    nothing = tl.full((TILE,), -1, dtype=tl.int64)
    if tl.load(due + head).to(tl.int32) == 0:
        for first in range(0, capacity, TILE):
            slots = first + tl.arange(0, TILE)
            tl.store(incoming + slots, nothing, mask=slots < capacity)
    else:
        # A bit for every wanted row.
        for first in range(0, capacity, TILE):
            slots = first + tl.arange(0, TILE)
            wanted = tl.load(rows + slots, mask=slots < capacity, other=-1)
            real = (wanted >= 0) & (wanted < num_rows)
            bit = (tl.full((TILE,), 1, dtype=tl.int32) << (wanted % 32).to(tl.int32)).to(tl.int32)
            tl.atomic_or(marks + wanted // 32, bit, mask=real, sem="relaxed")
        tl.debug_barrier()
        # A resident row that has its bit stays, and takes the bit away: what is left is missing. Bits are read past the
        # first cache, which does not see what atomics do.
        for first in range(0, capacity, TILE):
            slots = first + tl.arange(0, TILE)
            held = tl.load(resident_rows + slots, mask=slots < capacity, other=-1)
            real = (held >= 0) & (held < num_rows)
            word = tl.load(marks + held // 32, mask=real, other=0, cache_modifier=".cg")
            keeps = real & (((word >> (held % 32).to(tl.int32)) & 1) > 0)
            bit = (tl.full((TILE,), 1, dtype=tl.int32) << (held % 32).to(tl.int32)).to(tl.int32)
            tl.atomic_and(marks + held // 32, ~bit, mask=keeps, sem="relaxed")
            tl.store(incoming + slots, tl.where(keeps, nothing, nothing - 1), mask=slots < capacity)
        tl.debug_barrier()
        num_missing = tl.zeros((), dtype=tl.int64)
        for first in range(0, capacity, TILE):
            slots = first + tl.arange(0, TILE)
            wanted = tl.load(rows + slots, mask=slots < capacity, other=-1)
            real = (wanted >= 0) & (wanted < num_rows)
            word = tl.load(marks + wanted // 32, mask=real, other=0, cache_modifier=".cg")
            missing = real & (((word >> (wanted % 32).to(tl.int32)) & 1) > 0)
            rank = num_missing + tl.cumsum(missing.to(tl.int64), 0) - 1
            tl.store(compact + rank, wanted, mask=missing)
            num_missing += tl.sum(missing.to(tl.int64), 0)
        tl.debug_barrier()
        # The i-th missing row goes to the i-th free slot; the bits go.
        num_free = tl.zeros((), dtype=tl.int64)
        for first in range(0, capacity, TILE):
            slots = first + tl.arange(0, TILE)
            free = tl.load(incoming + slots, mask=slots < capacity, other=-1) == -2
            rank = num_free + tl.cumsum(free.to(tl.int64), 0) - 1
            takes = free & (rank < num_missing)
            row = tl.load(compact + rank, mask=takes, other=-1)
            wanted = tl.load(rows + slots, mask=slots < capacity, other=-1)
            tl.debug_barrier()  # every warp has read which slots are free
            tl.store(incoming + slots, row, mask=free)
            tl.store(resident_rows + slots, row, mask=free)
            tl.store(bias + slots, tl.where(takes, 0.0, float("-inf")), mask=free)
            num_free += tl.sum(free.to(tl.int64), 0)
            real = (wanted >= 0) & (wanted < num_rows)
            tl.store(marks + wanted // 32, tl.zeros((TILE,), dtype=tl.int32), mask=real)
        taken = tl.load(count + head)
        tl.store(counts + _RESIDENT * num_heads + head, taken)
        selections = tallies + _SELECTIONS * num_heads + head
        selected = tallies + _ROWS_SELECTED * num_heads + head
        recalled = tallies + _ROWS_RECALLED * num_heads + head
        num_selections = tl.load(selections) + 1
        num_selected = tl.load(selected) + taken
        num_recalled = tl.load(recalled) + num_missing
        tl.debug_barrier()
        tl.store(selections, num_selections)
        tl.store(selected, num_selected)
        tl.store(recalled, num_recalled)


def exchange_resident_triton(
    slots: Slots, counts: Tensor, rows: Tensor, count: Tensor, due: Tensor, tallies: Tensor, marks: Tensor,
    num_rows: int,
) -> Tensor:  # fmt: skip
    """Arguments and result as in `exchange_resident_reference`; everything is contiguous."""
    rows, count, due = rows.contiguous(), count.contiguous(), due.contiguous()
    batch_size, num_kv_heads, capacity = rows.shape
    incoming, compact = torch.empty_like(rows), torch.empty_like(rows)
    tile = min(_SLOT_TILE, triton.next_power_of_2(capacity))
    _exchange_resident_kernel[(batch_size * num_kv_heads,)](
        slots.resident_rows, slots.bias, counts, rows, count, due, tallies, marks, incoming, compact,
        batch_size * num_kv_heads, slots.bias.shape[-1], capacity, slots.sink_size, num_rows, marks.shape[-1],
        TILE=tile, num_warps=min(8, max(1, tile // 128)),
    )  # fmt: skip
    return incoming
