"""Spherical k-means of prompt keys, with clusters written out as runs of rows."""

from kvframe_kernels.kmeans.reference import kmeans_reference as kmeans

__all__ = ["kmeans"]
