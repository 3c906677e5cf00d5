"""`slot_attention` through torch's fused attention, which keeps its log-sum-exp to itself."""

import torch.nn.functional as F
from torch import Tensor

from kvframe_kernels.slot_attention.reference import limit_bias


def slot_attention_sdpa(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in `slot_attention_reference`, without the log-sum-exp."""
    batch_size, num_qo_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_slots = k_slots.shape[1:3]
    bias = limit_bias(bias, lengths, k_slots)
    # The query heads of a group become queries of one head: K and V are read once a KV head.
    grouped = query.reshape(batch_size, num_kv_heads, -1, head_dim)
    mask = None
    if bias is not None and num_queries == 1:
        mask = bias.view(batch_size, num_kv_heads, 1, num_slots).to(query.dtype)
    elif bias is not None:
        per_query = bias[:, :, None, None] if bias.dim() == 3 else bias[:, :, None]
        shape = (batch_size, num_kv_heads, num_qo_heads // num_kv_heads, num_queries, num_slots)
        mask = per_query.to(query.dtype).expand(shape).reshape(batch_size, num_kv_heads, -1, num_slots)
    out = F.scaled_dot_product_attention(grouped, k_slots, v_slots, attn_mask=mask, scale=sm_scale)
    return out.reshape(batch_size, num_qo_heads, num_queries, -1)
