"""Stages that more than one of the papers here needs, or that another policy may want: one file each."""

from kvframe_baselines.stages.accumulated_attention import AccumulatedAttention
from kvframe_baselines.stages.bounding_box import BoundingBox
from kvframe_baselines.stages.importance_redundancy import ImportanceRedundancy
from kvframe_baselines.stages.last_attention import LastAttention
from kvframe_baselines.stages.last_use import LastUse
from kvframe_baselines.stages.pyramid_budget import PyramidBudget
from kvframe_baselines.stages.shared_budget import SharedBudget
from kvframe_baselines.stages.window_attention import WindowAttention

__all__ = [
    "AccumulatedAttention",
    "BoundingBox",
    "ImportanceRedundancy",
    "LastAttention",
    "LastUse",
    "PyramidBudget",
    "SharedBudget",
    "WindowAttention",
]
