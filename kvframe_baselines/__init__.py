"""What LouisKV is compared with, each in the same five slots: a module for each paper, which tells how it differs."""

from collections.abc import Iterable

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe.types import ModelLayout
from kvframe_baselines import (
    arkvale,
    clusterkv,
    duoattention,
    freekv,
    full,
    infllm,
    omnikv,
    oracle_topk,
    quest,
    refreshkv,
    retroinfer,
    sentencekv,
    streamingllm,
    twilight,
    window,
)
from kvframe_baselines.stages import (
    BoundingBox,
    EstimationZone,
    PooledAttention,
    RefreshTrigger,
    RepresentativeKeys,
    SentenceMeanKey,
    SentenceTrigger,
    SentenceUnits,
    SharedTokens,
    SpeculativeTrigger,
    StaticHeads,
    TopP,
    sentence_end_ids,
)
from kvframe_baselines.stages.shared_tokens import problems_of

KVFRAME_API_VERSION = 1

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


@hookimpl
def kvframe_stages() -> Iterable[StageSpec]:
    """The stages that these policies add to the core's."""
    return [
        StageSpec(BoundingBox, paper="arXiv 2406.10774"),
        StageSpec(SpeculativeTrigger, paper="arXiv 2505.13109"),
        StageSpec(EstimationZone, paper="arXiv 2505.02922"),
        StageSpec(PooledAttention, paper="arXiv 2411.05787"),
        StageSpec(RefreshTrigger, paper="arXiv 2411.05787"),
        StageSpec(RepresentativeKeys, paper="arXiv 2402.04617"),
        StageSpec(SentenceMeanKey, paper="arXiv 2504.00970"),
        StageSpec(SentenceTrigger, paper="arXiv 2504.00970"),
        StageSpec(SentenceUnits, paper="arXiv 2504.00970"),
        StageSpec(SharedTokens, paper="ICLR 2025"),
        StageSpec(StaticHeads, paper="arXiv 2410.10819"),
        StageSpec(TopP, paper="arXiv 2502.02770"),
    ]


@hookimpl
def kvframe_policies() -> Iterable[PolicySpec]:
    """Reference points (everything, nothing but sinks and window, the best tokens at a budget), then the papers."""
    modules = (
        full,
        window,
        oracle_topk,
        streamingllm,
        quest,
        arkvale,
        clusterkv,
        freekv,
        refreshkv,
        omnikv,
        infllm,
        sentencekv,
        twilight,
        duoattention,
        retroinfer,
    )
    return [spec for module in modules for spec in module.POLICIES]


@hookimpl
def kvframe_check_policy(policy: Policy, layout: ModelLayout) -> list[str]:
    """Filter layers that cannot serve the layers behind them."""
    return problems_of(policy, layout)
