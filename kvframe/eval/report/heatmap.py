"""Stage x task: what each change is worth on each task, at the largest budget."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvframe.eval.figures import figure
from kvframe.eval.report.drawing import INK, PAPER, SERIES, Picture, drawing, picture
from kvframe.eval.report.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GOOD, _BAD = SERIES[0], SERIES[1]
_CELL_WIDTH, _CELL_HEIGHT = 1.25, 0.34
_LABEL_WIDTH = 2.6


def heat_map(rows: Sequence[Row], base: str | None, name: str) -> Picture | None:
    """A figure of every variant on every task; coloured by how it differs from the base, or from the mean without one.

    None where nothing has the figure.
    """
    shown = largest_budgets([row for row in rows if row.mean(name) is not None])
    if not shown:
        return None
    labels = list(dict.fromkeys(row.label for row in shown))
    tasks = list(dict.fromkeys((row.task, row.context) for row in shown))
    values = {(row.label, (row.task, row.context)): row.figures[name].mean for row in shown}
    label = figure(name).label
    caption = f"{label[:1].upper()}{label[1:]} of every variant on every task, at the largest budget"
    width = _LABEL_WIDTH + _CELL_WIDTH * len(tasks)
    with drawing(width, 1.0 + _CELL_HEIGHT * len(labels)) as (made, axes):
        for column, task in enumerate(tasks):
            own = [values[label, task] for label in labels if (label, task) in values]
            middle = values.get((base, task)) if base is not None else None
            if middle is None:
                middle = sum(own) / len(own)
            reach = _reach([value - middle for value in own])
            for line, label in enumerate(labels):
                if (label, task) in values:
                    _cell(axes, column, line, values[label, task], middle, reach, name)
        axes.set_xlim(0, len(tasks))
        axes.set_ylim(len(labels), 0)
        axes.set_yticks([line + 0.5 for line in range(len(labels))], labels)
        axes.set_xticks([column + 0.5 for column in range(len(tasks))], [_head(task) for task in tasks])
        axes.xaxis.tick_top()
        axes.tick_params(length=0, colors=INK)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return picture(made, f"heat-map-{name}", caption)


def largest_budgets(rows: Sequence[Row]) -> list[Row]:
    """Of each variant, task and context, the row of the largest budget."""
    found: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        place = (row.label, row.task, row.context)
        if place not in found or (row.budget or 0) > (found[place].budget or 0):
            found[place] = row
    return list(found.values())


def _reach(differences: Sequence[float]) -> float:
    """The difference that has the full colour: the largest but one, so that an outlier does not take it for itself."""
    sizes = sorted((abs(difference) for difference in differences), reverse=True)
    return next((size for size in (*sizes[1:2], *sizes[:1]) if size > 0), 1.0)


def _head(task: tuple[str, int]) -> str:
    name, context = task
    return "\n".join([*name.split(" "), f"{context:,}"])


def _cell(axes: "Axes", column: int, line: int, value: float, middle: float, reach: float, name: str) -> None:
    from matplotlib.patches import Rectangle

    better = (value - middle) * (-1 if figure(name).better == "low" else 1)
    strength = min(1.0, abs(value - middle) / reach)
    axes.add_patch(
        Rectangle(
            (column, line), 1, 1, facecolor=_GOOD if better > 0 else _BAD, alpha=0.55 * strength, edgecolor=PAPER,
            linewidth=2,
        )
    )  # fmt: skip
    axes.text(column + 0.5, line + 0.5, figure(name).show(value), ha="center", va="center", fontsize=9)
