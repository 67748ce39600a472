"""The pictures of a run: what each mode gains and costs, and how training went."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpscale.analysis.claim import doubts_of
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.columns import FAILED
from mpscale.core.record import modes_of, place_of
from mpscale.core.runs import Run, RunError
from mpscale.report.figures import (
    Look,
    Picture,
    as_text,
    empty_figure,
    house_style,
    legend_columns,
    looks,
    short_name,
)
from mpscale.report.sections import measured, metric_why, statuses
from mpscale.report.table import loss_scale, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE = 72
"""Characters of panel titles that fit into the width of the figure."""

_MOST_MARGINS = 5.0
"""Margins beyond which a difference of metrics is written as a number: a lost training must not flatten the others."""

_SEEDS = 10
"""Most seeds that are drawn per workload and mode: more lines would be indistinguishable, and slow to read."""

_POINTS = 100
"""Most points on a line of losses, each a mean over as many steps as necessary."""

_MARKERS, _MARKERS_PER_LINE = 60, 5
"""Markers of modes in a panel, approximately; most markers on a line."""

_CROSSES = 150
"""Most crosses, which show overflow, on a line of a loss scale."""

_Float = npt.NDArray[np.float64]
_Int = npt.NDArray[np.int64]


def gains(run: Run) -> Picture | None:
    """Draw speed, memory, energy and metric of every mode relative to its baseline, as far as known, with intervals.

    Return None if no mode can be compared with a baseline. In the SVG, panel ``n`` has ``neutral-n``, the line of no
    difference, and the points ``gain-n-m``, where ``m`` counts the rows of the summary except those of fp32.
    """
    rows = [row for row in summary_of(run) if row["mode"] != "fp32"]
    panels = [panel for panel in _panels(rows) if any(known is not None for known in panel.known)]
    if not panels:
        return None
    with house_style("gains"):
        svg = as_text(_gains_figure(rows, panels))
    captions = [panel.caption for panel in panels] + list(_what_is_missing(summary_of(run), panels))
    return Picture("What each mode buys and costs", " ".join(captions), svg)


@dataclass(frozen=True)
class _Known:
    """An estimate, with the ends of its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None
    of_all: bool = True
    """Whether it covers all processes, or all seeds."""


@dataclass(frozen=True)
class _Panel:
    """One quantity of all rows: a value for each, or None."""

    title: str
    caption: str
    known: Sequence[_Known | None]
    neutral: float
    """The value of no difference."""
    limit: float | None = None
    """The value beyond which a difference matters."""
    floor: float = -math.inf
    """The lowest possible value."""
    most: float = math.inf
    """How far the axis may reach from ``neutral``; values beyond are written as numbers."""


