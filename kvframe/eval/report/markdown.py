"""A study as a page of Markdown: conditions, figures with their intervals, what each change does, KL along the text."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from kvframe.eval.figures import Spread, figure, spread
from kvframe.eval.report.paired import paired
from kvframe.eval.report.table import Row, summarise
from kvframe.eval.running import Results, task_titles

_SHOWN = (
    "kl", "kl_all", "top1_agreement", "score", "score_full", "attended_total", "retrieval_rate", "bytes_per_token",
)  # fmt: skip
_COMPARED = ("kl", "kl_all", "score", "retrieval_rate", "bytes_per_token")
_PARTS = 8
"""Parts of a continuation that KL is meaned over."""


def markdown_page(results: Results) -> str:
    """The page.

    Intervals are 95 % confidence intervals of the mean over seeds, Student's t. Differences are taken seed by seed, so
    that what samples have in common drops out.
    """
    parts = [f"# {results.study.title}", _conditions(results)]
    rows = summarise(results)
    for task, context in dict.fromkeys((row.task, row.context) for row in rows):
        name = task if len(results.study.context) == 1 else f"{task}, {context:,} tokens"
        parts += [f"## {name}", _figures([row for row in rows if (row.task, row.context) == (task, context)])]
        if changes := _changes(results, task, context):
            parts += [f"### {name}: less the base, seed by seed", changes]
        if places := _along(results, task, context):
            parts += [f"### {name}: KL along the generated text", places]
    if failed := results.failed():
        parts += ["## Failed", "\n".join(f"- {cell.title}: {outcome.reason}" for cell, outcome in failed)]
    if missing := results.missing():
        parts += ["## Not run", "\n".join(f"- {cell.title}" for cell in missing)]
    policies = "\n\n".join(f"```text\n{variant.policy}\n```" for variant in results.study.variants())
    return "\n\n".join([*parts, "## Policies", policies]) + "\n"


def _conditions(results: Results) -> str:
    study = results.study
    facts = {
        "model": Path(study.model).name,
        "dtype": study.dtype,
        "tasks": ", ".join(task_titles(study.tasks)),
        "context": ", ".join(map(str, study.context)),
        "seeds": ", ".join(map(str, study.seeds)),
        "haystack": "Python's documentation" if study.haystack is None else Path(study.haystack).name,
    }
    lines = [
        "Made by `kvframe ablate --markdown`. " + "; ".join(f"{name} {value}" for name, value in facts.items()) + "."
    ]
    seen = dict.fromkeys(
        ", ".join(f"{name} {value}" for name, value in outcome.environment.items() if value is not None)
        for _, outcome in results.done()
    )
    lines += [f"Environment: {text}." for text in seen]
    lines.append("A mean ± half of its 95 % confidence interval over the seeds (Student's t).")
    return "\n\n".join(lines)


def _figures(rows: Sequence[Row]) -> str:
    names = [name for name in _SHOWN if any(name in row.figures for row in rows)]
    lines = [
        [row.label, "-" if row.budget is None else str(row.budget), str(row.num_seeds), *_cells(row, names)]
        for row in rows
    ]
    return table(["variant", "budget", "seeds", *(figure(name).label for name in names)], lines)


def _cells(row: Row, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        yield _show(name, row.figures.get(name))


def _changes(results: Results, task: str, context: int) -> str:
    """Variants down, figures across; empty without a base."""
    columns: dict[str, dict[tuple[str, int | None], Spread]] = {
        name: {
            (found.label, found.budget): found.difference
            for found in paired(results, name)
            if (found.task, found.context) == (task, context)
        }
        for name in _COMPARED
    }
    places = dict.fromkeys(place for column in columns.values() for place in column)
    names = [name for name in _COMPARED if columns[name]]
    lines = [
        [
            label,
            "-" if budget is None else str(budget),
            *(_show(name, columns[name].get((label, budget))) for name in names),
        ]
        for label, budget in places
    ]
    return table(["variant", "budget", *(figure(name).label for name in names)], lines) if lines else ""


def _along(results: Results, task: str, context: int) -> str:
    """KL in parts of equal length of the continuation, where every token's was kept."""
    curves: dict[tuple[str, int | None], list[list[float]]] = {}
    for cell, outcome in results.done():
        values = (outcome.figures or {}).get("kl_by_token")
        if values and len(values) >= _PARTS and (results.task_title(cell), cell.context) == (task, context):
            edges = [round(part * len(values) / _PARTS) for part in range(_PARTS + 1)]
            means = [fmean(values[start:stop]) for start, stop in pairwise(edges)]
            curves.setdefault((cell.label, cell.budget), []).append(means)
    heads = [f"{part}/{_PARTS}" for part in range(1, _PARTS + 1)]
    lines = [
        [
            label,
            "-" if budget is None else str(budget),
            *(_show("kl", spread(column)) for column in zip(*found, strict=True)),
        ]
        for (label, budget), found in curves.items()
    ]
    return table(["variant", "budget", *heads], lines) if lines else ""


def _show(name: str, found: Spread | None) -> str:
    if found is None:
        return "-"
    shown = figure(name)
    text = shown.show(found.mean)
    return text if found.reach is None else f"{text} ± {shown.show(found.reach).lstrip('+')}"


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown: the first column to the left, all others to the right."""
    marks = ["---", *("---:" for _ in headings[1:])]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in (headings, marks, *lines)
    )
