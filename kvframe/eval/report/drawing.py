"""How pictures are drawn: one palette, and SVG that follows the page from light to dark."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b2430"
MUTED = "#667085"
GRID = "#e4e7ec"
PAPER = "#fefefe"
ACCENT = "#3b5bdb"
SERIES = ("#3b5bdb", "#d9480f", "#2b8a3e", "#9c36b5", "#0c8599", "#c2255c", "#997404", "#495057")
"""Told apart in grey and by people who see colours differently; after the last one they begin again, with another
marker."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# In a page these become variables of its style sheet. No two are equal.
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    **{color: f"series-{number}" for number, color in enumerate(SERIES)},
}
_FONT = "DejaVu Sans"
"""Comes with matplotlib, which measures texts with it."""
_STYLE: dict[str, Any] = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.family": _FONT,
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "kvframe",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelsize": 9,
}
_PNG_DPI = 160


@frozen(kw_only=True)
class Line:
    """How one variant is drawn, the same in every picture."""

    label: str
    color: str
    marker: str
    style: str = "-"


@frozen(kw_only=True, eq=False)
class Picture:
    """One picture, as the page and as files show it."""

    name: str
    """Of its files."""
    caption: str
    inline: str
    """An SVG element whose colours are the page's."""
    svg: str
    """A file of its own."""
    png: bytes


def lines_of(labels: Sequence[str]) -> dict[str, Line]:
    """A colour and a marker for each label, in their order."""
    return {
        label: Line(
            label=label,
            color=SERIES[number % len(SERIES)],
            marker=MARKERS[(number + number // len(SERIES)) % len(MARKERS)],
            style="-" if number < len(SERIES) else "--",
        )
        for number, label in enumerate(labels)
    }


@contextmanager
def drawing(width: float, height: float, **options: Any) -> Iterator[tuple["Figure", Any]]:
    """A figure of so many inches and its axes, in the report's style; gone behind the block.

    options: as of `Figure.subplots`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**options)


def picture(figure: "Figure", name: str, caption: str) -> Picture:
    """What a figure looks like, inside its `drawing` block."""
    text, pixels = io.StringIO(), io.BytesIO()
    with warnings.catch_warnings():
        # A generated text may have signs of any script; where the page is read there are more fonts than here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=_PNG_DPI, facecolor="white")
    svg = text.getvalue()
    return Picture(name=name, caption=caption, inline=_inline(svg, caption), svg=svg, png=pixels.getvalue())


def _inline(svg: str, caption: str) -> str:
    """The element alone, in the page's fonts and colours, as wide as there is room for."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    for color, variable in _VARIABLES.items():
        element = element.replace(color, f"var(--{variable})")
    element = element.replace(f"font-family: '{_FONT}'", "font-family: var(--font)")
    element = re.sub(rf"font: ((?:[\w.]+ )*[\d.]+px) '{_FONT}'", r"font: \1 var(--font)", element)
    # Named parts that nothing refers to would be there twice in a page of several pictures.
    element = re.sub(r' id="[a-zA-Z0-9.]+_[\d_]+"', "", element)
    words = caption.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    size = re.search(r'width="([\d.]+)pt"', element)
    width = f' style="--width: {float(size[1]) * 4 / 3:.0f}px"' if size else ""
    element = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", element, count=1)
    return element.replace("<svg", f'<svg role="img" aria-label="{words}"{width}', 1)


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers, with commas."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def percent(axis: Any) -> None:
    """Ticks as percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def bytes_of(axes: "Axes") -> None:
    """The x axis as sizes in bytes, from nothing on."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    from kvframe.eval.figures import size

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.xaxis.set_minor_locator(NullLocator())
