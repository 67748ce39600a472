"""The picture of what each mode buys and costs: speed, memory, energy and metric against the baseline."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from mpscale.analysis.claim import doubts_of
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.record import place_of
from mpscale.core.runs import Run
from mpscale.report.figures import (
    DPI,
    SOFT,
    TINTS,
    WIDTH,
    Picture,
    as_text,
    empty_figure,
    fitting,
    house_style,
    looks,
    short_name,
    text_width,
)
from mpscale.report.panels import (
    SMALL,
    Known,
    difference_axis,
    draw_known,
    neutral_line,
    ratio_axis,
    ratio_limits,
    signed,
)
from mpscale.report.sections import statuses
from mpscale.report.table import in_points, listed, plural
from mpscale.report.words import metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_MARGINS = 5.0
"""Margins beyond which a difference of metrics is written as a number: a lost training must not flatten the others."""

_NAMED = 3
"""Rows that a caption names; of more, it says how many there are."""

_LINE, _EDGE, _GAP, _TICKS = 0.25, 0.12, 0.3, 0.34
"""Inches: the height of a row, the edge of the picture, between panels, below a panel for its numbers."""


@dataclass(frozen=True)
class _Column:
    """One quantity of all rows: a value for each, or None."""

    title: str
    caption: str
    known: Sequence[Known | None]
    is_ratio: bool = True
    """Whether the values are ratios, which share an axis; else differences of metrics, each in its own unit."""


def gains(run: Run) -> Picture | None:
    """Draw speed, memory, energy and metric of every mode against its baseline, as far as known, with intervals.

    Return None if no mode can be compared with a baseline. In the SVG, column ``n`` of workload ``w`` has
    ``neutral-n-w``, the line of no difference, and the points ``gain-n-m``, where ``m`` counts the rows of the summary
    except those of fp32. A metric has the area ``margin-w``.
    """
    rows = [row for row in summary_of(run) if row["mode"] != "fp32"]
    columns = [column for column in _columns(rows) if any(known is not None for known in column.known)]
    if not columns:
        return None
    title = "What each mode buys and costs"
    with house_style("gains"):
        svg = as_text(_figure(rows, columns), f"{title}: {', '.join(column.title for column in columns)}")
    captions = [column.caption for column in columns]
    if any(known is not None and known.low is not None for column in columns for known in column.known):
        captions.append("Bars are intervals, of 95 % for speed and of 90 % for a metric. An arrow: it goes on.")
    return Picture(title, " ".join([*captions, *_what_is_missing(summary_of(run), columns)]), svg)


def baseline_name(rows: Sequence[Row]) -> str:
    """Return the baseline of the speed-ups in rows of the summary, if it is one."""
    baselines = {row["headline_baseline"] for row in rows if row["headline_baseline"]}
    return str(baselines.pop()) if len(baselines) == 1 else "the default"


def _columns(rows: Sequence[Row]) -> list[_Column]:
    baseline = baseline_name(rows)
    return [
        _Column(f"speed-up over {baseline}", "Speed-up: right of the line is faster.", [_claimed(row) for row in rows]),
        _Column(
            f"speed-up over {baseline} by GPU time alone",
            "By GPU time: of rows whose step time shows no speed-up, how much faster the kernels are.",
            [_device_time(row) for row in rows],
        ),
        _cost("peak GPU memory over float32", "Memory", rows, "gpu_memory"),
        _cost("GPU energy over fp32", "Energy", rows, "gpu_energy"),
        _Column(
            "metric against fp32",
            "Metric: right of the line is better. The shaded band is the workload's margin, ± the number above it: a "
            "bar that stays right of the band's left end rules out a loss of the margin.",
            [difference(row) for row in rows],
            is_ratio=False,
        ),
    ]


def speed(row: Row) -> Known | None:
    """Return the speed-up of a row over its baseline; None if it is unknown, or if the row is the baseline."""
    name = f"speedup_{row['headline_baseline']}"
    if row["mode"] == row["headline_baseline"] or row.get(name) is None:
        return None
    return Known(row[name], row[f"{name}_low"], row[f"{name}_high"], _is_of_all(row, f"{name}_pairs"))


def _claimed(row: Row) -> Known | None:
    return None if doubts_of(row, row["headline_baseline"]) else speed(row)


def _device_time(row: Row) -> Known | None:
    """Return the speed-up by GPU time where none by step time is drawn; None also if one pair gives no interval."""
    name = f"speedup_device_{row['headline_baseline']}"
    if not doubts_of(row, row["headline_baseline"]) or row[name] is None or row[f"{name}_low"] is None:
        return None
    return Known(row[name], row[f"{name}_low"], row[f"{name}_high"], _is_of_all(row, f"{name}_pairs"))


def _cost(title: str, what: str, rows: Sequence[Row], column: str) -> _Column:
    known = [
        Known(row[f"{column}_ratio"], of_all=_is_of_all(row, f"{column}_processes")) if row[f"{column}_ratio"] else None
        for row in rows
    ]
    return _Column(title, f"{what}: left of the line is less.", known)


def _is_of_all(row: Row, processes: str) -> bool:
    return bool(row[processes] >= row["cases"] + row["not_started"])


def difference(row: Row) -> Known | None:
    """Return the difference of a row's metric to fp32's, in points or its own unit; None if its direction is unknown.

    :func:`unit_of` names the unit. Above 0 is a higher metric, which need not be better.
    """
    if row["metric_difference"] is None or row["metric_higher_is_better"] is None:
        return None
    value, low, high = (
        None if row[f"metric_difference{end}"] is None else row[f"metric_difference{end}"] * _factor(row)
        for end in ("", "_low", "_high")
    )
    assert value is not None
    return Known(value, low, high, row["metric_pairs"] >= row["seeds_planned"])


def margin(row: Row) -> float | None:
    """Return the workload's margin in the unit of :func:`difference`."""
    return row["metric_margin"] * _factor(row) if row["metric_margin"] else None


