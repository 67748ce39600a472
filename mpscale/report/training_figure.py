"""The picture of training: how the loss of each mode differs from fp32's, where steps overflowed, the loss scale."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpscale.core.columns import FAILED
from mpscale.core.record import modes_of
from mpscale.core.runs import Run, RunError
from mpscale.report.figures import SOFT, Look, Picture, as_text, house_style, looks
from mpscale.report.panels import (
    SMALL,
    Group,
    difference_axis,
    multiples,
    neutral_line,
    panel_title,
    power_ticks,
    scale_label,
    signed,
    width_of,
)
from mpscale.report.sections import measured
from mpscale.report.table import number, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOW_TRAINING_WENT = "How training went"
"""The title of the figure."""

_SEEDS = 10
"""Most seeds that are drawn per workload and mode: more lines would be indistinguishable, and slow to read."""

_POINTS = 60
"""Most points on a line of losses, each a mean over as many steps as necessary."""

_TICKS = 120
"""Most overflows that are drawn apart along an axis; nearer ones are one. Also most corners of a loss scale."""

_FLATTENED = 4.0
"""How many times the typical mode's difference an axis shows: a lost training must not flatten the others."""

_KEPT = 0.1
"""Differences of up to this share of what training takes off fp32's loss are always within the axis."""

_OF_THE_FALL = 0.02
"""The least that an axis of differences shows, as a share of what training takes off fp32's loss."""

_Float = npt.NDArray[np.float64]
_Int = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Steps:
    """A training, step by step. NaN is unknown, or not a number."""

    loss: _Float
    loss_scale: _Float
    overflow: npt.NDArray[np.bool_]

    @property
    def last(self) -> int:
        """The last step with a finite loss; -1 if there is none."""
        finite = np.flatnonzero(np.isfinite(self.loss))
        return int(finite[-1]) if len(finite) else -1

    @property
    def scales(self) -> _Float:
        """The loss scales that a logarithmic axis can show, in their order."""
        return self.loss_scale[np.isfinite(self.loss_scale) & (self.loss_scale > 0)]

    @property
    def scale_moved(self) -> bool:
        return len(self.scales) > 0 and bool(self.scales.min() < self.scales.max())


_Seeds = Mapping[int, _Steps]


@dataclass(frozen=True, slots=True)
class _Line:
    """What is drawn of a mode: means over seeds at the centres of spans of steps, and the extreme seeds."""

    where: _Float
    mean: _Float
    low: _Float
    high: _Float
    stars: Sequence[tuple[float, float]]
    """Last finite loss of the seeds that were lost, or the difference there."""

    def reach(self) -> float:
        """The largest distance of a mean from 0."""
        finite = self.mean[np.isfinite(self.mean)]
        return float(np.abs(finite).max()) if len(finite) else 0.0


@dataclass(frozen=True)
class _Workload:
    """The panels of a workload.

    Args:
        name: the workload.
        remark: what the lines are, and how fp32 went.
        lines: by mode.
        is_difference: whether they are differences to fp32.
        fall: what training takes off fp32's loss.
        steps: of the longest training.
    """

    name: str
    remark: str
    lines: Mapping[str, _Line]
    seeds: Mapping[str, _Seeds]
    is_difference: bool
    fall: float
    steps: int


