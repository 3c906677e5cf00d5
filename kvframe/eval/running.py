"""Runs what a study has left to do, and keeps what becomes of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from attrs import field, frozen

from kvframe.eval.engine import Engine, make_engine
from kvframe.eval.outcome import Outcome
from kvframe.eval.store import Store
from kvframe.eval.study import Cell, Study, task_to_dict


class Observer(Protocol):
    """Sees what happens while a study runs."""

    def started(self, cell: Cell) -> None:
        """A cell was handed to a worker."""

    def finished(self, cell: Cell, outcome: Outcome) -> None:
        """A cell came to its end, and that is committed."""


@frozen(kw_only=True, eq=False)
class Results:
    """A study and what became of its cells."""

    study: Study
    cells: tuple[Cell, ...]
    outcomes: dict[str, Outcome] = field(repr=False)
    """By key; a cell that was not run is not there."""

    def outcome(self, cell: Cell) -> Outcome | None:
        """What became of a cell; None if nothing yet."""
        return self.outcomes.get(cell.key)

    def done(self, kind: str = "score") -> list[tuple[Cell, Outcome]]:
        """The cells of a kind that have figures, in the study's order."""
        found = ((cell, self.outcomes.get(cell.key)) for cell in self.cells if cell.kind == kind)
        return [(cell, outcome) for cell, outcome in found if outcome is not None and not outcome.failed]

    def failed(self) -> list[tuple[Cell, Outcome]]:
        """The cells that were run and have none."""
        found = ((cell, self.outcomes.get(cell.key)) for cell in self.cells)
        return [(cell, outcome) for cell, outcome in found if outcome is not None and outcome.failed]

    def task_title(self, cell: Cell) -> str:
        """A task's name, with those of its options that tell it from others of that name in this study."""
        return task_titles(self.study.tasks)[self.study.tasks.index(cell.task)]

    def missing(self) -> list[Cell]:
        """The cells that were not run."""
        return [cell for cell in self.cells if cell.key not in self.outcomes]


def run_study(
    study: Study,
    results: str | Path,
    *,
    engine: Engine | None = None,
    observer: Observer | None = None,
    retry_failed: bool = False,
) -> Results:
    """Run every cell of a study that the results file does not have yet.

    Each cell is committed as it ends, so that a run that is broken off, in whatever way, goes on where it stopped.

    engine: where cells run; processes of this machine without.
    retry_failed: run those again that failed before.

    Raises ConfigError where model or haystack cannot be read, ResultsFileError where the file cannot be used.
    """
    cells = study.cells()
    with Store(results) as store:
        for cell, outcome in (engine or make_engine("local")).run(
            remaining(cells, store, retry_failed=retry_failed), _started(observer)
        ):
            store.save(cell, outcome)
            if observer is not None:
                observer.finished(cell, outcome)
        return Results(study=study, cells=cells, outcomes=store.outcomes())


def task_titles(tasks: Sequence[Any]) -> list[str]:
    """What to call each task: its name, and what differs where several have it."""
    options = [task_to_dict(task) for task in tasks]
    titles = []
    for own in options:
        others = [other for other in options if other["task"] == own["task"] and other != own]
        differing = [name for name in own if any(other.get(name) != own[name] for other in others)]
        titles.append(" ".join([own["task"], *(f"{name}={own[name]}" for name in differing)]))
    return titles


def remaining(cells: Sequence[Cell], store: Store, *, retry_failed: bool) -> list[Cell]:
    """The cells that a results file does not have."""
    over = store.done() if retry_failed else store.done() | store.failed()
    return [cell for cell in cells if cell.key not in over]


def _started(observer: Observer | None) -> "_Callback":
    return (lambda cell: None) if observer is None else observer.started


class _Callback(Protocol):
    def __call__(self, cell: Cell, /) -> None: ...
