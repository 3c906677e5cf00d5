"""What the studies at long context share, and what the environment says about it.

MODEL=DIRECTORY takes another model than SmolLM2, CONTEXT and BUDGET other sizes, several separated by commas, DTYPE
another precision, SEEDS other samples (a range such as 100-104), TEXT another haystack:

    MODEL=qwen-coder CONTEXT=8192,24576 BUDGET=512,1024 DTYPE=bfloat16 SEEDS=100-104 TEXT=prose.txt kvframe ablate ...
"""

import os
from typing import Any

import kvframe.eval
from kvframe.models import fetch_smollm2


def _numbers(name: str, default: str) -> list[int]:
    """Of an environment variable: numbers and ranges, both ends included."""
    found: list[int] = []
    for part in os.environ.get(name, default).split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


model = os.environ.get("MODEL") or fetch_smollm2()
budgets = _numbers("BUDGET", "256")
SIZES = {"token_budget": budgets[0], "sink_size": 32, "window_size": 128, "dense_layers": (0, 1)}
"""Of every policy."""

COMMON: dict[str, Any] = {
    "model": model,
    "dtype": os.environ.get("DTYPE", "float32"),
    "tasks": [kvframe.eval.task("niah_multiquery", num_needles=10), kvframe.eval.task("copy", copy_tokens=128)],
    "context": _numbers("CONTEXT", "4096"),
    "seeds": _numbers("SEEDS", "0-1"),
    "haystack": os.environ.get("TEXT"),
    "metrics": (
        *("score", "score_full", "kl", "kl_all", "attended_total", "retrieval_rate", "hit_rate", "bytes_per_token"),
        *("kv_footprint_gpu_decode", "kv_peak_gpu_decode"),
    ),
    "watch": 0,
}
"""Arguments of every study."""
