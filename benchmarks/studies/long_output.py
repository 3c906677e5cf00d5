"""Long output: the semantic trigger against fixed strides, and LouisKV-plus against LouisKV.

    kvframe calibrate MODEL --rate 0.0625 --dtype float32 --task relisting --set output_tokens=1152 --context 1408 \
        --output benchmarks/studies/tau/NAME-relisting-16.json
    kvframe ablate benchmarks/studies/long_output.py

A table is written and written again, after a few hundred tokens of prose: more than 1,000 generated tokens, of which 64
are in the window and 128 can be retrieved. tau is calibrated for one step in sixteen on samples that the study does not
use, prompts included; on what is generated it fires at one step in ten, so that a stride of 10 has its rate. NAME is
that of the model's directory.

In the environment, MODEL=DIRECTORY takes another model than SmolLM2, DTYPE=bfloat16 another dtype, as for a GPU,
SEEDS=16 more seeds, STRIDES=8,16 other strides, TOKENS=2304 a longer output, and PLUS=1 LouisKV-plus as well: with its
own trigger, and with LouisKV's.
"""

import os
from pathlib import Path

import kvframe
import kvframe.eval
from kvframe.calibration import Calibration
from kvframe.models import fetch_smollm2

SIZES = {"token_budget": 128, "sink_size": 16, "window_size": 64}

model = os.environ.get("MODEL") or fetch_smollm2()
tau = Calibration.load(Path(__file__).parent / "tau" / f"{Path(model).name}-relisting-16.json").tau
tokens = int(os.environ.get("TOKENS", "1152"))
strides = [int(stride) for stride in os.environ.get("STRIDES", "10,16").split(",")]

plus = [
    kvframe.policy("louiskv-plus", tau=tau, **SIZES),
    kvframe.policy("louiskv-plus", tau=tau, missed_share=None, **SIZES).swap(name="louiskv-plus, LouisKV's trigger"),
]
study = kvframe.eval.Study(
    title=f"Long output: {Path(model).name}, a table written twice",
    model=model,
    dtype=os.environ.get("DTYPE", "float32"),
    tasks=[kvframe.eval.task("relisting", output_tokens=tokens)],
    base=kvframe.policy("louiskv", tau=tau, **SIZES),
    vary={"trigger": [kvframe.FixedStride(stride=stride) for stride in strides]},
    policies=plus if os.environ.get("PLUS") else [],
    context=tokens + 256,
    seeds=range(int(os.environ.get("SEEDS", "8"))),
    metrics=[*kvframe.eval.DEFAULT_METRICS, "kl_by_token", "retrieval_rate_by_layer", "segment_lengths"],
    watch=0,
)
