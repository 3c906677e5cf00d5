"""The page of a study: one file that needs no other."""

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from attrs import frozen

from kvframe.eval.figures import figure
from kvframe.eval.report.charts import against_costs
from kvframe.eval.report.drawing import Line, Picture, lines_of
from kvframe.eval.report.effects import changes
from kvframe.eval.report.heatmap import heat_map, largest_budgets
from kvframe.eval.report.layers import layer_pictures
from kvframe.eval.report.table import Row, column_names, summarise
from kvframe.eval.report.timeline import Timeline, timeline
from kvframe.eval.running import Results

_MARKS = {
    "o": '<circle cx="14" cy="6" r="4" {}/>',
    "s": '<rect x="10.5" y="2.5" width="7" height="7" {}/>',
    "^": '<path d="M14 1.5 18.5 10h-9z" {}/>',
    "D": '<path d="M14 1l5 5-5 5-5-5z" {}/>',
    "v": '<path d="M14 10.5 9.5 2h9z" {}/>',
    "P": '<path d="M12.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z" {}/>',
    "X": '<path d="M11 1.5 14 4l3-2.5L18.5 3 16 6l2.5 3L17 10.5 14 8l-3 2.5L9.5 9 12 6 9.5 3z" {}/>',
    "*": '<path d="M14 .5l1.6 3.6 3.9.4-2.9 2.6.8 3.9L14 9l-3.4 2 .8-3.9-2.9-2.6 3.9-.4z" {}/>',
}
"""matplotlib's markers, for the legend."""


_TILES = {"bytes_per_token": "traffic, a token"}
"""What a tile calls a figure, where that is not its label."""


@frozen(kw_only=True)
class _Group:
    """Charts that belong together."""

    name: str
    folded: bool
    pictures: list[Picture]


def render(results: Results, written: Sequence[Path]) -> tuple[str, list[Picture]]:
    """The page as text, and every picture in it.

    written: files beside it that it names.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    study = results.study
    rows = summarise(results)
    labels = [variant.label for variant in study.variants()]
    lines = lines_of(labels)
    base = None if study.base is None else study.base.name
    watched = {cell.label: outcome.figures or {} for cell, outcome in results.done("watch")}
    charts = against_costs(rows, lines)
    heat_maps = [drawn for name in ("score", "kl") if (drawn := heat_map(rows, base, name)) is not None]
    layers = layer_pictures(watched, lines)
    timelines = _timelines(labels, watched)
    template = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    effects = [] if base is None else changes(rows, base)
    failures = [
        {"title": cell.title, "reason": outcome.reason, "traceback": outcome.error}
        for cell, outcome in results.failed()
    ]
    sections = {
        "effects": ("Changes", effects),
        "charts": ("Costs", charts),
        "stages": ("Stage × task", heat_maps),
        "layers": ("Layers", layers),
        "timeline": ("Timeline", timelines),
        "table": ("Figures", True),
        "failures": ("Failures", failures),
        "environment": ("Made with", True),
    }
    text = template.from_string(_read("page.html")).render(
        title=study.title,
        style=Markup(_read("style.css")),
        script=Markup(_read("script.js")),
        facts=_facts(results),
        sections=[(anchor, name) for anchor, (name, content) in sections.items() if content],
        tiles=_tiles([row for row in rows if row.mean("attended_total") is not None]),
        base=base,
        effects=effects,
        lines=[_legend_entry(lines[label], Markup) for label in labels],
        charts=_groups(charts),
        heat_maps=heat_maps,
        layers=layers,
        watched_tokens=max((len(found["tokens"]) for found in watched.values()), default=0),
        timelines=timelines,
        **_table(rows),
        files=[path.name for path in written],
        failures=failures,
        environment=_environment(results),
        policies=[str(variant.policy) for variant in study.variants()],
    )
    return text, [*charts, *heat_maps, *layers, *(each.drawn for each in timelines)]


def _read(name: str) -> str:
    return (files("kvframe.eval.report") / "template" / name).read_text(encoding="utf-8")


def _facts(results: Results) -> list[tuple[str, str]]:
    study = results.study
    scored = [cell for cell in results.cells if cell.kind == "score"]
    done = len(results.done())
    return [
        ("model", Path(study.model).name),
        ("tasks", str(len(study.tasks))),
        ("context", ", ".join(f"{context:,}" for context in study.context)),
        ("budgets", ", ".join(f"{budget:,}" for budget in study.token_budget) or "the policies' own"),
        ("seeds", str(len(study.seeds))),
        ("haystack", "Python's documentation" if study.haystack is None else Path(study.haystack).name),
        ("cells", f"{done} of {len(scored)}"),
    ]


def _tiles(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The best of each figure, over all tasks at the largest budget."""
    tiles = []
    for name, better in (("score", max), ("kl", min), ("bytes_per_token", min), ("retrieval_rate", min)):
        means: dict[str, list[float]] = {}
        for row in largest_budgets([row for row in rows if row.mean(name) is not None]):
            means.setdefault(row.label, []).append(row.figures[name].mean)
        averages = {label: sum(values) / len(values) for label, values in means.items()}
        if name not in ("score", "kl"):  # least of what there is: a policy that moves nothing does not compete
            averages = {label: value for label, value in averages.items() if value}
        if averages:
            best = better(averages.values())
            winners = [label for label, value in averages.items() if value == best]
            note = winners[0] if len(winners) == 1 else f"{winners[0]} and {len(winners) - 1} more"
            word = "highest" if better is max else "lowest"
            tiles.append(
                {
                    "name": f"{word} {_TILES.get(name, figure(name).label)}",
                    "value": figure(name).show(best),
                    "note": note,
                }
            )
    return tiles


