"""Stages that more than one of the papers here needs, or that another policy may want: one file each."""

from kvframe_baselines.stages.bounding_box import BoundingBox

__all__ = ["BoundingBox"]