def _panels(rows: Sequence[Row]) -> list[_Panel]:
    baselines = {row["headline_baseline"] for row in rows if row["headline_baseline"]}
    baseline = baselines.pop() if len(baselines) == 1 else "the default"
    return [
        _Panel(
            f"speed-up over {baseline}",
            "Speed-up: right of the line is faster. Bars are 95 % intervals; wide ones are cut off.",
            [_speed(row) for row in rows],
            neutral=1.0,
            floor=0.0,
        ),
        _Panel(
            f"speed-up over {baseline} by GPU time alone",
            "By GPU time: of rows whose step time shows no speed-up, how much faster the kernels are.",
            [_device_time(row) for row in rows],
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
    if row["mode"] == row["headline_baseline"] or row.get(name) is None or doubts_of(row, row["headline_baseline"]):
        return None
    return _Known(row[name], row[f"{name}_low"], row[f"{name}_high"], _is_of_all(row, f"{name}_pairs"))


def _device_time(row: Row) -> _Known | None:
    """Return the speed-up by GPU time where none by step time is drawn; None also if one pair gives no interval."""
    name = f"speedup_device_{row['headline_baseline']}"
    if not doubts_of(row, row["headline_baseline"]) or row[name] is None or row[f"{name}_low"] is None:
        return None
    return _Known(row[name], row[f"{name}_low"], row[f"{name}_high"], _is_of_all(row, f"{name}_pairs"))


def _cost(title: str, what: str, rows: Sequence[Row], column: str) -> _Panel:
    known = [
        _Known(row[f"{column}_ratio"], of_all=_is_of_all(row, f"{column}_processes"))
        if row[f"{column}_ratio"] is not None
        else None
        for row in rows
    ]
    return _Panel(title, f"{what}: left of the line is less.", known, neutral=1.0, floor=0.0)


def _is_of_all(row: Row, processes: str) -> bool:
    return bool(row[processes] >= row["cases"] + row["not_started"])


def _what_is_missing(rows: Sequence[Row], panels: Sequence[_Panel]) -> Iterator[str]:
    """Yield sentences on what the picture shows only in part or not at all."""
    if any(known is not None and not known.of_all for panel in panels for known in panel.known):
        yield "Hollow: some seeds or processes are not in it, so it may look better than it is."
    for row in rows:
        name = ", ".join(map(short_name, place_of(row)))
        if row["mode"] == "fp32" and (row["ok"] != row["cases"] or row["not_started"]):
            yield f"Compared with what is left of {name}: {statuses(row)}."
        if doubts := doubts_of(row, row["headline_baseline"]):
            yield f"No speed-up drawn for {name}: {', and '.join(doubt.text for doubt in doubts)}."
        if row["metric_verdict"] is not None and _metric(row) is None:
            yield f"No metric drawn for {name}: {metric_why(row) or 'it is unknown'}."


def _metric(row: Row) -> _Known | None:
    """Return the difference to fp32 in margins, above 0 if the mode is better; None if the direction is unknown."""
    if row["metric_difference"] is None or not row["metric_margin"] or row["metric_higher_is_better"] is None:
        return None
    unit = row["metric_margin"] if row["metric_higher_is_better"] else -row["metric_margin"]
    ends = (row["metric_difference_low"], row["metric_difference_high"])
    low, high = (None, None) if None in ends else sorted(end / unit for end in ends)
    return _Known(row["metric_difference"] / unit, low, high, row["metric_pairs"] >= row["seeds_planned"])


def _gains_figure(rows: Sequence[Row], panels: Sequence[_Panel]) -> Figure:
    labels: list[str] = []
    places: list[int] = []
    for number, row in enumerate(rows):
        workload = place_of(row)[0]
        if number == 0 or workload != place_of(rows[number - 1])[0]:
            labels.append(short_name(workload))
        places.append(len(labels))
        labels.append(_label(row))
    look_of = looks(row["mode"] for row in rows)
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
            look = look_of[row["mode"]]
            if not low <= known.value <= high:
                _beyond(axes, known.value, place, look.colour)
                continue
            bar = None
            if known.low is not None and known.high is not None:
                below, above = known.value - max(known.low, low), min(known.high, high) - known.value
                bar = [[max(0.0, below)], [max(0.0, above)]]
            drawn = axes.errorbar(
                [known.value], [place], xerr=bar, color=look.colour, marker=look.marker, markersize=5, elinewidth=1.1,
                capsize=2.5, linestyle="none", markerfacecolor=look.colour if known.of_all else "white",
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
    """Return the mode, with the statuses of its cases unless all ended well: the figures are of those that did."""
    name = short_name(place_of(row)[1])
    return name if row["ok"] == row["cases"] and not row["not_started"] else f"{name} ({statuses(row)})"


def _beyond(axes: Axes, value: float, place: int, colour: str) -> None:
    """Point towards a value beyond the axis, and write the value there."""
    low, high = axes.get_xlim()
    end, marker, side, inwards = (low, "<", "left", 8) if value < low else (high, ">", "right", -8)
    axes.plot([end], [place], color=colour, marker=marker, markersize=6, clip_on=False)
    axes.annotate(
        f"{value:+.0f}", (end, place), xytext=(inwards, 0), textcoords="offset points", ha=side, va="center",
        color=colour,
    )  # fmt: skip


def _limits(panel: _Panel) -> tuple[float, float]:
    """Return the ends of an axis: it includes the neutral value and estimates near it, and cuts off wide intervals."""
    known = [one for one in panel.known if one is not None and abs(one.value - panel.neutral) <= panel.most]
    held = [one.value for one in known] + [panel.neutral] + ([panel.limit] if panel.limit is not None else [])
    reach = max(abs(value - panel.neutral) for value in held)
    widest = panel.neutral - max(3 * reach, 0.5), panel.neutral + max(3 * reach, 0.5)
    ends = [end for one in known for end in (one.low, one.high) if end is not None]
    low, high = min(held + ends), max(held + ends)
    low, high = max(low, widest[0], panel.floor), min(high, widest[1])
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


@dataclass(frozen=True, slots=True)
class _Steps:
    """A training, step by step. NaN is unknown, or not a number."""

    loss: _Float
    loss_scale: _Float
    overflow: npt.NDArray[np.bool_]

    @property
    def finite(self) -> _Int:
        """The steps with a finite loss."""
        return np.flatnonzero(np.isfinite(self.loss))

    @property
    def has_scale(self) -> bool:
        return not np.isnan(self.loss_scale).all()


def training(run: Run) -> Picture | None:
    """Draw loss and loss scale by step, for every workload with logs of steps; return None if there are none.

    In the SVG, the lines of workload ``n`` are in groups ``loss-n`` and ``scale-n``, its crosses in ``overflow-n``.
    """
    by_workload: dict[str, dict[str, list[_Steps]]] = {}
    unreadable, limited = 0, False
    for workload, mode, records in measured(run, trained=True):
        first = sorted(records, key=lambda record: record["seed"])[:_SEEDS]
        steps = [found for record in first if (found := _read_steps(run, str(record["case_id"]))) is not None]
        unreadable += len(first) - len(steps)
        limited |= len(first) < len(records)
        if steps:
            by_workload.setdefault(workload, {})[mode] = steps
    if not by_workload:
        return None
    look_of = looks(modes_of(record for _, _, records in measured(run, trained=True) for record in records))
    with house_style("training"):
        figure, scaled, overflowed = _training_figure(by_workload, look_of)
        svg = as_text(figure)
    stopped = sum(len(_stopped(seeds)) for modes in by_workload.values() for seeds in modes.values())
    failed = sum(record["repeat"] == 0 and record["status"] in FAILED for record in run.records)
    failed += sum(repeat == 0 for waiting in run.waiting.values() for _, repeat in waiting)
    captions = {
        "Loss: mean over seeds and neighbouring steps; a line ends after its last finite loss.": True,
        f"Drawn: the first {_SEEDS} seeds of each mode.": limited,
        f"A star is the last finite loss of a seed ({stopped} of them); from there on the line is the mean of the "
        "others.": stopped,
        f"Failed or not started, and so not in it: {plural(failed, 'training')}.": failed,
        "Loss scale: a line per seed.": scaled,
        "A cross is a step that overflowed, or several next to each other.": overflowed,
        f"Not drawn: {plural(unreadable, 'training')} whose steps cannot be read.": unreadable,
    }
    return Picture("How training went", " ".join(text for text, applies in captions.items() if applies), svg)


def _read_steps(run: Run, case_id: str) -> _Steps | None:
    """Return the steps of a case; None if there are none, or they cannot be read, which the caption counts."""
    try:
        columns = run.step_columns(case_id)
    except RunError:
        return None
    if not columns["loss"]:
        return None
    # None becomes NaN.
    loss, scale = (np.array(columns[name], dtype=np.float64) for name in ("loss", "loss_scale"))
    return _Steps(loss, scale, np.array([overflow is True for overflow in columns["overflow"]]))


def _training_figure(
    by_workload: Mapping[str, Mapping[str, Sequence[_Steps]]], looks_of_all: Mapping[str, Look]
) -> tuple[Figure, bool, bool]:
    """Return the figure, whether it shows a loss scale, and whether it shows an overflow."""
    from matplotlib.lines import Line2D

    drawn = {mode for modes in by_workload.values() for mode in modes}
    look_of = {mode: look for mode, look in looks_of_all.items() if mode in drawn}
    scaled = any(steps.has_scale for modes in by_workload.values() for seeds in modes.values() for steps in seeds)
    figure = empty_figure(0.6 + 2.3 * len(by_workload))
    grid = figure.subplots(len(by_workload), 2 if scaled else 1, squeeze=False)
    overflowed = False
    for number, ((workload, modes), row) in enumerate(zip(by_workload.items(), grid, strict=True), 1):
        _draw_losses(row[0], number, modes, look_of)
        row[0].set_title(f"{short_name(workload)}: loss", loc="left", size=10)
        if scaled:
            overflowed |= _draw_scales(row[1], number, modes, look_of)
            row[1].set_title(f"{short_name(workload)}: loss scale", loc="left", size=10)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    handles = [
        Line2D([], [], color=look.colour, linewidth=1.6, marker=look.marker, markersize=5, label=short_name(mode))
        for mode, look in look_of.items()
    ]
    columns = legend_columns(figure, [short_name(mode) for mode in look_of])
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False)
    return figure, scaled, overflowed


def _draw_losses(axes: Axes, number: int, modes: Mapping[str, Sequence[_Steps]], look_of: Mapping[str, Look]) -> None:
    known: list[float] = []
    for line, (mode, seeds) in enumerate(modes.items()):
        look = look_of[mode]
        where, means = _mean_loss([steps.loss for steps in seeds])
        axes.plot(where, means, color=look.colour, linewidth=1.3, gid=f"loss-{number}")
        marked = _marked(len(where), line, len(modes))
        axes.plot(where[marked], means[marked], **_marks(look))
        ends = _stopped(seeds)
        if ends:
            steps, losses = zip(*ends, strict=True)
            axes.plot(steps, losses, "*", markersize=11, color=look.colour, gid=f"lost-{number}")
            known += losses
        known += means[np.isfinite(means)].tolist()
    if known and min(known) > 0 and max(known) > 20 * min(known):
        axes.set_yscale("log")
        _write_ticks(axes, "{:g}".format)


def _stopped(seeds: Sequence[_Steps]) -> list[tuple[int, float]]:
    """Return step and value of the last finite loss of each seed that was lost before another one ended."""
    # Losses that become finite again were interrupted by overflow; the mean leaves the gap out.
    ends = [(int(steps.finite[-1]), steps.loss) for steps in seeds if len(steps.finite)]
    last = max((end for end, _ in ends), default=0)
    whole = max((len(steps.loss) for steps in seeds), default=0)
    return [(end, float(loss[end])) for end, loss in ends if end < last and end < whole - 1]


def _mean_loss(seeds: Sequence[_Float]) -> tuple[_Float, _Float]:
    """Return the centres of at most :data:`_POINTS` spans of steps, and the mean of the finite losses in each."""
    longest = max(len(losses) for losses in seeds)
    width = math.ceil(longest / _POINTS)
    spans = np.full((len(seeds), math.ceil(longest / width), width), math.nan)
    for number, losses in enumerate(seeds):
        spans[number].reshape(-1)[: len(losses)] = np.where(np.isfinite(losses), losses, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # A span without a finite loss is a gap.
        means: _Float = np.nanmean(spans, axis=(0, 2)).astype(np.float64)
    centres: _Float = np.arange(len(means), dtype=np.float64) * width + (width - 1) / 2
    return centres, means


def _draw_scales(axes: Axes, number: int, modes: Mapping[str, Sequence[_Steps]], look_of: Mapping[str, Look]) -> bool:
    """Draw the loss scales of a workload. Return whether a step overflowed."""
    overflowed = False
    known: list[float] = []
    lines = [(look_of[mode], steps) for mode, seeds in modes.items() for steps in seeds if steps.has_scale]
    for line, (look, steps) in enumerate(lines):
        # A logarithmic axis has no place for 0.
        usable = np.isfinite(steps.loss_scale) & (steps.loss_scale > 0)
        scale = np.where(usable, steps.loss_scale, math.nan)
        corners = _corners(scale)
        axes.plot(
            corners, scale[corners], color=look.colour, alpha=0.8, linewidth=1.3, drawstyle="steps-post",
            gid=f"scale-{number}",
        )  # fmt: skip
        marked = _marked(len(scale), line, len(lines))
        axes.plot(marked, scale[marked], **_marks(look))
        overflow = np.flatnonzero(steps.overflow)
        crossed = _thinned(overflow, len(scale))
        axes.plot(
            crossed, scale[crossed], color=look.colour, alpha=0.8, linestyle="none", marker="x", markersize=4,
            gid=f"overflow-{number}",
        )  # fmt: skip
        overflowed |= len(overflow) > 0
        known += scale[usable].tolist()
    axes.set_yscale("log", base=2)
    _write_ticks(axes, loss_scale)
    axes.set_ylim(min(known, default=1.0) / 2, max(known, default=1.0) * 2)
    return overflowed


def _marks(look: Look) -> dict[str, Any]:
    return {"color": look.colour, "linestyle": "none", "marker": look.marker, "markersize": 4}


def _marked(length: int, line: int, lines: int) -> _Int:
    """Return places for the markers of a line, evenly spaced and away from those of the other lines."""
    each = max(1, min(_MARKERS_PER_LINE, _MARKERS // lines))
    places = (np.arange(each) + (line + 0.5) / lines) * length / each
    return np.unique(places.astype(np.int64))


def _write_ticks(axes: Axes, text: Callable[[float], str]) -> None:
    """Write the numbers of a logarithmic axis with ``text``: matplotlib's are formulas, which browsers cannot draw."""
    from matplotlib.ticker import NullFormatter

    axes.yaxis.set_major_formatter(lambda value, _: text(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _corners(values: _Float) -> _Int:
    """Return the places at which a stepped line needs a point: its ends and its changes."""
    changes = np.flatnonzero(~((values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1])))) + 1
    return np.unique(np.concatenate([[0], changes, [len(values) - 1]])).astype(np.int64)


def _thinned(places: _Int, length: int) -> _Int:
    """Leave out places that would be drawn on top of another one."""
    _, first = np.unique(places * _CROSSES // length, return_index=True)
    return places[first]
