"""The picture of what each mode of a run buys and costs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpscale.analysis.runs import Run
from mpscale.analysis.summary import plain_rows
from mpscale.analysis.trainings import Row
from mpscale.report import cells
from mpscale.report.figures import (
    Picture,
    as_text,
    colour,
    empty_figure,
    house_style,
    marker,
    mode_places,
    short_name,
)
from mpscale.report.tables import metric_why

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 72
"""Characters of titles that fit beside each other."""

_MOST_MARGINS = 5.0
"""Margins beyond which a difference of metrics is told in figures: a lost training must not flatten all others."""


def gains(run: Run) -> Picture | None:
    """Speed, memory, energy and metric of every mode over its baseline, as far as they are known, with intervals.

    None where there is no mode beside a baseline. In the SVG panel ``n`` has ``neutral-n``, the line of no difference,
    and the points ``gain-n-m``, ``m`` counting the summary's rows without those of fp32.
    """
    rows = [row for row in plain_rows(run.summary) if row["mode"] != "fp32"]
    panels = [panel for panel in _panels(rows) if any(known is not None for known in panel.known)]
    if not panels:
        return None
    with house_style("gains"):
        svg = as_text(_gains_figure(rows, panels))
    captions = [panel.caption for panel in panels] + list(_what_is_missing(plain_rows(run.summary), panels))
    return Picture("What each mode buys and costs", " ".join(captions), svg)


@dataclass(frozen=True)
class _Known:
    """An estimate and the ends of its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    of_all: bool = True
    """Whether all processes, or all seeds, are in it."""


@dataclass(frozen=True)
class _Panel:
    """One quantity of all rows.

    Args:
        title: its name.
        caption: how to read it.
        known: a value for each row, None where it has none.
        neutral: no difference.
        limit: from where on a difference matters.
        floor: no value is below.
        most: how far from ``neutral`` the axis reaches at most; what is beyond is told in figures.
    """

    title: str
    caption: str
    known: Sequence[_Known | None]
    neutral: float
    limit: float | None = None
    floor: float = -math.inf
    most: float = math.inf


def _panels(rows: Sequence[Row]) -> list[_Panel]:
    baselines = {row["headline_baseline"] for row in rows if row["headline_baseline"]}
    baseline = baselines.pop() if len(baselines) == 1 else "the default"
    return [
        _Panel(
            f"speed-up over {baseline}",
            "Speed-up: right of the line is faster; bars are 95 % intervals, of wide ones a part.",
            [_speed(row) for row in rows],
            neutral=1.0,
            floor=0.0,
        ),
        _cost("peak GPU memory over fp32", "Memory", rows, "gpu_memory"),
        _cost("GPU energy over fp32", "Energy", rows, "gpu_energy"),
        _Panel(
            "metric against fp32, in margins",
            "Metric: right of the line is better; a bar (90 % interval) that stays right of the dashed line "
            "rules out a loss of the workload's margin.",
            [_metric(row) for row in rows],
            neutral=0.0,
            limit=-1.0,
            most=_MOST_MARGINS,
        ),
    ]


def _speed(row: Row) -> _Known | None:
    name = f"speedup_{row['headline_baseline']}"
    if row["mode"] == row["headline_baseline"] or row.get(name) is None:
        return None
    return _Known(row[name], row[f"{name}_low"], row[f"{name}_high"], _is_of_all(row, f"{name}_pairs"))


def _cost(title: str, what: str, rows: Sequence[Row], column: str) -> _Panel:
    known = [
        None
        if (ratio := row[f"{column}_ratio"]) is None
        else _Known(ratio, of_all=_is_of_all(row, f"{column}_processes"))
        for row in rows
    ]
    return _Panel(title, f"{what}: left of the line is less.", known, neutral=1.0, floor=0.0)


def _is_of_all(row: Row, processes: str) -> bool:
    return bool(row[processes] >= row["cases"] + row["not_started"])


def _what_is_missing(rows: Sequence[Row], panels: Sequence[_Panel]) -> Iterator[str]:
    """What the picture does not show, or shows of a part alone."""
    if any(known is not None and not known.of_all for panel in panels for known in panel.known):
        yield "Hollow: some seeds or processes are not in it, so that it may look better than it is."
    for row in rows:
        name = f"{short_name(row['workload'])}, {short_name(row['mode'])}"
        if row["mode"] == "fp32" and (row["ok"] != row["cases"] or row["not_started"]):
            yield f"Compared with what is left of {name}: {cells.statuses(row)}."
        if row["metric_verdict"] is not None and _metric(row) is None:
            yield f"No metric drawn of {name}: {metric_why(row) or 'nothing is known of it'}."


