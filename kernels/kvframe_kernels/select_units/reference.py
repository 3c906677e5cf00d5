"""Plain torch definitions of `select_units`, `select_candidates`, `select_runs`, `resident_difference` and
`exchange_resident`."""

import math

import torch
from torch import Tensor

from kvframe_kernels.append_token.reference import RESIDENT, Slots

# What is counted of selections, one tensor int64 [NUM_TALLIES, B, H].
SELECTIONS = 0  # steps at which a head selected anew
ROWS_SELECTED = 1  # rows that selections asked for, resident or not
ROWS_RECALLED = 2  # rows of them that were not resident
NUM_TALLIES = 3


def select_units_reference(scores: Tensor, unit_offsets: Tensor, token_budget: int) -> tuple[Tensor, Tensor]:
    """Units in score order until the budget is filled, the last one cut so that it is filled exactly.

    scores: [B, H, U], -inf where there is no unit; ties go to the lower unit.
    unit_offsets: int32 or int64 [B, H, >= U + 1]; unit u is the rows [unit_offsets[u], unit_offsets[u + 1]).
    Returns (rows, count): rows int64 [B, H, token_budget], -1 behind the count; count int64 [B, H].
    """
    rows, count, _ = _in_score_order(scores, unit_offsets, token_budget)
    return rows, count


