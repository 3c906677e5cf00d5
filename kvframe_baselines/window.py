"""Sinks and recent tokens alone: the lower bound.

Older KV goes to the host all the same, so that a later turn can attend to it in full. `streamingllm` drops it instead.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import HostPool, MeanKey, Never, SelectNothing, TokenUnits


@frozen(kw_only=True)
class WindowConfig:
    """Sinks and recent tokens; nothing comes back."""

    sink_size: int = 64
    window_size: int = 1024
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_window(config: WindowConfig) -> Policy:
    """The trigger never fires, and there are no resident slots."""
    return Policy(
        name="window",
        trigger=Never(),
        units=TokenUnits(),
        scorer=MeanKey(),
        selector=SelectNothing(),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (PolicySpec(name="window", config_cls=WindowConfig, build=build_window),)
