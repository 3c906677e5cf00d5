"""When to retrieve: louiskv-plus by what it misses, by LouisKV's trigger, and what each option of that is worth.

    python benchmarks/studies/plus_trigger.py
    kvframe ablate benchmarks/studies/plus_trigger.py

The second command runs the study: LouisKV and louiskv-plus at every step; louiskv-plus with its own trigger, at several
shares that a token may be missed by; and with LouisKV's, as published and with all options. OPTIONS=1 adds its own
trigger with other parts, LouisKV with each option alone, and louiskv-plus with all but each. Thresholds of LouisKV's
trigger are in tau/: the first command finds them, such that every variant fires on a tenth of the steps of four
thousand tokens of prose. The environment's other variables are those of long_context.py.
"""

import json
import os
from pathlib import Path
from typing import Any

import attrs
from long_context import COMMON, SIZES, budgets, model
from trigger_options import OPTIONS

import kvframe
import kvframe.eval
from kvframe.calibration import Calibration

RATE = 0.1
SHARES = (0.01, 0.02, 0.03, 0.05, 0.1)
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
        return kvframe.policy(base, **SIZES).swap(name=f"{base}, LouisKV's trigger, {variant}", trigger=made)

    every_step = [
        kvframe.policy(name, **SIZES).swap(name=f"{name}, every step", trigger=kvframe.EveryStep())
        for name in ("louiskv", "louiskv-plus")
    ]
    own = [
        kvframe.policy("louiskv-plus", **SIZES, missed_share=share).swap(name=f"louiskv-plus, misses up to {share}")
        for share in SHARES
    ]
    published = [make("louiskv", "as published"), make("louiskv-plus", "as published"), make("louiskv-plus", "all")]
    if not os.environ.get("OPTIONS"):
        return [*every_step, *own, *published]
    parts: dict[str, dict[str, Any]] = {"no estimate": {"estimate": False}, "runs of 4": {"run_length": 4}}
    parts |= {"a quarter of the candidates": {"oversample": 4}, "sketch of 2 bits": {"bits": 2}}
    own += [
        kvframe.policy("louiskv-plus", **SIZES, **part).swap(name=f"louiskv-plus, {name}")
        for name, part in parts.items()
    ]
    alone = [make("louiskv", name) for name in VARIANTS if name.endswith("alone")]
    together = [make("louiskv-plus", name) for name in VARIANTS if name.startswith("all but")]
    return [*every_step, *own, *published, *alone, *together]


if __name__ == "__main__":
    calibrate()
else:
    study = kvframe.eval.Study(
        title="When to retrieve",
        policies=policies(),
        token_budget=budgets,
        **COMMON,
    )
