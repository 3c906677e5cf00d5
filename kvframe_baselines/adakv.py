"""Ada-KV: SnapKV's scores, a layer's budget shared out among its heads by them.

Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference, 2024, arXiv 2407.11550.

- trigger, units, scorer, transfer: those of `snapkv`
- selector: the best tokens of all heads of a layer together say how many each head keeps; a fifth of the budget is
  every head's own

What the paper adds is the selector, which goes with any scorer that gives shares of attention.

Where ours differs from the paper: as for `snapkv`; and fractions of tokens are dropped instead of rounded, so that a
layer never keeps more than its budget, but up to a token a head less.
"""

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe_baselines.snapkv import SnapKVConfig, compose
from kvframe_baselines.stages import SharedBudget


@frozen(kw_only=True)
class AdaKVConfig(SnapKVConfig):
    """Ada-KV: what the end of the prompt attends to, more of it for heads that attend widely."""

    token_budget: int = 1024
    """Tokens of the prompt that a head keeps, on average over the heads of a layer."""
    floor: float = 0.2
    """Part of the budget that every head has to itself."""


def build_adakv(config: AdaKVConfig) -> Policy:
    """The policy that a config stands for."""
    selector = SharedBudget(token_budget=config.token_budget, floor=config.floor, room=config.room)
    return compose("adakv", config, selector)


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
