"""Relevance of every unit to the current query."""

from kvframe_kernels.unit_scores.reference import unit_scores_reference as unit_scores

__all__ = ["unit_scores"]
