"""The sections of the report of a run: tables, and texts in markdown. They are empty if there is nothing to report."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mpscale.analysis.change import SINGLE_RUN
from mpscale.analysis.claim import TOO_SMALL, Doubt, doubts_of, mostly
from mpscale.analysis.noise_floor import FEWEST_RUNS, Floors, assumed_floor, pooled
from mpscale.analysis.quantities import COSTS, Cost
from mpscale.analysis.summary import Row, summary_of
from mpscale.analysis.trainings import have_no_metric
from mpscale.core.blocks import FASTER, SLOWER
from mpscale.core.case import Place
from mpscale.core.columns import COLUMNS, MEASURED, SUMMARY, Cell, Column, Over, Sheet
from mpscale.core.mode import is_mixed
from mpscale.core.record import (
    Record,
    grouped,
    in_order_of_modes,
    modes_of,
    of_good_trainings,
    place_of,
    values_of,
)
from mpscale.core.runs import Run
from mpscale.report.table import (
    DASH,
    Table,
    count,
    escape,
    interval,
    large,
    listed,
    loss_scale,
    metric,
    metric_difference,
    metric_margin,
    number,
    of_all,
    of_processes,
    of_seeds,
    plural,
    share,
    shown,
    span,
    text,
)

_COLUMNS_SHOWN = 8
_STEP_COUNTS = ("attempted_steps", "applied_steps", "skipped_steps", "overflow_steps", "nonfinite_loss_steps")
_PLACE = ("workload", "mode")
_PEAK = "gpu_memory_nvml_peak_mib"
_ALLOCATOR_PEAKS = ("gpu_memory_allocator_synchronised_peak_mib", "gpu_memory_allocator_timed_peak_mib")
_GPU_TIME = tuple(
    cell.heading
    for column in (*COLUMNS.values(), *SUMMARY)
    if column.name.startswith(("device_busy_", "speedup_device_"))
    for cell in column.cells
)
"""Headings of the timing table that are left out without a profile of a GPU."""
_RATES = tuple(
    cell.heading for column in SUMMARY if column.name.startswith(("tflops", "peak_share")) for cell in column.cells
)
"""Headings of the table of arithmetic that are left out if nothing was timed, or on a CPU."""
_PER_CALL = tuple(
    cell.heading
    for name in ("step_time_ms_median", "step_time_ms_one_per_call")
    for cell in COLUMNS[name].cells
    if cell.over is Over.MEDIAN
)
"""Headings of the timing table that are shown side by side, and only if a call took several steps."""


def results(run: Run) -> Table:
    """Return a row per workload and mode, for terminal, report and GitHub summary. Blank columns are left out."""
    rows = summary_of(run)
    names = {row["metric_name"] for row in rows if row["metric_name"] is not None}
    all_well = all(row["ok"] == row["cases"] and not row["not_started"] for row in rows)
    cells: dict[str, Callable[[Row], str]] = {
        "workload": lambda row: place_of(row)[0],
        "mode": lambda row: place_of(row)[1],
        "step time": step_time,
        "speed-up over fp32": lambda row: speedup(row, "fp32"),
        "speed-up over tf32": lambda row: speedup(row, "tf32"),
        "peak memory": peak_memory,
        "overflow steps": overflow_steps,
        f"final {names.pop() if len(names) == 1 else 'metric'}": final_metric,
        "status": lambda row: DASH if all_well else statuses(row),
    }
    table = Table(list(cells), [[cell(row) for cell in cells.values()] for row in rows], _SPARE)
    return table.without_blank("speed-up over tf32", "status")


_SPARE = ("peak memory", "overflow steps", "step time")
"""Columns that a narrow terminal leaves out."""


def step_time(row: Row) -> str:
    """Write the step time with its interval over processes."""
    return interval(row["step_time_ms"], row["step_time_ms_low"], row["step_time_ms_high"], " ms")


def speedup(row: Row, baseline: str) -> str:
    """Write the speed-up over ``baseline`` with its interval over pairs; in parentheses if there are doubts."""
    low, high = row[f"speedup_{baseline}_low"], row[f"speedup_{baseline}_high"]
    written, doubts = interval(row[f"speedup_{baseline}"], low, high, "x"), doubts_of(row, baseline)
    return f"({written}: {', '.join(doubts)})" if doubts else written


TOO_SMALL_CURE = (
    "this model and batch are too small to show what a mode does; use a larger batch, or --mp-steps-per-call"
)
ONE_PAIR_CURE = "use more seeds, or --mp-repeats"


def doubts_note(rows: Sequence[Row]) -> str:
    """Explain the parentheses that :func:`speedup` puts around ratios of these rows; empty if there are none."""
    found = {doubt for row in rows for baseline in ("fp32", "tf32") for doubt in doubts_of(row, baseline)}
    if not found:
        return ""
    told = "; ".join(f"{doubt}: {doubt.text}" for doubt in Doubt if doubt in found)
    cures = [TOO_SMALL_CURE] if found & TOO_SMALL else []
    cures += [f"for more pairs, {ONE_PAIR_CURE}"] if Doubt.ONE_PAIR in found else []
    cure = "".join(f" {text[0].upper()}{text[1:]}." for text in cures)
    return f"A speed-up in parentheses is no claim about the mode, because of the row or its baseline ({told}).{cure}"


def peak_memory(row: Row) -> str:
    """Write the peak memory of the GPU; without one that of the host, marked, because the two cannot be compared."""
    if row["gpu_memory_mib"] is not None:
        return large(row["gpu_memory_mib"], "MiB") + of_processes(row["gpu_memory_processes"], row)
    return DASH if row["host_memory_mib"] is None else f"{large(row['host_memory_mib'], 'MiB')} (host)"


def overflow_steps(row: Row) -> str:
    """Write overflow steps out of attempted steps."""
    if row["overflow_steps"] is None:
        return DASH
    return f"{count(row['overflow_steps'])}/{count(row['attempted_steps'])}{of_seeds(row['overflow_seeds'], row)}"


def final_metric(row: Row) -> str:
    """Write the mean of the metric over seeds, and its range if seeds differ; or that the workload has none."""
    if row["has_metric"] is False:
        return "none: synthetic inputs" if row["synthetic_inputs"] else "none"
    name = row["metric_name"]
    mean = metric(row["metric_mean"], name)
    ends = span([metric(row["metric_min"], name), metric(row["metric_max"], name)])
    written = mean if ends == mean else f"{mean} ({ends})"
    return written if row["metric_mean"] is None else written + of_seeds(row["metric_seeds"], row)


def statuses(row: Row) -> str:
    """Count the cases by status, including those that were not started."""
    waiting = f"not started {row['not_started']}" if row["not_started"] else ""
    return ", ".join(filter(None, (row["statuses"], waiting)))


def metric_why(row: Row) -> str:
    """Return the reason for the verdict on the metric, and the seeds that it leaves out; may be empty."""
    return "; ".join(filter(None, (row["metric_reason"], row["metric_left_out"])))


@lru_cache(maxsize=8)
def _groups(run: Run) -> Mapping[Place, Sequence[Record]]:
    return grouped(run.records)


@lru_cache(maxsize=32)
def measured(run: Run, trained: bool = False, good: bool = False) -> Sequence[tuple[str, str, list[Record]]]:
    """Cases whose figures count, by workload and mode as tables name them, in the order of the summary.

    Args:
        run: the run.
        trained: only cases that trained to the end.
        good: only cases of seeds that were not lost, which the costs of a mode are computed from.
    """
    found = []
    for (workload, mode), group in _groups(run).items():
        records = of_good_trainings(group) if good else [case for case in group if case["status"] in MEASURED]
        records = [case for case in records if case["repeat"] == 0] if trained else records
        if records:
            found.append((workload, mode, records))
    return found


_OVER: dict[Over, Callable[[list[Any]], Any]] = {
    Over.MEDIAN: statistics.median,
    Over.MAX: max,
    Over.SUM: sum,
    Over.KNOWN: len,
    Over.EACH: lambda values: "; ".join(dict.fromkeys(values)),
}


def _sheet(run: Run, sheet: Sheet, *needs: str, good: bool = True) -> Table:
    """Return a table of the columns that the data dictionary puts into ``sheet``, for modes with one of ``needs``."""
    summary = {place_of(row): row for row in summary_of(run)}
    cells = [(cell, column) for column in (*COLUMNS.values(), *SUMMARY) for cell in column.cells if cell.sheet is sheet]
    cells.sort(key=lambda pair: pair[0].place)
    rows = [
        [workload, mode, *(_cell(cell, column, records, summary[workload, mode]) for cell, column in cells)]
        for workload, mode, records in measured(run, good=good)
        if any(record[name] is not None for record in records for name in needs)
    ]
    return Table([*_PLACE, *(cell.heading for cell, _ in cells)], rows)


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


def timing(run: Run) -> list[Table | str]:
    """Show what the step times are based on."""
    table = _sheet(run, Sheet.TIMING, "step_time_ms_median", "trace_time_s", "first_step_s")
    if not table:
        return []
    several = {record["steps_per_call"] for record in run.records if record["steps_per_call"] not in (None, 1)}
    table = table.without_blank(*_GPU_TIME)
    parts: list[Table | str] = [table if several else table.without(*_PER_CALL)]
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
            "cost more than is gained. Run the modes with --mp-jit on, too, before you choose one."
        )
    parts.append(two_levels(run))
    return parts


def arithmetic(run: Run) -> list[Table | str]:
    """Show FLOPs per step, how fast they are computed, and the share of the GPU's peak."""
    table = _sheet(run, Sheet.ARITHMETIC, "flops_per_step")
    if not table:
        return []
    table = table.without_blank(*_RATES)
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
    return (
        f"The step time of {plural(len(found), 'process')} jumped between two levels: {listed(found, _COLUMNS_SHOWN)}. "
        "Something on the machine changed meanwhile, and the median is one level or the other by chance."
    )


