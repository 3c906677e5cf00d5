"""`kvframe ablate`: a study from a Python file, run to its end however often it is broken off."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer
from rich.table import Table

from kvframe.cli.console import check_choice, errors, out, print_json, print_table
from kvframe.cli.listing import JSON
from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from kvframe.eval.estimate import Estimate
    from kvframe.eval.running import Results
    from kvframe.eval.study import Cell, Study

_SHOWN = ("score", "score_full", "kl", "captured_mass", "attended_total", "bytes_per_token", "retrieval_rate")
"""What the table on the terminal has; the report has every figure."""
_BROKEN_OFF = 130
"""The exit code of a program that Ctrl-C ended."""


def ablate(
    study: Annotated[Path, typer.Argument(help="A Python file that defines `study = kvframe.eval.Study(...)`.")],
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where results are kept; beside the study without.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the report goes; beside the study without.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures there as well, as a page of Markdown.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells with predicted memory and time, and run none.")
    ] = False,
    engine: Annotated[str, typer.Option(help="local (processes), inline (this process) or ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells at the same time; without, as the engine likes.")
    ] = None,
    haystack: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text file to hide things in, instead of the study's own.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    json: JSON = False,
) -> None:
    """Run a study: whatever is done is kept, and the same command goes on where it stopped.

    Exit code 1 if a cell failed.
    """
    from kvframe.eval.engine import ENGINES

    check_choice("--engine", engine, ENGINES)
    results = results or study.with_suffix(".results.sqlite")
    report = report or study.with_suffix(".report")
    if not report.absolute().parent.is_dir():
        raise ConfigError(f"--report {report}: there is no directory {report.absolute().parent}; make it first")
    if markdown is not None and not markdown.absolute().parent.is_dir():
        raise ConfigError(f"--markdown {markdown}: there is no directory {markdown.absolute().parent}; make it first")
    # Workers inherit it, and read it when they first load torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from kvframe.eval.studyfile import StudyFile

    file = StudyFile.read(study)
    made = file.study()
    if haystack is not None:
        made = attrs.evolve(made, haystack=haystack)
    if dry_run:
        _list_cells(made, results, json)
        return

    from kvframe.cli.ablate_progress import watching
    from kvframe.eval.engine import make_engine
    from kvframe.eval.estimate import check_context
    from kvframe.eval.report import check_report_packages, write_report
    from kvframe.eval.running import run_study

    check_report_packages()
    check_context(made)
    where = make_engine(engine, workers, file)
    with watching(made, results, quiet=json) as observer:
        try:
            found = run_study(made, results, engine=where, observer=observer, retry_failed=retry_failed)
        except KeyboardInterrupt:
            errors.print(f"\nbroken off; what is done is in {results}, the same command goes on from there")
            raise typer.Exit(_BROKEN_OFF) from None
    page = write_report(found, report)
    if markdown is not None:
        _write_markdown(found, markdown)
    if json:
        print_json(_summary(found) | {"report": str(page), "results": str(results)})
    else:
        _show(found)
        out().print(f"report: {page}", markup=False)
    if found.failed():
        raise typer.Exit(1)


def _write_markdown(found: "Results", path: Path) -> None:
    from kvframe.eval.report.markdown import markdown_page

    try:
        path.write_text(markdown_page(found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _summary(found: "Results") -> dict[str, Any]:
    """Every cell with its figures, as plain data."""
    rows = []
    for cell in found.cells:
        outcome = found.outcome(cell)
        row = {"key": cell.key} | cell.to_dict()
        if outcome is not None:
            row |= {"figures": outcome.figures, "error": outcome.error, "seconds": outcome.seconds}
        rows.append(row)
    return {"title": found.study.title, "cells": rows}


def _show(found: "Results") -> None:
    """The table of the study on standard output."""
    from kvframe.eval.figures import figure
    from kvframe.eval.report.table import summarise

    rows = summarise(found)
    names = [name for name in _SHOWN if any(name in row.figures for row in rows)]
    table = Table(box=None, pad_edge=False)
    for head in ("variant", "task"):
        table.add_column(head)
    for name in ("budget", *(figure(name).label for name in names)):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [figure(name).show(row.figures[name].mean if name in row.figures else None) for name in names]
        table.add_row(row.label, row.task, "-" if row.budget is None else str(row.budget), *cells)
    print_table(table)
    for cell, outcome in found.failed():
        out().print(f"failed: {cell.title}: {outcome.reason}", markup=False)


def _list_cells(made: "Study", results: Path, json: bool) -> None:
    """What there is to do, and what it will take."""
    from kvframe.eval.estimate import Estimate, estimates
    from kvframe.eval.store import read_outcomes

    cells = made.cells()
    outcomes = read_outcomes(results) if results.is_file() else {}
    predicted = estimates(made, cells)
    if json:
        rows = []
        for cell in cells:
            found = predicted[cell.key]
            rows.append(
                {"key": cell.key, "done": cell.key in outcomes}
                | cell.to_dict()
                | {"predicted": attrs.asdict(found) if isinstance(found, Estimate) else found}
            )
        print_json({"title": made.title, "cells": rows})
        return
    print_table(_dry_table(cells, predicted, outcomes))
    left = [cell for cell in cells if cell.key not in outcomes]
    total = sum(found.seconds for cell in left if isinstance(found := predicted[cell.key], Estimate))
    out().print(
        f"\n{len(cells)} cells, {len(cells) - len(left)} of them done; the others take {_time(total)} of one worker, "
        "as the planner predicts from arithmetic and memory traffic; Python comes on top",
        markup=False,
    )


def _dry_table(cells: Iterable["Cell"], predicted: dict[str, "Estimate | str"], outcomes: Collection[str]) -> Table:
    """A row for the cells that differ in their seed only."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        task = cell.task.name + (" (timeline)" if cell.kind == "watch" else "")
        budget = "-" if cell.budget is None else str(cell.budget)
        groups.setdefault((cell.label, task, budget, str(cell.context)), []).append(cell)
    table = Table(box=None, pad_edge=False)
    for head in ("variant", "task"):
        table.add_column(head)
    for head in ("budget", "context", "cells", "done", "device GiB", "host GiB", "s each"):
        table.add_column(head, justify="right")
    for place, own in groups.items():
        done = sum(cell.key in outcomes for cell in own)
        table.add_row(*place, str(len(own)), str(done), *_predicted(predicted[own[0].key]))
    return table


def _predicted(found: "Estimate | str") -> tuple[str, str, str]:
    if isinstance(found, str):
        return "", "", found
    sizes = (f"{found.device_bytes / 2**30:.2f}", f"{found.host_bytes / 2**30:.2f}")
    return (*sizes, f"{found.seconds:.1f}" + ("" if found.fits else " (does not fit)"))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
