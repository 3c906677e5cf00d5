"""The figures of a comparison as tables: policies down, budgets across."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from kvframe.eval.compare import Row

_TRIGGERS = {
    "every-step": "every policy selects anew at every step",
    "own": "every policy by its own trigger",
    "calibrated": "every policy by its own trigger, calibrated",
}


@frozen(kw_only=True)
class Grid:
    """One table."""

    title: str
    headings: list[str]
    lines: list[list[str]]


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """KL of every policy at every budget, a table for each task and trigger; with a trigger of its own, how often it
    selects stands in brackets."""
    for task, trigger, rate in dict.fromkeys((row.task, row.trigger, row.wanted_rate) for row in rows):
        own = [row for row in rows if (row.task, row.trigger, row.wanted_rate) == (task, trigger, rate)]
        budgets = list(dict.fromkeys(row.token_budget for row in own))
        cells = {(row.policy, row.token_budget): _cell(row) for row in own}
        lines = [
            [policy, *(cells.get((policy, budget), "") for budget in budgets)]
            for policy in dict.fromkeys(row.policy for row in own)
        ]
        yield Grid(
            title=f"KL to full attention, {task}, {_TRIGGERS[trigger]}" + ("" if rate is None else f" to {rate:.0%}"),
            headings=["policy", *(f"{budget} retrieved" for budget in budgets)],
            lines=lines,
        )


def _cell(row: Row) -> str:
    if row.kl is None:
        return "refused"
    shown = f"{row.kl:.3f}"
    return shown if row.trigger == "every-step" else f"{shown} ({row.retrieval_rate:.0%})"


def listed(facts: Mapping[str, Any]) -> str:
    """Names and values in a line."""
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def markdown_page(rows: Sequence[Row], found: dict[str, Any], elsewhere: Mapping[str, Sequence[Row]]) -> str:
    """A page of the docs: conditions, the tables, and every figure.

    found: the environment, the conditions, and the names of policies that are not installed.
    elsewhere: other environments, and the figures that were made there.
    """
    parts = ["# Policies at equal totals\n"]
    parts.append(
        "Made by `kvframe compare`. KL(full attention || policy) in nats, mean over the tokens of the answers; in "
        "brackets the share of steps and heads that selected anew.\n"
    )
    for name in ("conditions", "environment"):
        parts.append(f"{name.capitalize()}: {listed(found[name])}.\n")
    for environment, made in elsewhere.items():
        names = dict.fromkeys(f"{row.policy} ({row.task}, {row.trigger})" for row in made)
        parts.append(f"Another environment: {environment}. There: {', '.join(names)}.\n")
    if found["not_installed"]:
        parts.append(f"Not installed, and left out: {', '.join(found['not_installed'])}.\n")
    for grid in grids(rows):
        parts.append(f"## {grid.title}\n")
        parts.append(_table(grid.headings, grid.lines))
    parts.append("## Every figure\n")
    parts.append(_table(*_everything(rows)))
    refused = dict.fromkeys((row.policy, row.trigger, row.refused) for row in rows if row.refused)
    parts += [f"- `{policy}`, {_TRIGGERS[trigger]}: {reason}" for policy, trigger, reason in refused]
    return "\n".join(parts).rstrip() + "\n"


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "task": lambda row: row.task,
    "trigger": lambda row: row.trigger,
    "retrieved": lambda row: str(row.token_budget),
    "policy": lambda row: row.policy,
    "KL": lambda row: f"{row.kl:.4f}",
    "KL, all tokens": lambda row: f"{row.kl_all:.4f}",
    "top-1": lambda row: f"{row.top1_agreement:.1%}",
    "score": lambda row: f"{row.score:.0%}",
    "full": lambda row: f"{row.score_full:.0%}",
    "attended": lambda row: f"{row.attended_total:.0f}",
    "selects": lambda row: f"{row.retrieval_rate:.1%}",
    "wanted": lambda row: "" if row.wanted_rate is None else f"{row.wanted_rate:.0%}",
    "bytes/token": lambda row: f"{row.bytes_per_token:,.0f}",
}


_ORACLE = "oracle_topk"


def _everything(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """All figures, and behind them how much further from full attention each is than the oracle."""
    oracle = {(row.task, row.trigger, row.token_budget): row.kl for row in rows if row.policy == _ORACLE}
    lines = []
    for row in rows:
        if row.kl is not None:
            best = oracle.get((row.task, row.trigger, row.token_budget))
            over = "" if best is None else f"{row.kl - best:+.4f}"
            lines.append([*(form(row) for form in _COLUMNS.values()), over])
    return [*_COLUMNS, f"KL less {_ORACLE}"], lines


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in headings[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, marks, *lines)) + "\n"