def unit_of(row: Row) -> str:
    """Name the metric of a row, and its unit if it has one."""
    name = short_name(metric_name(row["metric_name"]))
    return f"{name}, points" if in_points(row["metric_name"]) else name


def _factor(row: Row) -> float:
    return 100.0 if in_points(row["metric_name"]) else 1.0


def metric_limits(known: Sequence[Known], around: float | None) -> tuple[float, float]:
    """Return the ends of an axis of differences: around 0 and the margin, with estimates near them.

    Args:
        known: the differences.
        around: the margin; None if there is none.
    """
    near = [one for one in known if around is None or abs(one.value) <= _MOST_MARGINS * around]
    held = [one.value for one in near] + ([-around, around] if around else [0.0])
    reach = max(map(abs, held))
    ends = [max(-2 * reach, min(2 * reach, end)) for one in near for end in (one.low, one.high) if end is not None]
    low, high = min(held + ends + [0.0]), max(held + ends + [0.0])
    room = 0.08 * (high - low) or 0.05
    return low - room, high + room


def _what_is_missing(rows: Sequence[Row], columns: Sequence[_Column]) -> Iterator[str]:
    """Yield sentences on what the picture shows only in part or not at all."""
    if any(known is not None and not known.of_all for column in columns for known in column.known):
        yield "Hollow: some seeds or processes are not in it, so it may look better than it is."
    by_doubt: dict[str, list[str]] = {}
    without: dict[str, list[str]] = {}
    for row in rows:
        name = " ".join(map(short_name, place_of(row)))
        if row["mode"] == "fp32" and (row["ok"] != row["cases"] or row["not_started"]):
            yield f"Compared with what is left of {name}: {statuses(row)}."
        if doubts := doubts_of(row, row["headline_baseline"]):
            by_doubt.setdefault(", and ".join(doubt.text for doubt in doubts), []).append(name)
        if row["metric_verdict"] is not None and difference(row) is None:
            without.setdefault(row["metric_reason"] or row["metric_left_out"] or "it is unknown", []).append(name)
    for what, found in (("speed-up", by_doubt), ("metric", without)):
        for why, names in found.items():
            several = f"{plural(len(names), 'row')} ({listed(names, _NAMED)})" if len(names) > 1 else names[0]
            yield f"No {what} drawn for {several}: {why}."


