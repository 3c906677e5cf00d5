"""What louiskv-plus is made of, one part at a time, every variant selecting anew at every step.

    kvframe ablate benchmarks/studies/plus_parts.py

LouisKV, LouisKV with each part alone, all of them, and all but each; beside them the exact top tokens. Needles and a
verbatim copy at 4K: 32 sinks, 128 recent tokens, 256 retrieved. In the environment, MODEL=DIRECTORY takes another model
than SmolLM2, CONTEXT and BUDGET other sizes, several separated by commas, DTYPE another precision, SEEDS more samples:

    MODEL=qwen CONTEXT=8192,24576 BUDGET=512,1024 DTYPE=bfloat16 kvframe ablate benchmarks/studies/plus_parts.py
"""

import os

import attrs

import kvframe
import kvframe.eval
from kvframe.models import fetch_smollm2


def numbers(name: str, default: int) -> list[int]:
    """Of an environment variable."""
    return [int(part) for part in os.environ.get(name, str(default)).split(",")]


model = os.environ.get("MODEL") or fetch_smollm2()
budgets = numbers("BUDGET", 256)
SIZES = {"token_budget": budgets[0], "sink_size": 32, "window_size": 128, "dense_layers": (0, 1)}

louiskv = kvframe.policy("louiskv", **SIZES).swap(trigger=kvframe.EveryStep())
plus = kvframe.policy("louiskv-plus", **SIZES).swap(trigger=kvframe.EveryStep())
sketch = plus.selector.selector

# The ranking by a sketch has no use for the means of values; the estimate has.
estimate_alone = plus.swap(name="estimate alone", selector=kvframe.EstimateRest(selector=louiskv.selector))
sketch_alone = louiskv.swap(name="sketch alone", scorer=plus.scorer, selector=sketch)


def but(name: str, **options: object) -> kvframe.Policy:
    """All parts, the sketch with other options."""
    return plus.swap(name=name, selector=attrs.evolve(plus.selector, selector=attrs.evolve(sketch, **options)))


study = kvframe.eval.Study(
    title="louiskv-plus, part by part, selecting at every step",
    model=model,
    dtype=os.environ.get("DTYPE", "float32"),
    tasks=[kvframe.eval.task("niah_multiquery", num_needles=4), kvframe.eval.task("copy", copy_tokens=64)],
    policies=[
        kvframe.policy("oracle_topk", **SIZES),
        louiskv,
        estimate_alone,
        sketch_alone,
        plus,
        but("all, steps of tokens alone", scales="token"),
        but("all, half the candidates", oversample=4),
        but("all, sketch of 2 bits", bits=2),
    ],
    token_budget=budgets,
    context=numbers("CONTEXT", 4096),
    seeds=range(numbers("SEEDS", 2)[0]),
    metrics=(
        *("score", "kl", "kl_all", "attended_total", "retrieval_rate", "hit_rate", "bytes_per_token"),
        *("kv_footprint_gpu_decode", "kv_peak_gpu_decode"),
    ),
    watch=0,
)