def memory(run: Run) -> list[Table | str]:
    """Show peaks over the processes of a mode."""
    needs = (_PEAK, "gpu_memory_allocator_peak_mib", "host_memory_peak_mib")
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


def overflow(run: Run) -> Table:
    """Show applied and skipped steps and the loss scale over the seeds of each mixed mode."""
    rows = []
    for workload, mode, records in measured(run, trained=True):
        if not is_mixed(records[0]["mode"]) or not values_of(records, "attempted_steps"):
            continue
        initial, final = _scales(records, "loss_scale_initial"), _scales(records, "loss_scale_final")
        first, last = values_of(records, "first_overflow_step"), values_of(records, "last_overflow_step")
        lowest, highest = values_of(records, "loss_scale_min"), values_of(records, "loss_scale_max")
        rows.append(
            [
                workload,
                mode,
                *(_total(records, name) for name in _STEP_COUNTS),
                count(max(values_of(records, "longest_skip_run"), default=None)),
                span([count(min(first, default=None)), count(max(last, default=None))]),
                DASH if initial == final == DASH else f"{initial} -> {final}",
                span([loss_scale(min(lowest, default=None)), loss_scale(max(highest, default=None))]),
            ]
        )
    headers = [*_PLACE, "attempted", "applied", "skipped", "overflow", "non-finite loss", "longest skip run"]
    return Table([*headers, "first to last overflow", "loss scale, first -> last step", "min to max"], rows)