def _legend_entry(line: Line, markup: Any) -> dict[str, Any]:
    from kvframe.eval.report.drawing import SERIES

    color = f"var(--series-{SERIES.index(line.color)})"
    mark = markup(_MARKS[line.marker].format(f'style="fill: {color}"'))
    return {"label": line.label, "color": color, "style": line.style, "mark": mark}


def _groups(charts: list[Picture]) -> list[_Group]:
    """Charts of one task, or of all, together; those of single tasks are folded where there are several."""
    by_place: dict[str, list[Picture]] = {}
    for chart in charts:
        by_place.setdefault(chart.caption.partition(", ")[2], []).append(chart)
    return [
        _Group(name=name, folded=number > 0, pictures=pictures)
        for number, (name, pictures) in enumerate(by_place.items())
    ]


def _timelines(labels: Sequence[str], watched: dict[str, dict[str, Any]]) -> list[Timeline]:
    found = [timeline(label, str(number), watched[label]) for number, label in enumerate(labels) if label in watched]
    return [each for each in found if each is not None]


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    names = column_names(rows)
    return {
        "columns": [{"name": name, "label": figure(name).label} for name in names],
        "rows": [
            {
                "label": row.label,
                "task": row.task,
                "context": row.context,
                "budget": row.budget,
                "cells": [_table_cell(row, name) for name in names],
            }
            for row in rows
        ],
    }


def _table_cell(row: Row, name: str) -> dict[str, Any]:
    found = row.figures.get(name)
    if found is None:
        return {"name": name, "value": None, "text": "–", "reach": None}
    shown = figure(name)
    reach = shown.show(found.reach).lstrip("+") if found.reach else None
    return {"name": name, "value": repr(found.mean), "text": shown.show(found.mean), "reach": reach}


def _environment(results: Results) -> list[tuple[str, str]]:
    """What the cells were made with; where they differ, how many with what."""
    seen: dict[str, Counter[str]] = {}
    for outcome in results.outcomes.values():
        for name, value in outcome.environment.items():
            if value is not None:
                seen.setdefault(name, Counter())[str(value)] += 1
    found = []
    for name, values in seen.items():
        several = len(values) > 1
        text = "; ".join(f"{value} ({count} cells)" if several else value for value, count in values.items())
        found.append((name, text))
    keys = {cell.key for cell in results.cells}
    seconds = sum(outcome.seconds for key, outcome in results.outcomes.items() if key in keys)
    return [*found, ("time", f"{seconds:,.0f} s of one worker")]
