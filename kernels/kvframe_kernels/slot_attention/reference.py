"""Plain torch definition of `slot_attention`."""

import math

import torch
from torch import Tensor


def slot_attention_reference(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of T queries over slots, each KV head with its own contents.

    query: [B, Hq, T, D]; k_slots: [B, H, N, D]; v_slots: [B, H, N, Dv].
    bias: added to the scaled products, [B, H, N], or [B, H, T, N] where the queries see different slots; -inf marks an
    empty slot, which holds finite numbers all the same.
    lengths: int64 [B], where only the first lengths[b] slots exist; None where all of them do.
    extra: a partial result (out [B, Hq, T, Dv], lse [B, Hq, T]) over other entries, merged by its log-sum-exp; where
    that is -inf the output may hold anything.
    Returns (out [B, Hq, T, Dv] in the query's dtype, lse [B, Hq, T] in at least float32); out is 0 and lse -inf for a
    query that sees nothing.
    """
    batch_size, num_qo_heads, num_queries, head_dim = query.shape
    num_kv_heads = k_slots.shape[1]
    bias = limit_bias(bias, lengths, k_slots)
    grouped = (query * sm_scale).reshape(batch_size, num_kv_heads, -1, head_dim)  # [B, H, G * T, D]
    scores = torch.matmul(grouped, k_slots.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
    if bias is not None and bias.dim() == 3:
        scores += bias[:, :, None]
    elif bias is not None:
        shape = (batch_size, num_kv_heads, -1, num_queries, k_slots.shape[2])
        scores = (scores.view(shape) + bias[:, :, None]).view_as(scores)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - _finite(lse)).exp_().to(v_slots.dtype)
    out = torch.matmul(weights, v_slots).view(batch_size, num_qo_heads, num_queries, -1)
    lse = lse.view(batch_size, num_qo_heads, num_queries)
    if extra is not None:
        out, lse = _merge(out, lse, *extra)
    return out, lse


def limit_bias(bias: Tensor | None, lengths: Tensor | None, k_slots: Tensor) -> Tensor | None:
    """A bias of which the slots from lengths[b] on are empty; arguments as in `slot_attention_reference`."""
    if lengths is None:
        return bias
    batch_size, _, num_slots, _ = k_slots.shape
    if bias is None:
        bias = k_slots.new_zeros(k_slots.shape[:3])
    absent = torch.arange(num_slots, device=lengths.device) >= lengths[:, None]
    return bias.masked_fill(absent.view(batch_size, *[1] * (bias.dim() - 2), num_slots), -math.inf)


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, other_lse)
    mine, theirs = (lse - _finite(total)).exp()[..., None], (other_lse - _finite(total)).exp()[..., None]
    other_out = other_out.masked_fill((other_lse == -math.inf)[..., None], 0)
    return (out * mine + other_out * theirs).to(out.dtype), total


def _finite(lse: Tensor) -> Tensor:
    """What to subtract: over nothing, -inf less -inf would be NaN."""
    return lse.masked_fill(lse == -math.inf, 0)
