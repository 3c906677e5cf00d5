"""What each change does to the base, as far as the figures say."""

from collections.abc import Sequence
from statistics import fmean

from attrs import frozen

from kvframe.eval.figures import figure
from kvframe.eval.report.table import Row

_DIFFERENCES = ("score",)
_RATIOS = ("kl", "attended_total", "bytes_per_token")
_LEVELS = ("retrieval_rate",)


@frozen
class Effect:
    """One figure of a variant beside that of the base."""

    text: str
    kind: str
    """`good`, `bad` or empty."""


@frozen
class Change:
    """A variant, and what it changes: score, KL, attended tokens, bytes moved, retrieval rate."""

    label: str
    cells: list[Effect]


def changes(rows: Sequence[Row], base: str) -> list[Change]:
    """Every other variant beside the base, over the tasks, contexts and budgets that both have.

    A variant without a budget stands beside the base at its largest one.
    """
    labels = [label for label in dict.fromkeys(row.label for row in rows) if label != base]
    found = []
    for label in labels:
        pairs = [(row, other) for row in rows if row.label == label and (other := _partner(rows, row, base))]
        if pairs:
            found.append(Change(label, [_effect(name, pairs) for name in (*_DIFFERENCES, *_RATIOS, *_LEVELS)]))
    return found


def _partner(rows: Sequence[Row], row: Row, base: str) -> Row | None:
    candidates = [other for other in rows if (other.label, other.task, other.context) == (base, row.task, row.context)]
    same = [other for other in candidates if other.budget == row.budget]
    return max(same or candidates, key=lambda other: other.budget or 0, default=None)


def _effect(name: str, pairs: Sequence[tuple[Row, Row]]) -> Effect:
    both = [(row.figures[name].mean, other.figures[name].mean) for row, other in pairs
            if name in row.figures and name in other.figures]  # fmt: skip
    if not both:
        return Effect("–", "")
    new, old = fmean(mine for mine, _ in both), fmean(theirs for _, theirs in both)
    if name in _LEVELS:
        return Effect(f"{figure(name).show(old)} → {figure(name).show(new)}", "")
    if name in _DIFFERENCES:
        return Effect(f"{(new - old) * 100:+.1f} points", _kind(name, new - old, 5e-4))
    if old == 0:
        return Effect("0" if new == 0 else f"0 → {figure(name).show(new)}", "")
    return Effect(f"× {new / old:.2f}", _kind(name, new / old - 1, 5e-3))


def _kind(name: str, change: float, least: float) -> str:
    better = figure(name).better
    if not better or abs(change) < least:
        return ""
    return "good" if (change > 0) == (better == "high") else "bad"
