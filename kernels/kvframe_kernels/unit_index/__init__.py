"""What stands for a unit: summaries over ragged runs of rows."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.unit_index.reference import (
    unit_bounds_reference,
    unit_mean_reference,
    window_bounds_reference,
    window_mean_reference,
)

__all__ = [
    "unit_bounds",
    "unit_bounds_reference",
    "unit_mean",
    "unit_mean_reference",
    "window_bounds",
    "window_bounds_reference",
    "window_mean",
    "window_mean_reference",
]


def unit_mean(rows: Tensor, unit_ids: Tensor, num_units: int, *, backend: Backend = "auto") -> Tensor:
    """`unit_mean_reference`, by the chosen backend."""
    reason = float_reason(rows) or width_reason(rows.shape[-1]) or _stride_reason(rows)
    if choose("unit_mean", rows, backend, reason, kernels=("triton",)) == "reference":
        return unit_mean_reference(rows, unit_ids, num_units)
    from kvframe_kernels.unit_index.triton_kernel import unit_mean_triton

    return unit_mean_triton(rows, unit_ids, num_units)


def unit_bounds(rows: Tensor, unit_ids: Tensor, num_units: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """`unit_bounds_reference`, by the chosen backend."""
    reason = float_reason(rows) or width_reason(rows.shape[-1]) or _stride_reason(rows)
    if choose("unit_bounds", rows, backend, reason, kernels=("triton",)) == "reference":
        return unit_bounds_reference(rows, unit_ids, num_units)
    from kvframe_kernels.unit_index.triton_kernel import unit_bounds_triton

    return unit_bounds_triton(rows, unit_ids, num_units)


def window_mean(
    index: Tensor,
    columns: Tensor,
    leaves: Tensor,
    start: Tensor,
    size: Tensor,
    buffer: Tensor,
    first: int,
    ring_size: int,
    *,
    backend: Backend = "auto",
) -> None:
    """`window_mean_reference`, by the chosen backend."""
    reason = float_reason(index, buffer) or width_reason(index.shape[-1]) or _stride_reason(index, buffer)
    if choose("window_mean", index, backend, reason, kernels=("triton",)) == "reference":
        return window_mean_reference(index, columns, leaves, start, size, buffer, first, ring_size)
    from kvframe_kernels.unit_index.triton_kernel import window_mean_triton

    return window_mean_triton(index, columns, leaves, start, size, buffer, first, ring_size)


def window_bounds(
    lower: Tensor,
    upper: Tensor,
    columns: Tensor,
    leaves: Tensor,
    start: Tensor,
    size: Tensor,
    buffer: Tensor,
    first: int,
    ring_size: int,
    *,
    backend: Backend = "auto",
) -> None:
    """`window_bounds_reference`, by the chosen backend."""
    reason = float_reason(lower, upper, buffer) or width_reason(lower.shape[-1]) or _stride_reason(lower, upper, buffer)
    if choose("window_bounds", lower, backend, reason, kernels=("triton",)) == "reference":
        return window_bounds_reference(lower, upper, columns, leaves, start, size, buffer, first, ring_size)
    from kvframe_kernels.unit_index.triton_kernel import window_bounds_triton

    return window_bounds_triton(lower, upper, columns, leaves, start, size, buffer, first, ring_size)


def _stride_reason(*tensors: Tensor) -> str | None:
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        return "the kernel serves rows whose numbers lie side by side"
    return None