def training(run: Run) -> Picture | None:
    """Draw the loss of each mode, as a difference to fp32's of the same seed, the overflows, and a scale that moved.

    Return None if no steps were kept. In the SVG, panel ``m`` of workload ``w`` has ``loss-w-m``, and where there are
    any ``lost-w-m``, ``overflow-w-m`` and, a line for each seed, ``scale-w-m``.
    """
    by_workload: dict[str, dict[str, _Seeds]] = {}
    unreadable, limited = 0, False
    for workload, mode, records in measured(run, trained=True):
        first = sorted(records, key=lambda record: record["seed"])[:_SEEDS]
        steps = {record["seed"]: _read_steps(run, str(record["case_id"])) for record in first}
        known = {seed: found for seed, found in steps.items() if found is not None}
        unreadable += len(first) - len(known)
        limited |= len(first) < len(records)
        if known:
            by_workload.setdefault(workload, {})[mode] = known
    if not by_workload:
        return None
    look_of = looks(modes_of(record for _, _, records in measured(run, trained=True) for record in records))
    workloads = [_workload(name, modes) for name, modes in by_workload.items()]
    shown = [seeds for workload in workloads for seeds in workload.seeds.values()]
    with house_style("training"):
        svg = as_text(
            _figure(workloads, look_of), f"{HOW_TRAINING_WENT}: loss, overflows and loss scale of each mode by step"
        )
    failed = sum(record["repeat"] == 0 and record["status"] in FAILED for record in run.records)
    failed += sum(repeat == 0 for waiting in run.waiting.values() for _, repeat in waiting)
    stars = sum(len(line.stars) for workload in workloads for line in workload.lines.values())
    unpaired = sum(len(by_workload[w.name]) - 1 - len(w.lines) for w in workloads if w.is_difference)
    lines = [line for workload in workloads for line in workload.lines.values()]
    captions = {
        "Loss minus that of fp32 with the same seed: mean over seeds and neighbouring steps; below 0, the loss is "
        "lower than fp32's.": any(workload.is_difference for workload in workloads),
        "Loss: mean over seeds and neighbouring steps.": not any(workload.is_difference for workload in workloads),
        "The area reaches from the lowest to the highest seed.": any((line.low < line.high).any() for line in lines),
        f"Drawn: the first {_SEEDS} seeds of each mode.": limited,
        f"A star is the last finite loss of a seed ({stars} of them); from there on the line is the mean of the "
        "others.": stars,
        "A triangle at the edge: the line goes beyond it, up to the number there.": any(
            line.reach() > _reach(workload) for workload in workloads for line in workload.lines.values()
        ),
        f"Failed or not started, and so not in it: {plural(failed, 'training')}.": failed,
        "Ticks along the axis: steps that overflowed.": any(_overflows(seeds) for seeds in shown),
        "Below, where it moved: the loss scale, a line per seed.": any(_moved(seeds) for seeds in shown),
        f"Not drawn: {plural(unreadable, 'training')} whose steps cannot be read.": unreadable,
        f"Not drawn: {plural(unpaired, 'mode')} without a seed that fp32 has.": unpaired,
    }
    return Picture(HOW_TRAINING_WENT, " ".join(text for text, applies in captions.items() if applies), svg, unreadable)


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


