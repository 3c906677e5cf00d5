"""DuoAttention: retrieval heads attend to everything, streaming heads to the first and the last tokens.

DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, 2024, arXiv 2410.10819.

- trigger: the heads that attend in full, at every step; nothing is due
- units, scorer: not asked; selector: nothing
- transfer: all KV on the device
- residency of streaming heads: 128 sinks, 256 recent tokens

Where ours differs from the paper:

- **Which heads retrieve.** The paper trains a gate for each KV head on texts with passkeys. Here a head's score is the
  share of the attention of the prompt's last 64 queries that leaves sinks and recent tokens, and the higher half of all
  heads retrieves. So heads are found anew for every prompt, and every later turn. Trained patterns can be given as
  `StaticHeads(full_heads=...)`.
- **Memory is not saved.** The paper frees what a streaming head does not need. A store here holds the tokens of all
  heads: kept on the device, all KV stays there; with `offload=True` the device holds sinks and window alone, and the
  tokens of the retrieval heads, with those of their layer's other heads, come over the link at every step.
- **Nor is time.** A layer with a retrieval head computes full attention for all its heads, and takes that of the
  retrieval heads.
- **Prompts** attend in full in all heads; the paper's streaming heads stream there too.
"""

from typing import Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec
from kvframe.stages import HostPool, KeepOnDevice, MeanKey, SelectNothing, TokenUnits
from kvframe_baselines.stages import StaticHeads


@frozen(kw_only=True)
class DuoAttentionConfig:
    """DuoAttention: some KV heads attend to everything, the others to sinks and recent tokens."""

    sink_size: int = 128
    window_size: int = 256
    sparsity: float = 0.5
    """Share of all KV heads that stream."""
    num_queries: int = 64
    """Queries at the end of the prompt by which retrieval heads are found."""
    full_heads: tuple[tuple[int, ...], ...] | None = None
    """For each layer of the model its retrieval heads; None to find them in the prompt."""
    offload: bool = False
    """KV lives on the host, and retrieval heads read all of it at every step; False: on the device, as in the paper."""
    dense_layers: tuple[int, ...] | Literal["all"] = ()
    """Layers that keep their whole KV on the device."""


def build_duoattention(config: DuoAttentionConfig) -> Policy:
    """The policy that a config stands for."""
    return Policy(
        name="duoattention",
        trigger=StaticHeads(
            sparsity=config.sparsity,
            sink_size=config.sink_size,
            recent_size=config.window_size,
            num_queries=config.num_queries,
            full_heads=config.full_heads,
        ),
        units=TokenUnits(),
        scorer=MeanKey(),
        selector=SelectNothing(),
        transfer=HostPool() if config.offload else KeepOnDevice(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )


POLICIES = (
    PolicySpec(
        name="duoattention",
        config_cls=DuoAttentionConfig,
        build=build_duoattention,
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        year=2024,
        paper="arXiv 2410.10819",
    ),
)
