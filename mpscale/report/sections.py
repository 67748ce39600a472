"""The sections of a report that go into detail. Each is empty where the run has nothing to say on it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mpscale.analysis.change import SINGLE_RUN
from mpscale.analysis.noise_floor import FEWEST_RUNS, Floors, assumed_floor, pooled
from mpscale.analysis.quantities import COSTS, Cost
from mpscale.analysis.summary import mostly, summary_of
from mpscale.core.columns import MEASURED
from mpscale.core.mode import MODES, is_mixed
from mpscale.core.record import Record, grouped
from mpscale.core.runs import Run
from mpscale.report import table as cells
from mpscale.report.table import Cells, escape, largest, markdown_table, measured, median, metric_why, or_none, values
from mpscale.telemetry.host import BUSY_SHARE

_COLUMNS_SHOWN = 8
_STEP_COUNTS = ("attempted_steps", "applied_steps", "skipped_steps", "overflow_steps", "nonfinite_loss_steps")


def overflow(run: Run) -> str:
    """Steps applied and skipped, and the way of the loss scale, over the seeds of each mixed mode."""
    rows = []
    for workload, mode, records in measured(run, trained=True):
        if not is_mixed(mode) or not values(records, "attempted_steps"):
            continue
        first, last = values(records, "first_overflow_step"), values(records, "last_overflow_step")
        smallest, largest = values(records, "loss_scale_min"), values(records, "loss_scale_max")
        initial, final = (_scales(records, name) for name in ("loss_scale_initial", "loss_scale_final"))
        rows.append(
            [
                workload,
                mode,
                *(_total(records, name) for name in _STEP_COUNTS),
                cells.count(or_none(max, values(records, "longest_skip_run"))),
                cells.span([cells.count(or_none(min, first)), cells.count(or_none(max, last))]),
                cells.DASH if initial == final == cells.DASH else f"{initial} -> {final}",
                cells.span([cells.loss_scale(or_none(min, smallest)), cells.loss_scale(or_none(max, largest))]),
            ]
        )
    headers = ["workload", "mode", "attempted", "applied", "skipped", "overflow", "non-finite loss"]
    headers += ["longest skip run", "first to last overflow", "loss scale, first -> last step", "min to max"]
    return markdown_table(headers, rows) if rows else ""


def _total(records: Sequence[Record], name: str) -> str:
    """The sum of a column over trainings, and of how many where not all know it."""
    known = values(records, name)
    total = cells.count(or_none(sum, known))
    return f"{total} ({len(known)} of {len(records)} seeds)" if known and len(known) < len(records) else total


def accuracy(run: Run) -> str:
    """The metric of every seed under every mode, and when the target was reached.

    A training without a metric has its status instead: a gap would look like a seed that was not asked for.
    """
    trained = [record for record in run.records if record["repeat"] == 0 and record["status"] != "unsupported"]
    started = {record["mode"] for record in trained}
    modes = [mode for mode in dict.fromkeys(row["mode"] for row in summary_of(run)) if mode in started]
    names = {record["workload"]: record["metric_name"] for record in trained if record["metric_name"] is not None}
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    for record in sorted(trained, key=lambda record: record["seed"]):
        name = names.get(record["workload"])
        row = found.setdefault((record["workload"], name or "metric", record["seed"]), {})
        value = record["metric_value"] if record["status"] in MEASURED else None
        if value is not None:
            row[record["mode"]] = cells.metric(value, record["metric_name"])
        elif record["status"] != "ok":
            row[record["mode"]] = str(record["status"])
        if record["published_metric_value"] is not None and record["status"] in MEASURED:
            row = found.setdefault((record["workload"], f"{name or 'metric'}, published test set", record["seed"]), {})
            row[record["mode"]] = cells.metric(record["published_metric_value"], record["metric_name"])
    found = {place: row for place, row in found.items() if row}
    places = {place: number for number, place in enumerate(dict.fromkeys(key[:2] for key in found))}
    rows = [
        [workload, name, cells.count(seed), *(row.get(mode, cells.DASH) for mode in modes)]
        for (workload, name, seed), row in sorted(found.items(), key=lambda item: (places[item[0][:2]], item[0][2]))
    ]
    parts = [markdown_table(["workload", "metric", "seed", *modes], rows)] if rows else []
    targets = [
        [
            row["workload"],
            row["mode"],
            f"{row['target_reached']} of {row['seeds_planned']}",
            cells.count(row["steps_to_target"]),
        ]
        for row in summary_of(run)
        if row["target_reached"] is not None
    ]
    if targets:
        parts.append(
            markdown_table(["workload", "mode", "seeds that reached the target", "steps to it, median"], targets)
        )
    return "\n\n".join(parts)


def against_fp32(run: Run) -> str:
    """Whether each mode trains as well as fp32, seed by seed."""
    rows = []
    for row in summary_of(run):
        if row["metric_verdict"] is None:
            continue
        low, high = row["metric_difference_low"], row["metric_difference_high"]
        verdict = str(row["metric_verdict"])
        if row["metric_seeds_needed"] is not None:
            verdict += f" ({row['metric_seeds_needed']} seeds would tell)"
        if why := metric_why(row):
            verdict += f": {why}"
        rows.append(
            [
                row["workload"],
                row["mode"],
                cells.difference(row["metric_difference"], low, high, row["metric_name"]),
                cells.count(row["metric_pairs"]),
                cells.size(row["metric_margin"], row["metric_name"]),
                verdict,
            ]
        )
    return markdown_table(["workload", "mode", "difference", "seeds", "margin", "verdict"], rows) if rows else ""


def timing(run: Run) -> str:
    """What the step times rest on."""
    rows, bound = [], False
    for workload, mode, records in measured(run, good=True):
        if not any(values(records, name) for name in ("step_time_ms_median", "first_step_s", "trace_time_s")):
            continue
        is_bound = mostly(values(records, "dispatch_bound"))
        bound = bound or is_bound
        rows.append(
            [workload, mode, cells.count(len(values(records, "step_time_ms_median")))]
            + [cells.count(or_none(sum, values(records, "timed_blocks")))]
            + [cells.number(median(records, "step_time_ms_per_applied"))]
            + [cells.share(median(records, "dispatch_share")) + (" (bound)" if is_bound else "")]
            + [cells.share(or_none(max, values(records, "host_other_cpu_share")))]
            + [cells.number(median(records, name)) for name in ("trace_time_s", "first_step_s")]
        )
    if not rows:
        return ""
    headers = [
        "workload",
        "mode",
        "processes",
        "blocks",
        "ms per applied step",
        "dispatch share",
        "CPU time of others, most",
        "trace s",
        "first step s",
    ]
    parts = [markdown_table(headers, rows)]
    busiest = max(
        (row for _, _, group in measured(run, good=True) for row in values(group, "host_other_cpu_share")), default=0.0
    )
    if busiest > BUSY_SHARE:
        parts.append(
            f"The machine was busy: up to {cells.share(busiest)} of its processors' time went to other processes while "
            "steps were timed. Step times are longer for that, and differ more from process to process."
        )
    if bound:
        parts.append(
            "Where `bound` is noted, over half of a step's time went into dispatch: into Python and TensorFlow, and "
            "not into the device. The model or its batch is too small there to show what a mode does to the device."
        )
    return "\n\n".join(parts)


def memory(run: Run) -> str:
    """Peaks over the processes of a mode."""
    names = ("gpu_memory_nvml_peak_mib", "gpu_memory_allocator_peak_mib", "host_memory_peak_mib")
    summary = {(row["workload"], row["mode"]): row for row in summary_of(run)}
    rows = []
    for workload, mode, records in measured(run, good=True):
        peaks = [or_none(max, values(records, name)) for name in names]
        if any(peak is not None for peak in peaks):
            driver, allocator, host = (cells.number(peak, 4) for peak in peaks)
            row = summary[workload, mode]
            if peaks[0] is not None:
                driver += cells.of_processes(row["gpu_memory_processes"], row)
            rows.append([workload, mode, driver, cells.number(row["gpu_memory_ratio"]), allocator, host])
    headers = ["workload", "mode", "GPU, NVML (MiB)", "over fp32", "GPU, allocator (MiB)", "host (MiB)"]
    if not rows:
        return ""
    return markdown_table(headers, rows) + not_compared(run, COSTS["gpu_memory"], "gpu_memory_mib", "gpu_memory_ratio")


def troubles(run: Run) -> str:
    """Cases with another status than ok: why, and what the process wrote last."""
    headers, rows = trouble_cells(run)
    if not rows:
        return ""
    tails = [
        f"The last lines of {_text(record['case_id'])}:\n\n{fenced(record['output_tail'])}"
        for record in run.records
        if record["status"] != "ok" and record["output_tail"]
    ]
    return "\n\n".join([markdown_table(headers, rows), *tails])


def trouble_cells(run: Run) -> tuple[list[str], Cells]:
    """Headers and rows of the cases with another status than ok."""
    names = ("case_id", "status", "status_reason")
    bad = [record for record in run.records if record["status"] != "ok"]
    return ["case", "status", "reason"], [[_text(record[name]) for name in names] for record in bad]


def unread(run: Run, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """What of the run's own files could not be read, and which other runs, a list.

    Args:
        run: the run.
        left_out: folders of other runs, and why each could not be read.
    """
    lines = [*run.problems, *(f"{folder} was left out: {reason}" for folder, reason in left_out)]
    return "\n".join(f"- {escape(' '.join(line.split()))}" for line in lines)


def empty(run: Run) -> str:
    """The reasons for empty cells, with the columns and modes that they hold for."""
    cases: dict[tuple[str, str], list[Record]] = {}
    for record in run.records:
        for column, reason in ((column, str(why)) for column, why in record.unavailable.items()):
            cases.setdefault((reason, column), []).append(record)
    # Columns that are empty in the same cases for the same reason share a row.
    shared: dict[tuple[str, tuple[str, ...]], tuple[list[str], list[Record]]] = {}
    for (reason, column), records in cases.items():
        ids = tuple(str(record["case_id"]) for record in records)
        shared.setdefault((reason, ids), ([], records))[0].append(column)
    rows = []
    for (reason, _), (columns, records) in shared.items():
        more = len(columns) - _COLUMNS_SHOWN
        listed = ", ".join(columns[:_COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")
        has = {record["mode"] for record in records}
        modes = ", ".join([mode for mode in MODES if mode in has] + sorted(has - MODES.keys()))
        rows.append([reason, listed, modes, f"{len(records)} of {len(run.records)}"])
    rows.sort(key=lambda row: (row[0], row[2]))
    return markdown_table(["reason", "empty columns", "modes", "cases"], rows) if rows else ""


def fenced(text: str) -> str:
    """A code block that nothing in ``text`` can end, without the colours and bells of a terminal."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    plain = "".join(c for c in plain if c in "\n\t" or c.isprintable()).strip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", plain))])
    return f"{fence}text\n{plain}\n{fence}"


