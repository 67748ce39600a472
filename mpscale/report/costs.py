"""The tables of what a mode costs: time, arithmetic, memory, energy, and the state of the machine meanwhile.

Which columns they have is in the data dictionary (:mod:`mpscale.core.columns`). They are empty if there is nothing to
report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mpscale.analysis.change import SINGLE_RUN
from mpscale.analysis.claim import mostly
from mpscale.analysis.noise_floor import FEWEST_RUNS, Floors, assumed_floor, pooled
from mpscale.analysis.quantities import COSTS, Cost
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.blocks import FASTER, SLOWER
from mpscale.core.columns import COLUMNS, SUMMARY, Cell, Column, Format, Over, Sheet
from mpscale.core.record import Record, place_of, values_of
from mpscale.core.runs import Run
from mpscale.report import bars
from mpscale.report.sections import PLACE, by_place, measured
from mpscale.report.table import (
    DASH,
    Heading,
    Table,
    count,
    escape,
    large,
    listed,
    number,
    of_processes,
    plural,
    share,
    shown,
    span,
)
from mpscale.report.table import Cell as TableCell

_PROCESSES_NAMED = 8
_PEAK = "gpu_memory_nvml_peak_mib"
_ALLOCATOR_PEAKS = ("gpu_memory_allocator_synchronised_peak_mib", "gpu_memory_allocator_timed_peak_mib")
_SPREAD = Heading(
    "spread of processes", "Standard deviation of the logarithms of the step times of the processes, as percent."
)
_FLOOR = Heading(
    "noise floor",
    "95 % limit on the difference between two runs of the same code on this machine; a question mark where it is not "
    "from several runs but assumed from the spread of processes.",
)
_PER_CALL = tuple(
    cell.heading
    for name in ("step_time_ms_median", "step_time_ms_one_per_call")
    for cell in COLUMNS[name].cells
    if cell.over is Over.MEDIAN
)
"""Headings of the timing table that are shown side by side, and only if a call took several steps."""


_OVER: dict[Over, Callable[[list[Any]], Any]] = {
    Over.MEDIAN: statistics.median,
    Over.MAX: max,
    Over.SUM: sum,
    Over.KNOWN: len,
    Over.EACH: lambda values: "; ".join(dict.fromkeys(values)),
}


def _sheet(run: Run, sheet: Sheet, *needs: str, good: bool = True) -> Table:
    """Return a table of the columns that the data dictionary puts into ``sheet``, for modes with one of ``needs``.

    Columns that contain nothing but dashes are left out; without any other, so are the rows.
    """
    summary = {place_of(row): row for row in summary_of(run)}
    cells = [(cell, column) for column in (*COLUMNS.values(), *SUMMARY) for cell in column.cells if cell.sheet is sheet]
    cells.sort(key=lambda pair: pair[0].place)
    places = [
        (workload, mode, records)
        for workload, mode, records in measured(run, good=good)
        if any(record[name] is not None for record in records for name in needs)
    ]
    longest = _longest(places, [(cell, column) for cell, column in cells if cell.bar])
    rows = []
    for workload, mode, records in places:
        row = [_cell(cell, column, records, summary[workload, mode]) for cell, column in cells]
        for place, (cell, column) in enumerate(cells):
            if (most := longest.get((workload, column.name))) is not None and (own := _value(cell, column, records)):
                row[place] = TableCell(row[place], bar=bars.length(own, most, "the largest of this workload"))
        rows.append([workload, mode, *row])
    table = Table([*PLACE, *(_heading(cell, column) for cell, column in cells)], rows).without_blank()
    return table if len(table.headers) > len(PLACE) else Table([], [])


def _heading(cell: Cell, column: Column) -> Heading:
    over = cell.over if COLUMNS.get(column.name) is column else None
    is_number = cell.over is Over.KNOWN or column.format is not Format.TEXT
    return Heading(cell.heading, column.help(over), is_number)


def _longest(
    places: Sequence[tuple[str, str, Sequence[Record]]], cells: Sequence[tuple[Cell, Column]]
) -> dict[tuple[str, str], float]:
    """The largest of the values of each workload and column, if there are several to compare."""
    found: dict[tuple[str, str], list[float]] = {}
    for workload, _, records in places:
        for cell, column in cells:
            if (value := _value(cell, column, records)) is not None:
                found.setdefault((workload, column.name), []).append(value)
    return {place: max(values) for place, values in found.items() if len(values) > 1}


def _value(cell: Cell, column: Column, records: Sequence[Record]) -> float | None:
    known = values_of(records, column.name)
    return float(_OVER[cell.over](known)) if known else None


def _cell(cell: Cell, column: Column, records: Sequence[Record], row: Row) -> str:
    if COLUMNS.get(column.name) is not column:
        return shown(column, row[column.name])
    if cell.apart is not None:
        name, value = cell.apart
        apart = [record for record in records if record[name] == value and record[column.name] is not None]
        others = [record for record in records if record[name] != value]
        if apart:
            bare = replace(cell, apart=None)
            written = _cell(bare, column, apart, row)
            if not values_of(others, column.name):
                return f"{written} ({value})"
            return f"{_cell(bare, column, others, row)} ({count(len(apart))} {value}: {written})"
    known = values_of(records, column.name)
    if not known and cell.over is not Over.KNOWN:
        return DASH
    value = _OVER[cell.over](known)
    written = count(value) if cell.over is Over.KNOWN else shown(column, value)
    if cell.partial:
        written += of_processes(len(known), row)
    if cell.flag is not None and mostly(values_of(records, cell.flag[0])):
        written += f" ({cell.flag[1]})"
    return written


def timing(run: Run, floors: Floors) -> list[Table | str]:
    """Show what the step times are based on."""
    table = _sheet(run, Sheet.TIMING, "step_time_ms_median", "trace_time_s", "first_step_s")
    if not table:
        return []
    several = {record["steps_per_call"] for record in run.records if record["steps_per_call"] not in (None, 1)}
    if not several:
        table = table.without(*_PER_CALL)
    spread, basis = _noise(run, floors)
    parts: list[Table | str] = [table.beside(spread)]
    cases = [records for _, _, records in measured(run, good=True)]
    busiest = max((value for records in cases for value in values_of(records, "host_other_cpu_share")), default=0.0)
    if busiest > (COLUMNS["host_other_cpu_share"].warn_above or math.inf):
        parts.append(
            f"The machine was busy: other processes took up to {share(busiest)} of its CPU time while steps were "
            "timed. This makes step times longer, and makes them vary more from process to process."
        )
    if several:
        parts.append(
            f"A call took {span(sorted(map(count, several)))} steps. After them, steps of one call each were timed in "
            "the same process: the difference is what it costs to start every step from Python."
        )
    if any(mostly(values_of(records, "dispatch_bound")) for records in cases):
        parts.append(
            "`bound` means that dispatch in Python and TensorFlow took over half of the step time, rather than the "
            "device. The model or its batch is too small to show what the mode does to the device."
        )
    if any(values_of(records, "device_busy_ms_per_step") for records in cases):
        parts.append(
            "GPU ms per step is the time in which at least one kernel ran, from a profile of a few steps. Ratios of it "
            "show what a mode does to the kernels, without the time in which the GPU waits for the host. A user sees "
            "the step time."
        )
    if without_xla(run):
        parts.append(
            "Steps were not compiled with XLA. Each operation on the elements of a tensor, a cast to float16 included, "
            "is then a kernel of its own that reads and writes the whole tensor, while XLA fuses many into one. Matrix "
            "products and convolutions, which a mode makes faster, can be a small part of such a step, and casts can "
            f"cost more than is gained. {_before_choosing(run)}"
        )
    return [*parts, two_levels(run), basis]


def arithmetic(run: Run) -> list[Table | str]:
    """Show FLOPs per step, how fast they are computed, and the share of the GPU's peak."""
    table = _sheet(run, Sheet.ARITHMETIC, "flops_per_step")
    if not table:
        return []
    parts: list[Table | str] = [
        table,
        "FLOPs are those of matrix products and convolutions, forward and backward, two for each multiply-add. They "
        "are a property of the model and its batch, so they are the same in every mode.",
    ]
    if any(row["peak_share"] is not None for row in summary_of(run)):
        parts.append(
            "Peaks are NVIDIA's, for dense products in the precision that the mode is about. Part of a mixed step is "
            "float32, and operations on single elements take time without counting as FLOPs, so no training reaches "
            "its peak: well-tuned ones on large models reach about half. A low share means that something else sets "
            "the step time: memory, the host, or products that are too small."
        )
    elif any(row["device"] == "cpu" and row["tflops"] is not None for row in summary_of(run)):
        parts.append("Modes below float32 have no TFLOP/s here: most CPUs emulate float16 and bfloat16.")
    return parts


