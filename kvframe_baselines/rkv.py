"""R-KV: for long outputs, what is attended to and not said twice.

R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, 2025, arXiv 2505.24133.

- trigger: every 128 steps
- units: single tokens
- scorer: pooled attention of the last 8 queries, less the mean cosine of a key with all others
- selector: the highest tokens, up to the budget, and room for those of the 128 steps to come
- transfer: none, what is not kept is dropped

Where ours differs from the paper:

- **The first step after a prompt selects as well**, so that a prompt is cut to the budget at once; one that fits stays
  whole.
- **A key without a duplicate exempts none.** In the code of its authors it exempts the first token of the cache.
- **`token_budget` does not include the last 8 tokens**, which stay besides.
- lambda is 0.1, the paper's choice; the authors' code has 0.07.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import Drop, FixedStride, TokenUnits, TopBudget
from kvframe_baselines.stages import ImportanceRedundancy


@frozen(kw_only=True)
class RKVConfig:
    """R-KV: every 128 steps stays what recent queries attend to and other keys do not repeat."""

    token_budget: int = 1024
    sink_size: int = 0
    window_size: int = 8
    stride: int = 128
    """Steps from one selection to the next."""
    mix: float = 0.1
    """Weight of the attention; what is left is that of the redundancy."""
    observation_window: int = 8
    """Queries that are asked."""
    kernel_size: int = 7
    """Neighbouring tokens that are pooled; odd."""
    similarity: float = 0.5
    """Cosine above which two keys are taken for duplicates."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_rkv(config: RKVConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="rkv",
        trigger=FixedStride(stride=config.stride),
        units=TokenUnits(),
        scorer=ImportanceRedundancy(
            mix=config.mix,
            observation_window=config.observation_window,
            kernel_size=config.kernel_size,
            similarity=config.similarity,
        ),
        selector=TopBudget(token_budget=config.token_budget, room=config.stride),
        transfer=Drop(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="rkv",
        config_cls=RKVConfig,
        build=build_rkv,
        title="R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
        year=2025,
        paper="arXiv 2505.24133",
    ),
)
