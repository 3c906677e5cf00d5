"""Plain torch definitions of `unit_mean` and `window_mean`."""

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
    num_units, width = index.shape[2:]
    longest = ring_size
    if leaves.device.type == "cpu":  # free to ask for there, and most steps end here
        if not bool(leaves.any()):
            return
        longest = int((size * leaves).max())
    if num_units == 0:
        return
    steps = torch.arange(longest, device=size.device)
    slots = first + (start[..., None] + steps) % ring_size
    inside = (steps < size[..., None])[..., None]
    rows = buffer.gather(2, slots[..., None].expand(-1, -1, -1, width))
    # Not by a product: a slot outside the unit may hold anything.
    rows = torch.where(inside, rows, 0).to(torch.promote_types(buffer.dtype, torch.float32))
    mean = rows.sum(2) / size.clamp(min=1)[..., None]
    column = columns.clamp(0, num_units - 1)[..., None, None].expand(-1, -1, 1, width)
    writes = (leaves & (columns >= 0) & (columns < num_units))[..., None, None]
    index.scatter_(2, column, torch.where(writes, mean[:, :, None].to(index.dtype), index.gather(2, column)))