def without_xla(run: Run) -> bool:
    """Whether a run on a GPU compiled none of the steps that it timed with XLA."""
    timed = [record for record in run.records if record["step_time_ms_median"] is not None]
    return {(record["device"], record["jit"]) for record in timed} == {("gpu", False)}


def _before_choosing(run: Run) -> str:
    if any(record["replicas"] not in (None, 1) for record in run.records):
        return "With replicas there is no XLA: run the modes on one GPU, too, before you choose one."
    if any(record["xla_refused"] is not None for record in run.records):
        return "XLA refused some of it: the findings say what to replace, so that the modes can be compared with XLA."
    return "Run the modes with --mp-jit on, too, before you choose one."


def two_levels(run: Run) -> str:
    """Name the processes whose step time jumped between two levels; empty if there are none."""
    found = [
        f"{escape(record['case_id'])} ({number(record[FASTER])} and {number(record[SLOWER])} ms)"
        for _, _, records in measured(run, good=True)
        for record in records
        if record[SLOWER] is not None
    ]
    if not found:
        return ""
    named = listed(found, _PROCESSES_NAMED)
    return (
        f"The step time of {plural(len(found), 'process')} jumped between two levels: {named}. "
        "Something on the machine changed meanwhile, and the median is one level or the other by chance."
    )