def _metric(row: Row) -> _Known | None:
    """The difference to fp32 over the margin, above 0 where the mode is better; None where the direction is unknown."""
    if row["metric_difference"] is None or not row["metric_margin"] or row["metric_higher_is_better"] is None:
        return None
    unit = row["metric_margin"] if row["metric_higher_is_better"] else -row["metric_margin"]
    ends = [row["metric_difference_low"], row["metric_difference_high"]]
    if None in ends:
        return _Known(row["metric_difference"] / unit, of_all=row["metric_pairs"] >= row["seeds_planned"])
    low, high = sorted(end / unit for end in ends)
    return _Known(row["metric_difference"] / unit, low, high, row["metric_pairs"] >= row["seeds_planned"])


def _gains_figure(rows: Sequence[Row], panels: Sequence[_Panel]) -> Figure:
    labels: list[str] = []
    places: list[int] = []
    for number, row in enumerate(rows):
        if number == 0 or row["workload"] != rows[number - 1]["workload"]:
            labels.append(short_name(row["workload"]))
        places.append(len(labels))
        labels.append(_label(row))
    looks = mode_places(row["mode"] for row in rows)
    figure = empty_figure(0.9 + 0.24 * len(labels))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True), 1):
        low, high = _limits(panel)
        axes.set_xlim(low, high)
        axes.axvline(panel.neutral, color="#555555", linewidth=0.8, zorder=1, gid=f"neutral-{number}")
        if panel.limit is not None:
            axes.axvline(panel.limit, color="#555555", linewidth=0.8, linestyle="--", zorder=1)
        for which, (place, row, known) in enumerate(zip(places, rows, panel.known, strict=True), 1):
            if known is None:
                continue
            look = looks[row["mode"]]
            if not low <= known.value <= high:
                _beyond(axes, known.value, place, colour(look))
                continue
            bar = None
            if known.low is not None and known.high is not None:
                ends = max(known.low, low), min(known.high, high)
                bar = [[max(0.0, known.value - ends[0])], [max(0.0, ends[1] - known.value)]]
            drawn = axes.errorbar(
                [known.value], [place], xerr=bar, color=colour(look), marker=marker(look), markersize=5, elinewidth=1.1,
                capsize=2.5, linestyle="none", markerfacecolor=colour(look) if known.of_all else "white",
            )  # fmt: skip
            drawn.lines[0].set_gid(f"gain-{number}-{which}")
        axes.set_title(textwrap.fill(panel.title, _LINE // len(panels)), loc="left", size=10)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    grid[0].set_ylim(len(labels) - 0.5, -0.5)
    grid[0].set_yticks(range(len(labels)), labels)
    for place, label in enumerate(grid[0].get_yticklabels()):
        if place not in places:
            label.set_fontweight("bold")
    return figure


def _label(row: Row) -> str:
    """The mode, and what became of its cases where not all ended well: the others' figures do not show that."""
    name = short_name(row["mode"])
    return name if row["ok"] == row["cases"] and not row["not_started"] else f"{name} ({cells.statuses(row)})"


def _beyond(axes: Axes, value: float, place: int, shade: str) -> None:
    """Points to where a value lies that the axis does not reach, and says which."""
    low, high = axes.get_xlim()
    left = value < low
    axes.plot([low if left else high], [place], color=shade, marker="<" if left else ">", markersize=6, clip_on=False)
    axes.annotate(
        f"{value:+.0f}", (low if left else high, place), xytext=(8 if left else -8, 0), textcoords="offset points",
        ha="left" if left else "right", va="center", color=shade,
    )  # fmt: skip


def _limits(panel: _Panel) -> tuple[float, float]:
    """Ends of an axis: they hold the neutral value, estimates that are not far off, and of wide intervals a part."""
    known = [one for one in panel.known if one is not None and abs(one.value - panel.neutral) <= panel.most]
    held = [one.value for one in known] + [panel.neutral] + ([panel.limit] if panel.limit is not None else [])
    reach = max(abs(value - panel.neutral) for value in held)
    widest = panel.neutral - max(3 * reach, 0.5), panel.neutral + max(3 * reach, 0.5)
    ends = [end for one in known for end in (one.low, one.high) if end is not None]
    low, high = min(held + ends), max(held + ends)
    low, high = max(low, widest[0], panel.floor), min(high, widest[1])
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin
