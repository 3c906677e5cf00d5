"""LouisKV: retrieval where the text turns to something else; clusters for the prompt, segments for the output.

LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences, 2025, arXiv 2510.11292.

- trigger: the query of a step has turned away from that of the step before
- units: k-means clusters of the prompt's keys; generated tokens in segments, cut where the trigger fires
- scorer: the query against mean keys, softmax, mean over the query heads of a KV head
- selector: whole units in the order of their scores, the last one cut to fit the budget
- transfer: all KV on the host, missing rows are gathered

We know of no code of its authors. Where the paper is silent, each choice is an option; the documentation's page on
LouisKV lists them all, with the reasons.
"""

from typing import ClassVar, Literal

from attrs import frozen

from kvframe.composition import Policy
from kvframe.stages import ClusterUnits, DecoupledUnits, HostPool, MeanKey, TopBudget
from kvframe_louis.segments import SegmentUnits
from kvframe_louis.trigger import SemanticTrigger


@frozen(kw_only=True)
class LouisKVConfig:
    """LouisKV: retrieves at semantic boundaries; clusters for the prompt, segments for the output.

    LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences, 2025, arXiv 2510.11292. Sinks and window come
    on top of `token_budget`. The defaults are the paper's for long input with long output; where the paper is silent,
    each choice is an option here or in the stages.
    """

    policy_name: ClassVar[str] = "louiskv"
    token_budget: int = 1024
    sink_size: int = 64
    window_size: int = 256
    tau: float | tuple[float, ...] = 0.7
    """Similarity below which a step retrieves; a tuple has one for every layer."""
    rope: Literal["after", "before"] = "after"
    """Which queries the trigger compares: after the rotary embedding, or before it."""
    trigger_heads: Literal["layer", "kv-head"] = "layer"
    """One decision a layer, as in the paper, or one for every KV head."""
    max_age: int | None = None
    """A selection is due at the latest so many steps after the last one; None, as in the paper, for no bound."""
    anchor: float | tuple[float, ...] | None = None
    """Also due where the cosine to the query of the last selection, both before RoPE, is below this; None for never."""
    hysteresis: float | None = None
    """Having fired, tau fires again only after a similarity of at least tau + hysteresis; None for at once."""
    ahead: bool = False
    """Select for the step after the one that fires, so that nothing waits for it."""
    cluster_size: int = 16
    """Tokens of an average prompt cluster."""
    block_size: int = 8192
    """Prompt tokens clustered at once."""
    num_iterations: int = 10
    """Iterations of k-means."""
    split_factor: int = 4
    """A cluster of more than this many times the average size is split."""
    min_segment: int = 4
    """An event closes an output segment only if that holds this many tokens."""
    max_segment: int | None = None
    """A segment of this many tokens is closed without an event; None stands for min(window_size / 2, 64)."""
    size_term: bool = False
    """Add log(unit size) to the scores."""
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    """Layers that keep their whole KV on the device."""


@frozen(kw_only=True)
class LouisKVLongInputConfig(LouisKVConfig):
    """LouisKV as published for long input and short output (LongBench)."""

    policy_name: ClassVar[str] = "louiskv-long-input"
    token_budget: int = 512
    sink_size: int = 32
    window_size: int = 512
    tau: float | tuple[float, ...] = 0.85


@frozen(kw_only=True)
class LouisKVLongOutputConfig(LouisKVConfig):
    """LouisKV as published for short input and long output (MATH500, GPQA, AIME)."""

    policy_name: ClassVar[str] = "louiskv-long-output"
    sink_size: int = 500
    window_size: int = 128


@frozen(kw_only=True)
class LouisKVLongBothConfig(LouisKVConfig):
    """LouisKV as published for long input and long output (LongReason)."""

    policy_name: ClassVar[str] = "louiskv-long-both"


def build_louiskv(config: LouisKVConfig) -> Policy:
    """The policy that a config stands for."""
    max_segment = config.max_segment
    if max_segment is None:
        max_segment = max(1, min(config.window_size // 2, 64))
    return Policy(
        name=config.policy_name,
        trigger=SemanticTrigger(
            tau=config.tau,
            rope=config.rope,
            heads=config.trigger_heads,
            max_age=config.max_age,
            anchor=config.anchor,
            hysteresis=config.hysteresis,
            ahead=config.ahead,
        ),
        units=DecoupledUnits(
            prompt=ClusterUnits(
                cluster_size=config.cluster_size,
                block_size=config.block_size,
                num_iterations=config.num_iterations,
                split_factor=config.split_factor,
            ),
            output=SegmentUnits(min_segment=config.min_segment, max_segment=max_segment),
        ),
        scorer=MeanKey(size_term=config.size_term),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=HostPool(),
        sink_size=config.sink_size,
        window_size=config.window_size,
        dense_layers=config.dense_layers,
    )
