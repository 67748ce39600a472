"""The picture of what each mode of a run buys and costs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpscale.analysis.summary import Row, summary_of
from mpscale.core.runs import Run
from mpscale.report import table as cells
from mpscale.report.figures import Picture, as_text, colour, empty_figure, house_style, marker, mode_places, short_name
from mpscale.report.table import metric_why

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpscale.core.columns import FAILED
from mpscale.core.runs import RunError
from mpscale.report.table import measured

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


_LINE = 72
"""Characters of titles that fit beside each other."""

_MOST_MARGINS = 5.0
"""Margins beyond which a difference of metrics is told in figures: a lost training must not flatten all others."""


def gains(run: Run) -> Picture | None:
    """Speed, memory, energy and metric of every mode over its baseline, as far as they are known, with intervals.

    None where there is no mode beside a baseline. In the SVG panel ``n`` has ``neutral-n``, the line of no difference,
    and the points ``gain-n-m``, ``m`` counting the summary's rows without those of fp32.
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


# The picture of how a run's training went: loss and loss scale, step by step.

_POINTS = 100
"""Points of a line of losses, each a mean over as many steps as it takes."""

_MARKS = 150
"""Most marks of overflow on a line of a loss scale."""

_LOG_FROM = 20.0
"""Largest over smallest loss from which the axis is logarithmic."""

_Float = npt.NDArray[np.float64]


def training(run: Run) -> Picture | None:
    """Loss and loss scale by step, of every workload whose cases left their steps; None where none did.

    In the SVG, crosses of the workload ``n`` are in groups ``overflow-n``, lines in ``loss-n`` and ``scale-n``.
    """
    by_workload: dict[str, dict[str, list[pd.DataFrame]]] = {}
    missing = 0
    for workload, mode, records in measured(run, trained=True):
        steps = [found for record in records if (found := _steps(run, str(record["case_id"]))) is not None]
        missing += len(records) - len(steps)
        if steps:
            by_workload.setdefault(workload, {})[mode] = steps
    if not by_workload:
        return None
    with house_style("training"):
        figure, scaled, overflowed = _training_figure(by_workload)
        svg = as_text(figure)
    caption = "Loss: mean over seeds and neighbouring steps; where a line ends, no loss was finite any more."
    stopped = [steps for modes in by_workload.values() for seeds in modes.values() for steps in _stopped(seeds)]
    if stopped:
        caption += (
            f" A triangle is the last finite loss of a seed ({len(stopped)} of them); from there on the line is the "
            "mean of the others."
        )
    failed = sum(record["repeat"] == 0 and record["status"] in FAILED for record in run.records)
    failed += sum(repeat == 0 for waiting in run.waiting.values() for _, repeat in waiting)
    if failed:
        caption += f" Failed or not started, and so not in it: {failed} training{'' if failed == 1 else 's'}."
    if scaled:
        caption += " Loss scale: a line a seed."
    if overflowed:
        caption += " A cross is a step that overflowed, or several beside each other."
    if missing:
        caption += f" Not drawn: {missing} training{'' if missing == 1 else 's'} whose steps cannot be read."
    return Picture("How training went", caption, svg)


def _steps(run: Run, case_id: str) -> pd.DataFrame | None:
    try:
        steps = run.steps(case_id)
    except RunError:
        return None  # One training less in the picture; its caption says so.
    return steps if len(steps) else None


def _training_figure(by_workload: dict[str, dict[str, list[pd.DataFrame]]]) -> tuple[Figure, bool, bool]:
    """The figure, whether a loss scale is in it, and whether an overflow is."""
    looks = mode_places(mode for modes in by_workload.values() for mode in modes)
    scaled = any(
        _has_scale(steps) for modes in by_workload.values() for all_steps in modes.values() for steps in all_steps
    )
    figure = empty_figure(0.6 + 2.3 * len(by_workload))
    grid = figure.subplots(len(by_workload), 2 if scaled else 1, squeeze=False)
    overflowed = False
    for number, ((workload, modes), row) in enumerate(zip(by_workload.items(), grid, strict=True), 1):
        _losses(row[0], number, modes, looks)
        row[0].set_title(f"{short_name(workload)}: loss", loc="left", size=10)
        if scaled:
            overflowed |= _scales(row[1], number, modes, looks)
            row[1].set_title(f"{short_name(workload)}: loss scale", loc="left", size=10)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    seen = dict.fromkeys(mode for modes in by_workload.values() for mode in modes)
    handles = [_line_of(mode, looks[mode]) for mode in sorted(seen, key=lambda mode: looks[mode])]
    figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), 8), frameon=False)
    return figure, scaled, overflowed


def _line_of(mode: str, look: int) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour(look), linewidth=1.6, label=short_name(mode))