def _total(records: Sequence[Record], name: str) -> str:
    known = values_of(records, name)
    return count(sum(known)) + of_all(len(known), len(records), "seeds") if known else DASH


def _scales(records: Sequence[Record], name: str) -> str:
    return span([loss_scale(value) for value in sorted(values_of(records, name))])


def accuracy(run: Run) -> list[Table | str]:
    """Show the metric of every seed in every mode, or its status; and when the target was reached."""
    trained = [record for record in run.records if record["repeat"] == 0 and record["status"] != "unsupported"]
    modes = modes_of(trained)
    names = {record["workload"]: record["metric_name"] for record in trained if record["metric_name"] is not None}
    found: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for record in sorted(trained, key=lambda record: record["seed"]):
        name = names.get(record["workload"]) or "metric"
        ended = record["status"] in MEASURED

        def put(label: str, written: str, record: Record = record) -> None:
            workload, mode = record.place
            found.setdefault((workload, label), {}).setdefault(record["seed"], {})[mode] = written

        if ended and record["metric_value"] is not None:
            put(name, metric(record["metric_value"], record["metric_name"]))
        elif record["status"] != "ok":
            # A gap would look like a seed that was not planned.
            put(name, str(record["status"]))
        if ended and record["published_metric_value"] is not None:
            put(f"{name}, published test set", metric(record["published_metric_value"], record["metric_name"]))
    values = Table(
        ["workload", "metric", "seed", *modes],
        [
            [workload, name, count(seed), *(by_mode.get(mode, DASH) for mode in modes)]
            for (workload, name), by_seed in found.items()
            for seed, by_mode in by_seed.items()
        ],
    )
    reached = [
        [
            *place_of(row),
            f"{row['target_reached']} of {row['seeds_planned']}",
            count(row["steps_to_target"]),
        ]
        for row in summary_of(run)
        if row["target_reached"] is not None
    ]
    return [values, Table([*_PLACE, "seeds that reached the target", "steps to it, median"], reached)]