def memory(run: Run) -> list[Table | str]:
    """Show peaks over the processes of a mode on a GPU. That of the host is in the results."""
    needs = (_PEAK, "gpu_memory_process_peak_mib", "gpu_memory_allocator_peak_mib")
    without_ratio = _no_ratio(run, COSTS["gpu_memory"], "gpu_memory_mib", "gpu_memory_ratio")
    parts: list[Table | str] = [_sheet(run, Sheet.MEMORY, *needs), without_ratio]
    if any(record[_PEAK] is not None and _before_windows(record) for record in run.records):
        parts.append(
            "This run was measured by an older mpscale: the figure for training is the peak of the whole process, with "
            "steps queued and with evaluation."
        )
    return parts


def _before_windows(record: Record) -> bool:
    """Whether a case was measured before the peaks of synchronised and queued steps were told apart."""
    column = "gpu_memory_queued_peak_mib"
    return record[column] is None and record.why_empty(column) is None


def memory_parts(run: Run) -> list[Table | str]:
    """Show what the memory that the driver reports is used for."""
    parts: list[Table | str] = [_sheet(run, Sheet.MEMORY_PARTS, "gpu_memory_process_peak_mib", _PEAK)]
    searched = [
        f"{large(max(scratch), 'MiB')} for {workload} {mode}"
        for workload, mode, records in measured(run, good=True)
        if (scratch := [most for record in records if (most := _scratch(record)) is not None])
    ]
    if searched:
        parts.append(
            f"The first step took more from TensorFlow's allocator than later steps: {', '.join(searched)}. That is "
            "mostly scratch of the search for the fastest kernels. The process keeps it, so the figure for training "
            "contains it; to compare what the steps themselves need, use the allocator's peak while timed."
        )
    return parts


def _scratch(record: Record) -> float | None:
    """What the first steps took from the allocator beyond the timed steps, if it is over a tenth of the peak."""
    peak, first, timed = (record[name] for name in (_PEAK, *_ALLOCATOR_PEAKS))
    if peak is None or first is None or timed is None or first - timed <= peak / 10:
        return None
    return float(first - timed)


def energy(run: Run) -> list[Table | str]:
    """Show the energy of the GPU per step, and its power."""
    needed = "gpu_energy_j_per_step"
    return [_sheet(run, Sheet.ENERGY, needed), _no_ratio(run, COSTS["energy"], needed, "gpu_energy_ratio")]


def gpu_state(run: Run) -> Table:
    """Show clocks, temperature and throttling of the GPU while steps were timed."""
    return _sheet(run, Sheet.GPU_STATE, "gpu_sm_clock_mhz_median", "gpu_temperature_c_max", good=False)


def _no_ratio(run: Run, cost: Cost, figure: str, ratio: str) -> str:
    """Name the rows without a ratio to fp32 because the two figures do not measure the same thing."""
    kinds = {(workload, mode): cost.kinds(records) for workload, mode, records in measured(run, good=True)}
    bare = [
        " ".join(place)
        for row in summary_of(run)
        if row[figure] is not None
        and row[ratio] is None
        and len(kinds[place := place_of(row)] | kinds.get((place[0], "fp32"), set())) > 1
    ]
    if not bare:
        return ""
    columns = " or ".join(f"`{column}`" for column in cost.is_of)
    return (
        f"No ratio is given for {', '.join(bare)}: its figure and fp32's differ in {columns}, so they do not "
        "measure the same thing."
    )


def _noise(run: Run, floors: Floors) -> tuple[Table, str]:
    """Show the spread of processes and of runs of the same code, to judge whether a change is real."""
    time = COSTS["step_time"]
    cases = by_place(run)
    assumed = assumed_floor([cases], time)
    rows = []
    for place, records in cases.items():
        times = time.sample(records)
        if not times:
            continue
        variance, degrees = pooled([times])
        known = floors.get(time.name, place)
        floor = known or assumed
        limit = (
            DASH if floor is None else TableCell(f"{floor.limit:.1%}{'' if known else '?'}", "" if known else "weak")
        )
        rows.append([*place, f"{math.sqrt(variance):.1%}" if degrees else DASH, limit])
    if floors.runs:
        basis = (
            "Noise floor: 95 % limit on the difference between two runs of the same code, from "
            f"{plural(len(floors.runs), 'run')} of this code on this machine."
        )
    else:
        basis = (
            f"As a baseline this is a {SINGLE_RUN} (?): how much runs of this code differ is unknown until there are "
            f"{FEWEST_RUNS} of them. Until then, a comparison relies on the spread of processes."
        )
    table = Table([*PLACE, _SPREAD, _FLOOR], rows).without_blank()
    if not rows:
        return table, ""
    spread = "Spread: standard deviation of the processes' step times. " if _SPREAD in table.headers else ""
    return table, f"{spread}{basis}"
