"""Where commands write: results to standard output, progress and errors to standard error."""

import json
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from attrs import frozen
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvframe.errors import ConfigError

_WIDE = 240
"""Columns of a table in a file."""
errors = Console(stderr=True, highlight=False)


def out() -> Console:
    """A console on standard output; made at each call, because tests replace the stream."""
    return Console(highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """A table on standard output; where that is no terminal, as wide as it likes to be."""
    console = out()
    console.print(table, width=None if console.is_terminal else max(console.width, _WIDE))


def print_json(data: Any) -> None:
    """One JSON object, and nothing else, on standard output."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Raise ConfigError for a value that an option does not have."""
    if value not in choices:
        raise ConfigError(f"{option} must be one of {', '.join(choices)}; got {value!r}")


@frozen
class Bar:
    """A progress bar that is running, or none."""

    update: Callable[[int, int], None]
    """Takes the work done and the whole of it."""
    stop: Callable[[], None]
    """Clears it, before something else is written."""


@contextmanager
def progress(description: str, *, quiet: bool = False) -> Iterator[Bar]:
    """A bar on standard error, gone when it is done. None where that is no terminal, or with `quiet`."""
    if quiet or not errors.is_terminal:
        yield Bar(lambda done, total: None, lambda: None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as shown:
        task = shown.add_task(description, total=None)
        yield Bar(lambda done, total: shown.update(task, completed=done, total=total), shown.stop)


@contextmanager
def waiting(description: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on standard error for work that does not say how far it is; off as `progress` is."""
    if quiet or not errors.is_terminal:
        yield
        return
    with errors.status(description):
        yield
