"""Policies at equal totals, every one of them selecting anew at every step.

    kvframe ablate benchmarks/studies/policies.py

Needles and a verbatim copy at 4K; 32 sinks, 128 recent tokens, and 256 that are retrieved, or as many more recent
tokens where nothing is. The environment's variables are those of long_context.py; POLICIES=quest,arkvale takes others.
"""

import os

from long_context import COMMON, SIZES, budgets

import kvframe
import kvframe.eval

DROPS = ("snapkv",)
"""Selects once, after the prompt, and drops the rest."""
names = os.environ.get("POLICIES", "oracle_topk,louiskv,louiskv-plus,clusterkv,quest,arkvale,snapkv").split(",")


def every_step(name: str) -> kvframe.Policy:
    """The policy, selecting at every step where it can."""
    policy = kvframe.policy(name, **SIZES)
    return policy if name in DROPS else policy.swap(trigger=kvframe.EveryStep())


study = kvframe.eval.Study(
    title="Policies at equal totals, every step",
    policies=[
        *map(every_step, names),
        *(
            kvframe.policy("window", dense_layers=(0, 1), sink_size=32, window_size=128 + budget).swap(
                name=f"window of {128 + budget}"
            )
            for budget in budgets
        ),
    ],
    token_budget=budgets,
    **COMMON,
)
