"""`kvframe compare`: how far each policy is from full attention, at equal totals."""

import json as json_
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from kvframe.cli.console import check_choice, errors, out, print_json
from kvframe.cli.evaluate_dataset import DATASET_SET, make_dataset
from kvframe.cli.generate import DTYPE
from kvframe.cli.listing import JSON
from kvframe.cli.models import DEVICES, DTYPES
from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from kvframe.eval.compare import Row
    from kvframe.eval.tasks import Task

EVAL_MODEL = Annotated[str, typer.Option(help="A directory with a model, its name on the hub, or smollm2.")]
TEXT = Annotated[
    Path | None, typer.Option(help="A text file as haystack; the standard library's documentation without.")
]
DEVICE = Annotated[str, typer.Option(help="auto (a GPU if there is one), cuda or cpu.")]
CONTEXT = Annotated[int, typer.Option(min=1, help="Tokens of a task's whole text, prompt and continuation.")]
SEED = Annotated[int, typer.Option(help="Draws the tasks.")]


def compare(
    model: EVAL_MODEL = "smollm2",
    context: CONTEXT = 2048,
    budgets: Annotated[str, typer.Option(help="Retrieved tokens of a head, several separated by commas.")] = (
        "128,256,512,1024"
    ),
    policies: Annotated[
        str | None, typer.Option(help="Names of policies, separated by commas; the known competitors without.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that every policy attends to.")] = 32,
    window: Annotated[int, typer.Option(min=1, help="Last tokens that every policy attends to.")] = 128,
    dense_layers: Annotated[str, typer.Option(help="Layers that every policy keeps dense.")] = "0,1",
    triggers: Annotated[
        str,
        typer.Option(
            help="every-step (all select anew at every step), own, calibrated (own, at the rate of a calibration), "
            "several separated by commas."
        ),
    ] = "every-step,own",
    calibration: Annotated[
        Path | None, typer.Option(help="What `kvframe calibrate --output` wrote, for the trigger calibrated.")
    ] = None,
    needles: Annotated[int, typer.Option(min=2, help="Needles in the prose, all of which are asked for.")] = 10,
    copy_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the passage that is copied.")] = 128,
    tasks: Annotated[
        str, typer.Option(help="needles, copy, or both; with --dataset, none of them as well.")
    ] = "needles,copy",
    dataset: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A file of samples, --seed being the number of one; may be repeated."),
    ] = None,
    dataset_set: DATASET_SET = None,
    text: TEXT = None,
    seed: SEED = 0,
    output: Annotated[
        Path | None, typer.Option(help="Append each figure there as a line of JSON, when it exists.")
    ] = None,
    figures: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Run nothing: the figures are those of such files, made side by side perhaps."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables there, as a page of the docs.")] = None,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    json: JSON = False,
) -> None:
    """KL to full attention of many policies on one model: needles in prose, and a verbatim copy."""
    from kvframe.calibration import Calibration
    from kvframe.eval.compare import POLICIES, Setting, TriggerMode, installed
    from kvframe.eval.compare import compare as run_compare
    from kvframe.eval.tasks import task
    from kvframe.eval.text import haystack

    check_choice("--dtype", dtype, DTYPES)
    check_choice("--device", device, DEVICES)
    setting = Setting(
        budgets=numbers("--budgets", budgets),
        sink_size=sinks,
        window_size=window,
        dense_layers=numbers("--dense-layers", dense_layers),
        triggers=tuple(choices("--triggers", triggers, get_args(TriggerMode))),  # type: ignore[arg-type]
        calibration=None if calibration is None else Calibration.load(calibration),
    )
    known = {"needles": task("niah_multiquery", num_needles=needles), "copy": task("copy", copy_tokens=copy_tokens)}
    wanted: list[Task] = [known[name] for name in choices("--tasks", tasks, tuple(known))]
    wanted += [make_dataset(path, dataset_set or []) for path in dataset or []]
    if not wanted and not figures:
        raise ConfigError("nothing to compare on: --tasks names none, and there is no --dataset")
    names, missing = installed(POLICIES) if policies is None else ([name.strip() for name in policies.split(",")], [])
    stack = haystack(text)
    for path in (output, markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no directory {path.absolute().parent}; make it first")

    from kvframe.bench.environment import describe
    from kvframe.cli.models import load

    if figures:
        rows, found, elsewhere = _read(figures)
        _show(rows, found, markdown, json, elsewhere)
        return
    loaded, tokenizer = load(model, dtype, device, quiet=json)
    conditions = {
        "model": Path(model).name, "dtype": str(loaded.dtype).removeprefix("torch."), "context": context,
        "seed": seed, "haystack": stack.name, "needles": needles, "copy_tokens": copy_tokens,
        "sink_size": sinks, "window_size": window, "dense_layers": list(setting.dense_layers),
    }  # fmt: skip
    if dataset:
        conditions["dataset"] = ", ".join(path.name for path in dataset)
    coming = run_compare(
        loaded, tokenizer, tasks=wanted, policies=names, setting=setting, context=context, seed=seed, haystack=stack
    )
    if not json:
        errors.print(", ".join(f"{key} {value}" for key, value in conditions.items()), markup=False, soft_wrap=True)
        if missing:
            errors.print(f"not installed, and left out: {', '.join(missing)}", markup=False, soft_wrap=True)
    found = {"environment": describe(loaded.device), "conditions": conditions, "not_installed": missing}
    rows = []
    for row in coming:
        rows.append(row)
        if output is not None:
            append_line(output, found | {"row": row.to_dict()})
        if not json:
            out().print(_line(row), markup=False)
    _show(rows, found, markdown, json)


def _read(paths: Sequence[Path]) -> "tuple[list[Row], dict[str, Any], dict[str, list[Row]]]":
    """The figures that `--output` has written, in the order of tables, their conditions, and what of them was made in
    another environment than the first, by that.

    Raises ConfigError for files that cannot be read, or that were made under different conditions.
    """
    from kvframe.eval.compare import Row, TriggerMode
    from kvframe.eval.compare_tables import listed

    rows: list[Row] = []
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                made = json_.loads(line)
                rows.append(Row(**made.pop("row")))
                found.append({name: made[name] for name in ("environment", "conditions", "not_installed")})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"cannot read figures from {path}: {reason}; expected a file that `kvframe compare --output` wrote"
            ) from error
    if not rows:
        raise ConfigError(f"{', '.join(map(str, paths))}: there are no figures")
    for conditions in (each["conditions"] for each in found):
        if conditions != found[0]["conditions"]:
            raise ConfigError(
                f"figures of different conditions cannot share a table: {conditions} and {found[0]['conditions']}"
            )
    policies = list(dict.fromkeys(row.policy for row in rows))
    tasks = list(dict.fromkeys(row.task for row in rows))
    made_in: dict[str, list[Row]] = {}
    for row, each in zip(rows, found, strict=True):
        made_in.setdefault(listed(each["environment"] | {"date": None}), []).append(row)
    elsewhere = dict(list(made_in.items())[1:])
    modes = get_args(TriggerMode)
    rows.sort(
        key=lambda row: (
            tasks.index(row.task), modes.index(row.trigger), row.wanted_rate or 0, policies.index(row.policy)
        )
    )  # fmt: skip
    return rows, found[0], elsewhere


