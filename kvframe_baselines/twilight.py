"""Twilight: a generous choice of pages, and of their tokens only as many as the attention needs.

Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning, 2025, arXiv 2502.02770.

- trigger: every step
- units, scorer: those of Quest, pages of 16 tokens ranked by the bound over their keys; any others do
- selector: 8192 tokens are candidates; weighed by a copy of their keys in 4 bits, the fewest that hold 85 % of the
  attention to all candidates are taken
- transfer: all KV on the host

Where ours differs from the paper:

- **What p is a share of.** Sinks and window are attended in any case, and the attention that they get does not count;
  in the paper candidates include them.
- **One selection for each KV head**, from the mean of its query heads' weights.
- **The copy** has steps that are symmetric about zero, one scale a token; the paper's has a zero point. It is of tokens
  that have left the window.
- **The device has slots for all candidates**, since any step may need them. What is saved is what travels and what is
  attended to.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import EveryStep, HostPool, PageUnits, TopBudget
from kvframe_baselines.stages import BoundingBox, TopP


@frozen(kw_only=True)
class TwilightConfig:
    """Twilight: of generously chosen pages as many tokens as hold a share of the attention."""

    token_budget: int = 8192
    sink_size: int = 4
    window_size: int = 64
    page_size: int = 16
    """Tokens of a page."""
    p: float = 0.85
    """Share of the candidates' attention that is taken."""
    bits: Literal[2, 4, 8] = 4
    """Of a number in the copy of the keys that candidates are weighed by."""
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    """Layers that keep their whole KV on the device."""


def build_twilight(config: TwilightConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="twilight",
        trigger=EveryStep(),
        units=PageUnits(page_size=config.page_size),
        scorer=BoundingBox(),
        selector=TopP(selector=TopBudget(token_budget=config.token_budget), p=config.p, bits=config.bits),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="twilight",
        config_cls=TwilightConfig,
        build=build_twilight,
        title="Twilight: Adaptive Attention Sparsity with Hierarchical Top-p Pruning",
        year=2025,
        paper="arXiv 2502.02770",
    ),
)
