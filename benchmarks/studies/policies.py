"""Policies at equal totals, every one of them selecting anew at every step.

    kvframe ablate benchmarks/studies/policies.py

Needles and a verbatim copy at 4K; 32 sinks, 128 recent tokens, and 256 that are retrieved, or as many more recent
tokens where nothing is. MODEL=DIRECTORY in the environment takes another model than SmolLM2.
"""

import os
from pathlib import Path

import kvframe
import kvframe.eval
from kvframe.models import fetch_smollm2

SIZES = {"sink_size": 32, "window_size": 128}
BUDGET = 256

model = os.environ.get("MODEL") or fetch_smollm2()
names = ("oracle_topk", "louiskv", "louiskv-plus", "clusterkv", "quest", "snapkv")

study = kvframe.eval.Study(
    title=f"Policies at equal totals on {Path(model).name}",
    model=model,
    dtype="float32",
    tasks=[kvframe.eval.task("niah_multiquery", num_needles=4), kvframe.eval.task("copy", copy_tokens=64)],
    policies=[
        *(
            policy if name == "snapkv" else policy.swap(trigger=kvframe.EveryStep())  # SnapKV selects once, and drops
            for name in names
            for policy in [kvframe.policy(name, token_budget=BUDGET, dense_layers=(0, 1), **SIZES)]
        ),
        kvframe.policy("window", dense_layers=(0, 1), sink_size=32, window_size=128 + BUDGET),
    ],
    context=4096,
    seeds=range(2),
    watch=0,
)
