"""Decode attention over fixed slots."""

import torch
from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.slot_attention.reference import slot_attention_reference
from kvframe_kernels.slot_attention.sdpa import slot_attention_sdpa

__all__ = ["make_arrivals", "slot_attention", "slot_attention_reference", "slot_attention_sdpa"]


def slot_attention(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    need_lse: bool = False,
    arrivals: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`slot_attention_reference`, by the chosen backend; the log-sum-exp only where asked for or with `extra`.

    arrivals: scratch of the kernel, `make_arrivals`, zero before and after every call, so that a CUDA graph can replay
    it; calls that may run side by side need one each. None makes it anew.

    "auto" is the kernel for a single query on a CUDA device; elsewhere torch's fused attention, or the reference where
    the log-sum-exp is needed.
    """
    need_lse = need_lse or extra is not None
    # Torch's fused attention is the kernel for several queries, so nothing is amiss where it runs.
    if query.shape[2] == 1 or backend != "auto":
        reason = unserved(query, k_slots, v_slots)
        if choose("slot_attention", query, backend, reason, kernels=("triton",)) == "triton":
            from kvframe_kernels.slot_attention.triton_kernel import slot_attention_triton

            return slot_attention_triton(
                query, k_slots, v_slots, bias, sm_scale, lengths=lengths, extra=extra, need_lse=need_lse,
                arrivals=arrivals,
            )  # fmt: skip
    if backend != "reference" and not need_lse:
        return slot_attention_sdpa(query, k_slots, v_slots, bias, sm_scale, lengths=lengths), None
    out, lse = slot_attention_reference(query, k_slots, v_slots, bias, sm_scale, lengths=lengths, extra=extra)
    return out, lse if need_lse else None


def make_arrivals(batch_size: int, num_qo_heads: int, device: torch.device) -> Tensor:
    """int32, as many as `slot_attention`, or `rest_attention`, needs for any call of so many query heads: who has
    finished its part."""
    return torch.zeros(batch_size * num_qo_heads, dtype=torch.int32, device=device)


def unserved(query: Tensor, k_slots: Tensor, v_slots: Tensor) -> str | None:
    """Why the kernel does not serve a call; None where it does."""
    if query.shape[2] != 1:
        return f"the kernel serves one query, not {query.shape[2]}"
    if not query.dtype == k_slots.dtype == v_slots.dtype:
        return f"the kernel serves one dtype, not {query.dtype}, {k_slots.dtype} and {v_slots.dtype}"
    if k_slots.stride(-1) != 1 or v_slots.stride(-1) != 1:
        return "the kernel serves slots whose numbers lie side by side"
    return float_reason(query) or width_reason(query.shape[-1], v_slots.shape[-1])
