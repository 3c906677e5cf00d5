"""Plain torch definitions of `unit_mean`, `unit_bounds`, and of the same for the unit that leaves the window."""

from typing import Literal

import torch
from torch import Tensor


def unit_mean_reference(rows: Tensor, unit_ids: Tensor, num_units: int) -> Tensor:
    """Arithmetic mean of each unit's rows.

    rows: [N, T, D]; unit_ids: int64 [N, T], the unit of each row, or `num_units` for a row that belongs to none;
    ascending along T.
    Returns [N, num_units, D] in the rows' dtype, accumulated in at least float32; a unit without rows is zero.
    """
    num_problems, _, width = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    bins = num_units + 1  # the last one collects the rows that belong to no unit
    base = torch.arange(num_problems, device=rows.device)[:, None] * bins
    flat = (unit_ids + base).flatten()
    sums = torch.zeros(num_problems * bins, width, dtype=dtype, device=rows.device)
    sums.index_add_(0, flat, rows.flatten(0, 1).to(dtype))
    sizes = torch.zeros(num_problems * bins, dtype=dtype, device=rows.device)
    sizes.index_add_(0, flat, torch.ones_like(flat, dtype=dtype))
    mean = sums / sizes.clamp(min=1)[:, None]
    return mean.view(num_problems, bins, width)[:, :num_units].to(rows.dtype)


def unit_bounds_reference(rows: Tensor, unit_ids: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each unit's rows, column by column.

    Arguments as in `unit_mean_reference`.
    Returns (lower, upper), [N, num_units, D] each in the rows' dtype; a unit without rows is zero.
    """
    num_problems, _, width = rows.shape
    bins = num_units + 1  # the last one collects the rows that belong to no unit
    base = torch.arange(num_problems, device=rows.device)[:, None] * bins
    place = (unit_ids + base).view(-1, 1).expand(-1, width)

    def bound(reduce: Literal["amin", "amax"]) -> Tensor:
        found = rows.new_zeros(num_problems * bins, width)
        found.scatter_reduce_(0, place, rows.flatten(0, 1), reduce, include_self=False)
        return found.view(num_problems, bins, width)[:, :num_units]

    return bound("amin"), bound("amax")


def window_mean_reference(
    index: Tensor,
    columns: Tensor,
    leaves: Tensor,
    start: Tensor,
    size: Tensor,
    buffer: Tensor,
    first: int,
    ring_size: int,
) -> None:
    """Enter the mean of the rows of a unit that leaves the window into its column of the index, in place.

    index: [B, H, U, D]; columns, start, size: int64 [B, H]; leaves: bool [B, H]; buffer: [B, H, N, D], whose slots from
    `first` on are a ring of `ring_size`: where `leaves`,
    index[b, h, columns[b, h]] = mean of buffer[b, h, first + (start[b, h] + i) % ring_size], 0 <= i < size[b, h],
    accumulated in at least float32. A unit has at most `ring_size` rows.
    Nothing is written where not `leaves`, nor for a column outside [0, U).
    """
    found = leaving_rows(leaves, start, size, buffer, first, ring_size)
    if found is None or index.shape[2] == 0:
        return
    rows, inside = found
    # Not by a product: a slot outside the unit may hold anything.
    rows = torch.where(inside, rows, 0).to(torch.promote_types(buffer.dtype, torch.float32))
    _enter(index, columns, leaves, rows.sum(2) / size.clamp(min=1)[..., None])


def window_bounds_reference(
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
    """Enter the smallest and the largest numbers of the rows of a unit that leaves the window, in place.

    lower, upper: [B, H, U, D], what `unit_bounds_reference` gives; all else as in `window_mean_reference`. A unit
    without rows is zero.
    """
    found = leaving_rows(leaves, start, size, buffer, first, ring_size)
    if found is None or lower.shape[2] == 0:
        return
    rows, inside = found
    is_any = (size > 0)[..., None]
    _enter(lower, columns, leaves, rows.masked_fill(~inside, torch.inf).amin(2).where(is_any, 0))
    _enter(upper, columns, leaves, rows.masked_fill(~inside, -torch.inf).amax(2).where(is_any, 0))


def leaving_rows(
    leaves: Tensor, start: Tensor, size: Tensor, buffer: Tensor, first: int, ring_size: int
) -> tuple[Tensor, Tensor] | None:
    """Rows [B, H, n, D] that hold every unit which leaves, and bool [B, H, n, 1], those of them that belong to it; None
    where it is free to see that none leaves, as in most steps."""
    longest = ring_size
    if leaves.device.type == "cpu":
        if not bool(leaves.any()):
            return None
        longest = max(1, int((size * leaves).max()))
    steps = torch.arange(longest, device=size.device)
    slots = first + (start[..., None] + steps) % ring_size
    rows = buffer.gather(2, slots[..., None].expand(-1, -1, -1, buffer.shape[-1]))
    return rows, (steps < size[..., None])[..., None]


def _enter(index: Tensor, columns: Tensor, leaves: Tensor, entry: Tensor) -> None:
    """Write entries [B, H, D] into the columns of the index where a unit leaves and there is such a column."""
    num_units, width = index.shape[2:]
    column = columns.clamp(0, num_units - 1)[..., None, None].expand(-1, -1, 1, width)
    writes = (leaves & (columns >= 0) & (columns < num_units))[..., None, None]
    index.scatter_(2, column, torch.where(writes, entry[:, :, None].to(index.dtype), index.gather(2, column)))
