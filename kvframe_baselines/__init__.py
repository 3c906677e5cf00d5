"""What LouisKV is compared with, each in the same five slots: a module for each paper, which tells how it differs."""

from collections.abc import Iterable

from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe_baselines import arkvale, clusterkv, full, oracle_topk, quest, streamingllm, window
from kvframe_baselines.stages import BoundingBox

KVFRAME_API_VERSION = 1

__all__ = ["BoundingBox"]


@hookimpl
def kvframe_stages() -> Iterable[StageSpec]:
    """The stages that these policies add to the core's."""
    return [StageSpec(BoundingBox, paper="arXiv 2406.10774")]


@hookimpl
def kvframe_policies() -> Iterable[PolicySpec]:
    """Reference points (everything, nothing but sinks and window, the best tokens at a budget), then the papers."""
    modules = (full, window, oracle_topk, streamingllm, quest, arkvale, clusterkv)
    return [spec for module in modules for spec in module.POLICIES]