def _scales(records: Sequence[Record], name: str) -> str:
    return cells.span([cells.loss_scale(value) for value in sorted(values(records, name))])


def _text(value: Any) -> str:
    return cells.DASH if value is None else str(value)


# The sections of a report on what the GPU did. Each is empty where no case has anything to say on it.


def memory_parts(run: Run) -> str:
    """Where the memory that NVML reports went."""
    rows = []
    for workload, mode, records in measured(run, good=True):
        if largest(records, "gpu_memory_nvml_peak_mib") is None:
            continue
        parts = ("context", "allocator_peak", "allocator_timed_peak", "unexplained", "idle", "reserved")
        peaks = [cells.number(largest(records, f"gpu_memory_{part}_mib"), 4) for part in parts]
        rows.append(
            [
                workload,
                mode,
                *peaks,
                _texts(values(records, "gpu_memory_method")),
                _texts(values(records, "gpu_allocator")),
            ]
        )
    headers = ["workload", "mode", "context", "in tensors", "of them in the timed window", "unexplained"]
    headers += ["in use before", "reserved", "peak is of", "allocator"]
    return markdown_table(headers, rows) if rows else ""


def energy(run: Run) -> str:
    """Energy of the GPU per step, and the power that it drew."""
    summary = {(row["workload"], row["mode"]): row for row in summary_of(run)}
    rows = []
    for workload, mode, records in measured(run, good=True):
        joules = median(records, "gpu_energy_j_per_step")
        if joules is None:
            continue
        row = summary[workload, mode]
        names = ("gpu_energy_j_per_applied_step", "gpu_energy_net_j_per_step", "gpu_power_w_mean", "gpu_idle_power_w")
        rows.append(
            [
                workload,
                mode,
                cells.number(joules) + cells.of_processes(row["gpu_energy_processes"], row),
                cells.number(row["gpu_energy_ratio"]),
                *(cells.number(median(records, name)) for name in names),
                _texts(values(records, "gpu_energy_method")),
            ]
        )
    headers = ["workload", "mode", "J per step", "over fp32", "J per applied step", "J per step above idle"]
    headers += ["power (W)", "idle (W)", "by"]
    if not rows:
        return ""
    return markdown_table(headers, rows) + not_compared(
        run, COSTS["energy"], "gpu_energy_j_per_step", "gpu_energy_ratio"
    )


