"""A plugin for kvframe: one trigger, one scorer, one policy."""

import kvframe
from kvframe_example_policy.policy import SteadyPagesConfig, build_steady_pages
from kvframe_example_policy.scorer import KeyDirection
from kvframe_example_policy.trigger import AdaptiveStride

KVFRAME_API_VERSION = 1

__all__ = ["AdaptiveStride", "KeyDirection", "SteadyPagesConfig", "build_steady_pages"]


@kvframe.hookimpl
def kvframe_stages() -> list[kvframe.StageSpec]:
    """The stages, which other policies can take."""
    return [kvframe.StageSpec(AdaptiveStride), kvframe.StageSpec(KeyDirection)]


@kvframe.hookimpl
def kvframe_policies() -> list[kvframe.PolicySpec]:
    """The policy, by name and with options."""
    return [kvframe.PolicySpec(name="steady-pages", config_cls=SteadyPagesConfig, build=build_steady_pages)]
