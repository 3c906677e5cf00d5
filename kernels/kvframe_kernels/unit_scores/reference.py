"""Plain torch definitions of `unit_scores` and `box_scores`."""

import math

import torch
from torch import Tensor


def unit_scores_reference(
    query: Tensor,
    centroids: Tensor,
    num_units: Tensor,
    sm_scale: float,
    *,
    reduction: str = "mean",
    softmax: bool = True,
    log_sizes: Tensor | None = None,
    due: Tensor | None = None,
) -> Tensor:
    """Scaled products of the query heads with each unit's centroid, reduced over every group of query heads.

    query: [B, Hq, D]; centroids: [B, H, U, D]; num_units: int64 [B, H], units behind it do not exist.
    With `softmax` each query head is normalised over the units before the reduction ("mean" or "max") over its group;
    `log_sizes` [B, H, U] is added to the products first.
    due: bool [B, H], where false nobody reads the result, and a kernel leaves it as it finds it; None is true.
    Returns [B, H, U] in at least float32, -inf where there is no unit.
    """
    batch_size, num_kv_heads, _, head_dim = centroids.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, centroids.dtype), torch.float32)
    grouped = query.reshape(batch_size, num_kv_heads, -1, head_dim).to(dtype)
    scores = torch.matmul(grouped, centroids.to(dtype).transpose(2, 3)) * sm_scale  # [B, H, G, U]
    if log_sizes is not None:
        scores = scores + log_sizes[:, :, None]
    return _reduce(scores, num_units, reduction, softmax)


def box_scores_reference(
    query: Tensor,
    lower: Tensor,
    upper: Tensor,
    num_units: Tensor,
    sm_scale: float,
    *,
    reduction: str = "mean",
    softmax: bool = False,
    due: Tensor | None = None,
) -> Tensor:
    """The largest scaled product of a query head with any key inside each unit's box, reduced over every group.

    sm_scale * sum over c of max(query[c] * lower[c], query[c] * upper[c]) (Quest, 2024, arXiv 2406.10774).
    query: [B, Hq, D]; lower, upper: [B, H, U, D], the smallest and the largest numbers of the unit's keys.
    All else as in `unit_scores_reference`.
    """
    batch_size, num_kv_heads, _, head_dim = lower.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, lower.dtype), torch.float32)
    grouped = query.reshape(batch_size, num_kv_heads, -1, head_dim).to(dtype)
    # A positive number of the query is largest with the upper bound, a negative one with the lower.
    scores = torch.matmul(grouped.clamp(min=0), upper.to(dtype).transpose(2, 3))
    scores += torch.matmul(grouped.clamp(max=0), lower.to(dtype).transpose(2, 3))
    return _reduce(scores * sm_scale, num_units, reduction, softmax)


def _reduce(scores: Tensor, num_units: Tensor, reduction: str, softmax: bool) -> Tensor:
    """Scores [B, H, G, U] of query heads to [B, H, U]."""
    absent = torch.arange(scores.shape[-1], device=scores.device) >= num_units[..., None]
    scores = scores.masked_fill(absent[:, :, None], -math.inf)
    if softmax:
        # A head without any unit would be 0/0.
        scores = scores.softmax(-1).nan_to_num(0.0)
    reduced = scores.mean(2) if reduction == "mean" else scores.amax(2)
    return reduced.masked_fill(absent, -math.inf)
