"""SnapKV: of the prompt stays what its end attends to.

SnapKV: LLM Knows What You are Looking for Before Generation, 2024, arXiv 2404.14469.

- trigger: once, when the prompt has been read
- units: single tokens
- scorer: mean attention of the last 32 queries of the prompt, the largest of 7 neighbours, the mean over the query
  heads of a group
- selector: the highest tokens, up to the budget
- transfer: none, what is not kept is dropped

Everything generated is kept as well, as long as there is `room`. After a later turn's text the same is done again, with
what was left and generated.

Where ours differs from the paper:

- **One selection for each KV head.** The paper repeats keys for every query head; here the heads of a group share what
  they keep.
- **What is generated fills slots of a fixed number.** Beyond `window_size` + `room` tokens the window moves on, and
  what leaves it is dropped; the paper's cache grows without end.
- **`token_budget` does not include the observing tokens**, which stay besides.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import Drop, Once, Selector, TokenUnits, TopBudget
from kvframe_baselines.stages import WindowAttention


@frozen(kw_only=True)
class SnapKVConfig:
    """SnapKV: of the prompt stays what its last tokens attend to."""

    token_budget: int = 1024
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


def build_snapkv(config: SnapKVConfig) -> Policy:
    """The policy that a config stands for."""
    return compose("snapkv", config, TopBudget(token_budget=config.token_budget, room=config.room))


def compose(name: str, config: SnapKVConfig, selector: Selector) -> Policy:
    """SnapKV with another selector, which is all that some later papers change."""
    return Policy(
        name=name,
        trigger=Once(),
        units=TokenUnits(),
        scorer=WindowAttention(
            observation_window=config.observation_window, kernel_size=config.kernel_size, pooling=config.pooling
        ),
        selector=selector,
        transfer=Drop(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="snapkv",
        config_cls=SnapKVConfig,
        build=build_snapkv,
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        year=2024,
        paper="arXiv 2404.14469",
    ),
)
