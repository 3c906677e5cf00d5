"""Cosine of a step's query with an earlier one, reduced to KV heads or to the layer."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason
from kvframe_kernels.query_similarity.reference import query_similarity_reference as query_similarity
from kvframe_kernels.query_similarity.reference import query_turned_reference

__all__ = ["query_similarity", "query_turned", "query_turned_reference"]


def query_turned(
    query: Tensor,
    previous: Tensor,
    first: Tensor,
    tau: float,
    *,
    num_kv_heads: int,
    per_kv_head: bool,
    turned: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`query_turned_reference`, by the chosen backend."""
    reason = float_reason(query, previous)
    if choose("query_turned", query, backend, reason, kernels=("triton",)) == "reference":
        return query_turned_reference(
            query, previous, first, tau, num_kv_heads=num_kv_heads, per_kv_head=per_kv_head, turned=turned
        )
    from kvframe_kernels.query_similarity.triton_kernel import query_turned_triton

    return query_turned_triton(query, previous, first, tau, num_kv_heads, per_kv_head, turned)
