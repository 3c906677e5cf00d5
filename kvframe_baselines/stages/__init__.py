"""Stages that more than one of the papers here needs, or that another policy may want: one file each."""

from kvframe_baselines.stages.accumulated_attention import AccumulatedAttention
from kvframe_baselines.stages.bounding_box import BoundingBox
from kvframe_baselines.stages.estimation_zone import EstimationZone
from kvframe_baselines.stages.importance_redundancy import ImportanceRedundancy
from kvframe_baselines.stages.last_attention import LastAttention
from kvframe_baselines.stages.last_use import LastUse
from kvframe_baselines.stages.pooled_attention import PooledAttention
from kvframe_baselines.stages.pyramid_budget import PyramidBudget
from kvframe_baselines.stages.refresh import RefreshTrigger
from kvframe_baselines.stages.representative_keys import RepresentativeKeys
from kvframe_baselines.stages.sentences import SentenceMeanKey, SentenceTrigger, SentenceUnits, sentence_end_ids
from kvframe_baselines.stages.shared_budget import SharedBudget
from kvframe_baselines.stages.shared_tokens import SharedTokens
from kvframe_baselines.stages.speculative import SpeculativeTrigger
from kvframe_baselines.stages.static_heads import StaticHeads
from kvframe_baselines.stages.top_p import TopP
from kvframe_baselines.stages.window_attention import WindowAttention

__all__ = [
    "AccumulatedAttention",
    "BoundingBox",
    "EstimationZone",
    "ImportanceRedundancy",
    "LastAttention",
    "LastUse",
    "PooledAttention",
    "PyramidBudget",
    "RefreshTrigger",
    "RepresentativeKeys",
    "SentenceMeanKey",
    "SentenceTrigger",
    "SentenceUnits",
    "SharedBudget",
    "SharedTokens",
    "SpeculativeTrigger",
    "StaticHeads",
    "TopP",
    "WindowAttention",
    "sentence_end_ids",
]
