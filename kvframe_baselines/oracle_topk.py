"""The best tokens at a budget: what every selection is measured against.

It is no way to save memory, since its index holds every key; it says how good a selection of that size can be. The
score of a token is its share of the softmax over all tokens outside sinks and window, meaned over the query heads of a
group.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import EveryStep, HostPool, MeanKey, TokenUnits, TopBudget


@frozen(kw_only=True)
class OracleTopKConfig:
    """Exact attention scores of single tokens, selected anew at every step."""

    token_budget: int = 1024
    sink_size: int = 64
    window_size: int = 256
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    """Layers that keep their whole KV on the device."""


def build_oracle_topk(config: OracleTopKConfig) -> Policy:
    """Units of one token make the mean key the key itself."""
    return Policy(
        name="oracle_topk",
        trigger=EveryStep(),
        units=TokenUnits(),
        scorer=MeanKey(),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (PolicySpec(name="oracle_topk", config_cls=OracleTopKConfig, build=build_oracle_topk),)
