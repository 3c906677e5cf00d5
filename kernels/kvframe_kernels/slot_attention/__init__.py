"""Decode attention over fixed slots."""

import torch
from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.slot_attention.reference import Entries, slot_attention_reference
from kvframe_kernels.slot_attention.sdpa import slot_attention_sdpa

__all__ = ["Entries", "make_arrivals", "slot_attention", "slot_attention_reference", "slot_attention_sdpa"]


def slot_attention(
    query: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    bias: Tensor | None,
    sm_scale: float,
    *,
    lengths: Tensor | None = None,
    entries: Entries | None = None,
    need_lse: bool = False,
    arrivals: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`slot_attention_reference`, by the chosen backend; the log-sum-exp only where asked for.

    arrivals: scratch of the kernel, `make_arrivals`, zero before and after every call, so that a CUDA graph can replay
    it; calls that may run side by side need one each. None makes it anew.

    "auto" is the kernel for a single query on a CUDA device; elsewhere torch's fused attention, or the reference where
    there are virtual entries or the log-sum-exp is needed.
    """
    # Torch's fused attention is the kernel for several queries, so nothing is amiss where it runs.
    if query.shape[2] == 1 or backend != "auto":
        reason = _unserved(query, k_slots, v_slots, entries)
        if choose("slot_attention", query, backend, reason, kernels=("triton",)) == "triton":
            from kvframe_kernels.slot_attention.triton_kernel import slot_attention_triton

            return slot_attention_triton(
                query, k_slots, v_slots, bias, sm_scale, lengths=lengths, entries=entries, need_lse=need_lse,
                arrivals=arrivals,
            )  # fmt: skip
    if backend != "reference" and not need_lse and entries is None:
        return slot_attention_sdpa(query, k_slots, v_slots, bias, sm_scale, lengths=lengths), None
    out, lse = slot_attention_reference(query, k_slots, v_slots, bias, sm_scale, lengths=lengths, entries=entries)
    return out, lse if need_lse else None


def make_arrivals(batch_size: int, num_qo_heads: int, device: torch.device) -> Tensor:
    """int32, as many as `slot_attention` needs for any call of so many query heads: who has finished its part."""
    return torch.zeros(batch_size * num_qo_heads, dtype=torch.int32, device=device)


def _unserved(query: Tensor, k_slots: Tensor, v_slots: Tensor, entries: Entries | None) -> str | None:
    """Why the kernel does not serve a call; None where it does."""
    read = (k_slots, v_slots) if entries is None else (k_slots, v_slots, entries.keys, entries.values)
    if query.shape[2] != 1:
        return f"the kernel serves one query, not {query.shape[2]}"
    if any(part.dtype != query.dtype for part in read):
        return f"the kernel serves one dtype, not {query.dtype}, {', '.join(str(part.dtype) for part in read)}"
    if any(part.stride(-1) != 1 for part in read):
        return "the kernel serves slots whose numbers lie side by side"
    return float_reason(query) or width_reason(query.shape[-1], v_slots.shape[-1])
