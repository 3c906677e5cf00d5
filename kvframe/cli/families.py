"""`kvframe families`: every causal language model of transformers, tiny, compared with plain generate."""

from pathlib import Path
from typing import Annotated

import typer

from kvframe.cli.listing import JSON


def families(
    types: Annotated[list[str] | None, typer.Argument(help="Model types; all if none is given.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Families compared at the same time.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that one family may take.")] = 120.0,
    markdown: Annotated[Path | None, typer.Option(help="Write the result there, as a page of the docs.")] = None,
    json: JSON = False,
) -> None:
    """Compare model families, built tiny and random: full budget with plain generate, tight budget with dense."""
    from kvframe.hf.families import run_sweep

    raise typer.Exit(run_sweep(types, json=json, jobs=jobs, timeout=timeout, markdown=markdown))