def without_metric(run: Run) -> list[Table | str]:
    """Show throughput and loss of workloads without a metric, medians over their processes, and why they have none."""
    rows, synthetic = [], False
    for workload, mode, records in measured(run):
        if not have_no_metric(records):
            continue
        synthetic = synthetic or any(record["synthetic_inputs"] for record in records)
        known = {
            name: statistics.median(values) if (values := values_of(records, name)) else None
            for name in ("batch_size", "examples_per_s", "train_loss_first", "train_loss_final")
        }
        batch = None if known["batch_size"] is None else round(known["batch_size"])
        rows.append([workload, mode, count(batch), *(number(known[name], 4) for name in list(known)[1:])])
    if not rows:
        return []
    why = (
        " Synthetic inputs are drawn at random: there is nothing to learn, so no accuracy is given."
        if synthetic
        else ""
    )
    headers = [*_PLACE, "batch", "examples per second", "loss of the first step", "loss of the last steps"]
    return [Table(headers, rows), f"Nothing is evaluated, and nothing is said about how well these train.{why}"]


def against_fp32(run: Run) -> Table:
    """Show whether each mode trains as well as fp32, seed by seed."""
    rows = []
    for row in summary_of(run):
        if row["metric_verdict"] is None:
            continue
        needed = row["metric_seeds_needed"]
        verdict = str(row["metric_verdict"]) + ("" if needed is None else f" ({needed} seeds would decide)")
        low, high = row["metric_difference_low"], row["metric_difference_high"]
        rows.append(
            [
                *place_of(row),
                metric_difference(row["metric_difference"], low, high, row["metric_name"]),
                count(row["metric_pairs"]),
                metric_margin(row["metric_margin"], row["metric_name"]),
                ": ".join(filter(None, (verdict, metric_why(row)))),
            ]
        )
    return Table([*_PLACE, "difference", "seeds", "margin", "verdict"], rows)


def noise(run: Run, floors: Floors) -> list[Table | str]:
    """Show the spread of processes and of runs of the same code, to judge whether a change is real."""
    time, cases = COSTS["step_time"], _groups(run)
    assumed = assumed_floor([cases], time)
    rows = []
    for place, records in cases.items():
        times = time.sample(records)
        if not times:
            continue
        variance, degrees = pooled([times])
        known = floors.get(time.name, place)
        floor = known or assumed
        limit = DASH if floor is None else f"{floor.limit:.1%}{'' if known else '?'}"
        rows.append([*place, count(len(times)), f"{math.sqrt(variance):.1%}" if degrees else DASH, limit])
    if not rows:
        return []
    if floors.runs:
        basis = (
            "Noise floor: 95 % limit on the difference between two runs of the same code, from "
            f"{len(floors.runs)} runs of this code on this machine."
        )
    else:
        basis = (
            f"As a baseline this is a {SINGLE_RUN} (?): how much runs of this code differ is unknown until there are "
            f"{FEWEST_RUNS} of them. Until then, a comparison relies on the spread of processes."
        )
    table = Table([*_PLACE, "processes", "spread of processes", "noise floor"], rows)
    return [table, f"Spread: standard deviation. {basis}"]


def troubles(run: Run) -> list[Table | str]:
    """Show the cases that are not ok: why, and the last output of each process."""
    tails = [
        f"The last lines of {text(record['case_id'])}:\n\n{fenced(record['output_tail'])}"
        for record in run.records
        if record["status"] != "ok" and record["output_tail"]
    ]
    return [trouble_table(run), *tails]


def trouble_table(run: Run) -> Table:
    """Return a row per case that is not ok."""
    names = ("case_id", "status", "status_reason")
    bad = [record for record in run.records if record["status"] != "ok"]
    return Table(["case", "status", "reason"], [[text(record[name]) for name in names] for record in bad])


def unread(run: Run, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """List what could not be read in the run's own files, and the folders of other runs, with reasons."""
    lines = [*run.problems, *(f"{folder} was left out: {reason}" for folder, reason in left_out)]
    return "\n".join(f"- {escape(line)}" for line in lines)


def missing(run: Run) -> Table:
    """Show the reasons for empty cells, with the columns and modes that they apply to."""
    cases: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(run.records):
        for column, reason in record.unavailable.items():
            cases.setdefault((reason.text, column), []).append(place)
    # Columns that are empty in the same cases for the same reason share a row.
    shared: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (why, column), places in cases.items():
        shared.setdefault((why, tuple(places)), []).append(column)
    rows = []
    for (why, numbers), columns in shared.items():
        modes = in_order_of_modes(sorted({run.records[number]["mode"] for number in numbers}))
        rows.append([why, listed(columns, _COLUMNS_SHOWN), ", ".join(modes), f"{len(numbers)} of {len(run.records)}"])
    rows.sort(key=lambda row: (row[0], row[2]))
    return Table(["reason", "empty columns", "modes", "cases"], rows)


def fenced(text: str) -> str:
    """Return a code block that nothing in ``text`` can end, without a terminal's colours and bells."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    plain = "".join(c for c in plain if c in "\n\t" or c.isprintable()).strip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", plain))])
    return f"{fence}text\n{plain}\n{fence}"
