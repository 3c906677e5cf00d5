"""Quest: at every step, the pages whose keys can have the largest product with the query.

Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024, arXiv 2406.10774.

- trigger: every step
- units: pages of 16 consecutive tokens, for prompt and output alike
- scorer: the smallest and largest number of a page's keys in each channel span a box; a page's score is the largest
  product of the query with any point of it
- selector: the highest pages, up to the budget
- transfer: none is needed, all KV stays on the device

Where ours differs from the paper:

- **Pages come back from the host**, so that bytes moved can be compared with those of other policies. `offload=False`
  keeps all KV on the device, as published.
- **One selection for each KV head.** The paper lets every head choose for itself; heads that share a KV head share its
  rows, and here their scores are reduced, by default to the mean after a softmax over the pages.
- **The budget is for retrieved tokens**, sinks and window come on top. In the paper the newest page is one of those
  selected, and nothing is attended in any case. Pages begin behind the sinks.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import EveryStep, HostPool, KeepOnDevice, PageUnits, TopBudget
from kvframe_baselines.stages import BoundingBox


@frozen(kw_only=True)
class QuestConfig:
    """Quest: pages, scored by the box around their keys, selected anew at every step."""

    token_budget: int = 1024
    sink_size: int = 0
    window_size: int = 16
    page_size: int = 16
    """Tokens of a page."""
    group_reduction: Literal["mean", "max"] = "mean"
    """How the scores of the query heads of a group become one."""
    softmax: bool = True
    """Normalise each query head over the pages before the reduction."""
    offload: bool = True
    """KV lives on the host; False: on the device, as in the paper."""
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    """Layers that keep their whole KV on the device."""


def build_quest(config: QuestConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="quest",
        trigger=EveryStep(),
        units=PageUnits(page_size=config.page_size),
        scorer=BoundingBox(group_reduction=config.group_reduction, softmax=config.softmax),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool() if config.offload else KeepOnDevice(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="quest",
        config_cls=QuestConfig,
        build=build_quest,
        title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
        year=2024,
        paper="arXiv 2406.10774",
    ),
)
