"""Registered stages and policies, small enough for a short text to go through everything they do."""

from typing import Any, Literal

from kvframe.composition import Policy
from kvframe.options import option_names
from kvframe.registry import PolicyRecord, default_registry
from kvframe.stages import PageUnits, Stage, TokenUnits, TopBudget

# Values that make a short text go through everything a stage does, by the name of the option.
SMALL_OPTIONS: dict[str, Any] = {
    "beta": 3,
    "block_size": 11,
    "by": PageUnits(page_size=2),
    "byte_budget": 700,
    "cluster_size": 3,
    "end_ids": (1, 4),
    "estimated_share": 0.4,
    "filter_layers": (0,),
    "group_size": 4,
    "kernel_size": 3,
    "local_size": 5,
    "max_segment": 5,
    "max_sentence": 5,
    "max_tokens": 10,
    "min_segment": 2,
    "num_iterations": 2,
    "num_keys": 2,
    "num_queries": 4,
    "observation_window": 3,
    "output": TokenUnits(),
    "output_block_size": 7,
    "page_size": 3,
    "prompt": PageUnits(page_size=3),
    "room": 3,
    "selector": TopBudget(token_budget=10),
    "sink_size": 2,
    "stride": 3,
    "tau": 0.7,
    "token_budget": 10,
    "units": PageUnits(page_size=3),
    "window_size": 4,
}


def small_options(config_cls: type[Any]) -> dict[str, Any]:
    """The small values of those options that a stage or a policy's config has."""
    return {name: SMALL_OPTIONS[name] for name in option_names(config_cls) if name in SMALL_OPTIONS}


def small_stages(slot: str) -> list[Stage]:
    """Every registered stage of a slot, small."""
    return [record.make(**small_options(record.stage)) for record in default_registry().stages(slot)]


def small_policy(record: PolicyRecord) -> Policy:
    """A registered policy, small; no layer is dense unless all are, or the scorer's sources are."""
    return with_dense_layers(record.make(**small_options(record.config_cls)), ())


def with_dense_layers(policy: Policy, layers: tuple[int, ...] | Literal["all"]) -> Policy:
    """The policy with these dense layers, and those that its scorer needs; as it is where all layers are dense."""
    if policy.dense_layers == "all" or layers == "all":
        return policy.swap(dense_layers="all")
    sources = policy.scorer.sources
    needed = {*range(sources[0]), *sources} if sources else set()
    return policy.swap(dense_layers=tuple(sorted(needed.union(layers))))
