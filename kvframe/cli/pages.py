"""`kvframe pages`: the documentation of policies, written from what they are."""

from pathlib import Path
from typing import Annotated

import typer

from kvframe.cli.console import errors, out
from kvframe.cli.listing import DISTRIBUTION


def pages(
    folder: Annotated[Path, typer.Argument(help="Where a page for each policy belongs.")],
    overview: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A page that has a place for the table of all.")
    ] = None,
    distribution: DISTRIBUTION = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 where a page is not up to date.")
    ] = False,
) -> None:
    """Write a Markdown page for each policy: paper, differences, composition, traits, options; and a table of all."""
    from kvframe.pages import files_of
    from kvframe.registry import default_registry

    files = files_of(default_registry(), folder, overview, distribution)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        for path in stale:
            errors.print(f"not up to date: {path}", markup=False, soft_wrap=True)
        raise typer.Exit(int(bool(stale)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    out().print(f"{len(stale)} of {len(files)} pages written", markup=False)
