"""`kvframe plan`: does it fit, and how fast will it be, before anything is loaded?"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvframe.cli.console import check_choice, out, print_json, waiting
from kvframe.cli.generate import DTYPE
from kvframe.cli.listing import JSON
from kvframe.cli.models import DTYPES
from kvframe.cli.show import POLICY, SET
from kvframe.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kvframe.planner import Device, ModelShape, Plan

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_DEFAULT_MEMORY = 24 * 2**30

_LABELS = {
    "weights": "weights",
    "dense_kv": "KV of dense layers",
    "slots": "slots",
    "index": "index and ledger",
    "pool_on_gpu": "KV kept on the device",
    "staging": "prefill staging",
    "activations": "activations of a chunk (estimate)",
    "logits": "logits",
    "fixed": "CUDA context and workspaces (constant)",
}


def plan(
    model: Annotated[
        str, typer.Argument(help="A directory with config.json, a config file, or llama-3.1-8b or qwen3-8b.")
    ],
    context: Annotated[int, typer.Option(min=1, help="Prompt tokens of each sequence.")] = 131072,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at the same time.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(help="As 24GiB, 80GB or bytes; what is free on this GPU without, or 24GiB.")
    ] = None,
    policy: POLICY = "louiskv",
    set_: SET = None,
    prefill_chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Read the prompt in chunks of this size; the largest that fits without.")
    ] = None,
    retrieval_rate: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of steps that retrieve, where the trigger decides by data.")
    ] = 0.07,
    dtype: DTYPE = "auto",
    measure: Annotated[bool, typer.Option("--measure", help="Measure the speeds of this GPU first.")] = False,
    json: JSON = False,
) -> None:
    """Predict memory and speed from the model's config alone; exit code 1 if it does not fit."""
    from kvframe.options import parse_options
    from kvframe.registry import default_registry

    check_choice("--dtype", dtype, DTYPES)
    memory = None if gpu_memory is None else parse_bytes(gpu_memory)
    record = default_registry().policy_spec(policy)
    made = record.make(**parse_options(record.config_cls, set_ or []))

    from kvframe.planner import plan as make_plan
    from kvframe.types import ModelLayout

    notes: list[str] = []
    with waiting("planning", quiet=json):
        shape = _shape(model, dtype, notes)
        device = _device(memory, measure, notes)
        found = make_plan(
            shape,
            made,
            device,
            context=context,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chunk=prefill_chunk_size,
            retrieval_rate=retrieval_rate,
        )
    import torch

    layout = ModelLayout(
        num_layers=shape.num_layers,
        retrieval_layers=shape.retrieval_layers,
        device=torch.device("cpu"),
        dtype=shape.dtype,
    )
    problems = default_registry().plugins.check_policy(made, layout)
    if problems:
        raise ConfigError(f"the policy does not fit the model: {'; '.join(problems)}")
    if json:
        print_json({"model": model, "policy": made.to_dict(), **found.to_dict(), "notes": notes})
    else:
        _print(model, made.name, found, notes)
    if not found.fits:
        raise typer.Exit(1)


def parse_bytes(text: str) -> int:
    """Bytes from text such as `24GiB`, `80 GB` or `25769803776`. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ConfigError(f"--gpu-memory must be a size such as 24GiB, 80GB or a number of bytes, got {text!r}")
    return size


def _shape(name: str, dtype: str, notes: list[str]) -> "ModelShape":
    import torch

    from kvframe.cli.models import _silence
    from kvframe.hf.shape import model_shape

    with _silence():
        config = _config(name)
        wanted = getattr(config.get_text_config(decoder=True), "dtype", None) or config.dtype
        if dtype != "auto":
            wanted = getattr(torch, dtype)
        if wanted is None:
            notes.append("the config names no dtype: bfloat16 is assumed; --dtype says another")
            wanted = torch.bfloat16
        return model_shape(config, wanted)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    from kvframe.hf.shapes import SHAPE_NAMES, named_config

    path = Path(name).expanduser()
    if not path.exists():
        if name in SHAPE_NAMES:
            return named_config(name)
        raise ConfigError(
            f"{name} is neither a directory with config.json nor a config file, nor a built-in shape "
            f"({', '.join(SHAPE_NAMES)}); a name on the hub is not looked up, because nothing is fetched to plan"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{name} is a directory without config.json; expected one that from_pretrained reads")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        # Which types a broken file raises is up to transformers.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot read a model config from {name}: {reason}") from error


def _device(memory: int | None, measure: bool, notes: list[str]) -> "Device":
    import torch

    from kvframe.planner import Device, measure_device

    if measure:
        return measure_device(memory)
    notes.append("speeds are predicted for an NVIDIA H200 on PCIe 5; --measure takes those of this GPU")
    if memory is None and torch.cuda.is_available():
        memory = int(torch.cuda.mem_get_info()[0])
    if memory is None:
        notes.append("there is no CUDA device here: 24 GiB are assumed; --gpu-memory says another size")
        memory = _DEFAULT_MEMORY
    return Device(gpu_memory=memory)


def _print(model: str, policy: str, found: "Plan", notes: list[str]) -> None:
    console = out()
    shape, speed = found.shape, found.speed
    console.print(
        f"{model}: {shape.num_parameters / 1e9:.2f} billion parameters in {_name(shape.dtype)}, "
        f"{len(shape.retrieval_layers)} of {shape.num_layers} layers with a full KV cache",
        markup=False,
    )
    batch = f" x {found.batch_size} sequences" if found.batch_size > 1 else ""
    console.print(
        f"{found.context} prompt tokens + {found.max_new_tokens} new ones{batch}, under {policy}\n", markup=False
    )
    console.print(_memory_table(found))
    console.print()
    chunk = "in one piece" if found.chunk == found.context else f"in chunks of {found.chunk} tokens"
    full = found.full_cache
    lines = {
        "prompt is read": chunk,
        "time to first token": f"{speed.time_to_first_token:.2f} s (predicted)",
        "tokens/s": f"{speed.tokens_per_second:.1f} (predicted, at {speed.retrieval_rate:.1%} of steps retrieving)",
        "full cache instead": f"{_gib(full.gpu_bytes)} on the GPU, {_gib(full.dense_kv)} of it KV: "
        + ("fits" if found.full_cache_fits else "does not fit"),
    }
    for label, text in lines.items():
        console.print(f"{label:<21}{text}", markup=False)
    console.print(f"\n{_verdict(found)}", markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)


def _memory_table(found: "Plan") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("memory", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    for name, num_bytes in found.memory.gpu_items.items():
        if num_bytes:
            table.add_row(_LABELS[name], f"{num_bytes / 2**30:.2f}")
    table.add_row("on the GPU", f"{found.memory.gpu_bytes / 2**30:.2f}")
    table.add_row("on the host, pinned: all KV", f"{found.memory.pool_on_host / 2**30:.2f}")
    table.add_row("on the host: positions", f"{found.memory.positions_on_host / 2**30:.2f}")
    return table


def _verdict(found: "Plan") -> str:
    if found.fits:
        return f"fits: {_gib(found.memory.gpu_bytes)} of {_gib(found.device.gpu_memory)} on the GPU"
    return f"does not fit: {found.reason}"


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
