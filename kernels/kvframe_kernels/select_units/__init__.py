"""Which rows a step attends to, and which of them have to travel."""

from kvframe_kernels.select_units.reference import resident_difference_reference as resident_difference
from kvframe_kernels.select_units.reference import select_units_reference as select_units

__all__ = ["resident_difference", "select_units"]
