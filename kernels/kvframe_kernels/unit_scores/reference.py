"""Plain torch definition of `unit_scores`."""

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
    batch_size, num_kv_heads, max_units, head_dim = centroids.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, centroids.dtype), torch.float32)
    grouped = query.reshape(batch_size, num_kv_heads, -1, head_dim).to(dtype)
    scores = torch.matmul(grouped, centroids.to(dtype).transpose(2, 3)) * sm_scale  # [B, H, G, U]
    if log_sizes is not None:
        scores = scores + log_sizes[:, :, None]
    absent = torch.arange(max_units, device=query.device) >= num_units[..., None]
    scores = scores.masked_fill(absent[:, :, None], -math.inf)
    if softmax:
        # A head without any unit would be 0/0.
        scores = scores.softmax(-1).nan_to_num(0.0)
    reduced = scores.mean(2) if reduction == "mean" else scores.amax(2)
    return reduced.masked_fill(absent, -math.inf)
