"""Runs over time: one series per way of measuring and machine, oldest run first."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpscale.analysis.quantities import BASELINE, QUANTITIES, Quantity, failure, why_unknown
from mpscale.analysis.stats import Interval, geometric_interval, log_change
from mpscale.analysis.versions import ANY, ModelChange, model_changes, series_name, versions_key
from mpscale.core.case import SeriesKey
from mpscale.core.machines import hardware
from mpscale.core.naming import with_id
from mpscale.core.record import Key, Record, grouped, in_order_of_modes
from mpscale.core.runs import MAKE_ONE, Run, RunError, read_run, without_parts

_TIME_IN_NAME = re.compile(r"\d{8}T\d{6}Z")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a reader wants to know about a run when a figure has changed.

    Args:
        name: of the run, or the path of a cases.csv.
        started: in UTC; None if neither run.json nor the name has the time.
        finished: whether the run ended.
        commit: of the repository in which it was made; None if unknown.
        dirty: whether there were uncommitted changes; None if unknown.
        tensorflow: its version; None if unknown.
        given_name: the name that somebody gave the run; None if nobody did.
    """

    name: str
    started: datetime | None
    finished: bool
    commit: str | None
    dirty: bool | None
    tensorflow: str | None
    given_name: str | None = None

    @property
    def shown(self) -> str:
        """How texts name the run."""
        return with_id(self.name, self.given_name)


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a series. None is unknown.

    Args:
        run: the run.
        value: geometric mean over processes; for the metric, mean over seeds; for the overflow rate, over all steps.
        low: lower end of the spread, see :attr:`Quantity.spread`; None if there is a single process.
        high: upper end.
        n: processes; pairs of processes for a speed-up; seeds for metric and overflow rate.
        change: relative to the previous run in the series that has a value: 0.05 is 5 % more. None for metric and
            overflow rate, where a ratio says little.
        change_low: lower end of its 95 % interval by Welch; None if a single process gives no spread.
        change_high: upper end.
        reason: why there is no value; or which seeds or processes are not in it, or why it is no claim about speed.
        versions: how the model differs from that of the run before; empty if it is the same.
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
    versions: Sequence[ModelChange] = ()

    @property
    def is_incomplete(self) -> bool:
        """Whether there is a value with a reservation: something is missing from it, or it is no claim about speed."""
        return self.value is not None and self.reason is not None


