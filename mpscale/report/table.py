"""The table of results that terminal and markdown share, and how markdown tables are made."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.gates import Finding
from mpscale.analysis.quantities import QUANTITIES
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.columns import LOST, MEASURED
from mpscale.core.record import Record
from mpscale.core.runs import Run

Cells = list[list[str]]


def result_table(run: Run) -> str:
    """The results of a run for a terminal, one row a workload and mode; empty where no case was started."""
    headers, rows = result_cells(run)
    return tabulate(rows, headers, "simple", disable_numparse=True) if rows else ""


def result_cells(run: Run) -> tuple[list[str], Cells]:
    """Headers and rows of the results. A column that says nothing in this run is left out."""
    rows = summary_of(run)
    columns = {
        "workload": [row["workload"] for row in rows],
        "mode": [row["mode"] for row in rows],
        "step time": [step_time(row) for row in rows],
        "speed-up over fp32": [speedup(row, "fp32") for row in rows],
        "speed-up over tf32": [speedup(row, "tf32") for row in rows],
        "peak memory": [peak_memory(row) for row in rows],
        "overflow steps": [overflow(row) for row in rows],
        "final " + _metric_header(rows): [final_metric(row) for row in rows],
        "status": [statuses(row) for row in rows],
    }
    if all(row["ok"] == row["cases"] and not row["not_started"] for row in rows):
        del columns["status"]
    if all(text == DASH for text in columns["speed-up over tf32"]):
        del columns["speed-up over tf32"]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def step_time(row: Row) -> str:
    """Step time with its interval over processes."""
    return interval(row["step_time_ms"], row["step_time_ms_low"], row["step_time_ms_high"], " ms")


def speedup(row: Row, baseline: str) -> str:
    """Speed-up over ``baseline`` with its interval over pairs of processes."""
    low, high = row[f"speedup_{baseline}_low"], row[f"speedup_{baseline}_high"]
    return interval(row[f"speedup_{baseline}"], low, high, "x", decimals=2)


def peak_memory(row: Row) -> str:
    """Peak memory on the GPU, else of the host, which is marked: the two are not to be compared."""
    if row["gpu_memory_mib"] is not None:
        return f"{number(row['gpu_memory_mib'], 4)} MiB{of_processes(row['gpu_memory_processes'], row)}"
    if row["host_memory_mib"] is not None:
        return f"{number(row['host_memory_mib'], 4)} MiB (host)"
    return DASH


def overflow(row: Row) -> str:
    """Overflow steps of attempted steps."""
    if row["overflow_steps"] is None:
        return DASH
    counts = f"{count(row['overflow_steps'])}/{count(row['attempted_steps'])}"
    return counts + of_seeds(row["overflow_seeds"], row)


def final_metric(row: Row) -> str:
    """Mean of the metric over seeds, and its range where there are several."""
    name = row["metric_name"]
    mean = metric(row["metric_mean"], name)
    ends = span([metric(row["metric_min"], name), metric(row["metric_max"], name)])
    text = mean if ends == mean else f"{mean} ({ends})"
    return text if row["metric_mean"] is None else text + of_seeds(row["metric_seeds"], row)


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


# Numbers as text, the same in every table. None is unknown and becomes a dash.

DASH = "–"  # noqa: RUF001
_PERCENT_METRICS = ("accuracy",)


def number(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, without an exponent where that stays readable."""
    if value is None:
        return DASH
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    return f"{value:.{_decimals(value, digits)}f}"


def interval(
    estimate: float | None, low: float | None, high: float | None, unit: str, decimals: int | None = None
) -> str:
    """``7.91 [7.80, 8.02] ms``: the ends to the decimals of the estimate, left out where they are unknown.

    Args:
        estimate: the number itself.
        low: lower end of its interval, None where one process cannot give it.
        high: upper end, likewise.
        unit: put behind; give it a leading space if one belongs there.
        decimals: fixed; without, as many as show three digits of the estimate.
    """
    if estimate is None:
        return DASH
    places = _decimals(estimate, 3) if decimals is None else decimals
    if low is None or high is None:
        return f"{estimate:.{places}f}{unit}"
    ends = f"[{low:.{places}f}, {high:.{places}f}]"
    # "7.91 [7.80, 8.02] ms", but "0.98x [0.95, 1.01]".
    return f"{estimate:.{places}f} {ends}{unit}" if unit.startswith(" ") else f"{estimate:.{places}f}{unit} {ends}"