def select_candidates_reference(
    scores: Tensor, unit_offsets: Tensor, token_budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `select_units_reference` selects, in ascending order, and whose tokens they are.

    Returns (rows, count, unit_ids): rows and count as there; int32 [B, H, token_budget], the unit of each row, anything
    behind the count.
    """
    rows, count, unit_ids = _in_score_order(scores, unit_offsets, token_budget)
    ascending, order = rows.masked_fill(rows < 0, torch.iinfo(torch.int64).max).sort(-1)
    behind = torch.arange(token_budget, device=rows.device) >= count[..., None]
    return ascending.masked_fill(behind, -1), count, unit_ids.gather(-1, order).int()


def _in_score_order(scores: Tensor, unit_offsets: Tensor, token_budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and count of a selection, and the unit of each row, int64 [B, H, token_budget]."""
    num_units = scores.shape[-1]
    if num_units == 0:
        rows = torch.full((*scores.shape[:2], token_budget), -1, dtype=torch.int64, device=scores.device)
        return rows, rows.new_zeros(scores.shape[:2]), torch.zeros_like(rows)
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    starts = unit_offsets[..., :num_units].gather(-1, order).long()
    sizes = unit_offsets[..., 1 : num_units + 1].gather(-1, order) - starts
    sizes = sizes.masked_fill(ranked == -torch.inf, 0)
    ends = sizes.cumsum(-1)
    count = ends[..., -1].clamp(max=token_budget)
    places = torch.arange(token_budget, device=scores.device).expand(*scores.shape[:2], token_budget).contiguous()
    rank = torch.searchsorted(ends, places, right=True).clamp(max=num_units - 1)
    rows = starts.gather(-1, rank) + places - (ends - sizes).gather(-1, rank)
    return rows.masked_fill(places >= count[..., None], -1), count, order.gather(-1, rank)


def select_runs_reference(
    scores: Tensor,
    rows: Tensor,
    count: Tensor,
    run_length: int,
    token_budget: int,
    *,
    due: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Candidates in runs of `run_length`, one after the other in their order, the last run of what is left; runs in
    the order of their scores until the budget is filled, the last one cut so that it is filled exactly.

    scores: [B, H, C], of each candidate, added up in a run, finite; ties go to the lower run.
    rows: int64 [B, H, C], the first count[b, h] of which are candidates, count int64 [B, H].
    due: bool [B, H], where false rows, scores and count may be anything, and there is no candidate; None is true.
    Returns (rows, count) as `select_units_reference` does, in the order of the runs' scores.
    """
    if due is not None:
        count = count.masked_fill(~due, 0)
    num_candidates = rows.shape[-1]
    exists = torch.arange(num_candidates, device=rows.device) < count[..., None]
    padded = torch.nn.functional.pad(scores.masked_fill(~exists, 0), (0, -num_candidates % run_length))
    starts = torch.arange(0, num_candidates + run_length, run_length, device=rows.device)
    offsets = torch.minimum(starts, count[..., None])
    of_runs = padded.view(*rows.shape[:2], -1, run_length).sum(-1)
    of_runs = of_runs.masked_fill(offsets[..., :-1] >= count[..., None], -math.inf)
    places, taken = select_units_reference(of_runs, offsets, token_budget)
    return rows.gather(-1, places.clamp(min=0)).masked_fill(places < 0, -1), taken


def resident_difference_reference(
    resident_rows: Tensor, rows: Tensor, due: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Keep the resident rows that are wanted; put the i-th missing row into the i-th free slot.

    resident_rows: int64 [B, H, C], the row in each slot, -1 in an empty one; rows: int64 [B, H, C], the wanted rows, -1
    behind the last; due: bool [B, H], where nothing is due nothing changes; num_rows: rows of the pool.
    Returns (resident_rows, incoming), int64 [B, H, C] each: the new contents, and for every slot the row that must be
    loaded into it, -1 where the slot stays as it is.
    """
    # Column num_rows collects the -1 entries, so that no row is marked by an empty slot.
    wanted = mark_rows(rows, num_rows)
    present = mark_rows(resident_rows, num_rows)
    keep = (resident_rows >= 0) & wanted.gather(-1, _column(resident_rows, num_rows))
    missing = (rows >= 0) & ~present.gather(-1, _column(rows, num_rows))
    capacity = rows.shape[-1]
    place = torch.where(missing, missing.cumsum(-1) - 1, capacity)
    compact = torch.full((*rows.shape[:2], capacity + 1), -1, dtype=torch.int64, device=rows.device)
    compact.scatter_(-1, place, rows)
    compact[..., capacity] = -1
    free = ~keep
    incoming = compact.gather(-1, torch.where(free, free.cumsum(-1) - 1, capacity))
    incoming = torch.where(due[..., None], incoming, -1)
    updated = torch.where(keep, resident_rows, incoming)
    return torch.where(due[..., None], updated, resident_rows), incoming


def exchange_resident_reference(
    slots: Slots, counts: Tensor, rows: Tensor, count: Tensor, due: Tensor, tallies: Tensor, num_rows: int
) -> Tensor:
    """Make a selection resident where it is due, in place: all but the rows themselves, which have to be loaded.

    counts: int64 [NUM_COUNTS, B, H]; rows int64 [B, H, C], count int64 [B, H]: what `select_units` gave; due: bool
    [B, H]; tallies: int64 [NUM_TALLIES, B, H]; num_rows: rows of the pool.
    Returns incoming, int64 [B, H, C], as `resident_difference` does.
    """
    rows = torch.where(rows < num_rows, rows, -1)
    updated, incoming = resident_difference_reference(slots.resident_rows, rows, due, num_rows)
    slots.resident_rows.copy_(updated)
    filled = torch.zeros_like(updated, dtype=slots.bias.dtype).masked_fill_(updated < 0, -math.inf)
    slots.bias[..., slots.sink_size : slots.ring_first] = filled
    counts[RESIDENT] = torch.where(due, count, counts[RESIDENT])
    tallies[SELECTIONS] += due
    tallies[ROWS_SELECTED] += count * due
    tallies[ROWS_RECALLED] += (incoming >= 0).sum(-1)
    return incoming


def _column(rows: Tensor, num_rows: int) -> Tensor:
    return torch.where(rows >= 0, rows, num_rows)


def mark_rows(rows: Tensor, num_rows: int) -> Tensor:
    """bool [B, H, num_rows + 1]: the rows that are named, int64 [B, H, C] with -1 for none; the last is never."""
    marks = torch.zeros(*rows.shape[:2], num_rows + 1, dtype=torch.bool, device=rows.device)
    marks.scatter_(-1, _column(rows, num_rows), True)
    marks[..., num_rows] = False
    return marks
