"""The picture of how a run's training went: loss and loss scale, step by step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpscale.analysis.runs import Run, RunError
from mpscale.columns import FAILED
from mpscale.report import cells
from mpscale.report.figures import Picture, as_text, colour, empty_figure, house_style, mode_places, short_name
from mpscale.report.groups import measured

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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
    failed += sum(repeat == 0 for _, _, (_, repeat) in run.places_not_started)
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
        _label(axes, "{:g}".format)


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
    _label(axes, cells.loss_scale)
    axes.set_ylim(min(shown, default=1.0) / 2, max(shown, default=1.0) * 2)
    return overflowed


def _label(axes: Axes, text: Callable[[float], str]) -> None:
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
