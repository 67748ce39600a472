"""Runs over time: one series for each way of measuring on each machine, oldest run first."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpscale.analysis.quantities import BASELINE, MEASURES, Measure, estimate, failure, left_out, sample_of, why_unknown
from mpscale.analysis.stats import log_change
from mpscale.core.case import tell_apart
from mpscale.core.record import Record, grouped, in_order_of_modes
from mpscale.core.runs import Run, RunError, hardware, read_run
from mpscale.core.trainings import Key

_TIME_IN_NAME = re.compile(r"\d{8}T\d{6}Z")
_NONE_YET = "make one with `make bench` or `pytest bench/ --benchmark-only`"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a reader wants to know of a run when a figure has changed.

    Args:
        name: of the run; the path of a cases.csv.
        started: in UTC, None where neither run.json nor the name tells.
        finished: whether the run came to its end.
        commit: of the repository in which it was made, None where unknown.
        dirty: whether there were changes that are not in that commit, None where unknown.
        tensorflow: version, None where unknown.
    """

    name: str
    started: datetime | None
    finished: bool
    commit: str | None
    dirty: bool | None
    tensorflow: str | None


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a series. None is unknown.

    Args:
        run: which.
        value: geometric mean over processes; mean over seeds for the metric; for the overflow rate, over all steps.
        low: lower end of the spread, see :class:`Measure`; None where there is one process.
        high: upper end, likewise.
        n: processes, pairs of processes for a speed-up, seeds for metric and overflow rate.
        change: against the run before it in the series that has a value, as a share: 0.05 is 5 % more. None for
            metric and overflow rate, of which a ratio says little.
        change_low: lower end of its 95 % interval by Welch, None where one process gives no spread.
        change_high: upper end, likewise.
        reason: why there is no value; or which seeds or processes are not in it, and why.
    """

    run: RunFacts
    value: float | None
    low: float | None
    high: float | None
    n: int
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    reason: str | None = None

    @property
    def is_incomplete(self) -> bool:
        """Whether there is a value, and not of all that should be in it."""
        return self.value is not None and self.reason is not None


@dataclass(frozen=True, slots=True)
class Series:
    """What was measured in one way on one machine, oldest run first.

    Args:
        workload: its name.
        mode: its name.
        key: the series key, see :func:`mpscale.core.case.series_key`.
        hardware: see :func:`mpscale.analysis.compare.hardware`; only what is known.
        apart: what tells it from the other series of its workload and mode, empty where it is the only one.
        metric_name: of the workload, None where unknown.
        points: one a run.
    """

    workload: str
    mode: str
    key: str
    hardware: dict[str, Any]
    apart: str
    metric_name: str | None
    points: list[Point]

    @property
    def label(self) -> str:
        """Its mode, and what tells it apart."""
        return f"{self.mode} ({self.apart})" if self.apart else self.mode


@dataclass(frozen=True, slots=True)
class History:
    """The series of some runs.

    Args:
        measure: what they are of.
        series: by workload, in order of first appearance, then by mode, in the order of `MODES`.
        skipped: what was left out, and why.
    """

    measure: Measure
    series: list[Series]
    skipped: list[tuple[str, str]]

    @property
    def runs(self) -> list[RunFacts]:
        """Those that have a point, oldest first."""
        found = {point.run.name: point.run for series in self.series for point in series.points}
        return sorted(found.values(), key=_age)


def read_folder(results_dir: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """The runs in ``runs/`` and ``reference/``, each once, and those that cannot be read: folder and reason.

    Raises:
        RunError: there is none, or none of them can be read.
    """
    folders = [
        folder
        for kept in ("runs", "reference")
        for folder in sorted((results_dir / kept).glob("*"))
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    if not folders:
        raise RunError(f"there is no run in {results_dir / 'runs'} or {results_dir / 'reference'}; {_NONE_YET}")
    runs: dict[str, Run] = {}
    skipped = []
    for folder in folders:
        try:
            run = read_run(folder)
        except Exception as error:  # whatever one run stumbles over must not cost the others their history
            skipped.append((str(folder), str(error)))
        else:
            runs.setdefault(run.name, run)
    if not runs:
        raise RunError(
            f"none of the {len(skipped)} runs in {results_dir} can be read; the first: {skipped[0][1]}; {_NONE_YET}"
        )
    return list(runs.values()), skipped


def make_history(
    runs: Sequence[Run],
    quantity: str = "step_time",
    workloads: Sequence[str] = (),
    modes: Sequence[str] = (),
    skipped: Sequence[tuple[str, str]] = (),
) -> History:
    """Lays runs one behind the other.

    Args:
        runs: in any order; of those with the same name the first counts.
        quantity: one of :data:`MEASURES`.
        workloads: to show, all where none is named.
        modes: likewise.
        skipped: runs that could not be read, and why; they come first in the history's own list.

    Raises:
        ValueError: there is no such quantity.
        RunError: no run has a named workload or mode, or none knows the quantity.
    """
    if quantity not in MEASURES:
        raise ValueError(f"there is no quantity {quantity!r}; there are {', '.join(MEASURES)}")
    by_name: dict[str, Run] = {}
    for run in runs:
        by_name.setdefault(run.name, run)
    ordered = sorted(((_facts(run), run) for run in by_name.values()), key=lambda pair: _age(pair[0]))
    machines = _machines([run for _, run in ordered])
    tables = [(facts, machines[run.name], run.records) for facts, run in ordered]
    waiting = {run.name: run.places_not_started for _, run in ordered}
    there = {column: _there(tables, column, wanted) for column, wanted in (("workload", workloads), ("mode", modes))}
    measure = MEASURES[quantity]
    not_shown: list[tuple[str, str]] = []
    found: dict[tuple[str, str, str, str], _Found] = {}
    for facts, machine, rows in tables:
        for (workload, mode), cases in grouped(rows).items():
            if workload not in there["workload"] or mode not in there["mode"]:
                continue
            if measure.name == "speedup" and mode == BASELINE:
                continue  # over itself it is 1 in every run
            by_key = _by_key(cases)
            # A mode that a device does not have is no news; one that broke before its model was built is.
            if not by_key and (why := failure(cases, leave_out=("unsupported",))):
                not_shown.append(
                    (f"{facts.name} {workload} {mode}", f"{why}; so it is not known of which series it is")
                )
            baseline = [case for case in rows if (case["workload"], case["mode"]) == (workload, BASELINE)]
            for key, members in by_key.items():
                place = (workload, mode, key, json.dumps(machine, sort_keys=True, default=str))
                # Of which series a process is that was never started is known where there is one alone.
                keys = [key for *where, key in waiting[facts.name] if where == [workload, mode] and len(by_key) == 1]
                found.setdefault(place, _Found(machine, [])).runs.append((facts, members, baseline, keys))
    series = []
    for place in sorted(found, key=lambda place: (there["workload"].index(place[0]), there["mode"].index(place[1]))):
        one = Series(*place[:3], found[place].machine, "", found[place].metric_name, _points(measure, found[place]))
        if all(point.value is None for point in one.points):
            not_shown.append(
                (f"{one.workload} {one.mode}", f"no run knows the {measure.title}: {one.points[-1].reason}")
            )
        else:
            series.append(one)
    if not series:
        there_is_none = f"no mode but {BASELINE} was measured" if quantity == "speedup" else "no case was measured"
        why = not_shown[-1][1] if not_shown else f"no run knows the {measure.title}: {there_is_none}"
        raise RunError(f"{why}; choose another quantity with --quantity")
    return History(measure, _labelled(series), [*skipped, *not_shown])


@dataclass(frozen=True, slots=True)
class _Found:
    """One series: its machine, and of each run the facts, cases, those of the baseline, and what was not started."""

    machine: dict[str, Any]
    runs: list[tuple[RunFacts, list[Record], list[Record], list[Key]]]

    @property
    def metric_name(self) -> str | None:
        return next(
            (case["metric_name"] for _, cases, _, _ in self.runs for case in cases if case["metric_name"]), None
        )


def _there(tables: Sequence[tuple[RunFacts, Any, list[Record]]], column: str, wanted: Sequence[str]) -> list[str]:
    """The workloads or modes to show, in order.

    Raises:
        RunError: no run has a wanted one.
    """
    seen = list(dict.fromkeys(case[column] for _, _, rows in tables for case in rows))
    if column == "mode":
        seen = in_order_of_modes(seen)
    for name in wanted:
        if name not in seen:
            raise RunError(f"no run has the {column} {name!r}; there are {', '.join(seen) or 'none'}")
    return [name for name in seen if name in wanted or not wanted]


def _labelled(series: Sequence[Series]) -> list[Series]:
    siblings: dict[tuple[str, str], list[Series]] = {}
    for one in series:
        siblings.setdefault((one.workload, one.mode), []).append(one)
    return [
        replace(one, apart=apart)
        for group in siblings.values()
        for one, apart in zip(group, tell_apart([(one.key, one.hardware) for one in group]), strict=True)
    ]


def _by_key(cases: Sequence[Record]) -> dict[str, list[Record]]:
    """Cases of one workload and mode by series. One that failed too early to have a key is of the others' series."""
    keys = list(dict.fromkeys(case["series_key"] for case in cases if case["series_key"] is not None))
    if len(keys) == 1:
        return {keys[0]: list(cases)}
    return {key: [case for case in cases if case["series_key"] == key] for key in keys}