def _figure(rows: Sequence[Row], columns: Sequence[_Column]) -> Figure:
    look_of = looks(row["mode"] for row in rows)
    blocks = [
        (workload, [number for number, _ in members])
        for workload, members in groupby(enumerate(rows), key=lambda item: place_of(item[1])[0])
    ]
    figure = empty_figure()
    figure.set_layout_engine("none")
    labels = [_label(row) for row in rows]
    left = _EDGE + text_width(figure, labels) / DPI + 0.1
    left = max(left, _EDGE + text_width(figure, [short_name(name) for name, _ in blocks], weight="bold") / DPI + 0.1)
    wide = (WIDTH - left - _EDGE - _GAP * (len(columns) - 1)) / len(columns)
    titles = [_wrapped(figure, column.title, wide * DPI) for column in columns]
    head = 0.12 + 0.17 * max(title.count("\n") + 1 for title in titles)
    height = head + sum(_LINE * (len(members) + 1) + _TICKS for _, members in blocks)
    figure.set_figheight(height)
    limits = [ratio_limits(known for known in column.known if known is not None) for column in columns]
    top = height - head
    for block, (workload, members) in enumerate(blocks, 1):
        tall, below = _LINE * (len(members) + 1), len(members) / (len(members) + 1)
        for number, (column, ends) in enumerate(zip(columns, limits, strict=True), 1):
            x = left + (number - 1) * (wide + _GAP)
            axes = figure.add_axes((x / WIDTH, (top - tall) / height, wide / WIDTH, tall / height))
            axes.grid(axis="x")
            axes.grid(visible=False, axis="y")
            axes.set_ylim(len(members) + 0.5, -0.5)
            axes.set_yticks([])
            axes.tick_params(axis="x", length=2.5, pad=2, labelsize=SMALL)
            axes.spines["left"].set_visible(False)
            shown = [column.known[place] for place in members]
            some = [known for known in shown if known is not None]
            if block == 1:
                figure.text(x / WIDTH, (height - 0.08) / height, titles[number - 1], size=10, va="top")
            if not some:
                axes.set_axis_off()
                axes.text(0, 1, "nothing to compare", transform=axes.get_yaxis_transform(), va="center", size=SMALL,
                          color=SOFT)  # fmt: skip
                continue
            if column.is_ratio:
                ratio_axis(axes, "x", ends, most=int(wide * DPI // 42))
                neutral_line(axes, 1.0, f"neutral-{number}-{block}", until=below)
            else:
                first = next(rows[place] for place, known in zip(members, shown, strict=True) if known is not None)
                _metric_axis(figure, axes, some, first, wide * DPI, block)
                neutral_line(axes, 0.0, f"neutral-{number}-{block}", until=below)
            for line, (place, known) in enumerate(zip(members, shown, strict=True), 1):
                if known is not None:
                    text = signed(known.value)
                    draw_known(axes, known, line, look_of[rows[place]["mode"]], f"gain-{number}-{place + 1}", text)
        figure.text(_EDGE / WIDTH, (top - _LINE / 2) / height, short_name(workload), weight="bold", va="center")
        for line, place in enumerate(members, 1):
            y = (top - _LINE * (line + 0.5)) / height
            figure.text(_EDGE / WIDTH, y, labels[place], va="center")
        top -= tall + _TICKS
    return figure


def _wrapped(figure: Figure, text: str, pixels: float) -> str:
    per_character = text_width(figure, [text], size=10) / len(text)
    return textwrap.fill(text, max(12, math.floor(pixels / per_character)), break_long_words=False)


def _label(row: Row) -> str:
    """Return the mode, with the statuses of its cases unless all ended well: the figures are of those that did."""
    name = short_name(place_of(row)[1])
    return name if row["ok"] == row["cases"] and not row["not_started"] else f"{name} ({statuses(row)})"


def _metric_axis(figure: Figure, axes: Axes, known: Sequence[Known], row: Row, pixels: float, block: int) -> None:
    """Make an axis of differences, on which better is right, with the margin as a band."""
    around = margin(row)
    low, high = metric_limits(known, around)
    axes.set_xlim(*((low, high) if row["metric_higher_is_better"] else (high, low)))
    difference_axis(axes, "x", max(2, int(pixels // 55)))
    if around:
        axes.axvspan(-around, around, color=TINTS["margin"][0], linewidth=0, zorder=0, gid=f"margin-{block}")
    words = f" ±{around:.3g}" if around else ""
    text = fitting(figure, unit_of(row), pixels - text_width(figure, [words], SMALL), SMALL) + words
    axes.text(0, 0, text, transform=axes.get_yaxis_transform(), va="center", size=SMALL, color=SOFT)
