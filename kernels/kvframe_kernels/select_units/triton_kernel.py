"""`select_units`, `select_candidates`, `select_runs` and `exchange_resident` as Triton kernels: a program a KV head."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe_kernels.append_token.reference import RESIDENT, Slots
from kvframe_kernels.select_units.reference import ROWS_RECALLED, ROWS_SELECTED, SELECTIONS

# Scores of so many units stay in a program's registers, and of half as many behind them; those of more are read again
# in every step of the search.
_MAX_TILE = 16384
# Rows of a selection that are written together.
_FILL = 2048
# Slots looked at together.
_SLOT_TILE = 1024

_SELECTIONS = tl.constexpr(SELECTIONS)
_ROWS_SELECTED = tl.constexpr(ROWS_SELECTED)
_ROWS_RECALLED = tl.constexpr(ROWS_RECALLED)
_RESIDENT = tl.constexpr(RESIDENT)


@triton.jit
def _keys_and_sizes(scores, offsets, units, num_units, num_rows, RUN: tl.constexpr):
    """Integers in the order of the scores, and the units' tokens; a unit that does not exist has none.

    With RUN, units are so many rows each of num_rows, which have a score each; a unit has the sum of theirs.
    """
    if RUN > 0:
        starts = units * RUN
        sizes = tl.minimum(tl.maximum(num_rows - starts, 0), RUN)
        score = tl.load(scores + starts, mask=starts < num_rows, other=float("-inf")).to(tl.float32)
        for place in range(1, RUN):
            score += tl.load(scores + starts + place, mask=starts + place < num_rows, other=0.0).to(tl.float32)
    else:
        exists = units < num_units
        score = tl.load(scores + units, mask=exists, other=float("-inf")).to(tl.float32)
        starts = tl.load(offsets + units, mask=exists, other=0)
        ends = tl.load(offsets + units + 1, mask=exists, other=0)
        sizes = tl.where(score == float("-inf"), 0, ends - starts).to(tl.int32)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 equals 0
    keys = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return keys, sizes


@triton.jit
def _above(keys, sizes, first, second, third):
    """Tokens of each unit at or above three thresholds, in three fields of 21 bits."""
    wide = sizes.to(tl.int64)
    fields = tl.where(keys >= first.to(tl.int32), wide, 0)
    fields += tl.where(keys >= second.to(tl.int32), wide << 21, 0)
    return fields + tl.where(keys >= third.to(tl.int32), wide << 42, 0)


@triton.jit
def _later(one, other):
    return tl.maximum(one, other)


@triton.jit
def _select_units_kernel(
    scores, unit_offsets, candidates, num_candidates, due, rows, count, firsts, starts_of, units_of, unit_ids,
    num_units, num_offsets, scores_head, budget,
    HAS_DUE: tl.constexpr, TILE: tl.constexpr, REST: tl.constexpr, NUM_TILES: tl.constexpr, PART: tl.constexpr,
    FILL: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    # With RUN, units are runs of `candidates`, of which there are num_candidates; unit_offsets says nothing then.
    head = tl.program_id(0).to(tl.int64)
    is_due = True
    if HAS_DUE:
        is_due = tl.load(due + head).to(tl.int32) > 0
    if is_due:
        scores += head * scores_head
        offsets = unit_offsets + head * num_offsets
        rows += head * budget
        firsts += head * budget
        starts_of += head * budget
        if unit_ids is not None:
            units_of += head * budget
            unit_ids += head * budget
        num_rows = 0
        if RUN > 0:
            candidates += head * scores_head
            num_rows = tl.minimum(tl.load(num_candidates + head), scores_head).to(tl.int32)
        lanes = tl.arange(0, TILE)
        for begin in range(0, budget, FILL):
            places = begin + tl.arange(0, FILL)
            tl.store(firsts + places, tl.zeros((FILL,), dtype=tl.int32), mask=places < budget)
        tl.debug_barrier()

        # The range of the scores, and whether there is any choice.
        keys, sizes = _keys_and_sizes(scores, offsets, lanes, num_units, num_rows, RUN)
        total = tl.sum(sizes, 0)
        high = tl.max(tl.where(sizes > 0, keys, -2147483648), 0)
        low = tl.min(tl.where(sizes > 0, keys, 2147483647), 0)
        if REST > 0:
            rest_keys, rest_sizes = _keys_and_sizes(
                scores, offsets, TILE + tl.arange(0, REST), num_units, num_rows, RUN
            )
            total += tl.sum(rest_sizes, 0)
            high = tl.maximum(high, tl.max(tl.where(rest_sizes > 0, rest_keys, -2147483648), 0))
            low = tl.minimum(low, tl.min(tl.where(rest_sizes > 0, rest_keys, 2147483647), 0))
        for tile in range(1, NUM_TILES):
            keys, sizes = _keys_and_sizes(scores, offsets, tile * TILE + lanes, num_units, num_rows, RUN)
            total += tl.sum(sizes, 0)
            high = tl.maximum(high, tl.max(tl.where(sizes > 0, keys, -2147483648), 0))
            low = tl.minimum(low, tl.min(tl.where(sizes > 0, keys, 2147483647), 0))
        if NUM_TILES > 1:
            keys, sizes = _keys_and_sizes(scores, offsets, lanes, num_units, num_rows, RUN)

        # The highest score such that the units at or above it fill the budget. No sort: the range is cut into four
        # again and again, and one sum of three fields of 21 bits says in which quarter the score lies.
        high = high.to(tl.int64)
        low = low.to(tl.int64)
        if total <= budget:
            high = low
        while low < high:
            span = high - low
            first = low + (span + 3) // 4
            second = low + (span + 1) // 2
            third = low + (3 * span + 3) // 4
            above = tl.sum(_above(keys, sizes, first, second, third), 0)
            if REST > 0:
                above += tl.sum(_above(rest_keys, rest_sizes, first, second, third), 0)
            for tile in range(1, NUM_TILES):
                more_keys, more_sizes = _keys_and_sizes(scores, offsets, tile * TILE + lanes, num_units, num_rows, RUN)
                above += tl.sum(_above(more_keys, more_sizes, first, second, third), 0)
            if (above >> 42) >= budget:
                low = third
            elif ((above >> 21) & 0x1FFFFF) >= budget:
                low = second
                high = third - 1
            elif (above & 0x1FFFFF) >= budget:
                low = first
                high = second - 1
            else:
                high = first - 1

        # Units above it are taken whole, those at it in their order until the budget is filled.
        last = low.to(tl.int32)
        whole = tl.sum(tl.where(keys > last, sizes, 0), 0)
        if REST > 0:
            whole += tl.sum(tl.where(rest_keys > last, rest_sizes, 0), 0)
        for tile in range(1, NUM_TILES):
            more_keys, more_sizes = _keys_and_sizes(scores, offsets, tile * TILE + lanes, num_units, num_rows, RUN)
            whole += tl.sum(tl.where(more_keys > last, more_sizes, 0), 0)
        room = budget - whole
        tied_before = tl.zeros((), dtype=tl.int32)
        taken_before = tl.zeros((), dtype=tl.int32)
        # Read again in smaller parts: what this takes in registers is several times the scores.
        for part in range(0, num_units, PART):
            units = part + tl.arange(0, PART)
            part_keys, part_sizes = _keys_and_sizes(scores, offsets, units, num_units, num_rows, RUN)
            tied = tl.where(part_keys == last, part_sizes, 0)
            tied_sum = tl.cumsum(tied, 0)
            left = tl.maximum(room - (tied_before + tied_sum - tied), 0)
            taken = tl.where(part_keys > last, part_sizes, tl.minimum(tied, left))
            taken_sum = tl.cumsum(taken, 0)
            place = taken_before + taken_sum - taken
            if RUN > 0:
                starts = units * RUN
            else:
                starts = tl.load(offsets + units, mask=taken > 0, other=0)
            # Only the first row of each unit, and where it stands.
            tl.store(starts_of + place, starts, mask=taken > 0)
            tl.store(firsts + place, place, mask=taken > 0)
            if unit_ids is not None:
                tl.store(units_of + place, units, mask=taken > 0)
            tied_before += tl.sum(tied, 0)
            taken_before += tl.sum(taken, 0)
        tl.store(count + head, taken_before.to(tl.int64))
        tl.debug_barrier()
        # The other rows of a unit follow its first: the latest place up to theirs where a unit begins says which.
        latest = tl.zeros((), dtype=tl.int32)
        for begin in range(0, budget, FILL):
            places = begin + tl.arange(0, FILL)
            marked = tl.load(firsts + places, mask=places < taken_before, other=0)
            origin = tl.maximum(tl.associative_scan(marked, 0, _later), latest)
            latest = tl.max(origin, 0)
            row = tl.load(starts_of + origin, mask=places < taken_before, other=0) + places - origin
            if RUN > 0:
                row = tl.load(candidates + row, mask=places < taken_before, other=0)
            tl.store(rows + places, tl.where(places < taken_before, row, -1), mask=places < budget)
            if unit_ids is not None:
                unit = tl.load(units_of + origin, mask=places < taken_before, other=0)
                tl.store(unit_ids + places, unit, mask=places < budget)


def select_units_triton(
    scores: Tensor, unit_offsets: Tensor, token_budget: int, due: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `select_units_reference`, the rows in the units' order."""
    return _select(scores, unit_offsets, None, None, token_budget, 0, due)