def _workload(name: str, modes: Mapping[str, _Seeds]) -> _Workload:
    longest = max(len(steps.loss) for seeds in modes.values() for steps in seeds.values())
    last = max(steps.last for seeds in modes.values() for steps in seeds.values())
    baseline, others = modes.get("fp32", {}), {mode: seeds for mode, seeds in modes.items() if mode != "fp32"}
    paired = {
        mode: {seed: steps for seed, steps in seeds.items() if seed in baseline} for mode, seeds in others.items()
    }
    paired = {mode: seeds for mode, seeds in paired.items() if seeds}
    steps_text = plural(longest, "step").replace(str(longest), f"{longest:,}")
    if paired:
        lines = {mode: _line(seeds, baseline, longest, last) for mode, seeds in paired.items()}
        means = [_spans(steps.loss, longest)[1] for steps in baseline.values()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            course = np.nanmean(means, axis=0)
        known = course[np.isfinite(course)]
        first, end = (float(known[0]), float(known[-1])) if len(known) else (0.0, 0.0)
        remark = f"loss minus fp32's, which went from {_loss(first)} to {_loss(end)} in {steps_text}"
        return _Workload(name, remark, lines, paired, is_difference=True, fall=abs(first - end), steps=longest)
    why = "no fp32 to compare it with: " if not baseline else ""
    lines = {mode: _line(seeds, None, longest, last) for mode, seeds in modes.items()}
    return _Workload(
        name, f"{why}the loss itself, {steps_text}", lines, modes, is_difference=False, fall=0.0, steps=longest
    )


def _loss(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else number(value)


def _line(seeds: _Seeds, baseline: _Seeds | None, longest: int, last: int) -> _Line:
    """Return the line of a mode.

    Args:
        seeds: of the mode.
        baseline: fp32's, from which it is a difference; None draws the loss itself.
        longest: the number of steps of the longest training of the workload.
        last: the last step of the workload with a finite loss.
    """
    rows, stars = [], []
    where = np.empty(0)
    for seed, steps in seeds.items():
        where, values = _spans(steps.loss, longest)
        if baseline is not None:
            values = values - _spans(baseline[seed].loss, longest)[1]
        rows.append(values)
        # Losses that become finite again were interrupted by overflow; the mean leaves the gap out.
        if 0 <= steps.last < last:
            ends = values[np.isfinite(values)]
            if len(ends):
                stars.append((float(steps.last), float(ends[-1])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # A span without a finite loss is a gap.
        mean, low, high = (of(rows, axis=0) for of in (np.nanmean, np.nanmin, np.nanmax))
    return _Line(where, mean, low, high, stars)


def _spans(losses: _Float, longest: int) -> tuple[_Float, _Float]:
    """Return the centres of at most :data:`_POINTS` spans of steps, and the mean of the finite losses in each."""
    width = math.ceil(longest / _POINTS)
    spans = np.full((math.ceil(longest / width), width), math.nan)
    spans.reshape(-1)[: len(losses)] = np.where(np.isfinite(losses), losses, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        means: _Float = np.nanmean(spans, axis=1).astype(np.float64)
    centres: _Float = np.arange(len(means), dtype=np.float64) * width + (width - 1) / 2
    return centres, means


def _overflows(seeds: _Seeds) -> int:
    return sum(int(steps.overflow.sum()) for steps in seeds.values())


def _moved(seeds: _Seeds) -> bool:
    return any(steps.scale_moved for steps in seeds.values())


def _remarks(seeds: _Seeds) -> tuple[str, ...]:
    """Say what the loss scale was and how many steps overflowed, in full or in short."""
    scales = np.concatenate([steps.scales for steps in seeds.values()])
    if not len(scales):
        return ()
    ends = " to ".join(dict.fromkeys(scale_label(float(end)) for end in (scales.min(), scales.max())))
    overflow = f"overflow {_overflows(seeds):,}/{sum(len(steps.loss) for steps in seeds.values()):,}"
    return f"scale {ends}, {overflow}", f"{ends}, {overflow}", overflow


def _reach(workload: _Workload) -> float:
    """Return how far from 0 the differences of a workload are drawn; infinite for a loss itself."""
    if not workload.is_difference:
        return math.inf
    each = [reach for line in workload.lines.values() if (reach := line.reach())]
    if not each:
        return 1.0
    return min(max(each), max(_FLATTENED * statistics.median(each), _KEPT * workload.fall))


def _figure(workloads: Sequence[_Workload], look_of: Mapping[str, Look]) -> Figure:
    groups = [
        Group(
            workload.name, workload.remark, len(workload.lines),
            (0.95, 0.5) if any(map(_moved, workload.seeds.values())) else (0.95,),
        )
        for workload in workloads
    ]  # fmt: skip
    figure, panels = multiples(groups, foot=0.2)
    for place, (workload, axes_of) in enumerate(zip(workloads, panels, strict=True), 1):
        limits = _limits(workload)
        scales = [steps.scales for seeds in workload.seeds.values() for steps in seeds.values() if _moved(seeds)]
        for which, ((mode, line), stacked) in enumerate(zip(workload.lines.items(), axes_of, strict=True), 1):
            seeds, look = workload.seeds[mode], look_of[mode]
            panel_title(figure, stacked[0], mode, *_remarks(seeds))
            _draw_losses(stacked[0], workload, line, look, limits, f"{place}-{which}")
            _draw_overflows(stacked[0], seeds, look, f"overflow-{place}-{which}")
            lowest = stacked[0]
            if len(stacked) == 2:
                if _moved(seeds):
                    stacked[0].tick_params(labelbottom=False)
                    _draw_scales(stacked[1], seeds, look, np.concatenate(scales), f"scale-{place}-{which}")
                    stacked[1].set_xlim(stacked[0].get_xlim())
                    lowest = stacked[1]
                else:
                    stacked[1].remove()
            _step_ticks(lowest, width_of(figure, lowest))
            if which == 1 and workload is workloads[-1]:
                lowest.set_xlabel("step", size=SMALL, labelpad=1)
    return figure


def _step_ticks(axes: Axes, pixels: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=min(10, max(2, int(pixels // 50))), steps=[1, 2, 5, 10], integer=True)
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _limits(workload: _Workload) -> tuple[float, float]:
    """Return the ends of the axis of losses."""
    reach = _reach(workload)
    ends = [end for line in workload.lines.values() for end in (line.low, line.high, line.mean)]
    drawn = np.concatenate([*ends, [y for line in workload.lines.values() for _, y in line.stars]])
    drawn = np.clip(drawn[np.isfinite(drawn)], -reach, reach)
    low, high = (float(drawn.min()), float(drawn.max())) if len(drawn) else (0.0, 0.0)
    if workload.is_difference:
        least = _OF_THE_FALL * workload.fall / 2
        low, high = min(low, -least), max(high, least)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - 1.6 * room, high + room


def _draw_losses(
    axes: Axes, workload: _Workload, line: _Line, look: Look, limits: tuple[float, float], gid: str
) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = limits
    positive = not workload.is_difference and min(
        (float(np.nanmin(one.low)) for one in workload.lines.values() if np.isfinite(one.low).any()), default=0.0
    )
    if (line.low < line.high).any():
        axes.fill_between(line.where, line.low, line.high, color=look.colour, alpha=0.2, linewidth=0)
    axes.plot(line.where, line.mean, color=look.colour, linewidth=1.3, gid=f"loss-{gid}")
    axes.set_xlim(-0.01 * workload.steps, 1.01 * workload.steps)
    if not np.isfinite(line.mean).any():
        axes.text(0.5, 0.7, "no finite loss", transform=axes.transAxes, ha="center", size=SMALL, color=SOFT)
    if line.stars:
        steps, losses = zip(*line.stars, strict=True)
        axes.plot(
            steps, np.clip(losses, low, high), "*", markersize=10, color=look.colour, gid=f"lost-{gid}", clip_on=False
        )
    if workload.is_difference:
        neutral_line(axes, 0.0, f"same-{gid}", "y")
        axes.set_ylim(low, high)
        difference_axis(axes, "y", 4)
        _point_beyond(axes, line, look)
    elif positive and positive > 0 and high > 20 * positive:
        axes.set_yscale("log")
        axes.set_ylim(0.8 * positive, 1.25 * high)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(low, high)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _point_beyond(axes: Axes, line: _Line, look: Look) -> None:
    """Point to where the line is last beyond the axis, and write its largest value."""
    low, high = axes.get_ylim()
    beyond = np.flatnonzero((line.mean < low) | (line.mean > high))
    if not len(beyond):
        return
    most = line.mean[beyond[np.argmax(np.abs(line.mean[beyond]))]]
    end, marker, side = (low, "v", "bottom") if most < low else (high, "^", "top")
    at = line.where[beyond[-1]]
    axes.plot([at], [end], color=look.colour, marker=marker, markersize=6, clip_on=False)
    right = beyond[-1] < len(line.where) / 2
    axes.annotate(
        signed(float(most)), (at, end), xytext=(6 if right else -6, -1 if side == "top" else 1),
        textcoords="offset points", ha="left" if right else "right", va=side, size=SMALL,
    )  # fmt: skip


def _draw_overflows(axes: Axes, seeds: _Seeds, look: Look, gid: str) -> None:
    """Draw steps that overflowed in any seed as ticks along the axis; ticks that touch are one."""
    longest = max(len(steps.loss) for steps in seeds.values())
    parts = np.zeros(min(_TICKS, longest), dtype=bool)
    for steps in seeds.values():
        parts[np.flatnonzero(steps.overflow) * len(parts) // longest] = True
    if not parts.any():
        return
    edges = np.flatnonzero(np.diff(np.concatenate([[0], parts.astype(np.int64), [0]])))
    starts, ends = (edges[which::2] * longest / len(parts) - 0.5 for which in (0, 1))
    x = np.stack([starts, ends, np.full(len(starts), math.nan)], axis=1).reshape(-1)
    axes.plot(
        x, np.where(np.isnan(x), math.nan, 0.05), transform=axes.get_xaxis_transform(), color=look.colour, linewidth=6,
        solid_capstyle="butt", gid=gid, scalex=False, scaley=False,
    )  # fmt: skip


def _draw_scales(axes: Axes, seeds: _Seeds, look: Look, known: _Float, gid: str) -> None:
    """Draw the loss scales of a mode on an axis that has room for those of all modes."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_yscale("log", base=2)
    for steps in seeds.values():
        usable = np.isfinite(steps.loss_scale) & (steps.loss_scale > 0)
        scale = np.where(usable, steps.loss_scale, math.nan)
        corners = _corners(scale)
        axes.plot(corners, scale[corners], color=look.colour, alpha=0.8, linewidth=1.2, drawstyle="steps-post", gid=gid)
    low, high = float(known.min()) / 1.5, float(known.max()) * 1.5
    axes.set_ylim(low, high)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator(power_ticks(low, high, 3)))
    axes.yaxis.set_major_formatter(lambda value, _: scale_label(value))
    axes.yaxis.tick_right()
    axes.tick_params(labelright=True, length=0)


def _corners(values: _Float) -> _Int:
    """Return the places at which a stepped line needs a point: its ends and its changes, thinned out if many."""
    changes = np.flatnonzero(~((values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1])))) + 1
    if len(changes) > _TICKS:
        _, first = np.unique(changes * _TICKS // len(values), return_index=True)
        changes = changes[first]
    return np.unique(np.concatenate([[0], changes, [len(values) - 1]])).astype(np.int64)
