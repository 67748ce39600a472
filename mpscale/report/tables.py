"""The table of results that terminal and markdown share, and how markdown tables are made."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from mpscale.analysis.runs import Run
from mpscale.analysis.summary import plain_rows
from mpscale.analysis.trainings import Row
from mpscale.report import cells

Cells = list[list[str]]


def result_table(run: Run) -> str:
    """The results of a run for a terminal, one row a workload and mode; empty where no case was started."""
    headers, rows = result_cells(run)
    return tabulate(rows, headers, "simple", disable_numparse=True) if rows else ""


def result_cells(run: Run) -> tuple[list[str], Cells]:
    """Headers and rows of the results. A column that says nothing in this run is left out."""
    rows = plain_rows(run.summary)
    columns = {
        "workload": [row["workload"] for row in rows],
        "mode": [row["mode"] for row in rows],
        "step time": [step_time(row) for row in rows],
        "speed-up over fp32": [speedup(row, "fp32") for row in rows],
        "speed-up over tf32": [speedup(row, "tf32") for row in rows],
        "peak memory": [peak_memory(row) for row in rows],
        "overflow steps": [overflow(row) for row in rows],
        "final " + _metric_header(rows): [final_metric(row) for row in rows],
        "status": [cells.statuses(row) for row in rows],
    }
    if all(row["ok"] == row["cases"] and not row["not_started"] for row in rows):
        del columns["status"]
    if all(text == cells.DASH for text in columns["speed-up over tf32"]):
        del columns["speed-up over tf32"]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def step_time(row: Row) -> str:
    """Step time with its interval over processes."""
    return cells.interval(row["step_time_ms"], row["step_time_ms_low"], row["step_time_ms_high"], " ms")


def speedup(row: Row, baseline: str) -> str:
    """Speed-up over ``baseline`` with its interval over pairs of processes."""
    low, high = row[f"speedup_{baseline}_low"], row[f"speedup_{baseline}_high"]
    return cells.interval(row[f"speedup_{baseline}"], low, high, "x", decimals=2)


def peak_memory(row: Row) -> str:
    """Peak memory on the GPU, else of the host, which is marked: the two are not to be compared."""
    if row["gpu_memory_mib"] is not None:
        return f"{cells.number(row['gpu_memory_mib'], 4)} MiB{cells.of_processes(row['gpu_memory_processes'], row)}"
    if row["host_memory_mib"] is not None:
        return f"{cells.number(row['host_memory_mib'], 4)} MiB (host)"
    return cells.DASH


def overflow(row: Row) -> str:
    """Overflow steps of attempted steps."""
    if row["overflow_steps"] is None:
        return cells.DASH
    counts = f"{cells.count(row['overflow_steps'])}/{cells.count(row['attempted_steps'])}"
    return counts + cells.of_seeds(row["overflow_seeds"], row)


def final_metric(row: Row) -> str:
    """Mean of the metric over seeds, and its range where there are several."""
    name = row["metric_name"]
    mean = cells.metric(row["metric_mean"], name)
    ends = cells.span([cells.metric(row["metric_min"], name), cells.metric(row["metric_max"], name)])
    text = mean if ends == mean else f"{mean} ({ends})"
    return text if row["metric_mean"] is None else text + cells.of_seeds(row["metric_seeds"], row)


def metric_why(row: Row) -> str:
    """Why the verdict on the metric is what it is, and which seeds are not in it; may be empty."""
    return "; ".join(filter(None, (row["metric_reason"], row["metric_left_out"])))


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; no cell can break it or be taken for HTML."""
    return tabulate(
        [[escape(cell) for cell in row] for row in rows],
        [escape(header) for header in headers],
        "github",
        disable_numparse=True,
    )


def escape(text: str) -> str:
    """``text`` on one line, with nothing in it that markdown or HTML acts upon."""
    line = " ".join(str(text).split()).replace("\\", "\\\\")
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|`*~":
        line = line.replace(mark, "\\" + mark)
    return line


def _metric_header(rows: Sequence[Row]) -> str:
    names = {row["metric_name"] for row in rows if row["metric_name"] is not None}
    return names.pop() if len(names) == 1 else "metric"
