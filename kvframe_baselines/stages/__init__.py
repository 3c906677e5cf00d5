"""Stages that more than one of the papers here needs, or that another policy may want: one file each."""

from kvframe_baselines.stages.box_bound import BoxBound
from kvframe_baselines.stages.speculative import SpeculativeTrigger

__all__ = [
    "BoxBound",
    "SpeculativeTrigger",
]
