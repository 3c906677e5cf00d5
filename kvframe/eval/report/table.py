"""The table of a study: a row for every variant, task, context and budget, its figures over the seeds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen

from kvframe.eval.figures import FIGURES, Spread, scalars, spread

if TYPE_CHECKING:
    from kvframe.eval.running import Results

_OF_RETRIEVAL = ("attended_total", "bytes_per_token", "retrieval_rate", "hit_rate")


@frozen(kw_only=True)
class Row:
    """One variant on one task at one budget."""

    label: str
    slot: str | None
    task: str
    context: int
    budget: int | None
    num_seeds: int
    figures: dict[str, Spread] = field(factory=dict)

    def mean(self, name: str) -> float | None:
        """The mean of a figure over the seeds; None where there is none."""
        return self.figures[name].mean if name in self.figures else None


def summarise(results: "Results") -> list[Row]:
    """The rows of a study in its own order, of the cells that have figures."""
    groups: dict[tuple[str, str, int, int | None], list[dict[str, float]]] = {}
    slots: dict[str, str | None] = {}
    for cell, outcome in results.done():
        assert outcome.figures is not None
        slots[cell.label] = cell.slot
        place = (cell.label, results.task_title(cell), cell.context, cell.budget)
        figures = scalars(outcome.figures)
        if cell.policy.dense_layers == "all":
            # Full attention: figures of retrieval say nothing about it.
            figures = {name: value for name, value in figures.items() if name not in _OF_RETRIEVAL}
        groups.setdefault(place, []).append(figures)
    rows = []
    for (label, task, context, budget), found in groups.items():
        names = dict.fromkeys(name for figures in found for name in figures)
        spreads = {name: spread(each[name] for each in found if name in each) for name in names}
        rows.append(
            Row(
                label=label,
                slot=slots[label],
                task=task,
                context=context,
                budget=budget,
                num_seeds=len(found),
                figures={name: value for name, value in spreads.items() if value is not None},
            )
        )
    return rows


def column_names(rows: Sequence[Row]) -> list[str]:
    """Every figure that a row has, those that readers look for first in front."""
    found = dict.fromkeys(name for row in rows for name in row.figures)
    return [*(name for name in FIGURES if name in found), *(name for name in found if name not in FIGURES)]