def select_candidates_triton(
    scores: Tensor, unit_offsets: Tensor, token_budget: int, due: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as in `select_candidates_reference`."""
    unit_ids = torch.empty(*scores.shape[:2], token_budget, dtype=torch.int32, device=scores.device)
    return *_select(scores, unit_offsets, None, None, token_budget, 0, due, unit_ids), unit_ids


def select_runs_triton(
    scores: Tensor, rows: Tensor, count: Tensor, run_length: int, token_budget: int, due: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `select_runs_reference`, the rows in the order of the candidates."""
    return _select(scores, None, rows.contiguous(), count.contiguous(), token_budget, run_length, due)


def _select(
    scores: Tensor,
    unit_offsets: Tensor | None,
    candidates: Tensor | None,
    num_candidates: Tensor | None,
    token_budget: int,
    run_length: int,
    due: Tensor | None,
    unit_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Units of a table of offsets, or, without one, runs of so many candidates; fills `unit_ids` where it is given."""
    scores = scores.contiguous()
    batch_size, num_kv_heads, num_scores = scores.shape
    num_units = triton.cdiv(num_scores, run_length) if run_length else num_scores
    rows = torch.empty(batch_size, num_kv_heads, token_budget, dtype=torch.int64, device=scores.device)
    count = torch.empty(batch_size, num_kv_heads, dtype=torch.int64, device=scores.device)
    firsts, starts_of = torch.empty(2, *rows.shape, dtype=torch.int32, device=scores.device).unbind()
    tile = min(_MAX_TILE, triton.next_power_of_2(num_units))
    if tile // 2 < num_units <= tile // 2 + tile // 4:
        tile //= 2
    num_tiles, rest = triton.cdiv(num_units, tile), 0
    if tile < num_units <= tile + tile // 2:
        num_tiles, rest = 1, triton.next_power_of_2(num_units - tile)
    _select_units_kernel[(batch_size * num_kv_heads,)](
        scores,
        rows if unit_offsets is None else unit_offsets,
        rows if candidates is None else candidates,
        count if num_candidates is None else num_candidates,
        count if due is None else due.contiguous(),
        rows, count, firsts, starts_of, None if unit_ids is None else torch.empty_like(firsts), unit_ids,
        num_units, 0 if unit_offsets is None else unit_offsets.shape[-1], num_scores, token_budget,
        HAS_DUE=due is not None, TILE=tile, REST=rest, NUM_TILES=num_tiles,
        PART=min(tile, 4096),
        FILL=min(_FILL, triton.next_power_of_2(token_budget)),
        RUN=run_length,
        num_warps=min(32, max(4, tile // 1024)),
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
