"""Stages that more than one of the papers here needs, or that another policy may want: one file each."""

from kvframe_baselines.stages.bounding_box import BoundingBox
from kvframe_baselines.stages.estimation_zone import EstimationZone
from kvframe_baselines.stages.pooled_attention import PooledAttention
from kvframe_baselines.stages.refresh import RefreshTrigger
from kvframe_baselines.stages.representative_keys import RepresentativeKeys
from kvframe_baselines.stages.sentences import SentenceMeanKey, SentenceTrigger, SentenceUnits, sentence_end_ids
from kvframe_baselines.stages.shared_tokens import SharedTokens
from kvframe_baselines.stages.speculative import SpeculativeTrigger
from kvframe_baselines.stages.static_heads import StaticHeads
from kvframe_baselines.stages.top_p import TopP

__all__ = [
    "BoundingBox",
    "SpeculativeTrigger",
    "EstimationZone",
    "PooledAttention",
    "RefreshTrigger",
    "RepresentativeKeys",
    "SentenceMeanKey",
    "SentenceTrigger",
    "SentenceUnits",
    "SharedTokens",
    "StaticHeads",
    "TopP",
    "sentence_end_ids",
]
