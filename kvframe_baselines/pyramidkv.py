"""PyramidKV: SnapKV's scores, more tokens for lower layers than for higher ones.

PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, 2024, arXiv 2406.02069.

- trigger, units, scorer, transfer: those of `snapkv`, with 64 observing queries and the mean of 5 neighbours
- selector: budgets that fall linearly from the bottom layer to the top one, which gets a twentieth of the mean

Where ours differs from the paper: as for `snapkv`; and budgets do not depend on the prompt. The authors' code cuts the
lower layers' budgets to a short prompt's length and raises the higher ones'.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe_baselines.snapkv import SnapKVConfig, compose
from kvframe_baselines.stages import PyramidBudget


@frozen(kw_only=True)
class PyramidKVConfig(SnapKVConfig):
    """PyramidKV: what the end of the prompt attends to, more of it in lower layers."""

    token_budget: int = 1024
    """Tokens that a head keeps of the prompt, on average over the layers."""
    beta: int = 20
    """How many times more the mean is than the top layer's budget."""
    window_size: int = 65
    """At the first step, the observing tokens and the one generated."""
    observation_window: int = 64
    """Queries at the end of the prompt that are asked."""
    kernel_size: int = 5
    """Neighbouring tokens that are pooled; odd."""
    pooling: Literal["max", "mean"] = "mean"
    """What becomes of neighbours: the largest of them, or their mean."""


def build_pyramidkv(config: PyramidKVConfig) -> Policy:
    """The policy that a config stands for."""
    selector = PyramidBudget(token_budget=config.token_budget, beta=config.beta, room=config.room)
    return compose("pyramidkv", config, selector)


POLICIES = (
    PolicySpec(
        name="pyramidkv",
        config_cls=PyramidKVConfig,
        build=build_pyramidkv,
        title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        year=2024,
        paper="arXiv 2406.02069",
    ),
)
