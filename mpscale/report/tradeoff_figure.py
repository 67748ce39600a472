"""The picture of the trade-off: speed-up against what it does to the metric, with memory as the size of a point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpscale.analysis.claim import doubts_of
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.mode import MODES
from mpscale.core.record import place_of
from mpscale.core.runs import Run
from mpscale.report.figures import (
    DPI,
    SOFT,
    TINTS,
    Look,
    Picture,
    as_text,
    empty_figure,
    fitting,
    house_style,
    looks,
    short_name,
    text_width,
)
from mpscale.report.gains_figure import baseline_name, difference, margin, metric_limits, speed, unit_of
from mpscale.report.panels import (
    SMALL,
    Known,
    difference_axis,
    neutral_line,
    ratio_axis,
    ratio_limits,
    ratio_text,
    signed,
)
from mpscale.report.table import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 3.8
"""Inches: narrow, so that it can be read beside a text, too."""

_MOST = 12
"""Most panels."""

_TALL = {1: 1.5, 2: 1.4, 3: 0.95}
"""Inches of a panel's height, by the number of columns."""

_LEFT, _GAP, _EDGE, _HEAD, _TICKS, _LINE = 0.42, 0.44, 0.1, 0.44, 0.26, 0.19
"""Inches: left of the panels and between them, for numbers; right of them; above and below each; a line of text."""

_SIZE = 5.5
"""Points: the size of a marker of a mode that needs as much memory as fp32."""


_ORDER = {mode: place for place, mode in enumerate(MODES)}


@dataclass(frozen=True)
class _Point:
    """A mode of a workload.

    Args:
        row: of the summary.
        speed: over the baseline.
        metric: against fp32.
        memory: peak GPU memory over fp32's; None if unknown.
        is_claim: whether both may be claimed, and cover all seeds and processes.
    """

    row: Row
    speed: Known
    metric: Known
    memory: float | None
    is_claim: bool


def tradeoff(run: Run) -> Picture | None:
    """Draw each mode's speed-up over the baseline against its metric's difference to fp32, a panel for each workload.

    Return None if no mode has both. In the SVG, workload ``w`` has the points ``tradeoff-w-m`` in the order of the
    summary, except those beyond the axis, and the area ``tradeoff-margin-w``. The picture is 380 px wide, so that it
    can be read in a narrow column, and grows to 1.6 times as much.
    """
    rows = [row for row in summary_of(run) if row["mode"] != "fp32"]
    by_workload: dict[str, list[_Point]] = {}
    missing = 0
    for row in rows:
        fast, metric = speed(row), difference(row)
        if fast is None or metric is None:
            missing += row["mode"] != row["headline_baseline"]
            continue
        claim = fast.of_all and metric.of_all and not doubts_of(row, row["headline_baseline"])
        point = _Point(row, fast, metric, row["gpu_memory_ratio"], claim)
        by_workload.setdefault(place_of(row)[0], []).append(point)
    if not by_workload:
        return None
    drawn = dict(list(by_workload.items())[:_MOST])
    points = [point for members in drawn.values() for point in members]
    over = baseline_name(rows)
    title = f"Speed-up over {over} against the metric"
    with house_style("tradeoff"):
        svg = as_text(_figure(drawn, over), f"{title}, for each workload and mode")
    captions = {
        "Right is faster; up is better. The shaded band is the workload's margin around fp32's metric.": True,
        "Lines are intervals, as far as the axes go.": any(point.speed.low or point.metric.low for point in points),
        "An arrow with a number: the metric is beyond the axis, at that number.": any(
            _is_beyond(point, members) for members in drawn.values() for point in members
        ),
        "Hollow: no claim, because seeds or processes are missing or the speed-up is in doubt.": not all(
            point.is_claim for point in points
        ),
        "The size is peak GPU memory relative to fp32.": any(point.memory for point in points),
        f"Not drawn: {plural(missing, 'row')} without a speed-up or a metric.": missing,
        f"Not drawn: {plural(len(by_workload) - len(drawn), 'further workload')}.": len(by_workload) > len(drawn),
    }
    widest = f'<svg style="min-width: 0; max-width: {1.6 * _WIDTH * DPI:.0f}px"'
    caption = " ".join(text for text, applies in captions.items() if applies)
    return Picture(title, caption, svg.replace("<svg", widest, 1))


def _figure(by_workload: Mapping[str, Sequence[_Point]], over: str) -> Figure:
    from matplotlib.lines import Line2D

    columns = min(len(by_workload), 2 if len(by_workload) <= 4 else 3)
    wide = (_WIDTH - _LEFT - _EDGE - _GAP * (columns - 1)) / columns
    tall = _TALL[columns]
    points = [point for members in by_workload.values() for point in members]
    order = sorted(points, key=lambda point: _ORDER.get(point.row["mode"], len(_ORDER)))
    look_of = looks({place_of(point.row)[1]: point.row["mode"] for point in order})
    figure = empty_figure(width=_WIDTH)
    figure.set_layout_engine("none")
    entries = _legend(look_of, any(point.memory for point in points))
    lines = _in_lines(figure, [text for text, _ in entries])
    lines_of_panels = math.ceil(len(by_workload) / columns)
    height = lines_of_panels * (_HEAD + tall + _TICKS) + 0.24 + _LINE * (max(lines, default=(0, 0))[0] + 1) + 0.04
    figure.set_figheight(height)
    ends = ratio_limits(Known(point.speed.value) for point in points)
    for number, (workload, members) in enumerate(by_workload.items(), 1):
        row, column = divmod(number - 1, columns)
        left, top = _LEFT + column * (wide + _GAP), height - row * (_HEAD + tall + _TICKS)
        place = (left / _WIDTH, (top - _HEAD - tall) / height, wide / _WIDTH, tall / height)
        axes = figure.add_axes(place)
        room = (wide + _GAP * 0.8) * DPI
        for text, below, size, weight in ((workload, 0.2, 9, "bold"), (unit_of(members[0].row), 0.36, 7.5, "normal")):
            figure.text(
                (left - 0.3) / _WIDTH, (top - below) / height, fitting(figure, text, room, size, weight), size=size,
                weight=weight, color=SOFT if weight == "normal" else None,
            )  # fmt: skip
        _draw(axes, members, look_of, ends, wide * DPI, number)
    foot = height - lines_of_panels * (_HEAD + tall + _TICKS)
    figure.text(0.5, (foot - 0.12) / height, f"speed-up over {over}", ha="center", va="center", size=SMALL)
    for (_, look), (line, x), (text, _) in zip(entries, lines, entries, strict=True):
        y = (foot - 0.36 - line * _LINE) / height
        at = [(x + 8) / (_WIDTH * DPI)], [y]
        figure.add_artist(Line2D(*at, linestyle="none", transform=figure.transFigure, **look))
        figure.text((x + 16) / (_WIDTH * DPI), y, text, size=SMALL, va="center_baseline")
    return figure


