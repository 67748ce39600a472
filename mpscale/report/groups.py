"""The cases of a run by workload and mode, and what their columns come to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mpscale.analysis.runs import Run
from mpscale.analysis.summary import plain_rows
from mpscale.analysis.trainings import LOST, MEASURED
from mpscale.records import Record

Group = tuple[str, str, list[Record]]


def measured(run: Run, trained: bool = False, good: bool = False) -> Iterator[Group]:
    """Cases whose figures count, by workload and mode, in the order of the summary.

    Args:
        run: the run.
        trained: only those that trained to the end.
        good: only those of seeds that were not lost: for what a mode costs.
    """
    lost = {(r["workload"], r["mode"], r["seed"]) for r in run.records if r["status"] in LOST} if good else set()
    for row in plain_rows(run.summary):
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
