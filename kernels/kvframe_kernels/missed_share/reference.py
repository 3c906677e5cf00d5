"""Plain torch definitions of `kept_lse`, `missed_share` and `exceeds`."""

import torch
from torch import Tensor

from kvframe_kernels.append_token.reference import Slots
from kvframe_kernels.select_units.reference import mark_rows


def kept_lse_reference(query: Tensor, slots: Slots, sm_scale: float) -> Tensor:
    """Log-sum-exp of the scaled scores of sinks and window, [B, Hq] in at least float32.

    query: [B, Hq, D]. All slots but the resident ones count, where their bias is 0; each head has at least one.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads = slots.keys.shape[:2]
    kept = [slice(0, slots.sink_size), slice(slots.ring_first, None)]
    keys = torch.cat([slots.keys[:, :, part] for part in kept], 2).to(dtype)
    bias = torch.cat([slots.bias[:, :, part] for part in kept], 2).to(dtype)
    grouped = query.to(dtype).reshape(*heads, -1, query.shape[-1]) * sm_scale
    scores = torch.matmul(grouped, keys.transpose(2, 3)) + bias[:, :, None]
    return scores.logsumexp(-1).flatten(1)


def missed_share_reference(resident_rows: Tensor, rows: Tensor, count: Tensor, shares: Tensor, num_rows: int) -> Tensor:
    """Of each head the largest share of a candidate that is not resident, [B, H] in the dtype of the shares; 0 where
    all of them are, or there are none.

    resident_rows: int64 [B, H, C], -1 for an empty slot; rows: int64 [B, H, n] within [0, num_rows), shares [B, H, n],
    of which the first count[b, h] are candidates, count int64 [B, H].
    """
    is_resident = mark_rows(resident_rows, num_rows)
    exists = torch.arange(rows.shape[-1], device=rows.device) < count[..., None]
    missing = exists & ~is_resident.gather(-1, torch.where(exists, rows, num_rows))
    return shares.masked_fill(~missing, 0).amax(-1).clamp(min=0)


def exceeds_reference(missed: Tensor, share: float, first: Tensor) -> Tensor:
    """Where more than a share is missed, or at a head's first step: bool of the shape of `missed`.

    missed: floating point [B, H]; first: bool [B, H], which is False afterwards.
    """
    found = (missed > share) | first
    first.fill_(False)
    return found