def _legend(look_of: Mapping[str, Look], sized: bool) -> list[tuple[str, dict[str, Any]]]:
    """Return the texts of the legend, with the look of their markers."""
    found: list[tuple[str, dict[str, Any]]] = [
        (short_name(mode), {"color": look.colour, "marker": look.marker, "markersize": _SIZE})
        for mode, look in look_of.items()
    ]
    if sized:
        found += [
            (f"memory {ratio:g}x", {"color": SOFT, "marker": "o", "markersize": _size(ratio)}) for ratio in (0.5, 1.0)
        ]
    return found


def _in_lines(figure: Figure, texts: Sequence[str]) -> list[tuple[int, float]]:
    """Return the line of each text and its start in pixels, as many on a line as fit."""
    found: list[tuple[int, float]] = []
    line, x = 0, 4.0
    for text in texts:
        wide = 16 + text_width(figure, [text], SMALL) + 10
        if found and x + wide > _WIDTH * DPI:
            line, x = line + 1, 4.0
        found.append((line, x))
        x += wide
    return found


def _size(memory: float | None) -> float:
    """Return the size of a marker in points: its area is the memory over fp32's."""
    return _SIZE * min(2.0, max(0.5, math.sqrt(memory))) if memory else _SIZE


def _is_beyond(point: _Point, members: Sequence[_Point]) -> bool:
    low, high = metric_limits([one.metric for one in members], margin(point.row))
    return not low <= point.metric.value <= high


def _draw(
    axes: Axes,
    members: Sequence[_Point],
    look_of: Mapping[str, Look],
    ends: tuple[float, float],
    pixels: float,
    number: int,
) -> None:

    row = members[0].row
    around = margin(row)
    low, high = metric_limits([point.metric for point in members], around)
    # Numbers alone are short enough for a narrow panel; what they are is below the panels.
    ratio_axis(axes, "x", ends, max(3, int(pixels // 30)), lambda ratio: ratio_text(ratio).removesuffix("x"))
    better_is_up = row["metric_higher_is_better"]
    axes.set_ylim(*((low, high) if better_is_up else (high, low)))
    difference_axis(axes, "y", 4)
    axes.tick_params(labelsize=7.5, length=2, pad=1.5)
    axes.grid(visible=False)
    if around:
        axes.axhspan(-around, around, color=TINTS["margin"][0], linewidth=0, zorder=0, gid=f"tradeoff-margin-{number}")
    neutral_line(axes, 1.0, f"tradeoff-speed-{number}")
    neutral_line(axes, 0.0, f"tradeoff-metric-{number}", "y")
    written: list[tuple[bool, str]] = []
    for which, point in enumerate(members, 1):
        look = look_of[place_of(point.row)[1]]
        if not low <= point.metric.value <= high:
            is_top = (point.metric.value > high) == better_is_up
            end = high if point.metric.value > high else low
            axes.plot(
                [point.speed.value], [end], color=look.colour, marker=look.marker, markersize=_SIZE, clip_on=False,
                markerfacecolor=look.colour if point.is_claim else "white",
            )  # fmt: skip
            left = math.log(point.speed.value / ends[0]) > 0.6 * math.log(ends[1] / ends[0])
            text = f"{'↑' if is_top else '↓'} {signed(point.metric.value)}"
            if (is_top, text) in written:
                continue
            inwards = (1 + 8 * sum(top == is_top for top, _ in written)) * (-1 if is_top else 1)
            axes.annotate(
                text, (point.speed.value, end), xytext=(-5 if left else 5, inwards), textcoords="offset points",
                ha="right" if left else "left", va="top" if is_top else "bottom", size=7,
            )  # fmt: skip
            written.append((is_top, text))
            continue
        for known, across in ((point.speed, True), (point.metric, False)):
            if known.low is not None and known.high is not None:
                x, y = point.speed.value, point.metric.value
                bar = ([known.low, known.high], [y, y]) if across else ([x, x], [known.low, known.high])
                axes.plot(*bar, color=look.colour, linewidth=0.8, alpha=0.75, scalex=False, scaley=False)
        axes.plot(
            [point.speed.value], [point.metric.value], color=look.colour, marker=look.marker, linestyle="none",
            markersize=_size(point.memory), markerfacecolor=look.colour if point.is_claim else "white",
            gid=f"tradeoff-{number}-{which}", zorder=3,
        )  # fmt: skip
