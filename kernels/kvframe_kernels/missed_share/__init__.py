"""What a head would attend to if it were there."""

from torch import Tensor

from kvframe_kernels.append_token import Slots
from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.missed_share.reference import exceeds_reference, kept_lse_reference, missed_share_reference

__all__ = [
    "exceeds",
    "exceeds_reference",
    "kept_lse",
    "kept_lse_reference",
    "missed_share",
    "missed_share_reference",
]


def kept_lse(query: Tensor, slots: Slots, sm_scale: float, *, backend: Backend = "auto") -> Tensor:
    """`kept_lse_reference`, by the chosen backend."""
    reason = float_reason(query, slots.keys) or width_reason(query.shape[-1])
    if query.dtype != slots.keys.dtype:
        reason = reason or f"the kernel serves one dtype, not {query.dtype} and {slots.keys.dtype}"
    if choose("kept_lse", query, backend, reason, kernels=("triton",)) == "reference":
        return kept_lse_reference(query, slots, sm_scale)
    from kvframe_kernels.missed_share.triton_kernel import kept_lse_triton

    return kept_lse_triton(query, slots, sm_scale)


def missed_share(
    resident_rows: Tensor,
    rows: Tensor,
    count: Tensor,
    shares: Tensor,
    marks: Tensor,
    num_rows: int,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`missed_share_reference`, by the chosen backend.

    marks: int32 [B, H, ceil(num_rows / 32)], zero before and after: a bit a row for the kernel to work with.
    """
    if choose("missed_share", shares, backend, float_reason(shares), kernels=("triton",)) == "reference":
        return missed_share_reference(resident_rows, rows, count, shares, num_rows)
    from kvframe_kernels.missed_share.triton_kernel import missed_share_triton

    return missed_share_triton(resident_rows, rows, count, shares, marks, num_rows)


def exceeds(missed: Tensor, share: float, first: Tensor, *, backend: Backend = "auto") -> Tensor:
    """`exceeds_reference`, by the chosen backend."""
    if choose("exceeds", missed, backend, float_reason(missed), kernels=("triton",)) == "reference":
        return exceeds_reference(missed, share, first)
    from kvframe_kernels.missed_share.triton_kernel import exceeds_triton

    return exceeds_triton(missed, share, first)
