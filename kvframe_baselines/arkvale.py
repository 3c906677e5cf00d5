"""ArkVale: pages evicted to the host and recalled by a digest of their keys.

ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction, 2024, NeurIPS 2024.

- trigger: every step
- units: pages of 32 consecutive tokens
- scorer: a page's digest is a box around the middle of its keys; a page's score is the largest product of the query
  with any point of it
- selector: the highest 32 pages
- transfer: all KV on the host, pages that are missing are recalled

Where ours differs from the paper:

- **Which pages make room.** The paper keeps a cache of pages on the device and evicts by how they ranked in earlier
  steps, so that a page which is wanted again may still be there. Here the resident pages are those of the last
  selection: the same pages are attended, some are recalled more often.
- **The box** is by default as wide as the keys spread on average, as in the code of its authors; `box="full"` takes the
  bound of the paper's derivation, which is Quest's.
- **One selection for each KV head**, as for `quest`; and the budget is for retrieved tokens alone.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import EveryStep, HostPool, PageUnits, TopBudget
from kvframe_baselines.stages import BoundingBox


@frozen(kw_only=True)
class ArkValeConfig:
    """ArkVale: pages on the host, recalled by a digest of their keys at every step."""

    token_budget: int = 1024
    sink_size: int = 64
    window_size: int = 64
    page_size: int = 32
    """Tokens of a page."""
    box: Literal["full", "mean-deviation"] = "mean-deviation"
    """How far a digest reaches from its centre: to the outermost keys, or as far as keys are from it on average."""
    group_reduction: Literal["mean", "max"] = "mean"
    """How the scores of the query heads of a group become one."""
    softmax: bool = True
    """Normalise each query head over the pages before the reduction."""
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    """Layers that keep their whole KV on the device."""


def build_arkvale(config: ArkValeConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="arkvale",
        trigger=EveryStep(),
        units=PageUnits(page_size=config.page_size),
        scorer=BoundingBox(box=config.box, group_reduction=config.group_reduction, softmax=config.softmax),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="arkvale",
        config_cls=ArkValeConfig,
        build=build_arkvale,
        title="ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction",
        year=2024,
        paper="NeurIPS 2024",
    ),
)
