"""ClusterKV: clusters of similar keys, ranked by their centroids at every step.

ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression, 2024, arXiv 2412.03213.

- trigger: every step
- units: spherical k-means of the prompt's keys, one cluster for 80 tokens; of generated tokens every 320, 4 clusters
- scorer: product of the query with a cluster's centroid, without softmax
- selector: whole clusters in the order of their scores, the last one cut to fit the budget
- transfer: all KV on the host

Where ours differs from the paper:

- **Generated tokens** are clustered as in the paper, 320 at a time and alone, once those have left the window; there
  the newest ones stay on the device until then, here they leave one by one and form runs of 80 in between.
- **k-means** starts from evenly spaced tokens instead of random ones, so that the same prompt always gives the same
  clusters, and compares keys after taking off their mean, which no ranking of products depends on.
- **Which clusters make room.** The paper keeps the clusters of the last steps on the device; here those of the last
  selection stay.
- **One selection for each KV head**: the mean of its query heads' scores. The budget is for retrieved tokens, sinks and
  window come on top.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import ClusterUnits, EveryStep, HostPool, MeanKey, RegroupedUnits, TopBudget


@frozen(kw_only=True)
class ClusterKVConfig:
    """ClusterKV: clusters of the prompt's keys, ranked by their centroids at every step."""

    token_budget: int = 1024
    sink_size: int = 16
    window_size: int = 320
    cluster_size: int = 80
    """Tokens of an average cluster, and of a run of generated tokens that are not clustered yet."""
    output_block_size: int = 320
    """Generated tokens clustered at once."""
    num_iterations: int = 10
    """Iterations of k-means."""
    group_reduction: Literal["mean", "max"] = "mean"
    """How the scores of the query heads of a group become one."""
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    """Layers that keep their whole KV on the device."""


def build_clusterkv(config: ClusterKVConfig) -> Policy:
    """The policy that a config stands for."""
    clusters = ClusterUnits(
        cluster_size=config.cluster_size, block_size=None, num_iterations=config.num_iterations, split_factor=None
    )
    return Policy(
        name="clusterkv",
        trigger=EveryStep(),
        units=RegroupedUnits(units=clusters, by=clusters, block_size=config.output_block_size),
        scorer=MeanKey(group_reduction=config.group_reduction, softmax=False),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="clusterkv",
        config_cls=ClusterKVConfig,
        build=build_clusterkv,
        title="ClusterKV: Manipulating LLM KV Cache in Semantic Space for Recallable Compression",
        year=2024,
        paper="arXiv 2412.03213",
    ),
)
