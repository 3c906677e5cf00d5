"""Figures by name: what a reader calls them, and how they are written."""

from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen


@frozen
class Figure:
    """How one figure is shown."""

    label: str
    spec: str
    """Of `format`; empty for a size in bytes."""
    better: str = ""
    """`high` or `low`; empty where neither is better."""

    def show(self, value: Any) -> str:
        """The value as text; a dash for none."""
        if value is None:
            return "-"
        if isinstance(value, bool | str):
            return str(value)
        return format(value, self.spec) if self.spec else size(value)


FIGURES: dict[str, Figure] = {
    "score": Figure("score", ".1%", "high"),
    "score_full": Figure("score, full attention", ".1%"),
    "kl": Figure("KL", ".4f", "low"),
    "kl_all": Figure("KL, all tokens", ".4f", "low"),
    "top1_agreement": Figure("top-1 agreement", ".1%", "high"),
    "generated_score": Figure("score, free generation", ".1%", "high"),
    "nll_difference": Figure("NLL difference", "+.4f", "low"),
    "captured_mass": Figure("captured mass", ".1%", "high"),
    "oracle_recall": Figure("oracle recall", ".1%", "high"),
    "attended_total": Figure("attended tokens", ",.0f"),
    "bytes_per_token": Figure("moved a token", ""),
    "retrieval_rate": Figure("retrieval rate", ".1%"),
    "hit_rate": Figure("hit rate", ".1%", "high"),
    "kv_footprint": Figure("KV footprint", ".1%"),
    "kv_footprint_gpu": Figure("KV footprint, GPU", ".1%", "low"),
    "kv_active": Figure("KV read", ".1%"),
    "kv_peak_gpu": Figure("KV peak, GPU", ".1%", "low"),
    "tokens_per_second": Figure("tokens/s", ".1f", "high"),
    "prefill_seconds": Figure("prefill s", ".2f", "low"),
    "peak_memory": Figure("peak memory", ""),
    "num_answers": Figure("answers", ",.0f"),
}
"""In the order of a table's columns. A figure that is not here is shown behind them, by its own name."""


def figure(name: str) -> Figure:
    """How the figure of this name is shown."""
    return FIGURES.get(name) or Figure(name.replace("_", " "), ".4g")


def size(num_bytes: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"


def scalars(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are one number, those that readers look for first in front."""
    found = {name: value for name, value in figures.items() if _is_number(value)}
    known = [name for name in FIGURES if name in found]
    return {name: found[name] for name in [*known, *(name for name in found if name not in FIGURES)]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


@frozen
class Spread:
    """A figure over several seeds."""

    mean: float
    reach: float | None
    """Half of the 95 % confidence interval of the mean; None for a single value."""
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and confidence interval; None for no value."""
    from kvframe.eval.statistics import mean_interval

    found = list(values)
    if len(found) < 2:
        return Spread(found[0], None, 1) if found else None
    interval = mean_interval(found)
    return Spread(interval.mean, interval.high - interval.mean, len(found))
