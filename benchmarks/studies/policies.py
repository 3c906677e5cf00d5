"""Policies at equal totals, every one of them selecting anew at every step.

    kvframe ablate benchmarks/studies/policies.py

Needles and a verbatim copy at 4K; 32 sinks, 128 recent tokens, and 256 that are retrieved, or as many more recent
tokens where nothing is. The environment's variables are those of long_context.py; POLICIES=quest,louiskv:cluster_size=8
takes others, a policy's options behind its name.
"""

import os
from collections.abc import Iterator

from long_context import COMMON, SIZES, budgets

import kvframe
import kvframe.eval
from kvframe.options import parse_options
from kvframe.registry import default_registry

DROPS = ("snapkv",)
"""Selects once, after the prompt, and drops the rest."""
DEFAULT = "oracle_topk,louiskv,louiskv-plus,clusterkv,quest,arkvale,snapkv,window"


def policies(entry: str) -> Iterator[kvframe.Policy]:
    """What an entry of POLICIES stands for, selecting at every step where it can; a window for every budget."""
    name, *options = entry.split(":")
    if name == "window":
        for budget in budgets:
            size = 128 + budget
            policy = kvframe.policy("window", dense_layers=(0, 1), sink_size=32, window_size=size)
            yield policy.swap(name=f"window of {size}")
        return
    own = parse_options(default_registry().policy_spec(name).config_cls, options)
    policy = kvframe.policy(name, **SIZES, **own).swap(name=entry)
    yield policy if name in DROPS else policy.swap(trigger=kvframe.EveryStep())


study = kvframe.eval.Study(
    title="Policies at equal totals, every step",
    policies=[policy for entry in os.environ.get("POLICIES", DEFAULT).split(",") for policy in policies(entry)],
    token_budget=budgets,
    **COMMON,
)
