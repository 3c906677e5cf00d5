"""Figures against what they cost: a line for every variant, a point for every budget."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import frozen

from kvframe.eval.figures import figure, spread
from kvframe.eval.report.drawing import MUTED, Line, Picture, bytes_of, drawing, percent, picture, whole_numbers
from kvframe.eval.report.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 4.5, 3.2
_MOST_TICKS = 5
_COSTS = {"attended_total": "attended tokens", "bytes_per_token": "bytes moved a token"}
_GOALS = ("score", "kl")


@frozen(kw_only=True)
class Point:
    """One variant at one budget."""

    x: float
    y: float
    low: float
    high: float


def against_costs(rows: Sequence[Row], lines: Mapping[str, Line]) -> list[Picture]:
    """Score and KL against attended tokens and against bytes moved, over all tasks together and for every task."""
    titles = list(dict.fromkeys(_place(row) for row in rows))
    found = []
    for title in [None, *titles] if len(titles) > 1 else titles:
        own = [row for row in rows if title is None or _place(row) == title]
        for goal in _GOALS:
            for cost in _COSTS:
                drawn = _draw(own, goal, cost, title, lines)
                if drawn is not None:
                    found.append(drawn)
    return found


def _place(row: Row) -> str:
    return f"{row.task}, {row.context:,} tokens"


def _draw(rows: Sequence[Row], goal: str, cost: str, title: str | None, lines: Mapping[str, Line]) -> Picture | None:
    """One chart; None where there is nothing to draw."""
    series = {label: _points(rows, label, goal, cost) for label in lines}
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    where = "mean over tasks" if title is None else title
    caption = f"{figure(goal).label} against {_COSTS[cost]}, {where}"
    with drawing(_WIDTH, _HEIGHT) as (made, axes):
        for label, points in series.items():
            _line(axes, points, lines[label])
        full = [value for row in rows if (value := row.mean("score_full")) is not None]
        if goal == "score" and full:
            level = sum(full) / len(full)
            axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                "full attention", (1, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
                textcoords="offset points", ha="right", color=MUTED, fontsize=8,
            )  # fmt: skip
        axes.set_title(f"{_sentence(figure(goal).label)} against {_COSTS[cost]}")
        axes.set_xlabel(_COSTS[cost])
        axes.set_ylabel(figure(goal).label)
        _scale(axes, goal, cost, [point for points in series.values() for point in points])
        return picture(made, _file_name(goal, cost, title), caption)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _file_name(goal: str, cost: str, title: str | None) -> str:
    end = "" if title is None else "-" + "".join(char if char.isalnum() else "-" for char in title).strip("-")
    while "--" in end:
        end = end.replace("--", "-")
    return f"{goal}-against-{'attended' if cost == 'attended_total' else 'bytes'}{end}"


def _points(rows: Iterable[Row], label: str, goal: str, cost: str) -> list[Point]:
    """The variant's points by budget; over several tasks their mean, where every task has the figure."""
    by_budget: dict[int | None, list[Row]] = {}
    for row in rows:
        if row.label == label and row.mean(goal) is not None and row.mean(cost) is not None:
            by_budget.setdefault(row.budget, []).append(row)
    points = []
    for own in by_budget.values():
        x, y = spread(row.figures[cost].mean for row in own), spread(row.figures[goal].mean for row in own)
        assert x is not None and y is not None
        errors = [row.figures[goal].reach or 0.0 for row in own]
        error = math.sqrt(sum(each**2 for each in errors)) / len(errors)
        points.append(Point(x=x.mean, y=y.mean, low=y.mean - error, high=y.mean + error))
    return sorted(points, key=lambda point: point.x)


def _line(axes: "Axes", points: Sequence[Point], line: Line) -> None:
    x = [point.x for point in points]
    axes.plot(
        x, [point.y for point in points], color=line.color, marker=line.marker, linestyle=line.style,
        markeredgecolor="none", zorder=3,
    )  # fmt: skip
    for point in points:
        if point.high > point.low:
            axes.plot([point.x] * 2, [point.low, point.high], color=line.color, linewidth=1, alpha=0.5, zorder=2)


def _scale(axes: "Axes", goal: str, cost: str, points: Sequence[Point]) -> None:
    if goal == "score":
        # Intervals of two or three seeds reach far beyond what a score can be; they are cut, not the points.
        axes.set_ylim(-0.03, 1.05)
        percent(axes.yaxis)
    else:
        positive = [point.y for point in points if point.y > 0]
        highest = max(point.y for point in points)
        if positive and highest > 20 * min(positive):
            axes.set_yscale("symlog", linthresh=min(positive))
            axes.set_ylim(0 if len(positive) < len(points) else min(positive) / 2, 2 * highest)
        else:
            axes.set_ylim(-0.05 * highest, 1.15 * highest or 1.0)
    if cost == "attended_total":
        whole_numbers(axes.xaxis)
        return
    moved = [point.x for point in points if point.x > 0]
    if moved:
        axes.set_xscale("symlog", linthresh=max(1.0, min(moved) / 2), base=4)
        axes.set_xlim(left=-min(moved) / 20)
        low, high = math.floor(math.log(min(moved), 4)), math.ceil(math.log(max(moved), 4))
        step = max(1, (high - low + 1) // _MOST_TICKS)
        axes.set_xticks([0, *(4**power for power in range(low + 1, high + 1, step))])
    bytes_of(axes)
