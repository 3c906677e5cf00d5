"""The sweep's result for people: a table on the terminal, and a page of the documentation."""

from collections import Counter
from collections.abc import Sequence

import transformers
from rich.table import Table
from rich.text import Text

from kvframe.hf.families.outcome import Outcome, Status

_STYLES = {
    Status.EQUAL: "green",
    Status.REFUSED: "yellow",
    Status.NOT_BUILDABLE: "dim",
    Status.ERROR: "bold red",
    Status.DIFFERENT: "bold red",
}


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many families ended how."""
    counts = Counter(outcome.status for outcome in outcomes)
    return ", ".join(f"{counts[status]} {status}" for status in Status)


def terminal_table(outcomes: Sequence[Outcome]) -> Table:
    """One row per family, grouped by how it ended; the counts stand below, where a long table leaves the eye."""
    table = Table(caption=f"transformers {transformers.__version__}: {summary(outcomes)}", caption_justify="left")
    for name in ("model type", "outcome"):
        table.add_column(name, no_wrap=True)
    table.add_column("", overflow="fold")
    for outcome in in_order(outcomes):
        status = Text(outcome.status, style=_STYLES[outcome.status])
        table.add_row(outcome.model_type, status, Text(_detail(outcome)))
    return table


def markdown_page(outcomes: Sequence[Outcome]) -> str:
    """The page `docs/results/families.md`."""
    lines = [
        "# Model families",
        "",
        "Written by `kvframe families --markdown`. Every model type that transformers maps to a causal LM is built",
        "from a tiny random configuration in float32 and generates 12 tokens after a prompt of 48, in a batch of two",
        "with left padding. *Equal* means: with a budget beyond the context the logits are those of plain `generate`;",
        "with a budget of 16 tokens `offload` gives the logits of `dense`; the tokens agree in both; and at least one",
        "layer selected and recalled. The three right-hand columns are logit differences, as a share of the largest",
        "logit: full budget against plain, `offload` against `dense`, and tight budget against plain, which tells how",
        "much the budget mattered.",
        "",
        f"transformers {transformers.__version__}: {summary(outcomes)}, {len(outcomes)} in all.",
    ]
    for status in Status:
        chosen = [outcome for outcome in in_order(outcomes) if outcome.status is status]
        if chosen:
            lines += ["", f"## {status.capitalize()} ({len(chosen)})", "", *_markdown_rows(status, chosen)]
    return "\n".join(lines) + "\n"


def in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Grouped by status, then by name."""
    ranks = {status: rank for rank, status in enumerate(Status)}
    return sorted(outcomes, key=lambda outcome: (ranks[outcome.status], outcome.model_type))


def _markdown_rows(status: Status, outcomes: Sequence[Outcome]) -> list[str]:
    if status is Status.EQUAL:
        head = ["| model type | retrieval layers | selections | rows recalled | full | tight | effect |"]
        head += ["|---|---:|---:|---:|---:|---:|---:|"]
        return head + [f"| {outcome.model_type} | {' | '.join(_numbers(outcome))} |" for outcome in outcomes]
    rows = [f"| {outcome.model_type} | {_detail(outcome).replace('|', '&#124;')} |" for outcome in outcomes]
    return ["| model type | reason |", "|---|---|", *rows]


def _detail(outcome: Outcome) -> str:
    if outcome.full_error is None:
        return outcome.reason
    layers, selections, rows, full, tight, effect = _numbers(outcome)
    measured = f"{layers} layers, {selections} selections, {rows} rows; full {full}, tight {tight}, effect {effect}"
    return f"{outcome.reason}; {measured}" if outcome.reason else measured


def _numbers(outcome: Outcome) -> list[str]:
    errors = (outcome.full_error, outcome.tight_error, outcome.tight_effect)
    return [
        f"{outcome.retrieval_layers} of {outcome.layers}",
        f"{outcome.selections}",
        f"{outcome.rows_recalled}",
        *("" if error is None else f"{error:.1e}" for error in errors),
    ]
