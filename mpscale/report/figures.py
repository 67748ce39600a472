"""What pictures of results share. matplotlib is imported inside functions: little needs it, and it loads slowly."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from mpscale.core.mode import MODES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUFFIXES = (".svg", ".png")

WIDTH, DPI = 10.0, 100  # inches, pixels an inch: 1000 px
FONT = 9  # points

# Okabe and Ito, "Color Universal Design" (2008), without its yellow, too light for lines on white; grey instead.
_COLOURS = ("#000000", "#999999", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osD^vPX<>p"
Dashes = Literal["-", "--", ":", "-."]

_STYLE = {
    "font.size": FONT,
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
}


@dataclass(frozen=True)
class Picture:
    """A picture for a page.

    Args:
        title: what it shows.
        caption: what its marks mean, in a sentence or more.
        svg: an ``<svg>`` element, text as text.
    """

    title: str
    caption: str
    svg: str


class FigureError(ValueError):
    """A picture that cannot be made as asked for. The message says what can."""


def check_suffix(path: Path) -> None:
    """Tells early, before anything is read.

    Raises:
        FigureError: the kind of file that the suffix of ``path`` names is none of :data:`SUFFIXES`.
    """
    if path.suffix.lower() not in SUFFIXES:
        given = f"{path.suffix!r} files are not made" if path.suffix else "it has no suffix to tell the kind of file by"
        raise FigureError(f"{path}: {given}; end it in {' or '.join(SUFFIXES)}")


@contextmanager
def house_style(salt: str = "mpscale") -> Iterator[None]:
    """The look of all pictures, whatever a matplotlibrc of the user says.

    Args:
        salt: what ids in an SVG are made from, instead of chance: the same picture is the same file. Pictures that
            share a page need different ones.
    """
    from matplotlib import style

    with style.context(["default", {**_STYLE, "svg.hashsalt": salt}]):
        yield


def empty_figure(height: float = 1.0) -> Figure:
    """A figure 1000 px wide and ``height`` inches high, to be drawn on and saved without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, to: Path | IO[bytes], suffix: str) -> None:
    """Writes ``figure`` to a path or a binary file as ``svg`` or ``png``, the same bytes each time."""
    # The date would make every file another one.
    metadata = {"Date": None, "Creator": "mpscale"} if suffix == "svg" else {"Software": "mpscale"}
    figure.savefig(to, format=suffix, dpi=DPI, metadata=metadata)


def mode_places(modes: Iterable[str]) -> dict[str, int]:
    """A number for each mode, by which it has its colour and marker: the same in every picture, for those we know."""
    places = {mode: place for place, mode in enumerate(MODES)}
    for mode in modes:
        places.setdefault(mode, len(places))
    return places


def colour(place: int) -> str:
    """The colour of a mode with that number."""
    return _COLOURS[place % len(_COLOURS)]


def marker(place: int) -> str:
    """Likewise its marker."""
    return _MARKERS[place % len(_MARKERS)]


def short_name(text: str, length: int = 32) -> str:
    """``text`` without what neither a font nor XML has a place for, and of a long one the end, which tells most."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return shown if len(shown) <= length else f"…{shown[1 - length :]}"


def as_text(figure: Figure) -> str:
    """The figure as an ``<svg>`` element that fits the width it is given."""
    file = io.BytesIO()
    save(figure, file, "svg")
    svg = file.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    return re.sub(r' (?:width|height)="[0-9.]+pt"', "", svg, count=2).strip()
