"""Plain torch definition of `slot_attention`."""

import torch
from torch import Tensor


def slot_attention_reference(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    extra: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of T queries over slots, each KV head with its own contents.

    query: [B, Hq, T, D]; k_slots: [B, H, N, D]; v_slots: [B, H, N, Dv].
    bias: added to the scaled products, [B, H, N], or [B, H, T, N] where the queries see different slots; -inf marks an
    empty slot.
    extra: a partial result (out [B, Hq, T, Dv], lse [B, Hq, T]) over other entries, merged by its log-sum-exp.
    Returns (out [B, Hq, T, Dv] in the query's dtype, lse [B, Hq, T] in at least float32).
    """
    batch_size, num_qo_heads, num_queries, head_dim = query.shape
    num_kv_heads = k_slots.shape[1]
    grouped = (query * sm_scale).reshape(batch_size, num_kv_heads, -1, head_dim)  # [B, H, G * T, D]
    scores = torch.matmul(grouped, k_slots.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
    if bias is not None and bias.dim() == 3:
        scores += bias[:, :, None]
    elif bias is not None:
        shape = (batch_size, num_kv_heads, -1, num_queries, k_slots.shape[2])
        scores = (scores.view(shape) + bias[:, :, None]).view_as(scores)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp_().to(v_slots.dtype)
    out = torch.matmul(weights, v_slots).view(batch_size, num_qo_heads, num_queries, -1)
    lse = lse.view(batch_size, num_qo_heads, num_queries)
    if extra is not None:
        out, lse = _merge(out, lse, *extra)
    return out, lse


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, other_lse)
    mine, theirs = (lse - total).exp()[..., None], (other_lse - total).exp()[..., None]
    return (out * mine + other_out * theirs).to(out.dtype), total
