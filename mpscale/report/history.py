"""A history of runs: as a table for a terminal or markdown, as CSV or JSON, and as a picture."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpscale.analysis.history import History, Point, RunFacts, Series
from mpscale.analysis.quantities import Quantity
from mpscale.analysis.versions import in_words
from mpscale.report.figures import (
    Dashes,
    check_suffix,
    empty_figure,
    house_style,
    legend_columns,
    looks,
    save,
    short_name,
    text_width,
)
from mpscale.report.table import DASH, Table, interval, json_document, metric, share
from mpscale.terminal.streams import PIPE, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FORMATS = ("table", "markdown", "csv", "json")

_SHORT = 7
"""Digits of a commit hash, as git shortens it."""

_COLUMNS = (
    "workload", "mode", "series", "series_key", "hardware", "run", "started", "finished", "quantity", "unit", "value",
    "low", "high", "n", "change", "change_low", "change_high", "git_commit", "git_dirty", "tensorflow", "reason",
    "model_changes",
)  # fmt: skip
"""Columns of the CSV."""

_LINE = 140
"""Characters that fit into the width of the figure."""

_FEW_RUNS = 20
"""Most runs for which there is room for large markers."""

_MOST_ABOVE = 2
"""Upper limit of an axis with long error bars, as a multiple of the largest value."""

_DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")


def render(history: History, output: str, surface: Surface = PIPE) -> str:
    """Show the history, with a row per series and run.

    Args:
        history: what is shown.
        output: one of :data:`FORMATS`. CSV and JSON hold numbers in full, times as ISO 8601 in UTC and changes as
            shares of 1. Unknown values, and ends of intervals that no float can hold, are empty or null.
        surface: where a table will be shown.
    """
    if output == "csv":
        return Table.of(_COLUMNS, _lines(history)).csv()
    if output == "json":
        return json_document("history", _content(history))
    table = _table(history)
    note = _note_below(history.measure, table.headers)
    if output == "markdown":
        return f"## History of the {history.measure.title}\n\n{table.markdown()}\n\n{note}\n"
    return f"{table.text(surface)}\n\n{surface.wrapped(note)}\n"


def _note_below(measure: Quantity, headers: Sequence[str]) -> str:
    """Explain brackets and changes."""
    if measure.spread == "range":
        return "In brackets: minimum and maximum over seeds."
    what = "pairs of processes" if measure.name == "speedup" else "processes"
    text = f"In brackets: 95 % interval over {what}; none if there is only one."
    if "change" in headers:
        text += (
            "\nChange: against the previous value. Each is judged by itself, so one interval in twenty excludes 0 by "
            "chance; `mpscale compare` corrects for that."
        )
    return text


def _table(history: History) -> Table:
    """Return a row per series and run, without columns that would be empty in this history."""
    pairs = [(series, point) for series in history.series for point in series.points]
    columns = {
        "workload": [series.workload for series, _ in pairs],
        "mode": [series.mode for series, _ in pairs],
        "series": [series.apart or DASH for series, _ in pairs],
        "when (UTC)": [f"{at:%Y-%m-%d %H:%M}" if (at := point.run.started) else DASH for _, point in pairs],
        "run": [point.run.shown for _, point in pairs],
        history.measure.title: [shown_value(history.measure, series, point) for series, point in pairs],
        "n": [str(point.n) for _, point in pairs],
        "change": [shown_change(point) for _, point in pairs],
        "commit": [shown_commit(point.run) for _, point in pairs],
        "TensorFlow": [point.run.tensorflow or DASH for _, point in pairs],
        "note": [_note(point) for _, point in pairs],
    }
    rows = list(zip(*columns.values(), strict=True))
    return Table(list(columns), rows, _SPARE).without_blank("series", "change", "note")


_SPARE = ("TensorFlow", "n", "when (UTC)", "commit")
"""Columns that a narrow terminal leaves out."""


def shown_value(measure: Quantity, series: Series, point: Point) -> str:
    if measure.spread == "interval":
        unit = measure.unit if measure.unit == "x" else f" {measure.unit}"
        return interval(point.value, point.low, point.high, unit)
    shown = shown_single(measure, series)
    middle, low, high = (shown(part) for part in (point.value, point.low, point.high))
    return middle if low == high else f"{middle} [{low}, {high}]"


def shown_single(measure: Quantity, series: Series) -> Callable[[float | None], str]:
    """Return a function that writes a number of a quantity without a unit."""
    if measure.name == "metric":
        return lambda number: metric(number, series.metric_name)
    return lambda number: share(number, 2)


def shown_change(point: Point) -> str:
    if point.change is None:
        return DASH
    text = f"{100 * point.change:+.1f} %"
    if point.change_low is None or point.change_high is None:
        return text
    return f"{text} [{100 * point.change_low:+.1f}, {100 * point.change_high:+.1f}]"


def shown_commit(run: RunFacts) -> str:
    if run.commit is None:
        return DASH
    return run.commit[:_SHORT] + ("-dirty" if run.dirty else "")


def _note(point: Point) -> str:
    notes = [f"another version of the model: {said}"] if (said := in_words(point.versions)) else []
    notes += [point.reason] if point.reason else []
    if not point.run.finished:
        notes.append("the run did not finish")
    return "; ".join(notes) or DASH


def _lines(history: History) -> Iterator[dict[str, Any]]:
    """Yield the lines of the CSV, one per point of a series."""
    of_all = {"quantity": history.measure.name, "unit": history.measure.unit}
    for series in history.series:
        common = of_all | _identity(series) | {"hardware": json.dumps(series.hardware, default=str)}
        for point in series.points:
            yield common | _values(point)


def _content(history: History) -> dict[str, Any]:
    return {
        "quantity": history.measure.name,
        "unit": history.measure.unit,
        "low_and_high": "95 % interval over processes" if history.measure.spread == "interval" else "range over seeds",
        "series": [
            _identity(series)
            | {"metric_name": series.metric_name, "points": [_values(point) for point in series.points]}
            for series in history.series
        ],
        "skipped": [{"what": what, "reason": reason} for what, reason in history.skipped],
    }


def _identity(series: Series) -> dict[str, Any]:
    return {
        "workload": series.workload,
        "mode": series.mode,
        "series": series.apart,
        "series_key": series.key,
        "hardware": series.hardware,
    }


def _values(point: Point) -> dict[str, Any]:
    numbers = ("value", "low", "high", "n", "change", "change_low", "change_high")
    return {
        "run": point.run.name,
        "run_name": point.run.given_name,
        "started": None if point.run.started is None else point.run.started.isoformat(),
        "finished": point.run.finished,
        **{name: getattr(point, name) for name in numbers},
        "git_commit": point.run.commit,
        "git_dirty": point.run.dirty,
        "tensorflow": point.run.tensorflow,
        "reason": point.reason,
        "model_changes": in_words(point.versions) or None,
    }


def draw_history(history: History, path: Path) -> None:
    """Draw a panel per workload and a line per series, with runs from left to right; 1000 px wide.

    The same history gives the same SVG, byte for byte, with the same matplotlib. Groups have ids: ``panel-1`` and so
    on, containing ``line-1-1`` and so on, and ``legend``.

    Raises:
        FigureError: the suffix of ``path`` is not one of :data:`SUFFIXES`.
        OSError: the file cannot be written.
    """
    check_suffix(path)
    with house_style():
        save(_history_figure(history), path, path.suffix.lower().removeprefix("."))


@dataclass(frozen=True, slots=True)
class _SeriesLook:
    """The look of a series: its mode decides colour and marker; dashes distinguish the series of a mode."""

    colour: str
    marker: str
    dashes: Dashes
    hollow: bool


def _history_figure(history: History) -> Figure:
    panels: dict[str, list[Series]] = {}
    for series in history.series:
        panels.setdefault(series.workload, []).append(series)
    look_of = _looks(history.series)
    columns = 1 if len(panels) <= 3 else 2
    rows = math.ceil(len(panels) / columns)
    figure = empty_figure()
    legend_rows = _legend(figure, look_of, _caption(history))
    figure.set_figheight(0.6 + 0.2 * legend_rows + rows * (3.4 if rows == 1 else 2.4))
    title = history.measure.title
    figure.suptitle(f"{title[0].upper()}{title[1:]} by run", x=0.01, ha="left", size=12, weight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    runs = history.runs
    all_axes = list(grid.flat)
    for number, (axes, members) in enumerate(zip(all_axes, panels.values(), strict=False), 1):
        _panel(axes, number, history.measure, members, runs, look_of)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    _label_runs(figure, all_axes[: len(panels)], runs)
    return figure


def _looks(series: Sequence[Series]) -> dict[str, _SeriesLook]:
    """Return the look of each series, by label."""
    of_modes = looks(one.mode for one in series)
    labels: dict[str, dict[str, None]] = {}
    for one in series:
        labels.setdefault(one.mode, {})[one.label] = None
    return {
        label: _SeriesLook(look.colour, look.marker, _DASHES[which % len(_DASHES)], which % 2 == 1)
        for mode, look in of_modes.items()
        for which, label in enumerate(labels[mode])
    }


def _panel(
    axes: Axes,
    number: int,
    measure: Quantity,
    members: Sequence[Series],
    runs: Sequence[RunFacts],
    look_of: dict[str, _SeriesLook],
) -> None:
    axes.set_gid(f"panel-{number}")
    axes.set_title(members[0].workload, loc="left", size=10)
    places = {run.name: place for place, run in enumerate(runs)}
    bottom, top = _limits(measure, members)
    # Points of a run are shifted sideways, or their error bars would hide each other.
    gap = min(0.12, 0.5 / len(members))
    few = len(runs) <= _FEW_RUNS
    for which, series in enumerate(members):
        shift = (which - (len(members) - 1) / 2) * gap
        look = look_of[series.label]
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
    for place in sorted({places[point.run.name] for one in members for point in one.points if point.versions}):
        axes.axvline(place, color="#555555", linewidth=0.8, linestyle=":", zorder=1, gid=f"version-{number}-{place}")
    if measure.name == "speedup":
        axes.axhline(1.0, color="#555555", linewidth=0.8, zorder=1)
    axes.set_ylim(bottom, top)
    axes.set_xlim(-0.5, len(runs) - 0.5)
    axes.set_ylabel(_axis(measure, members[0]))
    if not measure.unit:
        shown = shown_single(measure, members[0])
        axes.yaxis.set_major_formatter(lambda value, _: shown(value))


def _bar(point: Point, top: float) -> tuple[float, float]:
    """Return the lengths of the error bar below and above the value; NaN if there is none."""
    if point.value is None or point.low is None or point.high is None:
        return math.nan, math.nan
    # The interval of two processes may reach too far to be drawn.
    high = min(point.high, max(2 * top, point.value))
    return max(0.0, point.value - point.low), max(0.0, high - point.value)


def _limits(measure: Quantity, members: Iterable[Series]) -> tuple[float, float]:
    """Return both limits of an axis. It starts at 0 except for a metric, whose small changes matter."""
    points = [point for series in members for point in series.points]
    values = [point.value for point in points if point.value is not None]
    ends = [end for point in points for end in (point.low, point.high) if end is not None]
    if measure.name == "metric":
        low, high = min(values + ends), max(values + ends)
        # If all values are equal, rounding must not look like a change.
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        return low - margin, high + margin
    # The interval of two processes may be many times the value; it must not flatten everything else.
    top = 1.08 * min(max(values + ends), _MOST_ABOVE * max(values)) or 0.01
    # Slightly below 0 makes a point at 0 visible.
    return (-0.03 * top if min(values) < 0.03 * top else 0.0), top


def _axis(measure: Quantity, series: Series) -> str:
    if measure.name == "metric":
        return series.metric_name or measure.title
    return f"{measure.title} ({measure.unit})" if measure.unit not in ("", "x") else measure.title


def _caption(history: History) -> str:
    """Explain points and bars."""
    if history.measure.spread == "range":
        text = "Points: all seeds of a run together. Bars: minimum and maximum over seeds."
    else:
        what = "pairs of processes" if history.measure.name == "speedup" else "processes"
        text = f"Points: geometric mean over {what}. Bars: 95 % interval if there is more than one,"
        text += f" cut off at {_MOST_ABOVE} times the largest value."
    if any(point.is_incomplete for series in history.series for point in series.points):
        text += " In a ring: a value that lacks seeds or processes, or is no claim about speed; the table says why."
    if any(point.versions for series in history.series for point in series.points):
        text += " Dotted: another version of the model, from there on."
    return f"{text} Times are UTC. A gap in a line: no value."


def _legend(figure: Figure, look_of: dict[str, _SeriesLook], caption: str) -> int:
    """Put caption and legend below the panels, in as many columns as fit. Return the rows of text that they take."""
    from matplotlib.lines import Line2D

    labels = [textwrap.fill(label, _LINE) for label in look_of]
    handles = [
        Line2D(
            [], [], color=look.colour, linestyle=look.dashes, linewidth=1.3, marker=look.marker, markersize=5,
            markerfacecolor="white" if look.hollow else look.colour, label=label,
        )
        for label, look in zip(labels, look_of.values(), strict=True)
    ]  # fmt: skip
    columns = legend_columns(figure, labels)
    title = textwrap.fill(caption, _LINE)
    legend = figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, frameon=False, handlelength=2.8, title=title,
        title_fontproperties={"size": 8}, alignment="left",
    )  # fmt: skip
    legend.set_gid("legend")
    per_column = math.ceil(len(labels) / columns)
    heights = [label.count("\n") + 1 for label in labels]
    tallest = max(sum(heights[start : start + per_column]) for start in range(0, len(labels), per_column))
    return title.count("\n") + 1 + tallest


def _label_runs(figure: Figure, panels: Sequence[Axes], runs: Sequence[RunFacts]) -> None:
    """Write dates below each panel, as many as fit without touching. The newest run always has one."""
    labels = _run_labels(runs)
    wide = text_width(figure, labels)
    figure.draw_without_rendering()  # the panels get their width from the layout
    for axes in panels:
        per_run = axes.get_window_extent().width / len(runs)
        every = max(1, math.ceil((wide + 12) / per_run))
        shown = range(len(runs) - 1, -1, -every)[::-1]
        axes.set_xticks(list(shown), [labels[place] for place in shown])


def _run_labels(runs: Sequence[RunFacts]) -> list[str]:
    """Return the date of each run, with the time if two runs share a date; the end of its name if it is unknown."""
    days = [run.started.date() for run in runs if run.started is not None]
    pattern = "%Y-%m-%d" if len(set(days)) == len(days) else "%Y-%m-%d\n%H:%M"
    return [run.started.strftime(pattern) if run.started else short_name(run.name, 18) for run in runs]
