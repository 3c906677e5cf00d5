"""Relevance of every unit to the current query."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.unit_scores.reference import unit_scores_reference

__all__ = ["unit_scores", "unit_scores_reference"]


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
