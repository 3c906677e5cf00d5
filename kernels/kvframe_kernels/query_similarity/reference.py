"""Plain torch definition of `query_similarity`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def query_similarity_reference(query: Tensor, previous: Tensor, num_kv_heads: int, per_kv_head: bool) -> Tensor:
    """r_t of LouisKV (arXiv 2510.11292): mean over query heads of cos(previous, query).

    query, previous: [B, Hq, D]. With `per_kv_head` the mean runs over each group of query heads alone.
    Returns float32 (float64 for float64 queries) [B, H]; without `per_kv_head` all heads of a row hold the same value.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Rounding must not carry a cosine past -1, which a threshold of -1 would take for an event.
    cosine = F.cosine_similarity(query.to(dtype), previous.to(dtype), dim=-1).clamp(-1, 1)
    batch_size = query.shape[0]
    if per_kv_head:
        return cosine.view(batch_size, num_kv_heads, -1).mean(-1)
    return cosine.mean(-1, keepdim=True).expand(batch_size, num_kv_heads)


def query_turned_reference(
    query: Tensor,
    previous: Tensor,
    first: Tensor,
    tau: float,
    *,
    num_kv_heads: int,
    per_kv_head: bool,
    turned: Tensor | None = None,
) -> Tensor:
    """Where a query has turned away from the one before it, or has none before it; remembers it, in place.

    query, previous: [B, Hq, D]; first: bool [B, H], heads that have seen no step yet; turned: what stands for
    `previous` in the comparison, where that is not `previous` itself.
    Returns bool [B, H], `query_similarity` < tau or first. Afterwards `previous` is the query and `first` is False.
    """
    compared = previous if turned is None else turned
    due = (query_similarity_reference(query, compared, num_kv_heads, per_kv_head) < tau) | first
    previous.copy_(query)
    first.fill_(False)
    return due
