"""Relevance of every unit to the current query."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.unit_scores.reference import box_scores_reference, unit_scores_reference

__all__ = ["box_scores", "box_scores_reference", "unit_scores", "unit_scores_reference"]


def unit_scores(
    query: Tensor,
    centroids: Tensor,
    num_units: Tensor,
    sm_scale: float,
    *,
    reduction: str = "mean",
    softmax: bool = True,
    log_sizes: Tensor | None = None,
    due: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`unit_scores_reference`, by the chosen backend."""
    reason = float_reason(query, centroids) or width_reason(query.shape[-1])
    if centroids.stride(-1) != 1:
        reason = reason or "the kernel serves centroids whose numbers lie side by side"
    if choose("unit_scores", query, backend, reason, kernels=("triton",)) == "reference":
        return unit_scores_reference(
            query, centroids, num_units, sm_scale, reduction=reduction, softmax=softmax, log_sizes=log_sizes, due=due
        )
    from kvframe_kernels.unit_scores.triton_kernel import unit_scores_triton

    return unit_scores_triton(query, centroids, num_units, sm_scale, reduction, softmax, log_sizes, due)


def box_scores(
    query: Tensor,
    lower: Tensor,
    upper: Tensor,
    num_units: Tensor,
    sm_scale: float,
    *,
    reduction: str = "mean",
    softmax: bool = False,
    due: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`box_scores_reference`, by the chosen backend."""
    reason = float_reason(query, lower, upper) or width_reason(query.shape[-1])
    if lower.dtype != upper.dtype:
        reason = reason or f"the kernel serves bounds of one dtype, not {lower.dtype} and {upper.dtype}"
    if lower.stride(-1) != 1 or upper.stride(-1) != 1:
        reason = reason or "the kernel serves bounds whose numbers lie side by side"
    if choose("box_scores", query, backend, reason, kernels=("triton",)) == "reference":
        return box_scores_reference(
            query, lower, upper, num_units, sm_scale, reduction=reduction, softmax=softmax, due=due
        )
    from kvframe_kernels.unit_scores.triton_kernel import unit_scores_triton

    return unit_scores_triton(query, upper, num_units, sm_scale, reduction, softmax, None, due, lower)