def state(run: Run) -> str:
    """Clocks, temperature and what held the clocks down while steps were timed."""
    rows = []
    for workload, mode, records in measured(run):
        clock, hottest = median(records, "gpu_sm_clock_mhz_median"), largest(records, "gpu_temperature_c_max")
        if clock is None and hottest is None:
            continue
        rows.append(
            [
                workload,
                mode,
                cells.number(clock, 4),
                cells.number(median(records, "gpu_memory_clock_mhz_median"), 4),
                cells.number(median(records, "gpu_utilization_median")),
                cells.number(hottest),
                cells.share(largest(records, "gpu_throttled_share")),
                cells.share(largest(records, "gpu_power_capped_share")),
                _texts(values(records, "gpu_event_reasons")),
            ]
        )
    headers = ["workload", "mode", "SM clock (MHz)", "memory clock (MHz)", "utilisation (%)", "hottest (°C)"]
    headers += ["throttled", "at the power limit", "event reasons"]
    return markdown_table(headers, rows) if rows else ""


def not_compared(run: Run, cost: Cost, figure: str, ratio: str) -> str:
    """A paragraph that says of which rows there is no ratio because their figures are of different things.

    Args:
        run: which.
        cost: what the figure is of.
        figure: column of the summary.
        ratio: that of its ratio to fp32's.

    Returns:
        The paragraph, empty if there is no such row.
    """
    rows = summary_of(run)
    kinds = {(workload, mode): cost.kinds(records) for workload, mode, records in measured(run, good=True)}
    bare = [
        row
        for row in rows
        if row[figure] is not None
        and row[ratio] is None
        and len(kinds[row["workload"], row["mode"]] | kinds.get((row["workload"], "fp32"), set())) > 1
    ]
    if not bare:
        return ""
    named = ", ".join(f"{row['workload']} {row['mode']}" for row in bare)
    columns = " or ".join(f"`{name}`" for name in cost.is_of)
    return f"\n\nNo ratio is given for {named}: its figure and fp32's differ in {columns}, so tell of different things."


