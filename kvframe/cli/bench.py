"""`kvframe bench`: what a step, a prompt, a gather and each kernel cost on this device."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvframe.cli.console import check_choice, errors, out
from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from kvframe.bench import Outcome

bench = typer.Typer(
    name="bench",
    help="Measure a decode step, a prompt, the gather and every kernel on this device.",
    no_args_is_help=True,
)

JSON_FILE = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there as JSON.")]
QUICK = Annotated[bool, typer.Option("--quick", help="A smoke run: sizes and steps are cut down.")]
SHAPE = Annotated[str, typer.Option(help="Whose shape the random weights have: llama-3.1-8b, qwen3-8b or tiny.")]
DEVICE = Annotated[str, typer.Option(help="cuda, or cpu with the shape tiny, to try the command out.")]
BATCH_SIZE = Annotated[int, typer.Option(min=1, help="Sequences at the same time.")]
SINK_SIZE = Annotated[int, typer.Option(min=0, help="Sinks of every policy.")]
TOKEN_BUDGET = Annotated[int, typer.Option(min=1, help="Retrieved tokens, where the policy has a budget.")]
WINDOW_SIZE = Annotated[int, typer.Option(min=1, help="Recent tokens of the policies that retrieve.")]
DENSE_LAYERS = Annotated[str, typer.Option(help="Layers that every policy keeps dense.")]


@bench.command()
def decode(
    policies: Annotated[
        str, typer.Option(help="NAME, NAME:OPTION=VALUE, NAME@FIRE_RATE or NAME+compile, separated by commas.")
    ] = "louiskv,louiskv@0,louiskv@1,louiskv-plus,window,quest,dynamic-cache,offloaded-cache",
    model_shape: SHAPE = "llama-3.1-8b",
    context: Annotated[int, typer.Option(min=2, help="Prompt tokens of every sequence.")] = 131072,
    batch_size: BATCH_SIZE = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a policy.")] = 512,
    stock_steps: Annotated[int, typer.Option(min=1, help="Timed steps of dynamic-cache.")] = 128,
    offloaded_steps: Annotated[int, typer.Option(min=1, help="Timed steps of offloaded-cache.")] = 12,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before the clock starts.")] = 16,
    fire_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of steps at which a layer selects.")] = 0.07,
    miss: Annotated[float, typer.Option(min=0, max=1, help="Share of a selection that is not resident.")] = 0.3,
    page_miss: Annotated[
        float | None, typer.Option(min=0, max=1, help="The same for policies that select at every step.")
    ] = None,
    sink_size: SINK_SIZE = 64,
    token_budget: TOKEN_BUDGET = 1024,
    window_size: WINDOW_SIZE = 256,
    dense_layers: DENSE_LAYERS = "0,1",
    prefill_chunk: Annotated[int, typer.Option(min=0, help="Tokens of a piece of the prompt; 0 for all at once.")] = (
        16384
    ),
    fill: Annotated[str, typer.Option(help="How caches of transformers get their KV: random or prefill.")] = "random",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile for every policy.")] = False,
    capture: Annotated[bool, typer.Option(help="Decode steps as CUDA graphs.")] = True,
    device: DEVICE = "cuda",
    quick: QUICK = False,
    json: JSON_FILE = None,
) -> None:
    """Decode steps of policies and of transformers' caches side by side, firing and missing by a fixed schedule."""
    check_choice("--fill", fill, ("random", "prefill"))
    check_shape(model_shape)
    check_file(json)
    from kvframe.bench.contender import Sizes, parse_contenders
    from kvframe.bench.environment import choose_device

    contenders = parse_contenders(policies, compile=compile)
    where = choose_device("decode", device, model_shape)
    from kvframe.bench.decode import DecodeBenchmark, run_decode

    benchmark = DecodeBenchmark(
        contenders=contenders,
        model_shape=model_shape,
        context=context,
        batch_size=batch_size,
        steps=steps,
        stock_steps=stock_steps,
        offloaded_steps=offloaded_steps,
        warmup=warmup,
        prefill_chunk=prefill_chunk,
        fill=fill,  # type: ignore[arg-type]  # checked above
        sizes=Sizes(
            sink_size=sink_size,
            token_budget=token_budget,
            window_size=window_size,
            dense_layers=tuple(numbers("--dense-layers", dense_layers)),
        ),
        fire_rate=fire_rate,
        miss=miss,
        page_miss=page_miss,
        capture=capture,
    )
    show(run_decode(benchmark.quick() if quick else benchmark, where, say), _DECODE, json)


