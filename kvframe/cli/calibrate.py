"""`kvframe calibrate`: thresholds for LouisKV's trigger from unlabelled text."""

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvframe.cli.console import check_choice, errors, out, print_json, progress
from kvframe.cli.generate import DTYPE, MODEL
from kvframe.cli.listing import JSON
from kvframe.cli.models import DTYPES
from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from kvframe.calibration import Calibration
    from kvframe.eval.tasks import Task
    from kvframe.stages import Trigger


def calibrate(
    model: MODEL,
    rate: Annotated[float, typer.Option(help="Share of steps that shall retrieve, between 0 and 1.")] = 0.07,
    per: Annotated[str, typer.Option(help="layer: one tau for each; model: one for all.")] = "layer",
    rope: Annotated[str, typer.Option(help="Compare queries after or before the rotary embedding.")] = "after",
    trigger: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of LouisKV's trigger, such as max_age=64, that has a say as well; may be repeated.",
        ),
    ] = None,
    dense_layers: Annotated[
        str, typer.Option(help="Layers that the policy keeps dense: they do not count in one tau for all.")
    ] = "0,1",
    text_file: Annotated[
        list[Path] | None,
        typer.Option(help="Unlabelled text, several times for several; the standard library's documentation without."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens to read, of all texts together.")] = 4096,
    task: Annotated[
        str | None, typer.Option(help="Read samples of this task in place of a text: what a study runs it on.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the task; may be given several times."),
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sample of the task.")] = 2048,
    seed: Annotated[
        int, typer.Option(min=0, help="Draws the first sample of the task, the next number the next; not a study's.")
    ] = 1000,
    output: Annotated[Path | None, typer.Option(help="Write the result there, for `generate --calibration`.")] = None,
    dtype: DTYPE = "auto",
    json: JSON = False,
) -> None:
    """Find tau for a wanted retrieval rate: no labels, no search, one reading of the text."""
    check_choice("--per", per, ("layer", "model"))
    check_choice("--rope", rope, ("after", "before"))
    check_choice("--dtype", dtype, DTYPES)
    if not 0 < rate < 1:
        raise ConfigError(f"--rate must lie between 0 and 1, got {rate}; tau=-1 and tau=2 are never and always")
    if task is None and set_:
        raise ConfigError("--set is an option of --task, and none was given")
    if task is not None and text_file:
        raise ConfigError("--text-file and --task exclude each other: either a text is read, or samples of a task")
    dense = _layers(dense_layers)
    chosen = None if not trigger else _trigger(trigger, rope)
    made = None if task is None else _task(task, set_ or [])
    texts = _read(text_file)
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no directory {output.absolute().parent}; make it first")

    from kvframe.calibration import calibrate as run_calibration
    from kvframe.cli.models import load

    loaded, tokenizer = load(model, dtype, quiet=json)
    if made is None:
        # No special tokens, and cut to length here: the tokenizer's own limit does not matter.
        encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        each = -(-tokens // len(texts))
        read = [ids[:each] for ids in encoded]
    else:
        read = _samples(made, tokenizer, context, seed, tokens)
    with progress("reading the text", quiet=json) as bar:
        found = run_calibration(
            loaded,
            read,
            retrieval_rate=rate,
            per=per,  # type: ignore[arg-type]  # checked above
            rope=rope,  # type: ignore[arg-type]
            trigger=chosen,
            dense_layers=dense,
            progress=bar.update,
        )
    if output is not None:
        found.save(output)
        errors.print(f"written to {output}", markup=False)
    if json:
        print_json(found.to_dict())
    else:
        _print(found)


def _trigger(assignments: list[str], rope: str) -> "Trigger":
    """LouisKV's, with these options."""
    from kvframe.options import parse_options
    from kvframe.registry import default_registry

    record = default_registry().stage("trigger", "semantic")
    options = parse_options(record.stage, assignments)
    for name, own in (("tau", "what is looked for"), ("rope", "set by --rope")):
        if name in options:
            raise ConfigError(f"--trigger {name}=...: {name} is {own}; leave it out")
    made: Any = record.make(**options, rope=rope)
    return made  # type: ignore[no-any-return]


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--dense-layers must be layer numbers separated by commas, got {text!r}") from None


def _read(files: list[Path] | None) -> list[str]:
    if not files:
        from kvframe.demo import prose_topics

        return ["\n\n".join(prose_topics())]
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text: {error}") from error


def _task(name: str, options: list[str]) -> "Task":
    from kvframe.eval.tasks import TASKS
    from kvframe.eval.tasks import task as make_task
    from kvframe.options import parse_options

    return make_task(name, **(parse_options(TASKS[name], options) if name in TASKS else {}))


def _samples(task: "Task", tokenizer: Any, context: int, seed: int, num_tokens: int) -> "list[Tensor]":
    """Texts [T] of a task's samples, `num_tokens` tokens together."""
    from kvframe.eval.text import haystack

    stack, found = haystack(), []
    for number in count(seed):
        found.append(task.make(tokenizer, context, number, stack).ids[0, :num_tokens])
        num_tokens -= len(found[-1])
        if num_tokens < 2:
            return found
    raise AssertionError


def _print(found: "Calibration") -> None:
    console = out()
    rates = [rate for rate in found.achieved if rate is not None]
    if isinstance(found.tau, tuple):
        console.print("layer     tau  fires at", markup=False)
        for layer, (tau, rate) in enumerate(zip(found.tau, found.achieved, strict=True)):
            shown = "no full KV cache" if rate is None else f"{rate:.1%}"
            console.print(f"{layer:>5}  {tau:.4f}  {shown}", markup=False)
    console.print(
        f"wanted {found.retrieval_rate:.1%}; on {found.num_samples} steps of the text {sum(rates) / len(rates):.1%}, "
        f"layers {min(rates):.1%} to {max(rates):.1%}",
        markup=False,
    )
    rope = "" if found.rope == "after" else f" --set rope={found.rope}"
    anchor = "" if found.anchor is None else f" --set anchor={_numbers(found.anchor)}"
    console.print(f"--set tau={_numbers(found.tau)}{anchor}{rope}", markup=False)


def _numbers(value: float | tuple[float, ...]) -> str:
    return ",".join(f"{number:.4f}" for number in (value if isinstance(value, tuple) else (value,)))
