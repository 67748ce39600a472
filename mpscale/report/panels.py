"""What panels of pictures have in common: their places, axes of ratios and powers of two, intervals with arrows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mpscale.core.case import scale_text
from mpscale.report.figures import DPI, FONT, SOFT, TEXT, WIDTH, Look, empty_figure, fitting, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL = 8
"""Size of remarks in points."""

COLUMNS = 6
"""Most panels beside each other in :func:`multiples`."""

_LEFT, _RIGHT, _GAP = 0.66, 0.4, 0.4
_HEAD, _TITLE, _TICKS = 0.32, 0.36, 0.3
"""Inches: left of panels for numbers, right of them, between them; above a group, above a panel, below it."""

_SIMPLE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 1.8)
_LEAST_OCTAVES, _MOST_OCTAVES = 0.14, 1.2
"""How far an axis of ratios reaches from 1 at least, which is 1.1; how far it does so to both sides alike."""


@dataclass(frozen=True)
class Known:
    """An estimate, with the ends of its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    of_all: bool = True
    """Whether it covers all processes, or all seeds, and may be claimed."""


def ratio_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most ``most`` round ratios between two, as fine as that allows; 1 is one of them if it is between."""
    steps = [[1 + n * step for n in range(-40, 41)] for step in (0.01, 0.02, 0.05, 0.1)] if high < 1.5 * low else []
    octaves = range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 1)
    steps.append([base * 2.0 ** (2 * n) for n in octaves for base in (*_SIMPLE, *(2 * part for part in _SIMPLE))])
    steps.append([part * 2.0**n for n in octaves for part in (1.0, 1.4)])
    found: list[float] = []
    for every in (None, 1, 2, 4, 8, 16, 64, 256, 1024):
        candidates = steps if every is None else [[2.0**n for n in octaves if n % every == 0]]
        for ticks in candidates:
            found = sorted({round(tick, 2) if 0.1 < tick < 10 else tick for tick in ticks if low <= tick <= high})
            gaps = [math.log2(after / before) for before, after in itertools.pairwise(found)]
            # Of ticks that are much closer than on average, the numbers would overlap.
            if len(found) <= most and min(gaps, default=math.inf) >= math.log2(high / low) / (1.5 * most):
                return found
    return found


def ratio_text(value: float) -> str:
    """Write a tick of an axis of ratios."""
    return f"{value:.3g}x" if 1e-3 <= value < 1e4 else f"2^{math.log2(value):.0f}x"


def ratio_limits(known: Iterable[Known]) -> tuple[float, float]:
    """Return the ends of an axis of ratios: around 1, with all estimates; intervals much wider than these are cut."""
    known = list(known)
    values = [_octaves(one.value) for one in known]
    reach = max(map(abs, values), default=0.0)
    widest = max(2 * reach, 0.5)
    ends = [_octaves(end) for one in known for end in (one.low, one.high) if end is not None]
    low = max(min([*values, *ends], default=0.0), -widest)
    high = min(max([*values, *ends], default=0.0), widest)
    both = max(-low, high, _LEAST_OCTAVES)
    if both <= _MOST_OCTAVES:
        low, high = -both, both
    else:
        low, high = min(low, -2 * _LEAST_OCTAVES), max(high, 2 * _LEAST_OCTAVES)
    room = 0.05 * (high - low)
    return 2.0 ** (low - room), 2.0 ** (high + room)


def _octaves(ratio: float) -> float:
    return math.log2(min(max(ratio, 2.0**-300), 2.0**300))


def ratio_axis(
    axes: Axes,
    across: Literal["x", "y"],
    ends: tuple[float, float],
    most: int,
    text: Callable[[float], str] = ratio_text,
) -> None:
    """Make an axis one of ratios between two ends, with at most ``most`` ticks, written with ``text``."""
    from matplotlib.ticker import FixedLocator, NullLocator

    # matplotlib's own numbers of a logarithmic axis are formulas, which browsers cannot draw.
    axis = axes.xaxis if across == "x" else axes.yaxis
    if across == "x":
        axes.set_xscale("log", base=2)
        axes.set_xlim(*ends)
    else:
        axes.set_yscale("log", base=2)
        axes.set_ylim(*ends)
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(ratio_ticks(*ends, most)))
    axis.set_major_formatter(lambda value, _: text(value))


def difference_axis(axes: Axes, across: Literal["x", "y"], most: int) -> None:
    """Give an axis of differences, whose limits are set, about ``most`` ticks with a sign."""
    from matplotlib.ticker import MaxNLocator

    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if across == "x" else (axes.yaxis, axes.get_ylim())
    nothing = 1e-9 * max(abs(low), abs(high))  # a tick at 0 may be off by rounding
    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: "0" if abs(value) < nothing else signed(float(value)))


def power_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most ``most`` powers of two between two positive numbers, evenly spaced."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    every = max(1, math.ceil((last - first + 1) / most))
    return [2.0**power for power in range(first, last + 1) if (power - first) % every == 0]


def scale_label(value: float) -> str:
    """Write a loss scale or a batch: powers of two from 1024 on as ``2^10``."""
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 and abs(exponent - 1) >= 10 else scale_text(value)


def signed(value: float) -> str:
    """Write a difference with three digits."""
    if 1e4 <= abs(value) < 1e7:
        return f"{float(f'{value:.3g}'):+,.0f}"
    return "0" if value == 0 else f"{value:+.3g}"


def draw_known(axes: Axes, known: Known, place: float, look: Look, gid: str, text: str) -> None:
    """Draw an estimate and its interval at a height. What is beyond the axis is an arrow head at its end.

    Args:
        axes: with its limits set.
        known: what to draw.
        place: the height.
        look: of the mode.
        gid: of the point in the SVG. A point beyond the axis has none.
        text: of the value, written if that is beyond the axis.
    """
    left, right = axes.get_xlim()
    low, high = sorted((left, right))
    outwards: dict[float, Literal["<", ">"]] = {left: "<", right: ">"}
    if not low <= known.value <= high:
        end = low if known.value < low else high
        inwards, side = (7, "left") if end == left else (-7, "right")
        axes.plot([end], [place], color=look.colour, marker=outwards[end], markersize=6, clip_on=False)
        axes.annotate(
            text, (end, place), xytext=(inwards, 0), textcoords="offset points", ha=side, va="center_baseline",
            size=SMALL,
        )  # fmt: skip
        return
    if known.low is not None and known.high is not None:
        ends = [max(known.low, low), min(known.high, high)]
        axes.plot(ends, [place, place], color=look.colour, linewidth=1.2, solid_capstyle="butt")
        for end, is_cut in zip(ends, (known.low < low, known.high > high), strict=True):
            marker = outwards[end] if is_cut else "|"
            axes.plot([end], [place], color=look.colour, marker=marker, markersize=5, clip_on=False)
    axes.plot(
        [known.value], [place], color=look.colour, marker=look.marker, markersize=5.5, linestyle="none",
        markerfacecolor=look.colour if known.of_all else "white", gid=gid,
    )  # fmt: skip


def neutral_line(axes: Axes, place: float, gid: str, across: Literal["x", "y"] = "x", until: float = 1.0) -> None:
    """Draw the line of no difference, over a share of the panel that leaves room for a remark."""
    line = axes.axvline if across == "x" else axes.axhline
    line(place, 0.0, until, color=SOFT, linewidth=0.9, zorder=1, gid=gid)


@dataclass(frozen=True)
class Group:
    """The panels of a workload.

    Args:
        title: above them, a name.
        remark: beside it.
        panels: how many there are.
        heights: of the axes of each panel, which are below each other, in inches.
    """

    title: str
    remark: str
    panels: int
    heights: Sequence[float]


def multiples(groups: Sequence[Group], foot: float) -> tuple[Figure, list[list[list[Axes]]]]:
    """Return a figure of small panels, in rows of at most :data:`COLUMNS`, and the axes of each panel of each group.

    Args:
        groups: from top to bottom.
        foot: room for a legend below them, in inches.
    """
    most = max(group.panels for group in groups)
    columns = math.ceil(most / math.ceil(most / COLUMNS))  # eight are twice four
    wide = (WIDTH - _LEFT - _RIGHT - _GAP * (columns - 1)) / columns
    rows = [math.ceil(group.panels / columns) for group in groups]
    row_heights = [_TITLE + _TICKS + sum(group.heights) + 0.1 * (len(group.heights) - 1) for group in groups]
    height = foot + sum(_HEAD + number * each for number, each in zip(rows, row_heights, strict=True))
    figure = empty_figure(height)
    figure.set_layout_engine("none")
    top = height
    found: list[list[list[Axes]]] = []
    for group, row_height in zip(groups, row_heights, strict=True):
        x, y = 0.08 / WIDTH, (top - 0.17) / height
        name = fitting(figure, group.title, 0.5 * WIDTH * DPI, 10, "bold")
        figure.text(x, y, name, weight="bold", size=10, va="center_baseline")
        x += text_width(figure, [name], 10, "bold") / (WIDTH * DPI) + 0.01
        remark = fitting(figure, group.remark, (0.99 - x) * WIDTH * DPI, SMALL)
        figure.text(x, y, remark, size=SMALL, color=SOFT, va="center_baseline")
        top -= _HEAD
        panels: list[list[Axes]] = []
        for number in range(group.panels):
            column = number % columns
            if number and column == 0:
                top -= row_height
            below, stacked = top - _TITLE, []
            for each in group.heights:
                place = ((_LEFT + column * (wide + _GAP)) / WIDTH, (below - each) / height, wide / WIDTH, each / height)
                axes = figure.add_axes(place)
                axes.tick_params(labelsize=SMALL, labelleft=column == 0, length=2.5, pad=2)
                axes.margins(x=0.01)
                stacked.append(axes)
                below -= each + 0.1
            panels.append(stacked)
        top -= row_height
        found.append(panels)
    return figure, found


def panel_title(figure: Figure, axes: Axes, name: str, *remarks: str) -> None:
    """Write the name of a mode above its panel, and below the name the first of some remarks that fits."""
    wide = width_of(figure, axes)
    fits = (remark for remark in remarks if text_width(figure, [remark], SMALL) <= wide)
    for text, points, size, colour in ((fitting(figure, name, wide), 13, FONT, TEXT), (next(fits, ""), 3, SMALL, SOFT)):
        axes.annotate(
            text, (0, 1), xycoords="axes fraction", xytext=(0, points), textcoords="offset points", va="bottom",
            size=size, color=colour,
        )  # fmt: skip


def width_of(figure: Figure, axes: Axes) -> float:
    """Return the width of a panel in pixels."""
    return float(axes.get_position().width * figure.get_figwidth() * DPI)