@bench.command()
def prefill(
    policies: Annotated[
        str, typer.Option(help="Names of policies, separated by commas; dynamic-cache is plain prefill.")
    ] = "dynamic-cache,louiskv",
    model_shape: SHAPE = "llama-3.1-8b",
    contexts: Annotated[str, typer.Option(help="Prompt tokens, several separated by commas.")] = "8192,32768,131072",
    batch_size: BATCH_SIZE = 1,
    chunks: Annotated[str, typer.Option(help="Tokens of a piece of the prompt; 0 for all at once.")] = "0,16384",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, after a first one.")] = 2,
    sink_size: SINK_SIZE = 64,
    token_budget: TOKEN_BUDGET = 1024,
    window_size: WINDOW_SIZE = 256,
    dense_layers: DENSE_LAYERS = "0,1",
    device: DEVICE = "cuda",
    quick: QUICK = False,
    json: JSON_FILE = None,
) -> None:
    """Time to the first token against plain prefill, the prompt read at once and in chunks."""
    check_shape(model_shape)
    check_file(json)
    names = tuple(dict.fromkeys(name.strip() for name in policies.split(",") if name.strip()))
    if not names:
        raise ConfigError("--policies names nobody; expected names of policies, or dynamic-cache")
    from kvframe.bench.contender import Sizes
    from kvframe.bench.environment import choose_device

    where = choose_device("prefill", device, model_shape)
    from kvframe.bench.prefill import PrefillBenchmark, run_prefill

    benchmark = PrefillBenchmark(
        policies=names,
        model_shape=model_shape,
        contexts=tuple(numbers("--contexts", contexts, at_least=2)),
        batch_size=batch_size,
        chunks=tuple(numbers("--chunks", chunks)),
        repeats=repeats,
        sizes=Sizes(
            sink_size=sink_size,
            token_budget=token_budget,
            window_size=window_size,
            dense_layers=tuple(numbers("--dense-layers", dense_layers)),
        ),
    )
    show(run_prefill(benchmark.quick() if quick else benchmark, where, say), _PREFILL, json)


@bench.command()
def gather(
    pool_gib: Annotated[float, typer.Option(help="Pinned host memory to gather from, in GiB.")] = 4.0,
    unit_sizes: Annotated[str, typer.Option(help="Tokens of a unit.")] = "1,4,16,64",
    tokens: Annotated[str, typer.Option(help="Tokens that a KV head gathers at once.")] = "304,1024,8192",
    num_blocks: Annotated[str, typer.Option(help="Thread blocks; 0 for the kernel's own choice.")] = "0,12,32,64,128",
    backends: Annotated[str, typer.Option(help="cuda, triton or both, separated by a comma.")] = "cuda,triton",
    quick: QUICK = False,
    json: JSON_FILE = None,
) -> None:
    """Random units out of pinned host memory, against the copy engine."""
    names = [name.strip() for name in backends.split(",")]
    for name in names:
        check_choice("--backends", name, ("cuda", "triton"))
    check_file(json)
    from kvframe.bench.environment import require_cuda
    from kvframe.bench.gather import GatherBenchmark, run_gather

    benchmark = GatherBenchmark(
        pool_bytes=int(pool_gib * 2**30),
        unit_sizes=tuple(numbers("--unit-sizes", unit_sizes, at_least=1)),
        tokens=tuple(numbers("--tokens", tokens, at_least=1)),
        num_blocks=tuple(number or None for number in numbers("--num-blocks", num_blocks)),
        backends=tuple(names),  # type: ignore[arg-type]  # checked above
    )
    where = require_cuda("gather")
    show(run_gather(benchmark.quick() if quick else benchmark, where, say), _GATHER, json)


@bench.command()
def kernels(
    context: Annotated[int, typer.Option(min=64, help="Tokens that the index and the pool hold.")] = 131072,
    replays: Annotated[int, typer.Option(min=1, help="Timed replays of every graph.")] = 20,
    quick: QUICK = False,
    json: JSON_FILE = None,
) -> None:
    """Every operation of a step alone inside a CUDA graph, beside what its bytes take at least."""
    check_file(json)
    from kvframe.bench.environment import require_cuda

    where = require_cuda("kernels")
    from kvframe.bench.case import KernelSizes
    from kvframe.bench.kernels import quick as cut
    from kvframe.bench.kernels import run_kernels

    sizes = KernelSizes(device=where, context=context)
    show(run_kernels(cut(sizes) if quick else sizes, replays=replays, progress=say), _KERNELS, json)


# ---- options --------------------------------------------------------------------------------------------------------


