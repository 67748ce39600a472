"""The picture of a sweep over batches: speed-up, throughput and memory of each mode."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpscale.analysis.claim import doubts_of
from mpscale.analysis.summary import Row
from mpscale.core.record import place_of
from mpscale.core.runs import Run
from mpscale.report.figures import Look, Picture, as_text, empty_figure, house_style, legend_columns, looks, short_name
from mpscale.report.gains_figure import baseline_name
from mpscale.report.panels import SMALL, Known, neutral_line, ratio_axis, ratio_limits
from mpscale.report.sweep import of_batches, throughput
from mpscale.report.table import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LINE = 84
"""Characters of panel titles that fit into the width of the figure."""


@dataclass(frozen=True, slots=True)
class _Point:
    batch: int
    value: float
    low: float | None = None
    high: float | None = None
    claimed: bool = True
    """Whether it is a claim about the mode."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One quantity over the batch.

    Args:
        name: of its lines in the SVG.
        title: with the unit.
        points: by workload, then by mode, with rising batch.
        is_ratio: whether 1 is no difference.
    """

    name: str
    title: str
    points: Mapping[str, Mapping[str, Sequence[_Point]]]
    is_ratio: bool = False


def over_batch(run: Run) -> Picture | None:
    """Draw speed-up, throughput and GPU memory over the batch, as far as known; None without several batches.

    In the SVG, the lines of workload ``n`` are in groups ``speedup-n``, ``throughput-n`` and ``memory-n``.
    """
    rows = of_batches(run)
    panels = [panel for panel in _panels(run, rows) if panel.points]
    if not panels:
        return None
    look_of = looks({place_of(row)[1]: row["mode"] for row in rows})
    with house_style("sweep"):
        svg = as_text(_figure(panels, look_of), f"Over the batch: {', '.join(panel.title for panel in panels)}")
    return Picture("Speed-up over batch", " ".join(_captions(panels)), svg)


def _panels(run: Run, rows: Sequence[Row]) -> Iterator[_Panel]:
    over = baseline_name(rows)
    rates = throughput(run)

    def points(of: Mapping[int, _Point | None]) -> dict[str, dict[str, list[_Point]]]:
        found: dict[str, dict[str, list[_Point]]] = {}
        for row in rows:
            if (point := of[id(row)]) is not None:
                found.setdefault(row["workload"], {}).setdefault(place_of(row)[1], []).append(point)
        return found

    def plain(row: Row, value: float | None) -> _Point | None:
        return None if value is None else _Point(row["swept_batch"], value)

    yield _Panel("speedup", f"speed-up over {over}", points({id(row): _speedup(row) for row in rows}), True)
    yield _Panel(
        "throughput", "examples per second", points({id(row): plain(row, rates.get(place_of(row))) for row in rows})
    )
    yield _Panel(
        "memory", "peak GPU memory (MiB)", points({id(row): plain(row, row["gpu_memory_mib"]) for row in rows})
    )


def _speedup(row: Row) -> _Point | None:
    baseline = row["headline_baseline"]
    name = f"speedup_{baseline}"
    if row["mode"] == baseline or row[name] is None:
        return None
    claimed = not doubts_of(row, baseline)
    return _Point(row["swept_batch"], row[name], row[f"{name}_low"], row[f"{name}_high"], claimed)


def _captions(panels: Sequence[_Panel]) -> Iterator[str]:
    drawn = [point for panel in panels for modes in panel.points.values() for line in modes.values() for point in line]
    if any(panel.name == "speedup" for panel in panels):
        yield "Speed-up: above the line is faster than the baseline of the same batch."
    if any(point.low is not None for point in drawn):
        yield "Bars are 95 % intervals. An arrow: it goes on."
    if any(not point.claimed for point in drawn):
        yield "Hollow: in parentheses in the table, and so no claim about the mode."
    yield "A mode has no point at a batch at which it did not end well."


def _figure(panels: Sequence[_Panel], look_of: Mapping[str, Look]) -> Figure:
    from matplotlib.lines import Line2D

    workloads = list(dict.fromkeys(workload for panel in panels for workload in panel.points))
    figure = empty_figure(0.6 + 2.5 * len(workloads))
    grid = figure.subplots(len(workloads), len(panels), squeeze=False)
    for number, (workload, row) in enumerate(zip(workloads, grid, strict=True), 1):
        for axes, panel in zip(row, panels, strict=True):
            if workload not in panel.points:
                axes.set_axis_off()
                continue
            _draw(axes, panel, panel.points[workload], look_of, number)
            line = _LINE // len(row)
            title = textwrap.fill(f"{short_name(workload, line - 2)}: {panel.title}", line)
            axes.set_title(title, loc="left", size=10)
            axes.set_xlabel("batch")
    drawn = {mode for panel in panels for modes in panel.points.values() for mode in modes}
    shown = {mode: look for mode, look in look_of.items() if mode in drawn}
    handles = [
        Line2D([], [], color=look.colour, linewidth=1.3, marker=look.marker, markersize=5, label=short_name(mode))
        for mode, look in shown.items()
    ]
    columns = legend_columns(figure, [short_name(mode) for mode in shown])
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False)
    return figure


def _draw(
    axes: Axes, panel: _Panel, modes: Mapping[str, Sequence[_Point]], look_of: Mapping[str, Look], number: int
) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

    drawn = [point for points in modes.values() for point in points]
    if panel.is_ratio:
        ratio_axis(axes, "y", ratio_limits(Known(point.value, point.low, point.high) for point in drawn), most=8)
        neutral_line(axes, 1.0, f"{panel.name}-neutral-{number}", "y")
    else:
        axes.set_ylim(0.0, 1.15 * max(point.value for point in drawn) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    # Points of a batch are shifted sideways, or their intervals would hide each other.
    gap = min(0.09, 0.5 / len(modes)) if any(point.low is not None for point in drawn) else 0.0
    for which, (mode, points) in enumerate(modes.items()):
        look, shift = look_of[mode], 2.0 ** (gap * (which - (len(modes) - 1) / 2))
        axes.plot(
            [point.batch * shift for point in points], [point.value for point in points], color=look.colour,
            linewidth=1.3, gid=f"{panel.name}-{number}",
        )  # fmt: skip
        for point in points:
            if point.low is not None and point.high is not None:
                _bar(axes, point.batch * shift, (point.low, point.high), look)
            axes.plot(
                [point.batch * shift], [point.value], color=look.colour, marker=look.marker, markersize=5,
                markerfacecolor=look.colour if point.claimed else "white",
            )  # fmt: skip
    batches = sorted({point.batch for point in drawn})
    axes.set_xscale("log", base=2)
    # matplotlib's own ticks are formulas, which browsers cannot draw, and not those of the sweep.
    axes.set_xticks(batches, [count(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=SMALL)


def _bar(axes: Axes, batch: float, ends: tuple[float, float], look: Look) -> None:
    """Draw an interval; an end beyond the axis is an arrow head."""
    low, high = axes.get_ylim()
    shown = [max(ends[0], low), min(ends[1], high)]
    axes.plot([batch, batch], shown, color=look.colour, linewidth=0.9)
    for end, marker in zip(shown, ("v" if ends[0] < low else "_", "^" if ends[1] > high else "_"), strict=True):
        axes.plot([batch], [end], color=look.colour, marker=marker, markersize=4, clip_on=False)