def count(value: float | None) -> str:
    """A whole number."""
    return DASH if value is None else f"{value:.0f}"


def share(value: float | None, decimals: int = 0) -> str:
    """A share of 1 as percent."""
    return DASH if value is None else f"{100 * value:.{decimals}f} %"


def metric(value: float | None, name: str | None) -> str:
    """A workload's metric, as percent where it is an accuracy."""
    return share(value, 2) if name in _PERCENT_METRICS else number(value, 4)


def metric_change(difference: float, name: str | None) -> str:
    """A difference between two values of a metric, in words."""
    if name in _PERCENT_METRICS:
        size, rounded = f"{abs(100 * difference):.2f} points", round(100 * difference, 2)
    else:
        size, rounded = number(abs(difference), 3), difference
    return "no different from" if rounded == 0 else f"{size} {'above' if difference > 0 else 'below'}"


def difference(value: float | None, low: float | None, high: float | None, name: str | None) -> str:
    """A difference between two values of a metric, with its interval; in points where it is an accuracy."""
    if value is None:
        return DASH
    factor, unit = (100, " points") if name in _PERCENT_METRICS else (1, "")

    def text(number: float) -> str:
        return f"{factor * number:+.2f}" if unit else f"{number:+.3g}"

    ends = "" if low is None or high is None else f" [{text(low)}, {text(high)}]"
    return f"{text(value)}{ends}{unit}"


def size(value: float | None, name: str | None) -> str:
    """The size of a difference between two values of a metric, in points where it is an accuracy."""
    if value is None:
        return DASH
    if name not in _PERCENT_METRICS:
        return number(value)
    return f"{100 * value:g} point{'' if 100 * value == 1 else 's'}"


def loss_scale(value: float | None) -> str:
    """A loss scale: mostly a power of two, and then in full."""
    if value is None:
        return DASH
    return f"{value:.0f}" if abs(value) < 1e9 and value == int(value) else f"{value:.6g}"


def span(texts: Iterable[str]) -> str:
    """The first and the last of some texts in order, or the one there is."""
    seen = [text for text in texts if text != DASH]
    if not seen:
        return DASH
    return seen[0] if seen[0] == seen[-1] else f"{seen[0]} to {seen[-1]}"


def statuses(row: Mapping[str, Any]) -> str:
    """What became of the cases of a row of the summary: how many ended how, and how many were not started."""
    waiting = f"not started {row['not_started']}" if row["not_started"] else ""
    return ", ".join(filter(None, (row["statuses"], waiting)))


def of_seeds(known: int, row: Mapping[str, Any]) -> str:
    """`` (4 of 5 seeds)`` behind a figure that not all seeds of a row of the summary are in, else nothing."""
    return f" ({known} of {row['seeds_planned']} seeds)" if known < row["seeds_planned"] else ""


def of_processes(known: int, row: Mapping[str, Any]) -> str:
    """The same for processes."""
    there = row["cases"] + row["not_started"]
    return f" ({known} of {there} processes)" if known < there else ""


def _decimals(value: float, digits: int) -> int:
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


# The cases of a run by workload and mode, and what their columns come to.

Group = tuple[str, str, list[Record]]


def measured(run: Run, trained: bool = False, good: bool = False) -> Iterator[Group]:
    """Cases whose figures count, by workload and mode, in the order of the summary.

    Args:
        run: the run.
        trained: only those that trained to the end.
        good: only those of seeds that were not lost: for what a mode costs.
    """
    lost = {(r["workload"], r["mode"], r["seed"]) for r in run.records if r["status"] in LOST} if good else set()
    for row in summary_of(run):
        records = [
            record
            for record in run.records
            if (record["workload"], record["mode"]) == (row["workload"], row["mode"])
            and record["status"] in MEASURED
            and (record["repeat"] == 0 or not trained)
            and (record["workload"], record["mode"], record["seed"]) not in lost
        ]
        if records:
            yield row["workload"], row["mode"], records