def _show(
    rows: "Sequence[Row]",
    found: dict[str, Any],
    markdown: Path | None,
    json: bool,
    elsewhere: "dict[str, list[Row]] | None" = None,
) -> None:
    from kvframe.eval.compare_tables import markdown_page

    if markdown is not None:
        _write(markdown, markdown_page(rows, found, elsewhere or {}))
        errors.print(f"written to {markdown}", markup=False)
    if json:
        print_json(found | {"rows": [row.to_dict() for row in rows]})
        return
    for table in tables(rows):
        out().print()
        console = out()
        console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
        console.print(table)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas; raises ConfigError for anything else."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} must be whole numbers separated by commas, got {text!r}") from None


def choices(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Some of these words separated by commas; raises ConfigError for another one."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        check_choice(option, name, known)
    return found


def tables(rows: "Sequence[Row]") -> list[Table]:
    """KL of every policy at every budget, a table for each task and trigger."""
    from kvframe.eval.compare_tables import grids

    made = []
    for grid in grids(rows):
        table = Table(title=grid.title, title_justify="left", box=None, pad_edge=False)
        for place, heading in enumerate(grid.headings):
            table.add_column(heading, no_wrap=True, justify="right" if place else "left")
        for cells in grid.lines:
            table.add_row(*cells)
        made.append(table)
    return made


def _line(row: "Row") -> str:
    place = f"{row.task:<16} {row.trigger:<11} {row.token_budget:>5}  {row.policy:<14}"
    if row.kl is None:
        return f"{place} refused: {row.refused}"
    return (
        f"{place} KL {row.kl:.4f}  top-1 {row.top1_agreement:.1%}  score {row.score:.0%} (full {row.score_full:.0%})  "
        f"attended {row.attended_total:.0f}  selects {row.retrieval_rate:.1%}"
    )


def append_line(path: Path, line: dict[str, Any]) -> None:
    """A line of JSON at the end of a file; raises ConfigError where that cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json_.dumps(line) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; what it held before is still there") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
