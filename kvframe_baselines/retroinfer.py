"""RetroInfer: clusters of keys; the best are attended exactly, the next ones as an estimate.

RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference, 2025, arXiv 2505.02922.

- trigger: every step
- units: spherical k-means of the prompt's keys, centred, in segments of 8192 tokens, one cluster for 16 tokens
- scorer: product of the query with a cluster's mean key, softmax, mean over the query heads of a group
- selector: the best clusters up to the budget; the next ones, 23.2 % of all, enter attention as n exp(q . c) with their
  mean value; the others do not
- transfer: all KV on the host
- residency: 4 sinks, 64 recent tokens

Where ours differs from the paper:

- **The budget** is a number of tokens, met exactly, for which the last cluster is cut; the paper retrieves 1.8 % of the
  clusters. Of a cluster that is cut, the remainder is estimated.
- **Generated tokens** form runs of 16 until 1024 of them have left the window and are clustered, as in the paper; there
  the newest ones stay on the device until then.
- **k-means** starts from evenly spaced tokens, so that the same prompt always gives the same clusters, and no cluster
  is split.
- **The device cache.** The paper keeps recently used blocks on the device, 5 % of the KV; here the clusters of the last
  selection stay.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import ClusterUnits, EveryStep, HostPool, MeanKey, RegroupedUnits
from kvframe_baselines.stages import EstimationZone


@frozen(kw_only=True)
class RetroInferConfig:
    """RetroInfer: the best clusters exactly, the next ones as an estimate, at every step."""

    token_budget: int = 1024
    sink_size: int = 4
    window_size: int = 64
    cluster_size: int = 16
    """Tokens of an average cluster, and of a run of generated tokens that are not clustered yet."""
    block_size: int = 8192
    """Prompt tokens clustered at once."""
    output_block_size: int = 1024
    """Generated tokens clustered at once."""
    num_iterations: int = 10
    """Iterations of k-means."""
    estimated_share: float = 0.232
    """Of all clusters, those that are estimated, rounded."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_retroinfer(config: RetroInferConfig) -> Policy:
    """The policy that a config stands for."""
    clusters = ClusterUnits(
        cluster_size=config.cluster_size,
        block_size=config.block_size,
        num_iterations=config.num_iterations,
        split_factor=None,
    )
    return Policy(
        name="retroinfer",
        trigger=EveryStep(),
        units=RegroupedUnits(units=clusters, by=clusters, block_size=config.output_block_size),
        scorer=MeanKey(keep_values=True),
        selector=EstimationZone(token_budget=config.token_budget, estimated_share=config.estimated_share),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="retroinfer",
        config_cls=RetroInferConfig,
        build=build_retroinfer,
        title="RetroInfer: A Vector-Storage Approach for Scalable Long-Context LLM Inference",
        year=2025,
        paper="arXiv 2505.02922",
    ),
)
