"""What LouisKV is compared with, each in the same five slots."""

from collections.abc import Iterable

from kvframe.hookspecs import PolicySpec, hookimpl
from kvframe_baselines.full import FullConfig, build_full
from kvframe_baselines.oracle_topk import OracleTopKConfig, build_oracle_topk
from kvframe_baselines.window import WindowConfig, build_window

KVFRAME_API_VERSION = 1

__all__ = ["FullConfig", "OracleTopKConfig", "WindowConfig", "build_full", "build_oracle_topk", "build_window"]


@hookimpl
def kvframe_policies() -> Iterable[PolicySpec]:
    """The reference points: everything, nothing but sinks and window, and the best tokens at a budget."""
    return [
        PolicySpec(name="full", config_cls=FullConfig, build=build_full),
        PolicySpec(name="window", config_cls=WindowConfig, build=build_window),
        PolicySpec(name="oracle_topk", config_cls=OracleTopKConfig, build=build_oracle_topk),
    ]