def _texts(found: list[str]) -> str:
    """Each text once."""
    return "; ".join(dict.fromkeys(found)) or cells.DASH


# The section of a report on how much step times move by themselves.

_TIME = COSTS["step_time"]


def noise(run: Run, floors: Floors) -> str:
    """Spread between processes of this run and between runs of this code, for who wants to judge a change by it.

    Args:
        run: the run.
        floors: how much runs of its code differ, where that is known.
    """
    cases = grouped(run.records)
    assumed = assumed_floor([cases], _TIME)
    rows = []
    for row in summary_of(run):
        place = (row["workload"], row["mode"])
        times = _TIME.sample(cases[place])
        if not times:
            continue
        variance, degrees = pooled([times])
        known = floors.get("step_time", place)
        floor = known or assumed
        text = cells.DASH if floor is None else f"{floor.limit:.1%}{'' if known else '?'}"
        rows.append([*place, cells.count(len(times)), f"{math.sqrt(variance):.1%}" if degrees else cells.DASH, text])
    if not rows:
        return ""
    table = markdown_table(["workload", "mode", "processes", "spread of processes", "noise floor"], rows)
    return f"{table}\n\n{_basis(floors)}"


def _basis(floors: Floors) -> str:
    if floors.runs:
        return (
            f"Spread: standard deviation. Noise floor: two runs of this code here differ by less in 19 of 20 cases, by "
            f"{len(floors.runs)} runs of it on this machine."
        )
    return (
        f"Spread: standard deviation. As a baseline this is a {SINGLE_RUN} (?): how much runs of this code differ here "
        f"is not known until there are {FEWEST_RUNS} of them, and a comparison goes by the spread of processes."
    )
