"""The picture of GPU memory over time: one process of each mode, with what it was doing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mpscale.core.files.reading import RunError
from mpscale.core.processes.events import Phase
from mpscale.core.record import Record, modes_of
from mpscale.core.run_folder import gpu_path
from mpscale.core.runs import Run
from mpscale.report.figures import SOFT, TINTS, Look, Picture, as_text, house_style, looks
from mpscale.report.panels import SMALL, Group, multiples, panel_title, width_of
from mpscale.report.sections import measured
from mpscale.report.table import plural
from mpscale.telemetry.samples import Sample, read_sample_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEMORY_OVER_TIME = "GPU memory over time"
"""The title of the figure."""

_WINDOWS = {
    "first step, compiled": ("grey", (Phase.COMPILED,)),
    "synchronised steps": ("blue", (Phase.STEPS_SYNCHRONISED,)),
    "queued steps": ("cyan", (Phase.STEPS_QUEUED,)),
    "evaluation": ("yellow", (Phase.METRIC_TRIED, Phase.EVALUATED)),
    "training": ("violet", (Phase.TRAINED,)),
    "timed steps": ("green", (Phase.TIMING_END, Phase.ENERGY_END)),
    "profiler": ("red", (Phase.PROFILED,)),
}
"""What a process was doing: the tint of it, and the phases that end it."""

_POINTS = 200
"""Most points on a line, each the largest memory in its span of time."""

_PHASES = frozenset(Phase)


@dataclass(frozen=True)
class _Process:
    """The memory of a process: seconds since its start, MiB, and the windows as name, start and end in seconds."""

    times: Sequence[float]
    mib: Sequence[float]
    windows: Sequence[tuple[str, float, float]]
    of_device: bool
    """Whether it is the memory in use on the whole GPU, because the driver does not tell the process's own."""

    @property
    def peak(self) -> float:
        return max(self.mib)


def memory_over_time(run: Run) -> Picture | None:
    """Draw the GPU memory of the first process of each mode over time; None without samples of it.

    In the SVG, panel ``m`` of workload ``w`` has the line ``gpu-memory-w-m``.
    """
    by_workload: dict[str, dict[str, _Process]] = {}
    unreadable = 0
    for workload, mode, records in measured(run):
        first = min(records, key=lambda record: (record["repeat"], record["seed"]))
        try:
            found = _read(run, first)
        except RunError:
            unreadable += 1
            continue
        if found is not None:
            by_workload.setdefault(workload, {})[mode] = found
    if not by_workload:
        return None
    processes = [process for modes in by_workload.values() for process in modes.values()]
    look_of = looks(modes_of(record for _, _, records in measured(run) for record in records))
    with house_style("memory"):
        what = f"{MEMORY_OVER_TIME}: the first process of each mode, with what it was doing"
        svg = as_text(_figure(by_workload, look_of), what)
    captions = {
        "The first process of each mode; seconds since it was started. Shaded: what it was doing.": True,
        "Memory in use on the whole GPU, where the driver does not tell the process's own.": any(
            process.of_device for process in processes
        ),
        f"Not drawn: {plural(unreadable, 'process')} whose samples cannot be read.": unreadable,
    }
    return Picture(MEMORY_OVER_TIME, " ".join(text for text, applies in captions.items() if applies), svg, unreadable)


def _read(run: Run, record: Record) -> _Process | None:
    """Return the memory of a process; None if no sample has it.

    Raises:
        RunError: the file is missing or broken.
    """
    samples = read_sample_file(gpu_path(run.path, str(record["case_id"]), record["attempts"] or 1))
    of_device = all(row.process_memory_mib is None for row in samples.rows)
    name = "device_memory_mib" if of_device else "process_memory_mib"
    # Before there is a context, the process has none.
    start = next((row.time_s for row in samples.rows if row.phase == Phase.IDLE), 0.0)
    known = [
        (row.time_s, float(value))
        for row in samples.rows
        if (value := getattr(row, name)) is not None and math.isfinite(value) and start <= row.time_s < math.inf
    ]
    if not any(value > 0 for _, value in known):
        return None
    times, mib = _thinned(known)
    return _Process(times, mib, _windows(samples.rows), of_device)


