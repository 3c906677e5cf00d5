"""What each option of the trigger is worth, at one retrieval rate.

    python benchmarks/studies/plus_trigger.py
    kvframe ablate benchmarks/studies/plus_trigger.py

The first command finds thresholds such that every variant fires on a tenth of the steps of four thousand tokens of
prose, and leaves them in tau/; the second runs the study. LouisKV with one tau for the model, as published, with each
option alone; louiskv-plus, with all of them, and with all but each; both at every step beside them. The environment's
variables are those of long_context.py.
"""

import json
from pathlib import Path
from typing import Any

import attrs
from long_context import COMMON, SIZES, budgets, model
from trigger_options import OPTIONS

import kvframe
import kvframe.eval
from kvframe.calibration import Calibration

RATE = 0.1
FILE = Path(__file__).parent / "tau" / f"{Path(model).name}-plus.json"

VARIANTS = {
    "as published": (),
    **{f"{name} alone": (name,) for name in OPTIONS},
    "all": tuple(OPTIONS),
    **{f"all but {name}": tuple(other for other in OPTIONS if other != name) for name in OPTIONS},
}
"""What is on under each name."""


def trigger(names: tuple[str, ...]) -> Any:
    """LouisKV's with these options, before its thresholds are set."""
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    return attrs.evolve(kvframe.policy("louiskv").trigger, **options)


def calibrate() -> None:
    """Find the thresholds of all variants, and write them."""
    from kvframe.cli.models import load
    from kvframe.demo import prose_topics

    loaded, tokenizer = load(model, "float32")
    ids = tokenizer("\n\n".join(prose_topics()), add_special_tokens=False, verbose=False)["input_ids"][-4096:]
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, on in VARIANTS.items():
        if name not in found:
            calibration = kvframe.calibrate(
                loaded,
                [ids],
                retrieval_rate=RATE,
                trigger=trigger(on),
                per="layer" if "tau per layer" in on else "model",
                dense_layers=SIZES["dense_layers"],
                chunk_size=256,
            )
            found[name] = calibration.to_dict()
            FILE.write_text(json.dumps(found, indent=1) + "\n")
            print(name, [None if rate is None else round(rate, 3) for rate in calibration.achieved], flush=True)


def policies() -> list[kvframe.Policy]:
    """Every variant with its thresholds: each option alone on LouisKV, the others on louiskv-plus."""
    if not FILE.exists():
        raise SystemExit(f"there are no thresholds in {FILE}; run python {__file__} first")
    thresholds = {name: Calibration.from_dict(data) for name, data in json.loads(FILE.read_text()).items()}

    def make(base: str, variant: str) -> kvframe.Policy:
        calibrated = thresholds[variant]
        set_to = {key: value for key, value in calibrated.options.items() if key != "rope"}
        made = attrs.evolve(trigger(VARIANTS[variant]), **set_to)
        return kvframe.policy(base, **SIZES).swap(name=f"{base}, {variant}", trigger=made)

    every_step = [
        kvframe.policy(name, **SIZES).swap(name=f"{name}, every step", trigger=kvframe.EveryStep())
        for name in ("louiskv", "louiskv-plus")
    ]
    alone = [make("louiskv", name) for name in VARIANTS if not name.startswith("all")]
    together = [make("louiskv-plus", name) for name in VARIANTS if name.startswith("all")]
    return [*every_step, *alone, make("louiskv-plus", "as published"), *together]


if __name__ == "__main__":
    calibrate()
else:
    study = kvframe.eval.Study(
        title="The options of LouisKV's trigger, one by one, at a rate of 10 % on prose",
        policies=policies(),
        token_budget=budgets,
        **COMMON,
    )
