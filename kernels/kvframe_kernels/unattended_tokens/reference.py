"""Plain torch definition of `unattended_tokens`."""

import torch
from torch import Tensor


def unattended_tokens_reference(
    resident_rows: Tensor, unit_offsets: Tensor, num_units: Tensor, max_units: int
) -> Tensor:
    """Tokens of each unit that are not resident.

    resident_rows: int64 [B, H, C], -1 for an empty slot; unit_offsets: int32 or int64 [B, H, >= max_units + 1], unit u
    is the rows [unit_offsets[u], unit_offsets[u + 1]); num_units: int64 [B, H], what lies behind it means nothing.
    Returns int32 [B, H, max_units], 0 where there is no unit.
    """
    offsets = unit_offsets[..., : max_units + 1].long()
    columns = torch.arange(max_units + 1, device=offsets.device)
    absent = columns > num_units[..., None]
    # Beyond the last unit every row is smaller than the bound, so that the bounds ascend throughout.
    bounds = offsets.masked_fill(absent, torch.iinfo(torch.int64).max)
    unit = torch.searchsorted(bounds, resident_rows.contiguous(), right=True) - 1
    inside = (resident_rows >= 0) & (unit >= 0) & (unit < num_units[..., None])
    counted = torch.zeros(*offsets.shape[:2], max_units + 1, dtype=torch.int64, device=offsets.device)
    counted.scatter_add_(-1, torch.where(inside, unit, max_units), inside.long())
    sizes = offsets[..., 1:] - offsets[..., :-1]
    return (sizes - counted[..., :-1]).masked_fill(absent[..., 1:], 0).int()
