"""Full attention, nothing retrieved: the upper bound.

Through kvframe's own path: no layer is managed, and none of the stages is asked.
"""

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import KeepOnDevice, MeanKey, Never, SelectNothing, TokenUnits


@frozen(kw_only=True)
class FullConfig:
    """Full attention: every layer keeps its whole KV on the device."""


def build_full(config: FullConfig) -> Policy:
    """Every layer is dense, so that the stages have nothing to do."""
    return Policy(
        name="full",
        trigger=Never(),
        units=TokenUnits(),
        scorer=MeanKey(),
        selector=SelectNothing(),
        transfer=KeepOnDevice(),
        dense_layers="all",
    )


POLICIES = (PolicySpec(name="full", config_cls=FullConfig, build=build_full),)
