"""Full attention of prompt tokens, aligned to the lower right."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    from torch.nn.attention.bias import causal_lower_right  # loads triton

    # is_causal would align to the upper left: a chunk's first query would see only the first key.
    mask = causal_lower_right(num_queries, num_keys)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=sm_scale, enable_gqa=grouped)


_SCORES_AT_ONCE = 1 << 25


def attention_sums(query: Tensor, keys: Tensor, sm_scale: float, alive: Tensor | None = None) -> Tensor:
    """What each of L tokens of one sequence gets from the last T of them together, under causal attention.

    query: [Hq, T, D]; keys: [H, L, D], L >= T. alive: bool [H, L], the tokens that exist; None for all.
    Returns [H, G, L] in at least float32, which adds up to T. Takes only so many queries at once that their scores stay
    small.
    """
    num_queries, num_keys = query.shape[1], keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(keys.shape[0], -1, num_queries, query.shape[-1])  # [H, G, T, D]
    sums = torch.zeros(*grouped.shape[:2], num_keys, dtype=dtype, device=query.device)
    columns = torch.arange(num_keys, device=query.device)
    at_once = max(1, _SCORES_AT_ONCE // (query.shape[0] * num_keys))
    for start in range(0, num_queries, at_once):
        block = grouped[:, :, start : start + at_once]
        last = num_keys - num_queries + start + torch.arange(block.shape[2], device=query.device)
        seen = columns <= last[:, None]  # [t, L]
        if alive is not None:
            seen = seen & alive[:, None, None]
        scores = torch.matmul((block * sm_scale).flatten(1, 2), keys.transpose(1, 2)).to(dtype)
        scores = scores.view(*block.shape[:3], num_keys)
        sums += scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(2)
    return sums
