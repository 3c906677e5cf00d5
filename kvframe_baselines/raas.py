"""RaaS: for long outputs, the tokens that were of use most recently, and the prompt.

RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM Reasoning, 2025, arXiv 2502.11147.

- trigger: every step
- units: pages of 16 tokens
- scorer: when a token last got more than a ten-thousandth of the attention; prompt tokens before all others
- selector: the most recent stamps, up to the budget
- transfer: none, what is not kept is dropped

Where ours differs from the paper:

- **A page's stamp is the newest of its tokens**, which are all weighed exactly; the paper estimates a page's weight
  from a representative key, as Quest does.
- **The prompt counts towards the budget.** The paper keeps all of it besides; here the tokens generated have what the
  prompt leaves of `token_budget`, and of a longer prompt those tokens stay that were of use last.
- **One stamp for each KV head**, by the mean weight of its query heads.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import Drop, EveryStep, PageUnits, TopBudget
from kvframe_baselines.stages import LastUse


@frozen(kw_only=True)
class RaaSConfig:
    """RaaS: the pages that were of use most recently, and the prompt."""

    token_budget: int = 1024
    """Tokens that every head keeps, those of the prompt included."""
    sink_size: int = 0
    window_size: int = 16
    page_size: int = 16
    """Tokens of a page."""
    alpha: float = 1e-4
    """Share of the softmax above which a token counts as used."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_raas(config: RaaSConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="raas",
        trigger=EveryStep(),
        units=PageUnits(page_size=config.page_size),
        scorer=LastUse(alpha=config.alpha),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=Drop(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="raas",
        config_cls=RaaSConfig,
        build=build_raas,
        title="RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM Reasoning",
        year=2025,
        paper="arXiv 2502.11147",
    ),
)