def _thinned(known: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Leave out values that repeat, and of those in one span of time all but the largest."""
    first, last = known[0][0], known[-1][0]
    width = (last - first) / _POINTS or 1.0
    spans: dict[int, tuple[float, float]] = {}
    for time_s, value in known:
        span = int((time_s - first) / width)
        if span not in spans or value > spans[span][1]:
            spans[span] = (time_s, value)
    kept = list(spans.values())
    corners = [after for before, after in pairwise(kept) if after[1] != before[1]]
    shown = [kept[0], *corners, (last, kept[-1][1])]
    return [time_s for time_s, _ in shown], [value for _, value in shown]


def _windows(rows: Sequence[Sample]) -> list[tuple[str, float, float]]:
    """Return what the process was doing between each two phases, joined where it is the same."""
    ended_by = {phase: name for name, (_, phases) in _WINDOWS.items() for phase in phases}
    found: list[tuple[str, float, float]] = []
    reached = [row for row in rows if row.phase in _PHASES]
    for before, after in pairwise(reached):
        name = ended_by.get(Phase(after.phase))
        if name is None:
            continue
        if found and found[-1][0] == name and found[-1][2] == before.time_s:
            found[-1] = (name, found[-1][1], after.time_s)
        else:
            found.append((name, before.time_s, after.time_s))
    return found


def _figure(by_workload: Mapping[str, Mapping[str, _Process]], look_of: Mapping[str, Look]) -> Figure:
    from matplotlib.patches import Patch

    shown = {name for modes in by_workload.values() for process in modes.values() for name, _, _ in process.windows}
    numbers = {name: number for number, name in enumerate((name for name in _WINDOWS if name in shown), 1)}
    units = {workload: _unit(modes) for workload, modes in by_workload.items()}
    groups = [Group(name, f"in {units[name][0]}", len(modes), (1.15,)) for name, modes in by_workload.items()]
    figure, panels = multiples(groups, foot=0.5)
    for place, ((workload, modes), axes_of) in enumerate(zip(by_workload.items(), panels, strict=True), 1):
        unit, divisor = units[workload]
        top = 1.22 * max(process.peak for process in modes.values()) / divisor
        for which, ((mode, process), (axes,)) in enumerate(zip(modes.items(), axes_of, strict=True), 1):
            panel_title(figure, axes, mode, f"peak {process.peak / divisor:,.{2 if unit == 'GiB' else 0}f} {unit}")
            axes.plot(
                process.times, [value / divisor for value in process.mib], color=look_of[mode].colour, linewidth=1.4,
                drawstyle="steps-post", gid=f"gpu-memory-{place}-{which}",
            )  # fmt: skip
            axes.set_ylim(0, top)
            _shade(axes, process.windows, numbers, width_of(figure, axes))
            _ticks(axes, width_of(figure, axes))
            if which == 1 and place == len(by_workload):
                axes.set_xlabel("seconds", size=SMALL, labelpad=1)
    handles = [
        Patch(facecolor=TINTS[_WINDOWS[name][0]][0], edgecolor=SOFT, linewidth=0.5, label=f"{number} {name}")
        for name, number in numbers.items()
    ]
    if handles:
        figure.legend(handles=handles, loc="lower left", ncols=len(handles), frameon=False, columnspacing=1.2)
    return figure


def _unit(modes: Mapping[str, _Process]) -> tuple[str, float]:
    return ("GiB", 1024.0) if max(process.peak for process in modes.values()) >= 2048 else ("MiB", 1.0)


def _ticks(axes: Axes, pixels: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=max(2, int(pixels // 45)), steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:,g}")


def _shade(axes: Axes, windows: Sequence[tuple[str, float, float]], numbers: Mapping[str, int], pixels: float) -> None:
    """Shade the windows, and number those that leave room for it."""
    left, right = axes.get_xlim()
    free = -1.0
    for name, start, end in windows:
        axes.axvspan(start, end, color=TINTS[_WINDOWS[name][0]][0], linewidth=0, zorder=0)
        middle = (max(start, left) + min(end, right)) / 2
        at = (middle - left) / (right - left) * pixels
        if at >= free:
            axes.text(
                middle, 0.98, str(numbers[name]), transform=axes.get_xaxis_transform(), ha="center", va="top",
                size=SMALL - 0.5, color=SOFT,
            )  # fmt: skip
            free = at + 9
    axes.set_xlim(left, right)
