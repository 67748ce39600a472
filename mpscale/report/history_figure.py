"""The picture of a history: figures of earlier runs, one line a series."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpscale.analysis.history import History, Point, RunFacts, Series
from mpscale.analysis.measures import Measure
from mpscale.report.figures import (
    DPI,
    FONT,
    WIDTH,
    Dashes,
    check_suffix,
    colour,
    empty_figure,
    house_style,
    marker,
    mode_places,
    save,
    short_name,
)
from mpscale.report.history import single

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 140
"""Characters that fit beside each other."""

_FEW = 20
"""Runs up to which there is room for large marks."""

_MOST_ABOVE = 2
"""How many times the largest value an axis reaches up, for the sake of bars."""

_ONE_COLUMN = 3
"""Panels up to which each has the whole width."""

_DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")


def draw_history(history: History, path: Path) -> None:
    """Draws one panel a workload and one line a series, runs from left to right; 1000 px wide.

    The same history gives the same SVG, byte for byte, with the same matplotlib. Groups have ids: ``panel-1`` and so
    on, in them ``line-1-1`` and so on, and ``legend``.

    Raises:
        FigureError: the suffix of ``path`` is none of :data:`SUFFIXES`.
        OSError: it cannot be written.
    """
    check_suffix(path)
    with house_style():
        save(_history_figure(history), path, path.suffix.lower().removeprefix("."))


@dataclass(frozen=True, slots=True)
class _Look:
    """How a series is drawn, the same in every panel: colour and marker by its mode, dashes by which of its mode."""

    colour: str
    marker: str
    dashes: Dashes
    hollow: bool


def _history_figure(history: History) -> Figure:
    panels: dict[str, list[Series]] = {}
    for series in history.series:
        panels.setdefault(series.workload, []).append(series)
    looks = _looks(history.series)
    columns = 1 if len(panels) <= _ONE_COLUMN else 2
    rows = math.ceil(len(panels) / columns)
    figure = empty_figure()
    legend_rows = _legend(figure, looks, _caption(history))
    figure.set_figheight(0.6 + 0.2 * legend_rows + rows * (3.4 if rows == 1 else 2.4))
    title = history.measure.title
    figure.suptitle(f"{title[0].upper()}{title[1:]} by run", x=0.01, ha="left", size=12, weight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    runs = history.runs
    all_axes = list(grid.flat)
    for number, (axes, (workload, members)) in enumerate(zip(all_axes, panels.items(), strict=False), 1):
        axes.set_gid(f"panel-{number}")
        axes.set_title(workload, loc="left", size=10)
        _panel(axes, number, history.measure, members, runs, looks)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    _label_runs(figure, all_axes[: len(panels)], runs)
    return figure


def _looks(series: Iterable[Series]) -> dict[str, _Look]:
    """By label."""
    series = list(series)
    places = mode_places(one.mode for one in series)
    of_mode: dict[str, list[str]] = {}
    for one in series:
        labels = of_mode.setdefault(one.mode, [])
        if one.label not in labels:
            labels.append(one.label)
    return {
        label: _Look(
            colour(places[mode]),
            marker(places[mode]),
            _DASHES[which % len(_DASHES)],
            which % 2 == 1,
        )
        for mode in sorted(of_mode, key=lambda mode: places[mode])
        for which, label in enumerate(of_mode[mode])
    }


def _panel(
    axes: Axes,
    number: int,
    measure: Measure,
    members: Sequence[Series],
    runs: Sequence[RunFacts],
    looks: dict[str, _Look],
) -> None:
    places = {run.name: place for place, run in enumerate(runs)}
    bottom, top = _limits(measure, members)
    # Side by side, so that bars of one run do not hide each other.
    gap = min(0.12, 0.5 / len(members))
    few = len(runs) <= _FEW
    for which, series in enumerate(members):
        shift = (which - (len(members) - 1) / 2) * gap
        look = looks[series.label]
        known = [point.value is not None for point in series.points]
        values = [math.nan if point.value is None else point.value for point in series.points]
        bars = [_bar(point, top) for point in series.points]
        line = axes.errorbar(
            [places[point.run.name] + shift for point in series.points],
            values,
            yerr=[[below for below, _ in bars], [above for _, above in bars]] if any(known) else None,
            color=look.colour,
            ecolor=(look.colour, 1.0 if few else 0.45),
            linestyle=look.dashes,
            linewidth=1.3,
            elinewidth=0.9,
            capsize=2.5 if few else 1.2,
            marker=look.marker,
            markersize=5 if few else 3,
            markerfacecolor="white" if look.hollow else look.colour,
        )
        line.lines[0].set_gid(f"line-{number}-{which + 1}")
        part = [(point, value) for point, value in zip(series.points, values, strict=True) if point.is_incomplete]
        if part:
            axes.plot(
                [places[point.run.name] + shift for point, _ in part], [value for _, value in part], linestyle="none",
                marker="o", markersize=11, markerfacecolor="none", markeredgecolor=look.colour,
                gid=f"part-{number}-{which + 1}",
            )  # fmt: skip
    if measure.name == "speedup":
        axes.axhline(1.0, color="#555555", linewidth=0.8, zorder=1)
    axes.set_ylim(bottom, top)
    axes.set_xlim(-0.5, len(runs) - 0.5)
    axes.set_ylabel(_axis(measure, members[0]))
    if not measure.unit:
        shown = single(measure, members[0])
        axes.yaxis.set_major_formatter(lambda value, _: shown(value))


def _bar(point: Point, top: float) -> tuple[float, float]:
    """Lengths of the error bar below and above the value; not a number where there is none."""
    if point.value is None or point.low is None or point.high is None:
        return math.nan, math.nan
    # An interval of two processes may reach beyond what can be drawn.
    high = min(point.high, max(2 * top, point.value))
    return max(0.0, point.value - point.low), max(0.0, high - point.value)


def _limits(measure: Measure, members: Iterable[Series]) -> tuple[float, float]:
    """Lower and upper limit of an axis: from 0 except for a metric, of which small changes matter."""
    points = [point for series in members for point in series.points]
    values = [point.value for point in points if point.value is not None]
    ends = [end for point in points for end in (point.low, point.high) if end is not None]
    if measure.name == "metric":
        low, high = min(values + ends), max(values + ends)
        # Where all are equal, the last digit must not look like a change.
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        return low - margin, high + margin
    # Two processes may give an interval many times as high as the value; it must not flatten all the rest.
    top = 1.08 * min(max(values + ends), _MOST_ABOVE * max(values)) or 0.01
    # A hair below 0, so that a point on 0 is seen.
    return (-0.03 * top if min(values) < 0.03 * top else 0.0), top


def _axis(measure: Measure, series: Series) -> str:
    if measure.name == "metric":
        return series.metric_name or measure.title
    return f"{measure.title} ({measure.unit})" if measure.unit not in ("", "x") else measure.title


def _caption(history: History) -> str:
    """What points and bars are."""
    if history.measure.spread == "range":
        text = "Points: all seeds of a run together. Bars: smallest and largest seed."
    else:
        what = "pairs of processes" if history.measure.name == "speedup" else "processes"
        text = f"Points: geometric mean over {what}. Bars: 95 % interval, where there is more than one;"
        text += f" one that is cut off goes beyond {_MOST_ABOVE} times the largest value."
    if any(point.is_incomplete for series in history.series for point in series.points):
        text += " In a ring: a value of some seeds or processes alone; the table says why."
    return f"{text} Times are UTC. A gap in a line: no value."


def _legend(figure: Figure, looks: dict[str, _Look], caption: str) -> int:
    """Puts the legend below the panels, in as many columns as fit, under its caption; gives its rows of text."""
    from matplotlib.lines import Line2D

    labels = [textwrap.fill(label, _LINE) for label in looks]
    handles = [
        Line2D(
            [], [], color=look.colour, linestyle=look.dashes, linewidth=1.3, marker=look.marker, markersize=5,
            markerfacecolor="white" if look.hollow else look.colour, label=label,
        )
        for label, look in zip(labels, looks.values(), strict=True)
    ]  # fmt: skip
    beside = 5.5 * FONT / 72 * DPI  # line, padding and the space between columns, as matplotlib has them
    columns = min(len(labels), max(1, int(WIDTH * DPI * 0.96 // (_text_width(figure, labels) + beside))))
    title = textwrap.fill(caption, _LINE)
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        handlelength=2.8,
        title=title,
        title_fontproperties={"size": 8},
        alignment="left",
    )
    legend.set_gid("legend")
    per_column = math.ceil(len(labels) / columns)
    return (
        title.count("\n")
        + 1
        + max(
            sum(label.count("\n") + 1 for label in labels[start : start + per_column])
            for start in range(0, len(labels), per_column)
        )
    )


def _label_runs(figure: Figure, panels: Sequence[Axes], runs: Sequence[RunFacts]) -> None:
    """Dates below each panel, as many as fit without touching; the newest run always has one."""
    labels = _run_labels(runs)
    wide = _text_width(figure, labels)
    figure.draw_without_rendering()  # the layout says how wide the panels are
    for axes in panels:
        per_run = axes.get_window_extent().width / len(runs)
        every = max(1, math.ceil((wide + 12) / per_run))
        shown = range(len(runs) - 1, -1, -every)[::-1]
        axes.set_xticks(list(shown), [labels[place] for place in shown])


def _run_labels(runs: Sequence[RunFacts]) -> list[str]:
    """The date of each run, with the time of day where two runs share a date; the end of its name where unknown."""
    days = [run.started.date() for run in runs if run.started is not None]
    pattern = "%Y-%m-%d" if len(set(days)) == len(days) else "%Y-%m-%d\n%H:%M"
    return [run.started.strftime(pattern) if run.started else short_name(run.name, 18) for run in runs]


def _text_width(figure: Figure, texts: Iterable[str]) -> float:
    """Of the longest line, in pixels."""
    from matplotlib.text import Text

    widest = 0.0
    for text in texts:
        drawn = Text(0, 0, text, size=FONT)
        drawn.set_figure(figure)
        widest = max(widest, drawn.get_window_extent().width)
    return widest
