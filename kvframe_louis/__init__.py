"""LouisKV (arXiv 2510.11292) as a plugin: semantic trigger, decoupled units, and the policies composed of them."""

from collections.abc import Iterable

from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe.stages import ClusterUnits
from kvframe_louis.plus import LouisKVPlusConfig, build_louiskv_plus
from kvframe_louis.policy import (
    LouisKVConfig,
    LouisKVLongBothConfig,
    LouisKVLongInputConfig,
    LouisKVLongOutputConfig,
    build_louiskv,
)
from kvframe_louis.segments import SegmentUnits
from kvframe_louis.trigger import SemanticTrigger

KVFRAME_API_VERSION = 1

PAPER = "arXiv 2510.11292"
TITLE = "LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences"

__all__ = [
    "ClusterUnits",
    "LouisKVConfig",
    "LouisKVLongBothConfig",
    "LouisKVLongInputConfig",
    "LouisKVLongOutputConfig",
    "LouisKVPlusConfig",
    "SegmentUnits",
    "SemanticTrigger",
    "build_louiskv",
    "build_louiskv_plus",
]


@hookimpl
def kvframe_stages() -> Iterable[StageSpec]:
    """The stages that LouisKV adds to the core's."""
    return [StageSpec(stage, paper=PAPER) for stage in (SemanticTrigger, SegmentUnits)]


@hookimpl
def kvframe_policies() -> Iterable[PolicySpec]:
    """LouisKV, and its three published settings."""
    configs = (LouisKVConfig, LouisKVLongInputConfig, LouisKVLongOutputConfig, LouisKVLongBothConfig)
    return [
        PolicySpec(
            name=config_cls.policy_name,
            config_cls=config_cls,
            build=build_louiskv,
            paper=PAPER,
            title=TITLE,
            year=2025,
        )
        for config_cls in configs
    ] + [
        PolicySpec(
            name=LouisKVPlusConfig.policy_name,
            config_cls=LouisKVPlusConfig,
            build=build_louiskv_plus,
        )
    ]
