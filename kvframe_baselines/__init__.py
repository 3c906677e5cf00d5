"""What LouisKV is compared with, each in the same five slots: a module for each paper, which tells how it differs."""

from collections.abc import Iterable

from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe_baselines import (
    arkvale,
    clusterkv,
    freekv,
    full,
    oracle_topk,
    quest,
    streamingllm,
    window,
)
from kvframe_baselines.stages import (
    BoxBound,
    SpeculativeTrigger,
)

KVFRAME_API_VERSION = 1

__all__ = [
    "BoxBound",
    "SpeculativeTrigger",
]


@hookimpl
def kvframe_stages() -> Iterable[StageSpec]:
    """The stages that these policies add to the core's."""
    return [
        StageSpec(BoxBound, paper="arXiv 2406.10774"),
        StageSpec(SpeculativeTrigger, paper="arXiv 2505.13109"),
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
    )
    return [spec for module in modules for spec in module.POLICIES]
