"""`kvframe matrix`: which stage goes with which policy."""

from pathlib import Path
from typing import Annotated

import typer

from kvframe.cli.console import out, print_json, progress
from kvframe.cli.listing import DISTRIBUTION, JSON


def matrix(
    base: Annotated[str, typer.Option(help="The policy whose slots are changed.")] = "louiskv",
    distribution: DISTRIBUTION = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the result there, as a page of the docs.")] = None,
    json: JSON = False,
) -> None:
    """Swap every stage into a policy, and its stages into every other: each runs, or is refused with the reason."""
    from kvframe.matrix import Verdict, outcomes, swaps
    from kvframe.matrix.tables import markdown_page, summary, terminal_table
    from kvframe.registry import default_registry

    registry = default_registry()
    made = swaps(registry, base, distribution)
    found = []
    with progress("swaps") as bar:
        total = len(list(made))
        for outcome in outcomes(made, registry):
            found.append(outcome)
            bar.update(len(found), total)
    if json:
        rows = [
            {
                "policy": outcome.swap.policy.name,
                "slot": outcome.swap.slot,
                "stage": outcome.swap.label,
                "used_by": list(outcome.swap.used_by),
                "outcome": str(outcome.verdict),
                "reason": outcome.reason or None,
                "selections": outcome.selections,
                "rows_recalled": outcome.rows_recalled,
            }
            for outcome in found
        ]
        print_json({"base": base, "summary": summary(found), "swaps": rows})
    else:
        out().print(terminal_table(found))
    if markdown is not None:
        markdown.write_text(markdown_page(made, found), encoding="utf-8")
    raise typer.Exit(int(any(outcome.verdict in (Verdict.ERROR, Verdict.DIFFERENT) for outcome in found)))
