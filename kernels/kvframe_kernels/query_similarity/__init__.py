"""Cosine of a step's query with an earlier one, reduced to KV heads or to the layer."""

from kvframe_kernels.query_similarity.reference import query_similarity_reference as query_similarity

__all__ = ["query_similarity"]
