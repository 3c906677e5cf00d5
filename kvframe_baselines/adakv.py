"""Ada-KV: SnapKV's scores, a layer's budget shared out among its heads by them.

Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, 2024, arXiv 2407.11550.

- trigger, units, scorer, transfer: those of `snapkv`
- selector: the best tokens of all heads of a layer together say how many each head keeps; a fifth of the budget is
  every head's own

What the paper adds is the selector, which goes with any scorer that gives shares of attention.

Where ours differs from the paper: as for `snapkv`; and fractions of tokens are dropped instead of rounded, so that a
layer never keeps more than its budget, but up to a token a head less.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import Drop, Once, TokenUnits
from kvframe_baselines.stages import SharedBudget, WindowAttention


@frozen(kw_only=True)
class AdaKVConfig:
    """Ada-KV: what the end of the prompt attends to, more of it for heads that attend widely."""

    token_budget: int = 1024
    """Tokens of the prompt that a head keeps, on average over the heads of a layer."""
    floor: float = 0.2
    """Part of the budget that every head has to itself."""
    sink_size: int = 0
    window_size: int = 33
    """At the first step, the observing tokens and the one generated."""
    observation_window: int = 32
    """Queries at the end of the prompt that are asked."""
    kernel_size: int = 7
    """Neighbouring tokens that are pooled; odd."""
    pooling: Literal["max", "mean"] = "max"
    """What becomes of neighbours: the largest of them, or their mean."""
    room: int = 1024
    """Generated tokens that are kept besides the window."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_adakv(config: AdaKVConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="adakv",
        trigger=Once(),
        units=TokenUnits(),
        scorer=WindowAttention(
            observation_window=config.observation_window, kernel_size=config.kernel_size, pooling=config.pooling
        ),
        selector=SharedBudget(token_budget=config.token_budget, floor=config.floor, room=config.room),
        transfer=Drop(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="adakv",
        config_cls=AdaKVConfig,
        build=build_adakv,
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        year=2024,
        paper="arXiv 2407.11550",
    ),
)
