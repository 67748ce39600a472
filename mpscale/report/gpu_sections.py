"""The sections of a report on what the GPU did. Each is empty where no case has anything to say on it."""

from __future__ import annotations

from collections.abc import Sequence

from mpscale.analysis.runs import Run
from mpscale.analysis.summary import ENERGY_IS_OF, figures_of, plain_rows
from mpscale.report import cells
from mpscale.report.groups import largest, measured, median, values
from mpscale.report.tables import markdown_table


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
    summary = {(row["workload"], row["mode"]): row for row in plain_rows(run.summary)}
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
        run, "gpu_energy_j_per_step", "gpu_energy_j_per_step", "gpu_energy_ratio", ENERGY_IS_OF
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


def not_compared(run: Run, column: str, figure: str, ratio: str, is_of: Sequence[str]) -> str:
    """A paragraph that says of which rows there is no ratio because their figures are of different things.

    Args:
        run: which.
        column: column of the cases that the figure is made of.
        figure: column of the summary.
        ratio: that of its ratio to fp32's.
        is_of: columns of the cases in which the figures may differ.

    Returns:
        The paragraph, empty if there is no such row.
    """
    rows = plain_rows(run.summary)
    kinds = {
        (workload, mode): figures_of([{name: r[name] for name in (column, *is_of)} for r in records], column, is_of)
        for workload, mode, records in measured(run, good=True)
    }
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
    columns = " or ".join(f"`{name}`" for name in is_of)
    return f"\n\nNo ratio is given for {named}: its figure and fp32's differ in {columns}, so tell of different things."


def _texts(found: list[str]) -> str:
    """Each text once."""
    return "; ".join(dict.fromkeys(found)) or cells.DASH