def values(records: Sequence[Record], name: str) -> list[Any]:
    """The known values of a column."""
    return [record[name] for record in records if record[name] is not None]


def or_none(function: Callable[[Any], Any], found: list[Any]) -> Any:
    """``function`` of the values, None where there are none."""
    return function(found) if found else None


def median(records: Sequence[Record], name: str) -> float | None:
    """The median of a column's known values."""
    found: float | None = or_none(statistics.median, values(records, name))
    return found


def largest(records: Sequence[Record], name: str) -> float | None:
    """The largest of a column's known values."""
    found: float | None = or_none(max, values(records, name))
    return found


# A comparison of runs for programs: CSV and JSON.

_COLUMNS = (
    "baseline_run", "run", "workload", "mode", "state", "state_reason", "quantity", "unit", "baseline", "value",
    "change", "low", "high", "noise_floor", "floor_runs", "detectable", "verdict", "verdict_reason",
)  # fmt: skip


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """One line for each quantity of each row, shares as shares; a row that is not compared has a line of its own."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for comparison in comparisons:
        for row in comparison.rows:
            for values in _long(row) or [{}]:
                common = {"baseline_run": comparison.baseline.name, "run": comparison.other.name}
                pair = row.pair
                state = {"workload": pair.workload, "mode": pair.mode, "state": pair.state, "state_reason": pair.reason}
                writer.writerow(
                    {name: value for name, value in {**common, **state, **values}.items() if value is not None}
                )
    return text.getvalue()


def _long(row: ComparedRow) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "quantity": name,
            "unit": QUANTITIES[name].unit,
            "baseline": change.baseline,
            "value": change.other,
            **{
                key: getattr(change, key)
                for key in ("change", "low", "high", "noise_floor", "floor_runs", "detectable", "verdict")
            },
            "verdict_reason": "; ".join(dict.fromkeys(filter(None, (change.reason, change.left_out)))) or None,
        }
        for name, change in row.changes.items()
    ]
    if row.quality is not None:
        difference = row.quality.difference
        found.append(
            {
                "quantity": "metric",
                "change": difference and difference.mean,
                "low": difference and difference.low,
                "high": difference and difference.high,
                "verdict": row.quality.verdict,
                "verdict_reason": row.quality.why or None,
            }
        )
    if row.overflow_rates != (None, None):
        before, after = row.overflow_rates
        found.append({"quantity": "overflow_rate", "baseline": before, "value": after})
    return found


def as_json(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> str:
    """Everything that is known of the comparisons; null for what is not."""
    content = {
        "baseline": comparisons[0].baseline.name,
        "comparisons": [
            {
                "run": comparison.other.name,
                "same_device": comparison.same_device,
                "in_turns": comparison.in_turns,
                "floor_runs": comparison.floors.runs,
                "hardware": {"baseline": comparison.hardware[0], "run": comparison.hardware[1]},
                "differences": [dict(zip(("name", "baseline", "run"), d, strict=True)) for d in comparison.differences],
                "rows": [
                    {
                        "workload": row.pair.workload,
                        "mode": row.pair.mode,
                        "state": row.pair.state,
                        "reason": row.pair.reason,
                        "newly_failed": row.pair.newly_failed,
                        "changes": {name: asdict(change) for name, change in row.changes.items()},
                        "metric": row.quality and asdict(row.quality),
                        "overflow_rate": dict(zip(("baseline", "run"), row.overflow_rates, strict=True)),
                    }
                    for row in comparison.rows
                ],
            }
            for comparison in comparisons
        ],
        "gates": [
            {"gate": str(f.gate), "run": f.run, "row": f.row, "outcome": f.outcome, "text": f.text} for f in findings
        ],
    }
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """``value`` with null for an end of an interval that no float holds: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
