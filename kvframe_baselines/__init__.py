"""What LouisKV is compared with, each in the same five slots: a module for each paper, which tells how it differs."""

from collections.abc import Iterable

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe.types import ModelLayout
from kvframe_baselines import (
    adakv,
    arkvale,
    clusterkv,
    duoattention,
    freekv,
    full,
    h2o,
    infllm,
    omnikv,
    oracle_topk,
    pyramidkv,
    quest,
    raas,
    refreshkv,
    retroinfer,
    rkv,
    sentencekv,
    snapkv,
    streamingllm,
    tova,
    twilight,
    window,
)
from kvframe_baselines.stages import (
    AccumulatedAttention,
    BoundingBox,
    EstimationZone,
    ImportanceRedundancy,
    LastAttention,
    LastUse,
    PooledAttention,
    PyramidBudget,
    RefreshTrigger,
    RepresentativeKeys,
    SentenceMeanKey,
    SentenceTrigger,
    SentenceUnits,
    SharedBudget,
    SharedTokens,
    SpeculativeTrigger,
    StaticHeads,
    TopP,
    WindowAttention,
    sentence_end_ids,
)
from kvframe_baselines.stages.shared_tokens import problems_of

KVFRAME_API_VERSION = 1

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

_STAGES = (
    StageSpec(AccumulatedAttention, paper="arXiv 2306.14048"),
    StageSpec(BoundingBox, paper="arXiv 2406.10774"),
    StageSpec(EstimationZone, paper="arXiv 2505.02922"),
    StageSpec(ImportanceRedundancy, paper="arXiv 2505.24133"),
    StageSpec(LastAttention, paper="arXiv 2401.06104"),
    StageSpec(LastUse, paper="arXiv 2502.11147"),
    StageSpec(PooledAttention, paper="arXiv 2411.05787"),
    StageSpec(PyramidBudget, paper="arXiv 2406.02069"),
    StageSpec(RefreshTrigger, paper="arXiv 2411.05787"),
    StageSpec(RepresentativeKeys, paper="arXiv 2402.04617"),
    StageSpec(SentenceMeanKey, paper="arXiv 2504.00970"),
    StageSpec(SentenceTrigger, paper="arXiv 2504.00970"),
    StageSpec(SentenceUnits, paper="arXiv 2504.00970"),
    StageSpec(SharedBudget, paper="arXiv 2407.11550"),
    StageSpec(SharedTokens, paper="ICLR 2025"),
    StageSpec(SpeculativeTrigger, paper="arXiv 2505.13109"),
    StageSpec(StaticHeads, paper="arXiv 2410.10819"),
    StageSpec(TopP, paper="arXiv 2502.02770"),
    StageSpec(WindowAttention, paper="arXiv 2404.14469"),
)

# Reference points (everything, nothing but sinks and window, the best tokens at a budget), then the papers.
_MODULES = (
    full,
    window,
    oracle_topk,
    quest,
    arkvale,
    clusterkv,
    retroinfer,
    freekv,
    refreshkv,
    omnikv,
    infllm,
    sentencekv,
    twilight,
    duoattention,
    streamingllm,
    h2o,
    tova,
    snapkv,
    pyramidkv,
    adakv,
    rkv,
    raas,
)


@hookimpl
def kvframe_stages() -> Iterable[StageSpec]:
    """The stages that these policies add to the core's."""
    return list(_STAGES)


@hookimpl
def kvframe_policies() -> Iterable[PolicySpec]:
    """The policies of all modules."""
    return [spec for module in _MODULES for spec in module.POLICIES]


@hookimpl
def kvframe_check_policy(policy: Policy, layout: ModelLayout) -> list[str]:
    """Filter layers that cannot serve the layers behind them."""
    return problems_of(policy, layout)
