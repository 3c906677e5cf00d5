"""One generation as a picture: where the trigger fired, what was fetched, what was held, over the generated text."""

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from kvframe.eval.report.drawing import ACCENT, INK, SERIES, Picture, drawing, percent, picture

_STEP_WIDTH = 0.115
_MARGIN = 1.6
_NARROWEST = 8.0
_HEIGHT = 6.0
_LONGEST_TOKEN = 12
_FETCH_COLOR = SERIES[1]


@frozen(kw_only=True)
class Token:
    """One generated token, as the page shows it."""

    text: str
    share: float
    """Of the layers' heads that selected anew at its step."""
    note: str


@frozen(kw_only=True, eq=False)
class Timeline:
    """One variant's generation."""

    label: str
    tokens: list[Token]
    drawn: Picture


def timeline(label: str, name: str, found: Mapping[str, Any]) -> Timeline | None:
    """What a variant did; None where it has no layer that retrieves.

    found: what `kvframe.eval.watch.watch` gave.
    """
    if not found["fires"]:
        return None
    return Timeline(label=label, tokens=_tokens(found), drawn=_draw(label, name, found))


def _tokens(found: Mapping[str, Any]) -> list[Token]:
    shares = _column_means(found["fires"])
    rows = [sum(column) for column in zip(*found["fetched_rows"], strict=True)]
    tokens = []
    for text, share, num_rows, sources in zip(found["tokens"], shares, rows, found["fetched_from"], strict=True):
        note = f"{share:.0%} of heads select; {num_rows:,.0f} rows fetched"
        if any(sources):
            place = max(range(len(sources)), key=sources.__getitem__)
            note += f", most from “{' '.join(found['places'][place].split())}”"
        tokens.append(Token(text=_printable(text, keep="\n\t"), share=share, note=_printable(note)))
    return tokens


def _draw(label: str, name: str, found: Mapping[str, Any]) -> Picture:
    num_steps = len(found["tokens"])
    width = max(_NARROWEST, _MARGIN + _STEP_WIDTH * num_steps)
    caption = f"{label}: where the trigger fired, from where rows were fetched, and how much of full attention was held"
    options: dict[str, Any] = {"nrows": 3, "sharex": True, "height_ratios": [1.2, 1.6, 0.8]}
    with drawing(width, _HEIGHT, **options) as (made, (fires, places, mass)):
        _image(fires, found["fires"], ACCENT)
        fires.set_ylabel("layer")
        fires.set_title("Where the trigger fired")
        layers = [layer["layer"] for layer in found["layers"]]
        ticks = sorted({0, len(layers) // 2, len(layers) - 1})
        fires.set_yticks(ticks, [str(layers[tick]) for tick in ticks])

        columns = found["fetched_from"]
        _image(places, [list(row) for row in zip(*columns, strict=True)], _FETCH_COLOR, power=0.5)
        places.set_ylabel("place in the text")
        places.set_title("From where rows were fetched")
        num_places = len(columns[0])
        prompt = num_places * found["prompt_tokens"] / (found["prompt_tokens"] + num_steps)
        places.axhline(prompt - 0.5, color=INK, linewidth=0.6, linestyle=(0, (3, 3)))
        places.set_yticks([0, prompt / 2, prompt - 1], ["start", "prompt", "end"])

        mass.plot(range(num_steps), _column_means(found["held_mass"]), color=SERIES[2], linewidth=1.4)
        mass.set_ylim(0, 1.05)
        percent(mass.yaxis)
        mass.set_title("Share of full attention that was held")
        mass.set_xlim(-0.5, num_steps - 0.5)
        mass.set_xticks(range(num_steps), [_short(text) for text in found["tokens"]], rotation=90, fontsize=7)
        for axes in (fires, places):
            axes.grid(visible=False)
            axes.tick_params(axis="x", length=0)
        return picture(made, f"timeline-{name}", caption)


def _image(axes: Any, values: Sequence[Sequence[float]], color: str, power: float = 1.0) -> None:
    """Values as a picture of one colour, clear where there is nothing."""
    import numpy
    from matplotlib.colors import to_rgb

    array = numpy.asarray(values, dtype=float)
    most = array.max() if array.size else 0.0
    pixels = numpy.empty((*array.shape, 4))
    pixels[..., :3] = to_rgb(color)
    pixels[..., 3] = (array / most) ** power if most else 0.0
    axes.imshow(pixels, aspect="auto", interpolation="none", origin="upper")


def _column_means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _short(text: str) -> str:
    """A token as a tick: one line, no longer than others."""
    flat = _printable(text.replace("\n", "⏎").replace("\t", "⇥").strip(" "))
    flat = flat if len(flat) <= _LONGEST_TOKEN else flat[: _LONGEST_TOKEN - 1] + "…"
    return flat.replace("$", r"\$")  # which would begin a formula


def _printable(text: str, keep: str = "") -> str:
    """Text without signs that nothing can show, and that XML does not allow."""
    return "".join(char if char.isprintable() or char in keep else "·" for char in text)
