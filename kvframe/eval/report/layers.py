"""What happens layer by layer, and how long segments are: from the generation that every variant is watched on."""

from collections.abc import Mapping
from typing import Any

from kvframe.eval.report.drawing import Line, Picture, drawing, percent, picture, whole_numbers

_WIDTH, _HEIGHT = 4.5, 3.2
_BINS = 12

Watched = Mapping[str, Mapping[str, Any]]
"""For every variant what `kvframe.eval.watch.watch` gave."""


def layer_pictures(watched: Watched, lines: Mapping[str, Line]) -> list[Picture]:
    """Captured mass and retrieval rate by layer, and histograms of retrieval rates and segment lengths."""
    shown = {label: found for label, found in watched.items() if found["layers"]}
    if not shown:
        return []
    pictures = [
        _by_layer(shown, lines, "captured_mass", "captured mass", "Captured mass by layer"),
        _by_layer(shown, lines, "retrieval_rate", "retrieval rate", "Retrieval rate by layer"),
        _rates(shown, lines),
    ]
    if any(found["segment_lengths"] for found in shown.values()):
        pictures.append(_segments(shown, lines))
    return pictures


def _by_layer(watched: Watched, lines: Mapping[str, Line], name: str, label: str, title: str) -> Picture:
    with drawing(_WIDTH, _HEIGHT) as (made, axes):
        for variant, found in watched.items():
            layers = found["layers"]
            line = lines[variant]
            axes.plot(
                [layer["layer"] for layer in layers], [layer[name] for layer in layers], color=line.color,
                marker=line.marker, markersize=4, linestyle=line.style, linewidth=1.3, markeredgecolor="none",
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.set_ylim(-0.03, 1.03)
        percent(axes.yaxis)
        whole_numbers(axes.xaxis)
        return picture(made, f"{name.replace('_', '-')}-by-layer", title)


def _rates(watched: Watched, lines: Mapping[str, Line]) -> Picture:
    """How many layers retrieve how often."""
    title = "Retrieval rates of layers"
    with drawing(_WIDTH, _HEIGHT) as (made, axes):
        for variant, found in watched.items():
            counts = [0] * (_BINS + 1)
            for layer in found["layers"]:
                counts[round(layer["retrieval_rate"] * _BINS)] += 1
            _outline(axes, [place / _BINS for place in range(_BINS + 1)], counts, lines[variant])
        axes.set_title(title)
        axes.set_xlabel("share of steps that select")
        axes.set_ylabel("layers")
        percent(axes.xaxis)
        whole_numbers(axes.yaxis)
        return picture(made, "retrieval-rates", title)


def _segments(watched: Watched, lines: Mapping[str, Line]) -> Picture:
    """How long the units of later tokens are."""
    title = "Segment lengths"
    with drawing(_WIDTH, _HEIGHT) as (made, axes):
        for variant, found in watched.items():
            sizes = {int(length): count for length, count in found["segment_lengths"].items()}
            total = sum(sizes.values())
            if total:
                lengths = list(range(1, max(sizes) + 1))
                _outline(axes, lengths, [sizes.get(length, 0) / total for length in lengths], lines[variant])
        axes.set_title(title)
        axes.set_xlabel("tokens of a unit behind the prompt")
        axes.set_ylabel("share of segments")
        percent(axes.yaxis)
        whole_numbers(axes.xaxis)
        return picture(made, "segment-lengths", title)


def _outline(axes: Any, places: list[Any], counts: list[Any], line: Line) -> None:
    """A histogram of which several fit over each other."""
    # Nothing on either side, so that the first and the last step have their whole width.
    width = places[1] - places[0] if len(places) > 1 else 1
    places, counts = [places[0] - width, *places, places[-1] + width], [0, *counts, 0]
    axes.plot(places, counts, color=line.color, linewidth=1.5, linestyle=line.style, drawstyle="steps-mid")
    axes.fill_between(places, counts, step="mid", color=line.color, alpha=0.12, linewidth=0)
