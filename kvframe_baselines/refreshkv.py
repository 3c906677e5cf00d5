"""RefreshKV: a small cache that a step of full attention renews when the query has moved on.

RefreshKV: Updating Small KV Cache During Long-form Generation, 2024, arXiv 2411.05787.

- trigger: every 5 steps the query is compared with that of the last full step; where their cosine is at most tau, the
  step attends to everything and the small cache is chosen anew. Each layer decides on its own
- units: single tokens
- scorer: the attention weights of the full step, the largest among the query heads of a group, max-pooled along the
  text
- selector: the tokens with the highest scores
- transfer: all KV on the device, as in the paper, whose full steps read all of it; `offload=True` keeps it on the host

Where ours differs from the paper:

- **The threshold.** The paper sets it for each model and task; 0.85 is ours, to be tuned.
- **The small cache** starts from the attention of the prompt's last token. Sinks and window are attended besides, and
  tokens generated since the last full step are in the window or resident while there is room for them.
- **Pooling in a full step** runs over the tokens in the order in which they are stored. For units of one token that is
  the order of the text.
- **A full step reads the keys twice** where the KV is on the host: to attend, and again for its weights.
- Training with such a cache, which the paper adds, is out of scope.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import HostPool, KeepOnDevice, TokenUnits, TopBudget
from kvframe_baselines.stages import PooledAttention, RefreshTrigger


@frozen(kw_only=True)
class RefreshKVConfig:
    """RefreshKV: a small cache, chosen anew by a step of full attention when the query has moved on."""

    token_budget: int = 1024
    sink_size: int = 4
    window_size: int = 128
    stride: int = 5
    """Steps from one comparison of queries to the next."""
    tau: float = 0.85
    """Similarity at or below which a step attends to everything."""
    kernel_size: int = 7
    """Neighbouring tokens whose weights are pooled; odd."""
    offload: bool = False
    """KV lives on the host, and every full step reads it; False: on the device, as in the paper."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_refreshkv(config: RefreshKVConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="refreshkv",
        trigger=RefreshTrigger(stride=config.stride, tau=config.tau),
        units=TokenUnits(),
        scorer=PooledAttention(kernel_size=config.kernel_size),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool() if config.offload else KeepOnDevice(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="refreshkv",
        config_cls=RefreshKVConfig,
        build=build_refreshkv,
        title="RefreshKV: Updating Small KV Cache During Long-form Generation",
        year=2024,
        paper="arXiv 2411.05787",
    ),
)
