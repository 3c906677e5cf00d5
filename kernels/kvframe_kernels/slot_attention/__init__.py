"""Decode attention over fixed slots."""

from torch import Tensor

from kvframe_kernels.slot_attention.reference import slot_attention_reference
from kvframe_kernels.slot_attention.sdpa import slot_attention_sdpa

__all__ = ["slot_attention", "slot_attention_reference", "slot_attention_sdpa"]


def slot_attention(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    extra: tuple[Tensor, Tensor] | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`slot_attention_reference`, through torch's fused attention where nobody asks for the log-sum-exp."""
    if extra is None and not need_lse:
        return slot_attention_sdpa(query, k_slots, v_slots, bias, sm_scale), None
    return slot_attention_reference(query, k_slots, v_slots, bias, sm_scale, extra=extra)