def numbers(option: str, text: str, *, at_least: int = 0) -> list[int]:
    """The whole numbers of a list separated by commas, which may be empty where 0 is allowed.

    Raises ConfigError for anything else.
    """
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1]
    if any(number < at_least for number in found) or (at_least and not found):
        raise ConfigError(f"{option} must be whole numbers >= {at_least} separated by commas, got {text!r}")
    return found


def check_shape(name: str) -> None:
    """Raise ConfigError for a shape there is none of."""
    from kvframe.bench.model import SHAPES

    check_choice("--model-shape", name, SHAPES)


def check_file(path: Path | None) -> None:
    """Raise ConfigError where a result could not be written, before it is measured."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--json {path}: there is no directory {path.absolute().parent}; make it first")


# ---- results --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """What is being measured, on standard error: a run takes minutes."""
    errors.print(text, markup=False, soft_wrap=True)


Format = Callable[[Any], str]


def _number(places: int) -> Format:
    return lambda value: f"{value:,.{places}f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f}"


def _chunk(value: int) -> str:
    return f"{value:,}" if value else "at once"


def _blocks(value: int | None) -> str:
    return "default" if value is None else str(value)


Columns = dict[str, tuple[str, Format]]

_DECODE: Columns = {
    "name": ("policy", str),
    "mean_ms": ("mean ms", _number(3)),
    "median_ms": ("median ms", _number(3)),
    "tokens_per_s": ("tokens/s", _number(1)),
    "steps": ("steps", str),
    "attended_tokens": ("attended", _number(0)),
    "retrieval_rate": ("fires", _share),
    "miss_rate": ("misses", _share),
    "captured": ("captured", lambda value: "yes" if value else "no"),
    "device_kv_bytes": ("KV GiB", _gib),
    "index_bytes": ("index GiB", _gib),
    "host_kv_bytes": ("host GiB", _gib),
    "peak_prefill_bytes": ("peak prefill GiB", _gib),
    "peak_decode_bytes": ("peak decode GiB", _gib),
}
_PREFILL: Columns = {
    "name": ("policy", str),
    "context": ("context", _number(0)),
    "chunk": ("chunk", _chunk),
    "seconds_to_first_token": ("first token s", _number(3)),
    "seconds_until_idle": ("idle s", _number(3)),
    "first_run_seconds": ("first run s", _number(3)),
    "pinning_seconds": ("pinning in it s", _number(3)),
}
_GATHER: Columns = {
    "backend": ("backend", str),
    "unit_tokens": ("unit", str),
    "unit_bytes": ("unit bytes", _number(0)),
    "bytes": ("bytes", _number(0)),
    "num_blocks": ("blocks", _blocks),
    "microseconds": ("us", _number(1)),
    "gb_per_s": ("GB/s", _number(1)),
    "copy_engine_gb_per_s": ("copy engine GB/s", _number(1)),
    "ratio": ("ratio", _number(3)),
}
_KERNELS: Columns = {
    "op": ("operation", str),
    "state": ("state", str),
    "microseconds": ("us", _number(2)),
    "floor_microseconds": ("floor us", _number(2)),
    "ratio": ("ratio", _number(2)),
}


def show(outcome: "Outcome", columns: Columns, json: Path | None) -> None:
    """Print a table, ratios and notes, and write JSON where that was asked for."""
    console = out()
    where = ", ".join(f"{key} {value}" for key, value in outcome.environment.items() if value is not None)
    console.print(where, markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in outcome.conditions.items()), markup=False)
    table = Table(title=f"bench {outcome.benchmark}", title_justify="left", box=None, pad_edge=False)
    for place, (heading, _) in enumerate(columns.values()):
        table.add_column(heading, no_wrap=True, justify="right" if place else "left")
    for row in outcome.rows:
        cells = []
        for key, (_, form) in columns.items():
            shown = row[key] is not None or form is _blocks
            cells.append(form(row[key]) if shown else "-")
        table.add_row(*cells)
    # Figures that are cut short are none: what is narrower than the table shows it all the same.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    for name, ratio in outcome.ratios.items():
        console.print(f"{name}: {ratio:.3f}", markup=False)
    for row in outcome.rows:
        for key in ("error", "capture_reason"):
            if row.get(key):
                label = ", ".join(str(row[name]) for name in list(columns)[:2])
                console.print(f"{row.get('name', label)}: {row[key]}", markup=False)
    for note in outcome.notes:
        console.print(note, markup=False)
    if json is not None:
        outcome.save(json)
        errors.print(f"written to {json}", markup=False)