def _losses(axes: Axes, number: int, modes: dict[str, list[pd.DataFrame]], looks: dict[str, int]) -> None:
    shown: list[float] = []
    for mode, seeds in modes.items():
        where, means = _mean_loss([steps["loss"].to_numpy(float, na_value=math.nan) for steps in seeds])
        axes.plot(where, means, color=colour(looks[mode]), linewidth=1.3, gid=f"loss-{number}")
        ends = _stopped(seeds)
        if ends:
            axes.plot(
                *zip(*ends, strict=True), linestyle="none", marker="v", markersize=6, color=colour(looks[mode]),
                gid=f"lost-{number}",
            )  # fmt: skip
            shown += [loss for _, loss in ends]
        shown += [value for value in means if math.isfinite(value)]
    if shown and min(shown) > 0 and max(shown) > _LOG_FROM * min(shown):
        axes.set_yscale("log")
        _label_training_figure(axes, "{:g}".format)


def _stopped(seeds: Sequence[pd.DataFrame]) -> list[tuple[int, float]]:
    """Step and loss where a seed had its last finite loss while another one went on."""
    finite = [np.flatnonzero(np.isfinite(steps["loss"].to_numpy(float, na_value=math.nan))) for steps in seeds]
    last = [int(where[-1]) for where in finite if len(where)]
    whole = max((len(steps) for steps in seeds), default=0)
    found = []
    for steps, where in zip(seeds, finite, strict=True):
        # Losses that come back were a spell of overflow, which the mean leaves out.
        if len(where) and where[-1] < max(last) and where[-1] < whole - 1:
            found.append((int(where[-1]), float(steps["loss"].iloc[where[-1]])))
    return found


def _mean_loss(seeds: Sequence[_Float]) -> tuple[_Float, _Float]:
    """Middles of at most :data:`_POINTS` spans of steps, and the mean of the finite losses in each."""
    longest = max(len(losses) for losses in seeds)
    width = math.ceil(longest / _POINTS)
    spans = np.full((len(seeds), math.ceil(longest / width), width), math.nan)
    for number, losses in enumerate(seeds):
        spans[number].reshape(-1)[: len(losses)] = np.where(np.isfinite(losses), losses, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # A span without a finite loss is a gap.
        means: _Float = np.nanmean(spans, axis=(0, 2)).astype(np.float64)
    middles: _Float = np.arange(len(means), dtype=np.float64) * width + (width - 1) / 2
    return middles, means


def _scales(axes: Axes, number: int, modes: dict[str, list[pd.DataFrame]], looks: dict[str, int]) -> bool:
    """Draws loss scales; whether a step overflowed."""
    overflowed = False
    shown: list[float] = []
    for mode, seeds in modes.items():
        for steps in filter(_has_scale, seeds):
            scale = steps["loss_scale"].to_numpy(float, na_value=math.nan)
            # An axis of powers of two has no place for 0.
            scale = np.where(np.isfinite(scale) & (scale > 0), scale, math.nan)
            corners = _corners(scale)
            look: dict[str, Any] = {"color": colour(looks[mode]), "alpha": 0.8}
            axes.plot(corners, scale[corners], linewidth=1.3, drawstyle="steps-post", gid=f"scale-{number}", **look)
            overflow = np.flatnonzero(steps["overflow"].to_numpy(bool, na_value=False))
            marked = _thinned(overflow, len(scale))
            axes.plot(
                marked, scale[marked], linestyle="none", marker="x", markersize=4, gid=f"overflow-{number}", **look
            )
            overflowed |= len(overflow) > 0
            shown += [value for value in scale[corners] if math.isfinite(value)]
    axes.set_yscale("log", base=2)
    _label_training_figure(axes, cells.loss_scale)
    axes.set_ylim(min(shown, default=1.0) / 2, max(shown, default=1.0) * 2)
    return overflowed


def _label_training_figure(axes: Axes, text: Callable[[float], str]) -> None:
    """Numbers at a logarithmic axis as ``text`` has them: matplotlib's own are formulas, which no browser draws."""
    from matplotlib.ticker import NullFormatter

    axes.yaxis.set_major_formatter(lambda value, _: text(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _has_scale(steps: pd.DataFrame) -> bool:
    return bool(steps["loss_scale"].notna().any())


def _corners(values: _Float) -> npt.NDArray[np.int64]:
    """Where a line that goes in steps has to have a point: its ends, and wherever it changes."""
    changes = np.flatnonzero(~((values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1])))) + 1
    return np.unique(np.concatenate([[0], changes, [len(values) - 1]])).astype(np.int64)


def _thinned(places: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Of places that would be drawn upon each other the first."""
    if len(places) == 0:
        return places
    _, first = np.unique(places * _MARKS // length, return_index=True)
    return places[first]
