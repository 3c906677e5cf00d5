"""The command `kvframe families`."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path

import attrs
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvframe.errors import UnknownNameError
from kvframe.hf.families.configs import model_types
from kvframe.hf.families.outcome import Outcome, Status
from kvframe.hf.families.sweep import outcomes
from kvframe.hf.families.tables import in_order, markdown_page, terminal_table
from kvframe.suggest import hint


def run_sweep(
    types: Sequence[str] | None = None,
    json: bool = False,
    jobs: int = 1,
    timeout: float = 120.0,
    markdown: Path | None = None,
) -> int:
    """Compare model families with plain generate and print what became of each.

    Args:
        types: Model types to compare; all that transformers maps to a causal LM if None or empty.
        json: Print JSON instead of a table.
        jobs: How many families to compare at the same time, one thread each.
        timeout: Seconds that one family may take.
        markdown: A file to write the result to, as a page of the documentation.

    Returns:
        The exit code: 1 if a family was different or failed, else 0.
    """
    known = model_types()
    for name in types or ():
        if name not in known:
            raise UnknownNameError(f"transformers has no causal LM of model type {name!r}{hint(name, known, 'types')}")
    result = _with_progress(list(types or known), jobs, timeout)
    if json:
        found = [attrs.asdict(outcome) for outcome in in_order(result)]
        print(json_module.dumps({"transformers": transformers.__version__, "families": found}, indent=2))
    else:
        Console().print(terminal_table(result))
    if markdown is not None:
        markdown.write_text(markdown_page(result), encoding="utf-8")
    return int(any(outcome.status in (Status.DIFFERENT, Status.ERROR) for outcome in result))


def _with_progress(types: list[str], jobs: int, timeout: float) -> list[Outcome]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[Outcome] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("families", total=len(types))
        for outcome in outcomes(types, jobs, timeout):
            found.append(outcome)
            progress.update(task, advance=1, description=outcome.model_type)
    return found
