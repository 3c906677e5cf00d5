"""Plain torch definitions of `unattended_tokens` and `rest_attention`."""

import math

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


def rest_attention_reference(
    query: Tensor, mean_keys: Tensor, mean_values: Tensor, rest: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over one virtual entry for each unit: its mean key and mean value, counted once for every token of
    `rest`, as in RetroInfer (2025, arXiv 2505.02922).

    query: [B, Hq, T, D]; mean_keys: [B, H, U, D]; mean_values: [B, H, U, Dv]; rest: whole numbers [B, H, U], 0 for no
    entry.
    Returns (out [B, Hq, T, Dv], lse [B, Hq, T]), both in at least float32; lse is -inf, and out 0, where there is no
    entry at all.
    """
    batch_size, num_qo_heads, num_queries, head_dim = query.shape
    num_kv_heads = mean_keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(dtype) * sm_scale).reshape(batch_size, num_kv_heads, -1, head_dim)  # [B, H, G * T, D]
    scores = torch.matmul(grouped, mean_keys.to(dtype).transpose(2, 3))
    scores = scores + rest.to(dtype).log()[:, :, None]
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)).exp()
    out = torch.matmul(weights, mean_values.to(dtype))
    return (
        out.view(batch_size, num_qo_heads, num_queries, -1),
        lse.view(batch_size, num_qo_heads, num_queries),
    )
