"""LouisKV's own ablation: semantic trigger against fixed stride at one rate, clusters and segments against pages.

    kvframe calibrate MODEL --rate 0.125 --dtype float32 --output benchmarks/studies/tau/NAME-prose-8.json
    kvframe ablate benchmarks/studies/louiskv.py

Needles and a verbatim copy at 4K. tau is calibrated on prose, for the rate that the stride has; NAME is that of the
model's directory. In the environment, MODEL=DIRECTORY takes another model than SmolLM2, DTYPE another dtype, SEEDS=5
more seeds.
"""

import os
from pathlib import Path

import kvframe
import kvframe.eval
from kvframe.calibration import Calibration
from kvframe.models import fetch_smollm2

STRIDE = 8
SIZES = {"token_budget": 256, "sink_size": 32, "window_size": 128}

model = os.environ.get("MODEL") or fetch_smollm2()
tau = Calibration.load(Path(__file__).parent / "tau" / f"{Path(model).name}-prose-{STRIDE}.json").tau
base = kvframe.policy("louiskv", tau=tau, **SIZES)

study = kvframe.eval.Study(
    title=f"LouisKV's trigger and units on {Path(model).name}",
    model=model,
    dtype=os.environ.get("DTYPE", "float32"),
    tasks=[kvframe.eval.task("niah_multiquery", num_needles=4), kvframe.eval.task("copy", copy_tokens=64)],
    base=base,
    vary={
        "trigger": [kvframe.FixedStride(stride=STRIDE), kvframe.EveryStep()],
        "units": [kvframe.PageUnits(page_size=16)],
    },
    policies=[base.swap(name="pages, every step", trigger=kvframe.EveryStep(), units=kvframe.PageUnits(page_size=16))],
    context=4096,
    seeds=range(int(os.environ.get("SEEDS", "2"))),
    watch=0,
)
