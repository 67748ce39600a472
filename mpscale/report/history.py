"""A history of runs as a table for a terminal, markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

from tabulate import tabulate

from mpscale.analysis.history import History, Point, RunFacts, Series
from mpscale.analysis.measures import Measure
from mpscale.report import cells
from mpscale.report.tables import Cells, markdown_table

FORMATS = ("table", "markdown", "csv", "json")

_SHORT = 7
"""Digits of a commit, as git shortens it."""

_COLUMNS = (
    "workload", "mode", "series", "series_key", "hardware", "run", "started", "finished", "quantity", "unit", "value",
    "low", "high", "n", "change", "change_low", "change_high", "git_commit", "git_dirty", "tensorflow", "reason",
)  # fmt: skip


def render(history: History, output: str) -> str:
    """The history, one row a series and run.

    Args:
        history: what is shown.
        output: one of :data:`FORMATS`. CSV and JSON hold numbers in full: times as ISO 8601 in UTC, changes as shares
            of 1; unknown is empty or null, and so is an end of an interval that no float can hold.
    """
    if output == "csv":
        return _csv(history)
    if output == "json":
        return _json(history)
    headers, rows = history_cells(history)
    note = _notes(history.measure, headers)
    if output == "markdown":
        title = history.measure.title
        return f"## History of the {title}\n\n{markdown_table(headers, rows)}\n\n{note}\n"
    return f"{tabulate(rows, headers, 'simple', disable_numparse=True)}\n\n{note}\n"


def _notes(measure: Measure, headers: list[str]) -> str:
    """What brackets and changes are."""
    if measure.spread == "range":
        return "In brackets: smallest and largest seed."
    what = "pairs of processes" if measure.name == "speedup" else "processes"
    text = f"In brackets: 95 % interval over {what}; none where there is only one."
    if "change" in headers:
        text += (
            "\nChange: against the last value before. Each is judged by itself, so one interval in twenty leaves out 0 "
            "by chance; `mpscale compare` allows for that."
        )
    return text


def history_cells(history: History) -> tuple[list[str], Cells]:
    """Headers and rows. A column that says nothing here is left out."""
    pairs = [(series, point) for series in history.series for point in series.points]
    columns = {
        "workload": [series.workload for series, _ in pairs],
        "mode": [series.mode for series, _ in pairs],
        "series": [series.apart or cells.DASH for series, _ in pairs],
        "when (UTC)": [when(point.run) for _, point in pairs],
        "run": [point.run.name for _, point in pairs],
        history.measure.title: [value(history.measure, series, point) for series, point in pairs],
        "n": [str(point.n) for _, point in pairs],
        "change": [_change(point) for _, point in pairs],
        "commit": [_commit(point.run) for _, point in pairs],
        "TensorFlow": [point.run.tensorflow or cells.DASH for _, point in pairs],
        "note": [_note(point) for _, point in pairs],
    }
    for name in ("series", "change", "note"):
        if all(text == cells.DASH for text in columns[name]):
            del columns[name]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def when(run: RunFacts) -> str:
    """When a run started, to the minute, in UTC."""
    return cells.DASH if run.started is None else f"{run.started:%Y-%m-%d %H:%M}"


def value(measure: Measure, series: Series, point: Point) -> str:
    """The value of a point with its interval, or its range over seeds."""
    if measure.spread == "interval":
        unit, decimals = (measure.unit, 2) if measure.name == "speedup" else (f" {measure.unit}", None)
        return cells.interval(point.value, point.low, point.high, unit, decimals)
    shown = single(measure, series)
    middle, low, high = (shown(part) for part in (point.value, point.low, point.high))
    return middle if low == high else f"{middle} [{low}, {high}]"


def single(measure: Measure, series: Series) -> Callable[[float | None], str]:
    """How one number of a measure without a unit of its own is written."""
    if measure.name == "metric":
        return lambda number: cells.metric(number, series.metric_name)
    return lambda number: cells.share(number, 2)


def _change(point: Point) -> str:
    if point.change is None:
        return cells.DASH
    text = f"{100 * point.change:+.1f} %"
    if point.change_low is None or point.change_high is None:
        return text
    return f"{text} [{100 * point.change_low:+.1f}, {100 * point.change_high:+.1f}]"


def _commit(run: RunFacts) -> str:
    if run.commit is None:
        return cells.DASH
    return run.commit[:_SHORT] + ("-dirty" if run.dirty else "")


def _note(point: Point) -> str:
    notes = [point.reason] if point.reason else []
    if not point.run.finished:
        notes.append("the run did not finish")
    return "; ".join(notes) or cells.DASH


def _csv(history: History) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for series in history.series:
        common = {
            "workload": series.workload,
            "mode": series.mode,
            "series": series.apart,
            "series_key": series.key,
            "hardware": json.dumps(series.hardware, default=str),
            "quantity": history.measure.name,
            "unit": history.measure.unit,
        }
        for point in series.points:
            row = common | _plain(point)
            writer.writerow({name: value for name, value in row.items() if value is not None})
    return text.getvalue()


def _json(history: History) -> str:
    content = {
        "quantity": history.measure.name,
        "unit": history.measure.unit,
        "low_and_high": "95 % interval over processes" if history.measure.spread == "interval" else "range over seeds",
        "series": [
            {
                "workload": series.workload,
                "mode": series.mode,
                "series": series.apart,
                "series_key": series.key,
                "hardware": series.hardware,
                "metric_name": series.metric_name,
                "points": [_plain(point) for point in series.points],
            }
            for series in history.series
        ],
        "skipped": [{"what": what, "reason": reason} for what, reason in history.skipped],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _plain(point: Point) -> dict[str, Any]:
    numbers = {
        name: getattr(point, name) for name in ("value", "low", "high", "n", "change", "change_low", "change_high")
    }
    return {
        "run": point.run.name,
        "started": None if point.run.started is None else point.run.started.isoformat(),
        "finished": point.run.finished,
        # JSON has no infinity.
        **{name: number if number is not None and math.isfinite(number) else None for name, number in numbers.items()},
        "git_commit": point.run.commit,
        "git_dirty": point.run.dirty,
        "tensorflow": point.run.tensorflow,
        "reason": point.reason,
    }
