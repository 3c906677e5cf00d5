"""What LouisKV is compared with, each in the same five slots: a module for each paper, which tells how it differs."""

from collections.abc import Iterable

from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe_baselines import (
    adakv,
    arkvale,
    clusterkv,
    full,
    h2o,
    oracle_topk,
    pyramidkv,
    quest,
    raas,
    rkv,
    snapkv,
    streamingllm,
    tova,
    window,
)
from kvframe_baselines.stages import (
    AccumulatedAttention,
    BoundingBox,
    ImportanceRedundancy,
    LastAttention,
    LastUse,
    PyramidBudget,
    SharedBudget,
    WindowAttention,
)

KVFRAME_API_VERSION = 1

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

_STAGES = (
    StageSpec(BoundingBox, paper="arXiv 2406.10774"),
    StageSpec(AccumulatedAttention, paper="arXiv 2306.14048"),
    StageSpec(LastAttention, paper="arXiv 2401.06104"),
    StageSpec(WindowAttention, paper="arXiv 2404.14469"),
    StageSpec(ImportanceRedundancy, paper="arXiv 2505.24133"),
    StageSpec(LastUse, paper="arXiv 2502.11147"),
    StageSpec(PyramidBudget, paper="arXiv 2406.02069"),
    StageSpec(SharedBudget, paper="arXiv 2407.11550"),
)

# Reference points (everything, nothing but sinks and window, the best tokens at a budget), then the papers.
_MODULES = (
    full,
    window,
    oracle_topk,
    quest,
    arkvale,
    clusterkv,
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
