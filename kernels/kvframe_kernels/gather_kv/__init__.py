"""Rows from the pool into slots."""

from kvframe_kernels.gather_kv.reference import gather_kv_reference as gather_kv

__all__ = ["gather_kv"]
