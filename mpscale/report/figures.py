"""The common style of all pictures. Functions import matplotlib themselves: it loads slowly and is rarely needed."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from mpscale.core.mode import MODES
from mpscale.core.record import in_order_of_modes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUFFIXES = (".svg", ".png")

WIDTH, DPI = 10.0, 100  # inches, pixels an inch: 1000 px
FONT = 9  # points

Dashes = Literal["-", "--", ":", "-."]

_UNKNOWN_COLOUR = "#666666"
_UNKNOWN_MARKERS = "dH8"
"""Markers for modes that this version does not know, and for further loss scales of one; no known mode uses them."""

_STYLE = {
    "font.size": FONT,
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
}


@dataclass(frozen=True, slots=True)
class Look:
    """Colour and marker of a mode."""

    colour: str
    marker: str


def looks(modes: Iterable[str] | Mapping[str, str]) -> dict[str, Look]:
    """Return the look of each mode, in the order of tables. A known mode looks the same in every picture.

    Args:
        modes: their names; or the names in tables, ordered, each with that of the mode, of which a sweep has several.
            These share the colour and differ in the marker.
    """
    named = modes if isinstance(modes, Mapping) else {mode: mode for mode in in_order_of_modes(modes)}
    markers, variants = itertools.cycle(_UNKNOWN_MARKERS), itertools.cycle(_UNKNOWN_MARKERS)
    found: dict[str, Look] = {}
    seen: set[str] = set()
    for label, mode in named.items():
        if mode not in MODES:
            found[label] = Look(_UNKNOWN_COLOUR, next(markers))
        else:
            found[label] = Look(MODES[mode].colour, next(variants) if mode in seen else MODES[mode].marker)
        seen.add(mode)
    return found


@dataclass(frozen=True)
class Picture:
    """A picture for a page.

    Args:
        title: what it shows.
        caption: what its marks mean, in sentences.
        svg: an ``<svg>`` element, with text as text.
    """

    title: str
    caption: str
    svg: str


class FigureError(ValueError):
    """A picture cannot be made as requested. The message names what can be made."""


def check_suffix(path: Path) -> None:
    """Check the kind of file, before anything is read.

    Raises:
        FigureError: the suffix of ``path`` is not one of :data:`SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        given = f"{path.suffix!r} files cannot be made" if path.suffix else "its suffix must name the kind of file"
        raise FigureError(f"{path}: {given}; end it in {' or '.join(SUFFIXES)}")


@contextmanager
def house_style(salt: str = "mpscale") -> Iterator[None]:
    """Apply the style of all pictures, whatever the user's matplotlibrc says.

    Args:
        salt: seeds the ids in an SVG, which makes files reproducible. Pictures on one page need different ones.
    """
    from matplotlib import style

    with style.context(["default", {**_STYLE, "svg.hashsalt": salt}]):
        yield


def empty_figure(height: float = 1.0) -> Figure:
    """Return a figure 1000 px wide and ``height`` inches high that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, to: Path | IO[bytes], suffix: str) -> None:
    """Write ``figure`` to a path or a binary file as ``svg`` or ``png``, the same bytes each time."""
    # A date would make every file different.
    metadata = {"Date": None, "Creator": "mpscale"} if suffix == "svg" else {"Software": "mpscale"}
    figure.savefig(to, format=suffix, dpi=DPI, metadata=metadata)


def short_name(text: str, length: int = 32) -> str:
    """Remove characters that fonts or XML lack, and shorten a long text to its end, the most distinctive part."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return shown if len(shown) <= length else f"…{shown[1 - length :]}"


def text_width(figure: Figure, texts: Iterable[str]) -> float:
    """Return the width of the longest text, in pixels."""
    from matplotlib.text import Text

    widest = 0.0
    for text in texts:
        drawn = Text(0, 0, text, size=FONT)
        drawn.set_figure(figure)
        widest = max(widest, drawn.get_window_extent().width)
    return widest


def legend_columns(figure: Figure, labels: Sequence[str]) -> int:
    """Return how many columns of a legend fit into the width of the figure."""
    beside = 5.5 * FONT / 72 * DPI  # line, padding and the space between columns, as matplotlib has them
    return min(len(labels), max(1, int(WIDTH * DPI * 0.96 // (text_width(figure, labels) + beside))))


def as_text(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element that adapts to the width of the page."""
    file = io.BytesIO()
    save(figure, file, "svg")
    svg = file.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    return re.sub(r' (?:width|height)="[0-9.]+pt"', "", svg, count=2).strip()
