"""What stands for a unit: summaries over ragged runs of rows."""

from kvframe_kernels.unit_index.reference import unit_mean_reference as unit_mean

__all__ = ["unit_mean"]
