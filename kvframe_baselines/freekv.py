"""FreeKV: the pages that the step before would have chosen, corrected for the heads whose query has turned.

FreeKV: Boosting KV Cache Retrieval for Efficient LLM Inference, 2025, arXiv 2505.13109.

- trigger: every step selects for the next one with its own query; a KV head for which the mean of cos(q_{t-1}, q_t)
  over its query heads is below tau selects at once
- units: pages of 32 consecutive tokens
- scorer: Quest's bound from a page's smallest and largest keys, softmax over the pages for every query head, then the
  mean over the heads that share a KV head
- selector: the highest pages, up to the budget
- transfer: all KV on the host

The paper's threshold is 0.8 for long inputs, the default here, and 0.9 for reasoning, `tau=0.9`. Its budget is 2048
tokens in all, 128 sinks and 128 recent ones among them; the remainder is `token_budget` here.

Where ours differs from the paper:

- **What runs beside what.** The paper recalls pages for the next step on a second stream while this step computes, from
  a layout and with a double buffer made for that. Here the selection for a step is made when that step begins, with the
  query of the step before: the same pages are attended, and the time is not hidden.
- **Pages that become whole in between.** A selection made at the beginning of a step can name a page that left the
  window in this very step; the paper's could not.
- **The page's summary** is a choice there; its authors' code has both the bound and ArkVale's digest. Ours is the
  bound, and `swap(scorer=BoundingBox(box="mean-deviation"))` takes the other.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import HostPool, PageUnits, TopBudget
from kvframe_baselines.stages import BoundingBox, SpeculativeTrigger


@frozen(kw_only=True)
class FreeKVConfig:
    """FreeKV: pages chosen with the query of the step before, corrected where a head's query has turned."""

    token_budget: int = 1792
    sink_size: int = 128
    window_size: int = 128
    tau: float = 0.8
    """Similarity below which a KV head selects at once."""
    page_size: int = 32
    """Tokens of a page."""
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    """Layers that keep their whole KV on the device."""


def build_freekv(config: FreeKVConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="freekv",
        trigger=SpeculativeTrigger(tau=config.tau),
        units=PageUnits(page_size=config.page_size),
        scorer=BoundingBox(),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="freekv",
        config_cls=FreeKVConfig,
        build=build_freekv,
        title="FreeKV: Boosting KV Cache Retrieval for Efficient LLM Inference",
        year=2025,
        paper="arXiv 2505.13109",
    ),
)
