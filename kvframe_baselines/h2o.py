"""H2O: the tokens that have received most attention, and the most recent ones.

H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, 2023, arXiv 2306.14048.

- trigger: every step
- units: single tokens
- scorer: attention weights a token has received, added up over the prompt's queries and every step since
- selector: the heaviest tokens, up to the budget
- transfer: none, what is not kept is dropped

Half of the cache is for heavy hitters, half for recent tokens, in every layer. A step attends to what the step before
has left, and to its own token; then one token goes.

Where ours differs from the paper:

- **Sizes are numbers of tokens**, not shares of the prompt: the paper keeps 20 % of it, half and half.
- **One selection for each KV head**, by the mean of its query heads' sums; the paper's models have a KV head for every
  query head.
- **The prompt is dropped from once it has been read**, at the first step after it, as in the code of its authors; it
  attends in full.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import Drop, EveryStep, TokenUnits, TopBudget
from kvframe_baselines.stages import AccumulatedAttention


@frozen(kw_only=True)
class H2OConfig:
    """H2O: the tokens that have received most attention so far, and as many recent ones."""

    token_budget: int = 512
    """Heavy hitters that every head keeps."""
    sink_size: int = 0
    window_size: int = 512
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_h2o(config: H2OConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="h2o",
        trigger=EveryStep(),
        units=TokenUnits(),
        scorer=AccumulatedAttention(),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=Drop(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="h2o",
        config_cls=H2OConfig,
        build=build_h2o,
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        year=2023,
        paper="arXiv 2306.14048",
    ),
)
