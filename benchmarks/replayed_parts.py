"""What louiskv-plus is made of, one part at a time, on traces: without a model, and so on a CPU at any length.

    kvframe trace needles.safetensors --model MODEL --task niah_multiquery --context 8192 --seed 11
    python benchmarks/replayed_parts.py needles.safetensors [TRACE ...] [--budget 512] [--rate 0.1] [--markdown FILE]

Two tables. The parts of the selection, every variant selecting anew at every step; and the options of the trigger, each
variant's thresholds set such that it fires at one rate over the queries of the trace's prompt: LouisKV with each option
alone, louiskv-plus with none, with all, and with all but each. The error is what a variant's attention gives less what
full attention gives, over the latter: mean over the layers, heads and steps of the trace.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from studies.trigger_options import OPTIONS

import kvframe
from kvframe.calibrated_trigger import find_thresholds, record_layer
from kvframe.errors import ConfigError
from kvframe.eval.figures import size
from kvframe.eval.replaying import Replay, Replayed
from kvframe.eval.trace import Trace, load_trace

SIZES: dict[str, Any] = {"sink_size": 32, "window_size": 128, "dense_layers": ()}
CHUNK, NUM_CHUNKS = 256, 8
"""Of the prompt, a trigger is run over so many pieces of so many tokens."""

EVERYTHING = tuple(OPTIONS)


def selections(token_budget: int) -> dict[str, kvframe.Policy]:
    """By what they are called, all selecting anew at every step."""
    sizes = {"token_budget": token_budget, **SIZES}
    louiskv = kvframe.policy("louiskv", **sizes)
    plus = kvframe.policy("louiskv-plus", missed_share=None, **sizes)
    sketch: Any = plus.selector.selector

    def but(**options: Any) -> kvframe.Policy:
        return plus.swap(selector=attrs.evolve(plus.selector, selector=attrs.evolve(sketch, **options)))

    variants = {
        "oracle top-k": kvframe.policy("oracle_topk", **sizes),
        "louiskv": louiskv,
        "estimate alone": plus.swap(selector=kvframe.EstimateRest(selector=louiskv.selector)),
        "sketch alone": plus.swap(selector=sketch),
        "all: louiskv-plus": plus,
        "all, half the candidates": but(oversample=8),
        "all, sketch of 2 bits": but(bits=2),
        "all, runs of 4": but(run_length=4),
        "all, sizes of channels": but(scales="channel"),
        "all, clusters of 8, 2 bits": kvframe.policy("louiskv-plus", cluster_size=8, bits=2, **sizes),
    }
    return {name: policy.swap(trigger=kvframe.EveryStep()) for name, policy in variants.items()}


def triggers() -> dict[str, tuple[str, tuple[str, ...]]]:
    """By what they are called: policies, and the options of their triggers."""
    found = {}
    for base, names in (
        ("louiskv", ("as published", *EVERYTHING)),
        ("louiskv-plus", ("as published", "all", *EVERYTHING)),
    ):
        for name in names:
            on: tuple[str, ...] = () if name == "as published" else EVERYTHING
            label = name
            if name in OPTIONS:
                on = (name,) if base == "louiskv" else tuple(other for other in EVERYTHING if other != name)
                label = f"{name} alone" if base == "louiskv" else f"all but {name}"
            found[f"{base}, {label}"] = base, on
    return found


def fitted(trace: Trace, on: tuple[str, ...], rate: float) -> Any:
    """LouisKV's trigger with these options, and with thresholds for the recorded layers."""
    options = {key: value for name in on for key, value in OPTIONS[name].items()}
    trigger = attrs.evolve(kvframe.policy("louiskv").trigger, **options)
    num_prompt, _ = trace.turns[0]
    starts = torch.linspace(0, num_prompt - CHUNK, NUM_CHUNKS).long().tolist()
    layers = {
        layer.layer_idx: record_layer(
            [torch.stack([layer.query[:, start : start + CHUNK] for start in starts])],
            trace.layout(layer),
            trigger,
            rate,
        )
        for layer in trace.layers
    }
    per: Literal["layer", "model"] = "layer" if "tau per layer" in on else "model"
    found = find_thresholds(trigger, layers, rate, per)

    def of(name: str) -> tuple[float, ...]:
        return tuple(found[idx][0][name] if idx in found else -1.0 for idx in range(trace.shape.num_layers))

    anchor = {"anchor": of("anchor")} if "anchor" in options else {}
    return attrs.evolve(trigger, tau=of("tau"), **anchor)


def row(name: str, found: list[Replayed]) -> str:
    """One line of a table, the figures of all traces beside each other."""
    columns: dict[str, Callable[[Replayed], str]] = {
        "error": lambda each: f"{each.output_error:.4f}",
        "mass": lambda each: f"{each.captured_mass:.1%}",
        "selects": lambda each: f"{each.retrieval_rate:.1%}",
        "rows": lambda each: f"{sum(layer.rows_recalled for layer in each.layers) / len(each.layers):,.0f}",
        "bytes": lambda each: size(each.bytes_per_token),
    }
    return f"| {name} | " + " | ".join(" / ".join(map(show, found)) for show in columns.values()) + " |"


def main() -> None:
    """Parse the command line, replay everything, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--budget", type=int, default=512, help="tokens that are retrieved")
    parser.add_argument("--rate", type=float, default=0.1, help="share of steps at which triggers shall fire")
    parser.add_argument("--tables", default="selection,trigger", help="which tables, separated by commas")
    parser.add_argument("--only", metavar="NAME;NAME", help="rows to make, by their names")
    parser.add_argument("--markdown", type=Path, help="append the lines of the tables there, each when it exists")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    traces = [load_trace(path) for path in arguments.traces]
    replays = [Replay(trace) for trace in traces]

    def show(line: str) -> None:
        print(line, flush=True)
        if arguments.markdown is not None:
            with arguments.markdown.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    wanted = None if arguments.only is None else arguments.only.split(";")
    sizes = {"token_budget": arguments.budget, **SIZES}
    for table in arguments.tables.split(","):
        show(f"\n| {table} | error | attention held | selects | rows a layer, all steps | bytes a step |")
        show("| --- | ---: | ---: | ---: | ---: | ---: |")
        every_step, own = selections(arguments.budget), triggers()
        for name in every_step if table == "selection" else own:
            if wanted is not None and name not in wanted:
                continue
            try:
                runs = []
                for trace, replay in zip(traces, replays, strict=True):
                    if table == "selection":
                        policy = every_step[name]
                    else:
                        base, on = own[name]
                        policy = kvframe.policy(base, **sizes).swap(trigger=fitted(trace, on, arguments.rate))
                    runs.append(replay.run(policy))
                show(row(name, runs))
            except ConfigError as error:
                show(f"| {name} | {error} |")


if __name__ == "__main__":
    main()
