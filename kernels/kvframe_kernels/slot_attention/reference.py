"""Plain torch definition of `slot_attention`."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """Virtual entries, each of which stands for several tokens by their mean."""

    keys: Tensor
    """[B, H, U, D]"""
    values: Tensor
    """[B, H, U, Dv]"""
    counts: Tensor
    """Whole numbers [B, H, U]: for how many tokens, 0 for an entry that does not exist; it holds finite numbers all the
    same."""


def slot_attention_reference(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
    entries: Entries | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of T queries over slots, each KV head with its own contents, and over virtual entries.

    query: [B, Hq, T, D]; k_slots: [B, H, N, D]; v_slots: [B, H, N, Dv].
    bias: added to the scaled products, [B, H, N], or [B, H, T, N] where the queries see different slots; -inf marks an
    empty slot, which holds finite numbers all the same.
    lengths: int64 [B], where only the first lengths[b] slots exist; None where all of them do.
    entries: every query sees all of them, each as often as it counts: log(count) is added to its scaled product, as in
    RetroInfer (2025, arXiv 2505.02922).
    Returns (out [B, Hq, T, Dv] in the query's dtype, lse [B, Hq, T] in at least float32); out is 0 and lse -inf for a
    query that sees nothing.
    """
    batch_size, num_qo_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_slots = k_slots.shape[1:3]
    bias = limit_bias(bias, lengths, k_slots)
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = (query * sm_scale).reshape(batch_size, num_kv_heads, -1, head_dim)  # [B, H, G * T, D]
    scores = torch.matmul(grouped, k_slots.transpose(2, 3)).to(dtype)
    if bias is not None and bias.dim() == 3:
        scores += bias[:, :, None]
    elif bias is not None:
        shape = (batch_size, num_kv_heads, -1, num_queries, num_slots)
        scores = (scores.view(shape) + bias[:, :, None]).view_as(scores)
    if entries is not None:
        of_entries = torch.matmul(grouped, entries.keys.transpose(2, 3)).to(dtype)
        scores = torch.cat([scores, of_entries + entries.counts.to(dtype).log()[:, :, None]], -1)
    lse = scores.logsumexp(-1, keepdim=True)
    # Over nothing, -inf less -inf would be NaN.
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)).exp_().to(v_slots.dtype)
    out = torch.matmul(weights[..., :num_slots], v_slots)
    if entries is not None:
        out += torch.matmul(weights[..., num_slots:], entries.values)
    out = out.view(batch_size, num_qo_heads, num_queries, -1)
    return out, lse.view(batch_size, num_qo_heads, num_queries)


def limit_bias(bias: Tensor | None, lengths: Tensor | None, k_slots: Tensor) -> Tensor | None:
    """A bias of which the slots from lengths[b] on are empty; arguments as in `slot_attention_reference`."""
    if lengths is None:
        return bias
    batch_size, _, num_slots, _ = k_slots.shape
    if bias is None:
        bias = k_slots.new_zeros(k_slots.shape[:3])
    absent = torch.arange(num_slots, device=lengths.device) >= lengths[:, None]
    return bias.masked_fill(absent.view(batch_size, *[1] * (bias.dim() - 2), num_slots), -math.inf)
