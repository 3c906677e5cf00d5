"""A live table of a running study on standard error; where that is no terminal, a line for every cell that ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, field
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvframe.cli.console import errors
from kvframe.eval.figures import figure, scalars, spread

if TYPE_CHECKING:
    from kvframe.eval.outcome import Outcome
    from kvframe.eval.running import Observer
    from kvframe.eval.study import Cell, Study

_SHOWN = ("score", "kl", "attended_total", "bytes_per_token", "retrieval_rate")


@define
class _Row:
    """What is known of one variant at one budget."""

    total: int = 0
    running: int = 0
    failed: int = 0
    figures: list[dict[str, float]] = field(factory=list)
    """Of the cells that are done and have a score."""
    num_done: int = 0

    @property
    def style(self) -> str:
        """How the variant's name is written."""
        if self.failed:
            return "red"
        if self.running:
            return "cyan"
        return "green" if self.num_done == self.total else "dim"


class _Lines:
    """A line for every cell that ends: for logs."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        if done:
            errors.print(f"{done} of {total} cells are done already", markup=False, soft_wrap=True)

    def started(self, cell: "Cell") -> None:
        """Nothing is said of it."""

    def finished(self, cell: "Cell", outcome: "Outcome") -> None:
        self._done += 1
        end = f"failed: {outcome.reason}" if outcome.failed else f"{outcome.seconds:.1f} s"
        errors.print(f"[{self._done}/{self._total}] {cell.title}: {end}", markup=False, soft_wrap=True)


class _Quiet:
    """Nothing at all: for machines."""

    def started(self, cell: "Cell") -> None:
        """Nothing."""

    def finished(self, cell: "Cell", outcome: "Outcome") -> None:
        """Nothing."""


class _LiveTable:
    """A row for every variant and budget, with its figures so far."""

    def __init__(self, title: str, cells: tuple["Cell", ...], outcomes: dict[str, "Outcome"]) -> None:
        self._title = title
        self._rows: dict[tuple[str, int | None], _Row] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=errors,
        )
        self._task = self._bar.add_task(title, total=len(cells))
        self.live = Live(console=errors, refresh_per_second=4, get_renderable=self._render, transient=True)
        for cell in cells:
            self._row(cell).total += 1
            if cell.key in outcomes:
                self._count(cell, outcomes[cell.key])
        self._bar.update(self._task, completed=sum(row.num_done + row.failed for row in self._rows.values()))

    def started(self, cell: "Cell") -> None:
        """One more is running."""
        self._row(cell).running += 1

    def finished(self, cell: "Cell", outcome: "Outcome") -> None:
        """One less is running."""
        self._row(cell).running -= 1
        self._count(cell, outcome)
        self._bar.advance(self._task)
        if outcome.failed:
            self.live.console.print(f"failed: {cell.title}: {outcome.reason}", markup=False)

    def _row(self, cell: "Cell") -> _Row:
        return self._rows.setdefault((cell.label, cell.budget), _Row())

    def _count(self, cell: "Cell", outcome: "Outcome") -> None:
        row = self._row(cell)
        if outcome.figures is None:
            row.failed += 1
            return
        row.num_done += 1
        if cell.kind == "score":
            row.figures.append(scalars(outcome.figures))

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        table.add_column("variant", no_wrap=True)
        for head in ("budget", "cells", *(figure(name).label for name in _SHOWN)):
            table.add_column(head, justify="right", no_wrap=True)
        room = max(4, errors.height - 5)
        hidden = len(self._rows) - room
        for (label, budget), row in list(self._rows.items())[: room if hidden > 0 else None]:
            means = [spread(each[name] for each in row.figures if name in each) for name in _SHOWN]
            table.add_row(
                Text(label, style=row.style),
                "-" if budget is None else str(budget),
                f"{row.num_done + row.failed}/{row.total}",
                *(figure(name).show(mean.mean if mean else None) for name, mean in zip(_SHOWN, means, strict=True)),
            )
        more = [Text(f"and {hidden} more", style="dim")] if hidden > 0 else []
        return Group(table, *more, self._bar)


@contextmanager
def watching(study: "Study", results: Path, *, quiet: bool) -> Iterator["Observer"]:
    """An observer that shows how far a study is; for machines, one that shows nothing."""
    from kvframe.eval.store import read_outcomes

    if quiet:
        yield _Quiet()
        return
    cells = study.cells()
    outcomes = read_outcomes(results) if results.is_file() and results.stat().st_size else {}
    if not errors.is_terminal:
        yield _Lines(len(cells), sum(cell.key in outcomes for cell in cells))
        return
    table = _LiveTable(study.title, cells, outcomes)
    with table.live:
        yield table
