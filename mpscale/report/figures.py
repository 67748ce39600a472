"""The common style of all pictures. Functions import matplotlib themselves: it loads slowly and is rarely needed.

An SVG has the colours of a light page in its elements, so that every viewer shows it, and a style that replaces them
where the reader prefers dark: by the custom properties of the page that it is part of, or by the same values in a file
of its own. Printers are light. A PNG is light.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mpscale.core.files.writing import write_named
from mpscale.core.mode import MODES
from mpscale.core.record import in_order_of_modes
from mpscale.terminal.streams import on_one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SUFFIXES = (".svg", ".png")

WIDTH, DPI = 10.0, 100  # inches, pixels an inch: 1000 px
FONT = 9  # points

Dashes = Literal["-", "--", ":", "-."]

TEXT, SOFT, LINE, PAPER = "#1b1f24", "#555555", "#d0d7de", "#ffffff"
"""Colours of text, of axes and remarks, of the grid, and of what is behind them."""

_ROLES = {TEXT: ("text", "#e6edf3"), SOFT: ("soft", "#9aa4af"), LINE: ("line", "#3d444d"), PAPER: ("page", "#0d1117")}
"""The custom property of a page for each of them, and its value on a dark one."""

TINTS = {
    "margin": ("#dfe9f5", "#18293e"),
    "lost": ("#f4c7c3", "#4f2523"),
    "rough": ("#fbe9b7", "#443812"),
    "grey": ("#e6e9ed", "#2a3038"),
    "blue": ("#cfe2ff", "#173259"),
    "cyan": ("#c5f1f5", "#0d3b42"),
    "violet": ("#e6dcfb", "#33245c"),
    "yellow": ("#fdeeb5", "#453909"),
    "green": ("#cdefd3", "#123d20"),
    "red": ("#fbd9df", "#4a1f2b"),
}
"""Colours of areas behind lines and text, on a light and on a dark page."""

_UNKNOWN_COLOUR, _UNKNOWN_ON_DARK = "#666666", "#a5adb5"
_UNKNOWN_MARKERS = "dH8"
"""Markers for modes that this version does not know, and for further loss scales of one; no known mode uses them."""

_CLASS = "mp-picture"

_STYLE = {
    "font.size": FONT,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; every text in an SVG names all fonts of the list
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
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
        unread: how many lines it lacks because their files cannot be read.
    """

    title: str
    caption: str
    svg: str
    unread: int = 0


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


def empty_figure(height: float = 1.0, width: float = WIDTH) -> Figure:
    """Return a figure of ``width`` by ``height`` inches that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, to: Path, suffix: str) -> None:
    """Write ``figure`` to a file as ``svg`` or ``png``, the same bytes each time."""
    if suffix == "svg":
        write_named(to, _svg(figure, figure.get_suptitle()))
    else:
        file = io.BytesIO()
        figure.savefig(file, format=suffix, dpi=DPI, metadata={"Software": "mpscale"})
        write_named(to, file.getvalue())


def short_name(text: str, length: int = 32) -> str:
    """Escape characters that fonts or XML lack, and shorten a long text to its end, the most distinctive part."""
    shown = on_one_line(str(text))
    return shown if len(shown) <= length else f"…{shown[1 - length :]}"


def text_width(figure: Figure, texts: Iterable[str], size: float = FONT, weight: str = "normal") -> float:
    """Return the width of the longest text, in pixels."""
    from matplotlib.text import Text

    widest = 0.0
    for text in texts:
        drawn = Text(0, 0, text, size=size, weight=weight)
        drawn.set_figure(figure)
        widest = max(widest, drawn.get_window_extent().width)
    return widest


def fitting(figure: Figure, text: str, pixels: float, size: float = FONT, weight: str = "normal") -> str:
    """Return a name, shortened to its end if it is wider than ``pixels``."""
    shown = short_name(text, 200)
    wide = text_width(figure, [shown], size, weight)
    if wide <= pixels:
        return shown
    kept = max(1, min(len(shown) - 1, int(1.2 * len(shown) * pixels / wide)))
    while kept > 1 and text_width(figure, [f"…{shown[-kept:]}"], size, weight) > pixels:
        kept -= 1
    return f"…{shown[-kept:]}"


def legend_columns(figure: Figure, labels: Sequence[str]) -> int:
    """Return how many columns of a legend fit into the width of the figure."""
    beside = 5.5 * FONT / 72 * DPI  # line, padding and the space between columns, as matplotlib has them
    room = figure.get_figwidth() * DPI * 0.96
    return min(len(labels), max(1, int(room // (text_width(figure, labels) + beside))))


def as_text(figure: Figure, title: str) -> str:
    """Return the figure as an ``<svg>`` element that adapts to the width of the page, and to its colours.

    Args:
        figure: what was drawn.
        title: what it shows, for those who cannot see it.
    """
    figure.patch.set_visible(False)  # the page's own background
    svg = _svg(figure, title)
    return re.sub(r' (?:width|height)="[0-9.]+pt"', "", svg[svg.index("<svg") :], count=2).strip()


def _svg(figure: Figure, title: str) -> str:
    file = io.BytesIO()
    # A date would make every file different.
    figure.savefig(file, format="svg", dpi=DPI, metadata={"Date": None, "Creator": "mpscale", "Title": title})
    svg = file.getvalue().decode("utf-8")
    svg = re.sub(r">\s+<", ">\n<", re.sub(r"<!--.*?-->", "", svg, flags=re.S))
    # Hundredths of a point cannot be seen, and take as many bytes as the rest. Text between tags has no "<".
    svg = re.sub(r"<(?:path|use|g|text|rect)\b[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    head = svg.index(">", svg.index("<svg"))
    return f'{svg[:head]} class="{_CLASS}">{_colours(svg)}{svg[head + 1 :]}'


def _colours(svg: str) -> str:
    """Return a ``<style>`` that replaces the colours of ``svg`` on a screen whose reader prefers dark."""
    dark = {light: f"var(--{name}, {value})" for light, (name, value) in _ROLES.items()}
    dark |= dict(TINTS.values()) | {_UNKNOWN_COLOUR: _UNKNOWN_ON_DARK}
    dark |= {mode.colour.lower(): mode.on_dark for mode in MODES.values()}
    # Without an ancestor, which a browser would not find from the copies that <use> makes of markers.
    rules = [
        f':is(path, use, text)[style*="{what}: {light}"] {{ {what}: {other} !important }}'
        for light, other in dark.items()
        for what in ("fill", "stroke")
        if f"{what}: {light}" in svg
    ]
    # matplotlib leaves out a fill that is black.
    rules.append(f".{_CLASS} {{ fill: {MODES['fp32'].on_dark} }}")
    text = f".{_CLASS} text {{ font-family: system-ui, sans-serif !important }}"
    return f"<style>{text} @media screen and (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"