@dataclass(frozen=True, slots=True)
class Series:
    """What was measured in one way on one machine, oldest run first.

    Args:
        workload: its name.
        mode: its name.
        key: the series key, see :class:`mpscale.core.case.SeriesKey`; of a named series for all versions.
        hardware: see :func:`mpscale.core.machines.hardware`; only what is known.
        apart: what distinguishes it from other series of its workload and mode; empty if it is the only one.
        metric_name: of the workload; None if unknown.
        points: one per run.
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
        """The mode, and what distinguishes the series."""
        return f"{self.mode} ({self.apart})" if self.apart else self.mode


@dataclass(frozen=True, slots=True)
class History:
    """The series of some runs.

    Args:
        measure: the quantity that they show.
        series: by workload, in order of first appearance, then by mode, in the order of tables.
        skipped: what was left out, and why.
    """

    measure: Quantity
    series: list[Series]
    skipped: list[tuple[str, str]]

    @property
    def runs(self) -> list[RunFacts]:
        """The runs that have a point, oldest first."""
        found = {point.run.name: point.run for series in self.series for point in series.points}
        return sorted(found.values(), key=_age)


def read_folder(results_dir: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """Read the runs in ``runs/`` and ``reference/``, each once; also return unreadable ones as folder and reason.

    Raises:
        RunError: there is no run, or none can be read.
    """
    runs, skipped = read_what_can_be(results_dir)
    if not runs:
        which = "the only run" if len(skipped) == 1 else f"the first of {len(skipped)} runs"
        raise RunError(f"no run in {results_dir} can be read; {which}: {skipped[0][1]}; {MAKE_ONE}")
    return runs, skipped


def read_what_can_be(results_dir: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """As :func:`read_folder`, but it is no error if every run is broken. Of a merged run and its parts, only it counts.

    Raises:
        RunError: there is no run.
    """
    folders = [
        folder
        for kept in ("runs", "reference")
        for folder in sorted((results_dir / kept).glob("*"))
        if folder.is_dir() and not folder.name.startswith(".")
    ]
    if not folders:
        raise RunError(f"there is no run in {results_dir / 'runs'} or {results_dir / 'reference'}; {MAKE_ONE}")
    runs: dict[str, Run] = {}
    skipped = []
    for folder in folders:
        try:
            run = read_run(folder)
        except Exception as error:  # whatever is wrong with one run must not cost the others their history
            skipped.append((str(folder), str(error)))
        else:
            runs.setdefault(run.name, run)
    return without_parts(runs.values()), skipped


def make_history(
    runs: Sequence[Run],
    quantity: str = "step_time",
    workloads: Sequence[str] = (),
    modes: Sequence[str] = (),
    skipped: Sequence[tuple[str, str]] = (),
    by_name: bool = False,
) -> History:
    """Line up runs by time.

    Args:
        runs: in any order; if several have the same name, the first counts.
        quantity: one of :data:`QUANTITIES`.
        workloads: those to show; all if empty.
        modes: those to show; all if empty.
        skipped: runs that could not be read, with the reason; they come first in the history's own list.
        by_name: take all versions of a workload of one name for one series, also if it names none.

    Raises:
        ValueError: there is no such quantity.
        RunError: no run has a named workload or mode, or a value of the quantity.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"there is no quantity {quantity!r}; there are {', '.join(QUANTITIES)}")
    ordered = oldest_first(runs)
    machines = _machines([run for _, run in ordered])
    tables = [(facts, run, grouped(run.records)) for facts, run in ordered]
    firsts = [cases[0] for *_, table in tables for cases in table.values()]
    there = {
        "workload": _shown("workload", [case["workload"] for case in firsts], workloads),
        "mode": _shown("mode", in_order_of_modes(case["mode"] for case in firsts), modes),
    }
    measure = QUANTITIES[quantity]
    not_shown: list[tuple[str, str]] = []
    found: dict[tuple[str, str, str, str], _Found] = {}
    for facts, run, table in tables:
        machine = machines[run.name]
        for place, cases in table.items():
            # A row of a sweep belongs to the series of its batch and scale, whatever the run calls it.
            workload, mode = cases[0]["workload"], cases[0]["mode"]
            if workload not in there["workload"] or mode not in there["mode"]:
                continue
            if measure.name == "speedup" and mode == BASELINE:
                continue  # over itself it is 1 in every run
            by_key = _by_key(cases, by_name)
            # An unsupported mode is not worth a line; one that failed before its model was built is.
            if not by_key and (why := failure(cases, leave_out=("unsupported",))):
                not_shown.append((f"{facts.name} {' '.join(place)}", f"{why}; so its series is unknown"))
            baseline = table.get((place[0], BASELINE), [])
            for key, members in by_key.items():
                name = series_name(members, by_name) or workload
                series_of = (name, mode, key, json.dumps(machine, sort_keys=True, default=str))
                if (seen := found.get(series_of)) and seen.runs[-1][0] is facts:
                    which = f"{facts.name} {' '.join(place)}"
                    not_shown.append((which, f"another workload of the run has the series {name}, too"))
                    continue
                # A process that never started has no series key, and belongs to the series if there is only one.
                waiting = run.waiting.get(place, ()) if len(by_key) == 1 else ()
                found.setdefault(series_of, _Found(machine, [])).runs.append((facts, members, baseline, waiting))
    series = []
    order = {name: place for place, name in enumerate([*there["workload"], *there["mode"]])}
    for (_, mode, key, _), of in sorted(found.items(), key=lambda each: (order[each[1].workload], order[each[0][1]])):
        one = Series(of.workload, mode, key, of.machine, "", of.metric_name, _points(measure, of))
        if all(point.value is None for point in one.points):
            not_shown.append(
                (f"{one.workload} {one.mode}", f"no run has a value of {measure.title}: {one.points[-1].reason}")
            )
        else:
            series.append(one)
    if not series:
        there_is_none = f"no mode but {BASELINE} was measured" if quantity == "speedup" else "no case was measured"
        why = not_shown[-1][1] if not_shown else f"no run has a value of {measure.title}: {there_is_none}"
        raise RunError(f"{why}; choose another quantity with --quantity")
    return History(measure, _labelled(series), [*skipped, *not_shown])


def oldest_first(runs: Sequence[Run]) -> list[tuple[RunFacts, Run]]:
    """Sort runs by age, with what a reader wants to know; if several have the same name, the first counts."""
    by_name: dict[str, Run] = {}
    for run in runs:
        by_name.setdefault(run.name, run)
    return sorted(((_facts(run), run) for run in by_name.values()), key=lambda pair: _age(pair[0]))


@dataclass(frozen=True, slots=True)
class _Found:
    """One series: its machine, and for each run the facts, cases, cases of the baseline, and what was not started."""

    machine: dict[str, Any]
    runs: list[tuple[RunFacts, list[Record], list[Record], Sequence[Key]]]

    @property
    def workload(self) -> str:
        """Its name, which may change from version to version: the newest."""
        return str(self.runs[-1][1][0]["workload"])

    @property
    def metric_name(self) -> str | None:
        return next(
            (case["metric_name"] for _, cases, _, _ in self.runs for case in cases if case["metric_name"]), None
        )


