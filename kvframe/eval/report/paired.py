"""Variants beside the base, seed by seed: what both have in common, the sample, drops out of the interval."""

from collections.abc import Iterator

from attrs import frozen

from kvframe.eval.figures import Spread, scalars, spread
from kvframe.eval.running import Results


@frozen(kw_only=True)
class Paired:
    """What a variant has more of a figure than the base, on the same samples."""

    label: str
    task: str
    context: int
    budget: int | None
    figure: str
    difference: Spread
    """Over the seeds that both have."""


def paired(results: Results, figure: str) -> Iterator[Paired]:
    """Every other variant beside the base, in the study's order, where both have the figure for a seed.

    A variant without a budget stands beside the base at its largest one.
    """
    base = None if results.study.base is None else results.study.base.name
    values: dict[tuple[str, str, int, int | None], dict[int, float]] = {}
    for cell, outcome in results.done():
        found = scalars(outcome.figures or {}).get(figure)
        if found is not None:
            place = (cell.label, results.task_title(cell), cell.context, cell.budget)
            values.setdefault(place, {})[cell.seed] = found
    for (label, task, context, budget), own in values.items():
        budgets = [other[3] for other in values if other[:3] == (base, task, context)]
        if label == base or not budgets:
            continue
        beside = budget if budget in budgets else max(budgets, key=lambda other: other or 0)
        of_base = values[base, task, context, beside]  # type: ignore[index]  # there are budgets, so there is a base
        difference = spread(own[seed] - of_base[seed] for seed in own if seed in of_base)
        if difference is not None:
            yield Paired(label=label, task=task, context=context, budget=budget, figure=figure, difference=difference)
