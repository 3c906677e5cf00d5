"""Plain torch definition of `unit_mean`."""

import torch
from torch import Tensor


def unit_mean_reference(rows: Tensor, unit_ids: Tensor, num_units: int) -> Tensor:
    """Arithmetic mean of each unit's rows.

    rows: [N, T, D]; unit_ids: int64 [N, T], the unit of each row, or `num_units` for a row that belongs to none.
    Returns [N, num_units, D] in at least float32; a unit without rows is zero.
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
    return mean.view(num_problems, bins, width)[:, :num_units]