def _shown(what: str, names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The workloads or modes to show, in order.

    Raises:
        RunError: no run has a wanted one.
    """
    seen = list(dict.fromkeys(names))
    for name in wanted:
        if name not in seen:
            raise RunError(f"no run has the {what} {name!r}; there are {', '.join(seen) or 'none'}")
    return [name for name in seen if name in wanted or not wanted]


def _labelled(series: Sequence[Series]) -> list[Series]:
    """Set ``apart`` of series that come sorted by workload and mode."""
    labelled = []
    for _, siblings in itertools.groupby(series, key=lambda one: (one.workload, one.mode)):
        members = list(siblings)
        apart = tell_apart([(one.key, one.hardware) for one in members])
        labelled += [replace(one, apart=text) for one, text in zip(members, apart, strict=True)]
    return labelled


_ON = "on "
"""Prefix for the names of facts about the machine, which could be names of settings, too."""


def tell_apart(siblings: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A short text for each of several series of one workload and mode; empty if nothing differs.

    Args:
        siblings: series key and hardware of each; hardware holds only what is known.
    """
    facts = [
        SeriesKey.facts(key) | {f"{_ON}{name}": str(fact) for name, fact in machine.items()}
        for key, machine in siblings
    ]
    names = dict.fromkeys(name for each in facts for name in each)
    differing = [name for name in names if len({each.get(name) for each in facts}) > 1]
    machines = {tuple(sorted((name, str(fact)) for name, fact in machine.items())) for _, machine in siblings}
    if len({each.get("on name") for each in facts}) == len(machines):
        # The device's name identifies the machine; more would only make the text longer.
        differing = [name for name in differing if name == "on name" or not name.startswith(_ON)]
    # A key leaves out what is the default. A fact without one is unknown, or the series has no such thing.
    known = [{**{name: fact for name in differing if (fact := SeriesKey.unsaid(name))}, **each} for each in facts]
    return [", ".join(_words(name, each[name]) for name in differing if name in each) for each in known]


def _words(name: str, fact: str) -> str:
    if name in ("on name", "on kind"):
        return fact
    if name == "on cores":
        return f"{fact} core" if fact == "1" else f"{fact} cores"
    if fact == ANY:
        return "all versions" if name == "digest" else f"any {name}"
    # Eight hex digits tell models apart and leave room for the rest.
    return f"digest {fact[:8]}" if name == "digest" else f"{name.removeprefix(_ON)}={fact}"


def _by_key(cases: Sequence[Record], by_name: bool) -> dict[str, list[Record]]:
    """Cases of one workload and mode by series key. If there is one series, cases that failed too early join it."""
    of_cases = [versions_key(case, by_name) for case in cases]
    keys = list(dict.fromkeys(key for key in of_cases if key is not None))
    if len(keys) == 1:
        return {keys[0]: list(cases)}
    return {key: [case for case, own in zip(cases, of_cases, strict=True) if own == key] for key in keys}


def _points(quantity: Quantity, found: _Found) -> list[Point]:
    points = []
    before: list[float] = []
    model: Sequence[Record] = ()
    for run, cases, baseline, not_started in found.runs:
        described = [case for case in cases if case["series_key"] is not None]
        versions = model_changes(model, described) if model and described else []
        model = described or model
        sample = quantity.sample(cases, baseline)
        if not sample:
            why = why_unknown(quantity, cases, baseline)
            points.append(Point(run, None, None, None, 0, reason=why, versions=versions))
            continue
        value = _estimate(quantity, sample, cases)
        change: tuple[float | None, float | None, float | None] = (None, None, None)
        if before and quantity.spread == "interval":
            compared = log_change(before, sample)
            change = (compared.change, *(compared.interval() or (None, None)))
        lacking = "; ".join(filter(None, quantity.lacking(cases, baseline, not_started))) or None
        points.append(Point(run, value.estimate, value.low, value.high, value.n, *change, lacking, versions))
        before = sample
    return points


def _estimate(quantity: Quantity, sample: list[float], cases: Sequence[Record]) -> Interval:
    if quantity.spread == "interval":
        return geometric_interval(sample)
    low, high = (min(sample), max(sample)) if len(sample) > 1 else (None, None)
    return Interval(quantity.mean(sample, cases), low, high, len(sample))


def _facts(run: Run) -> RunFacts:
    git = _object(run.environment.get("git"))
    versions = (_object(run.environment.get(name)).get("tensorflow") for name in ("packages", "runtime"))
    commit, dirty = git.get("commit"), git.get("dirty")
    return RunFacts(
        run.name,
        _started(run),
        run.finished,
        str(commit) if commit else None,
        dirty if isinstance(dirty, bool) else None,
        next((str(version) for version in versions if version), None),
        run.given_name,
    )


def _started(run: Run) -> datetime | None:
    """From run.json, else from the time in the run's name or in the path of a cases.csv."""
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
    """Sort key, oldest first; runs of unknown age come last, by name."""
    return (run.started is None, run.started or datetime.min.replace(tzinfo=UTC), run.name)


def _machines(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The hardware of each run, by the run's name.

    A cases.csv has only the kind and name of the device; if exactly one machine has both, it belongs there.
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
