"""Full attention of prompt tokens, aligned to the lower right."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def causal_attention(
    query: Tensor, keys: Tensor, values: Tensor, sm_scale: float, alive: Tensor | None = None
) -> Tensor:
    """Attention of the last T of L tokens over all L, causal.

    query: [B, Hq, T, D]; keys: [B, H, L, D]; values: [B, H, L, Dv]; L >= T. Returns [B, Hq, T, Dv].
    alive: bool [H, L - T], those of the earlier tokens that exist, of every sequence; None for all.
    """
    num_queries, num_keys = query.shape[2], keys.shape[2]
    grouped = query.shape[1] != keys.shape[1]
    if alive is not None:
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        exists = F.pad(alive, (0, num_queries), value=True).repeat_interleave(query.shape[1] // keys.shape[1], 0)
        mask = seen & exists[:, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=sm_scale, enable_gqa=grouped)
    if num_queries == 1:
        return F.scaled_dot_product_attention(query, keys, values, scale=sm_scale, enable_gqa=grouped)
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=sm_scale, enable_gqa=grouped)
    # is_causal would align to the upper left: a chunk's first query would see only the first key.
    mask = causal_lower_right(num_queries, num_keys)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=sm_scale, enable_gqa=grouped)