def _points(measure: Measure, found: _Found) -> list[Point]:
    points = []
    before: list[float] = []
    for run, cases, baseline, not_started in found.runs:
        sample = sample_of(measure, cases, baseline)
        if not sample:
            points.append(Point(run, None, None, None, 0, reason=why_unknown(measure, cases, baseline)))
            continue
        value = estimate(measure, sample, cases)
        change: tuple[float | None, float | None, float | None] = (None, None, None)
        if before and measure.spread == "interval":
            compared = log_change(before, sample)
            change = (compared.change, *(compared.interval() or (None, None)))
        why = left_out(measure, cases, baseline, not_started)
        points.append(Point(run, value.estimate, value.low, value.high, value.n, *change, reason=why))
        before = sample
    return points


def _facts(run: Run) -> RunFacts:
    environment = _object(run.info.get("environment"))
    git = _object(environment.get("git"))
    versions = (_object(environment.get(name)).get("tensorflow") for name in ("packages", "runtime"))
    commit, dirty = git.get("commit"), git.get("dirty")
    return RunFacts(
        run.name,
        _started(run),
        run.finished,
        str(commit) if commit else None,
        dirty if isinstance(dirty, bool) else None,
        next((str(version) for version in versions if version), None),
    )


def _started(run: Run) -> datetime | None:
    """From run.json; else from the name, which begins with it, or that of the folder in which a cases.csv lies."""
    try:
        found = datetime.fromisoformat(str(run.info.get("started")))
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    for text in reversed(_TIME_IN_NAME.findall(run.name)):
        try:
            return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        except ValueError:
            continue
    return None


def _age(run: RunFacts) -> tuple[bool, datetime, str]:
    """Sorts oldest first; runs of unknown age come last, by name."""
    return (run.started is None, run.started or datetime.min.replace(tzinfo=UTC), run.name)


def _machines(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The hardware of each run by its name.

    A cases.csv knows only kind and name of the device; it belongs to the one machine that has both, if it is one.
    """
    known = {run.name: {name: fact for name, fact in hardware(run).items() if fact is not None} for run in runs}
    full: list[dict[str, Any]] = []
    for run in runs:
        if run.info and known[run.name] not in full:
            full.append(known[run.name])
    for run in runs:
        if not run.info:
            fitting = [facts for facts in full if known[run.name].items() <= facts.items()]
            known[run.name] = fitting[0] if len(fitting) == 1 else known[run.name]
    return known


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
