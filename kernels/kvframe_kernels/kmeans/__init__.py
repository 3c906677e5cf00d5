"""Spherical k-means of prompt keys, with clusters written out as runs of rows."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.kmeans.reference import kmeans_reference, write_in_order_reference

__all__ = ["kmeans", "kmeans_reference", "write_in_order", "write_in_order_reference"]


def kmeans(
    keys: Tensor, num_clusters: int, num_iterations: int, max_cluster_size: int, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """`kmeans_reference`, by the chosen backend."""
    reason = float_reason(keys) or width_reason(keys.shape[-1]) or _stride_reason(keys)
    if choose("kmeans", keys, backend, reason, kernels=("triton",)) == "reference":
        return kmeans_reference(keys, num_clusters, num_iterations, max_cluster_size)
    from kvframe_kernels.kmeans.triton_kernel import kmeans_triton

    return kmeans_triton(keys, num_clusters, num_iterations, max_cluster_size)


def write_in_order(keys: Tensor, values: Tensor, order: Tensor, out: Tensor, *, backend: Backend = "auto") -> None:
    """`write_in_order_reference`, by the chosen backend."""
    reason = float_reason(keys, values, out) or width_reason(keys.shape[-1], values.shape[-1])
    reason = reason or _stride_reason(keys, values, out)
    if choose("write_in_order", keys, backend, reason, kernels=("triton",)) == "reference":
        return write_in_order_reference(keys, values, order, out)
    from kvframe_kernels.kmeans.triton_kernel import write_in_order_triton

    return write_in_order_triton(keys, values, order, out)


def _stride_reason(*tensors: Tensor) -> str | None:
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        return "the kernel serves rows whose numbers lie side by side"
    return None
