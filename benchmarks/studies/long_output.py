"""Long output: the semantic trigger against a fixed stride at the same rate, and LouisKV-plus against LouisKV.

    kvframe calibrate MODEL --rate 0.0625 --dtype float32 --task relisting --set output_tokens=1152 --context 1408 \
        --output benchmarks/studies/tau/NAME-relisting.json
    kvframe ablate benchmarks/studies/long_output.py

A table is written and written again, after a few hundred tokens of prose: more than 1,000 generated tokens, of which 64
are in the window and 128 can be retrieved. NAME is that of the model's directory, from which tau is read: calibrated on
samples that the study does not use, for the rate that the stride has. MODEL=DIRECTORY in the environment takes another
model than SmolLM2, DTYPE=bfloat16 another dtype, SEEDS=16 more seeds.
"""

import os
from pathlib import Path

import kvframe
import kvframe.eval
from kvframe.calibration import Calibration
from kvframe.models import fetch_smollm2

STRIDE = 16
SIZES = {"token_budget": 128, "sink_size": 16, "window_size": 64}

model = os.environ.get("MODEL") or fetch_smollm2()
tau = Calibration.load(Path(__file__).parent / "tau" / f"{Path(model).name}-relisting.json").tau

study = kvframe.eval.Study(
    title=f"Long output: {Path(model).name}, a table written twice",
    model=model,
    dtype=os.environ.get("DTYPE", "float32"),
    tasks=[kvframe.eval.task("relisting", output_tokens=1152)],
    base=kvframe.policy("louiskv", tau=tau, **SIZES),
    vary={"trigger": [kvframe.FixedStride(stride=STRIDE)]},
    policies=[kvframe.policy("louiskv-plus", tau=tau, **SIZES)],
    context=1408,
    seeds=range(int(os.environ.get("SEEDS", "8"))),
    metrics=[*kvframe.eval.DEFAULT_METRICS, "kl_by_token", "retrieval_rate_by_layer", "segment_lengths"],
    watch=96,
)
