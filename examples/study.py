"""A small study: what two stages of LouisKV are worth on SmolLM2, one exchanged at a time.

    kvframe ablate examples/study.py

Needles and a verbatim copy, at two budgets; some minutes on two cores. Break it off whenever you like: the same command
goes on where it stopped. Results and report lie beside this file, unless --results and --report say where.
"""

import kvframe
import kvframe.eval
from kvframe.models import fetch_smollm2

study = kvframe.eval.Study(
    title="LouisKV on SmolLM2, one stage at a time",
    model=fetch_smollm2(),
    dtype="float32",
    tasks=[
        kvframe.eval.task("niah_multiquery", num_needles=2),
        kvframe.eval.task("copy", copy_tokens=24),
    ],
    base=kvframe.policy("louiskv", sink_size=16, window_size=64),
    vary={
        "trigger": [kvframe.EveryStep(), kvframe.FixedStride(stride=8)],
        "units": [kvframe.PageUnits()],
    },
    policies=[
        kvframe.policy("oracle_topk", sink_size=16, window_size=64),
        kvframe.policy("window", sink_size=16, window_size=128),
    ],
    token_budget=[48, 192],
    context=1024,
    seeds=range(2),
    watch=48,
)
