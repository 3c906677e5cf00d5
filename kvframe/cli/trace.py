"""`kvframe trace`: what some layers compute over a text, recorded once under full attention."""

from pathlib import Path
from typing import Annotated

import typer

from kvframe.cli.compare import CONTEXT, DEVICE, EVAL_MODEL, SEED, TEXT, numbers
from kvframe.cli.console import check_choice, out, print_json, waiting
from kvframe.cli.generate import DTYPE
from kvframe.cli.listing import JSON
from kvframe.cli.models import DEVICES, DTYPES
from kvframe.errors import ConfigError


def trace(
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    model: EVAL_MODEL = "smollm2",
    task: Annotated[str, typer.Option(help="Name of a task; the text of its sample is read.")] = "niah_multiquery",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the task; may be given several times."),
    ] = None,
    context: CONTEXT = 2048,
    layers: Annotated[
        str | None, typer.Option(help="Layers to record, separated by commas; four, evenly spaced, without.")
    ] = None,
    max_gib: Annotated[float, typer.Option(min=0, help="The largest trace allowed, in GiB.")] = 2.0,
    text: TEXT = None,
    seed: SEED = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    json: JSON = False,
) -> None:
    """Record queries, keys and values of some layers, for `kvframe replay`."""
    from kvframe.eval.tasks import TASKS
    from kvframe.eval.tasks import task as make_task
    from kvframe.eval.text import haystack
    from kvframe.options import parse_options

    check_choice("--dtype", dtype, DTYPES)
    check_choice("--device", device, DEVICES)
    options = parse_options(TASKS[task], set_ or []) if task in TASKS else {}
    made = make_task(task, **options)
    stack = haystack(text)
    chosen = None if layers is None else numbers("--layers", layers)
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no directory {output.absolute().parent}; make it first")

    from kvframe.cli.models import load
    from kvframe.eval.forced import check_length
    from kvframe.eval.trace import record, save_trace

    loaded, tokenizer = load(model, dtype, device, quiet=json)
    check_length(loaded.config, context, f"task {task}")
    sample = made.make(tokenizer, context, seed, stack)
    with waiting("reading the text", quiet=json):
        recorded = record(loaded, sample, layers=chosen, max_bytes=int(max_gib * 2**30))
    save_trace(recorded, output)
    found = {
        "path": str(output),
        "model": recorded.model,
        "fingerprint": recorded.fingerprint,
        "layers": [layer.layer_idx for layer in recorded.layers],
        "turns": [list(turn) for turn in recorded.turns],
        "bytes": recorded.nbytes,
    }
    if json:
        print_json(found)
        return
    layer_ids = ", ".join(str(layer.layer_idx) for layer in recorded.layers)
    out().print(
        f"layers {layer_ids} over {recorded.num_tokens:,} tokens, {recorded.num_steps} of them decode steps: "
        f"{recorded.nbytes / 2**20:.1f} MiB in {output}",
        markup=False,
    )
