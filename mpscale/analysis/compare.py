"""Compare runs row by row: which rows belong together, and what changed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mpscale.analysis.change import Change, measure_change, with_verdicts
from mpscale.analysis.noise_floor import NO_FLOORS, Floors, assumed_floor, floors_of, pair_noise
from mpscale.analysis.quantities import COSTS, Cost, Ranked, Verdict
from mpscale.analysis.summary import Quality, judge_metric
from mpscale.analysis.trainings import NO_SUCH_ROW, NOT_STARTED, Trainings, overflow_rate, trainings
from mpscale.analysis.versions import (
    UNSAID,
    ModelChange,
    in_words,
    model_changes,
    one_series,
    versions_key,
    without_model,
)
from mpscale.core.case import Place, SeriesKey
from mpscale.core.columns import FAILED, MEASURED
from mpscale.core.machines import environment_differences, hardware, same_machine
from mpscale.core.record import Key, Record, common, grouped, of_good_trainings
from mpscale.core.runs import Run, RunError


class State(Ranked):
    """Whether a row of two runs can be compared."""

    PAIRED = "paired"
    MISSING = "missing"
    """Measured in the baseline alone."""
    NEW = "new"
    """Measured in the other run alone."""
    NOT_COMPARABLE = "not-comparable"
    """In both, but of different series."""


class NotComparable(RunError):
    """Two runs were measured in different ways. The message says which.

    Args:
        text: the message.
        only_models: whether some rows differ in nothing but the model, so that they can be compared by name.
    """

    def __init__(self, text: str, only_models: bool) -> None:
        super().__init__(text)
        self._only_models = only_models

    def with_cure(self, prefix: str = "") -> str:
        """The message, and what to do.

        Args:
            prefix: of options where it is shown.
        """
        by_name = f"--{prefix}compare-by name to judge versions of a model, or " if self._only_models else ""
        return f"{self}; use {by_name}--{prefix}force to compare them all the same"


@dataclass(frozen=True, slots=True)
class Pair:
    """The cases of one workload and mode in two runs.

    Args:
        workload: as tables of the other run name it, or of the baseline if only that has it.
        mode: named in the same way.
        state: whether they can be compared.
        reason: why not, or what is odd although they can.
        baseline: cases of the baseline.
        other: cases of the other run.
        not_started: processes that were planned but not started, of the baseline and of the other run.
        plan_known: whether the plan of each is known.
        versions: how the models of the two differ, if they are compared all the same.
    """

    workload: str
    mode: str
    state: State
    reason: str | None
    baseline: Sequence[Record]
    other: Sequence[Record]
    not_started: tuple[Sequence[Key], Sequence[Key]] = ((), ())
    plan_known: tuple[bool, bool] = (False, False)
    versions: Sequence[ModelChange] = ()

    @property
    def said(self) -> str:
        """How the models differ, in words; empty if they do not."""
        return in_words(self.versions)

    @property
    def place(self) -> Place:
        """Workload and mode."""
        return self.workload, self.mode

    @property
    def place_in_baseline(self) -> Place:
        """What the baseline calls them: other names if only one of the runs is a sweep."""
        return self.baseline[0].place if self.baseline else self.place

    @property
    def seeds(self) -> tuple[Trainings, Trainings]:
        """The outcomes of the trainings of the baseline, and of the other run."""
        sides = zip((self.baseline, self.other), self.not_started, self.plan_known, strict=True)
        before, after = (trainings(*side) for side in sides)
        return before, after

    @property
    def newly_failed(self) -> list[str]:
        """Cases that failed or were not started in the other run, and did not fail in the baseline, with the reason."""
        before = {case.key for case in self.baseline if case["status"] in FAILED} | set(self.not_started[0])
        failed = [
            f"{case['case_id']} {case['status']}"
            for case in self.other
            if case["status"] in FAILED and case.key not in before
        ]
        waiting = [key for key in self.not_started[1] if key not in before]
        return failed + [f"seed {seed} repeat {repeat} {NOT_STARTED}" for seed, repeat in waiting]


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One workload and mode of a run, against the baseline's.

    Args:
        pair: the cases of both.
        changes: by the name of the cost; only those that one of the two has.
        quality: the metric against the baseline's, seed by seed; None if the row is not paired or trains nothing.
        overflow_rates: overflow steps over attempted steps, of the baseline and of the run; None if the mode checks no
            gradient.
    """

    pair: Pair
    changes: dict[str, Change]
    quality: Quality | None
    overflow_rates: tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run against a baseline.

    Args:
        baseline: the run to compare with.
        other: the run that is compared.
        same_device: whether both ran on the same kind of device. Only then do costs get a verdict.
        hardware: of the baseline, and of the other run.
        differences: what else differs between the environments: name, value in the baseline, value in the other run.
        in_turns: whether the two runs were interleaved, case by case, and so saw the same state of the machine.
        floors: how much runs of the baseline's code differ, if known.
        rows: those of the baseline in its order, then new ones.
    """

    baseline: Run
    other: Run
    same_device: bool
    hardware: tuple[dict[str, object], dict[str, object]]
    differences: list[tuple[str, str, str]]
    in_turns: bool = False
    floors: Floors = NO_FLOORS
    rows: list[ComparedRow] = field(default_factory=list)


def compare(
    baseline: Run,
    other: Run,
    *,
    force: bool = False,
    threshold: float | None = None,
    floors: Floors = NO_FLOORS,
    anew: Mapping[Place, int] = MappingProxyType({}),
    by_name: bool = False,
) -> Comparison:
    """Compare ``other`` with ``baseline``.

    Rows are paired by series key; where a workload names its series, also if the model has changed. Costs on different
    devices get no verdict: that one GPU is faster than another is not a regression, and only ratios within each can be
    compared.

    Args:
        baseline: the run to compare with.
        other: the run that is compared.
        force: compare rows of one workload and mode even if they were measured in different ways or on different
            devices.
        threshold: the smallest relative change of step time that matters; 0.05 if None.
        floors: how much runs of the baseline's code differ; assumed where not known.
        anew: rows of ``other`` that were measured again, with the first repeat that counts for costs that drift.
        by_name: take all versions of a workload of one name for one series.

    Raises:
        NotComparable: the runs were measured in different ways; not with ``force``.
    """
    if baseline.name != other.name and baseline.origins & other.origins and not force:
        raise NotComparable(
            f"{baseline.name} and {other.name} hold the same measurements, since one was merged from the other or from "
            "the same runs; compare with a run that was measured at another time",
            only_models=False,
        )
    pairs = pair_rows(baseline, other, force, by_name)
    machines = hardware(baseline), hardware(other)
    same = same_machine(*machines)
    in_turns = ran_in_turns(baseline, other)
    paired = [pair for pair in pairs if pair.state is State.PAIRED]
    changes: dict[str, dict[Place, Change]] = {}
    for name, cost in COSTS.items():
        others = {pair.place: since(pair.other, anew.get(pair.place, 0), cost) for pair in paired}
        sides = [{pair.place: pair.baseline for pair in paired}, others]
        assumed = assumed_floor(sides, cost)
        pairs_of = pair_noise(sides, cost) if in_turns else {}
        found = {
            pair.place: change
            for pair in paired
            if (
                change := measure_change(
                    pair.baseline,
                    others[pair.place],
                    cost,
                    len(paired),
                    floors.get(name, pair.place_in_baseline) or assumed,
                    pairs_of.get(pair.place),
                    pair.not_started,
                )
            )
        }
        if same or force:
            limit = threshold if name == "step_time" else None
            changes[name] = dict(zip(found, with_verdicts(list(found.values()), limit), strict=True))
        else:
            changes[name] = {
                place: replace(change, verdict=Verdict.NOT_COMPARABLE, reason="another device")
                for place, change in found.items()
            }
    rows = [
        ComparedRow(
            pair,
            {name: of_rows[pair.place] for name, of_rows in changes.items() if pair.place in of_rows},
            judge_metric(pair.baseline, pair.other, pair.seeds) if pair.state is State.PAIRED else None,
            (overflow_rate(pair.baseline), overflow_rate(pair.other)),
        )
        for pair in pairs
    ]
    return Comparison(
        baseline,
        other,
        same,
        machines,
        environment_differences(baseline, other),
        in_turns,
        floors,
        rows,
    )


def since(cases: Sequence[Record], first: int, cost: Cost) -> Sequence[Record]:
    """The cases whose figures count if a row was measured again from repeat ``first`` on.

    The row was picked because its first times were long; pooled with the new ones they would bias the mean.
    """
    if not first or not cost.drifts:
        return cases
    good = set(map(id, of_good_trainings(cases)))
    return [case for case in cases if case["repeat"] >= first and (id(case) in good or case["status"] in FAILED)]


def ran_in_turns(baseline: Run, other: Run) -> bool:
    """Whether `mpscale ab` made the two runs together."""
    one, two = (run.info.get("interleaved") for run in (baseline, other))
    return isinstance(one, dict) and isinstance(two, dict) and one.get("id") == two.get("id") is not None


def compare_all(
    runs: Sequence[Run],
    *,
    force: bool = False,
    threshold: float | None = None,
    results: Path | None = None,
    by_name: bool = False,
) -> list[Comparison]:
    """Compare every run but the first with the first.

    Args:
        runs: the baseline first.
        force: see :func:`compare`.
        threshold: see :func:`compare`.
        results: the results folder, which may hold further runs of the baseline's code.
        by_name: see :func:`compare`.
    """
    how: dict[str, Any] = {"force": force, "threshold": threshold, "by_name": by_name}
    return [compare(runs[0], other, floors=floors_for(runs[0], other, results), **how) for other in runs[1:]]


def floors_for(baseline: Run, other: Run, results: Path | None = None) -> Floors:
    """How much runs of the baseline's code differ, without the run to be judged."""
    return floors_of(baseline, results, leave_out=tuple(other.origins))


def pair_rows(baseline: Run, other: Run, force: bool = False, by_name: bool = False) -> list[Pair]:
    """Pair rows by series key: those of the baseline first, in its order. None is left out.

    Args:
        baseline: the run to compare with.
        other: the run that is compared.
        force: pair rows of one workload and mode even if their series differ.
        by_name: see :func:`compare`.

    Raises:
        NotComparable: the runs were measured by different methods, or no row of one has its series in the other;
            not with ``force``.
        RunError: a run holds a workload and mode in several series, or a series in several workloads.
    """
    before, after = grouped(baseline.records), grouped(other.records)
    names = {
        name: name if name in after else _same_series(before[name], before, after, other) or name for name in before
    }
    new = [name for name in after if name not in names.values()]
    pairs = [
        _pair(name, before.get(there, []), after.get(name, []), baseline, other, force, by_name)
        for there, name in [*names.items(), *zip(new, new, strict=True)]
    ]
    apart = [pair for pair in pairs if pair.state is State.NOT_COMPARABLE]
    if apart and not any(pair.state is State.PAIRED for pair in pairs):
        reasons = "; ".join(dict.fromkeys(str(pair.reason) for pair in apart))
        by_names = (_pair(pair.place, pair.baseline, pair.other, baseline, other, False, True) for pair in apart)
        only_models = any(pair.state is State.PAIRED for pair in by_names)
        raise NotComparable(f"{other.name} was not measured as {baseline.name} was: {reasons}", only_models)
    return pairs


def _same_series(
    cases: Sequence[Record], before: Container[Place], after: Mapping[Place, Sequence[Record]], other: Run
) -> Place | None:
    """The row of the other run that has the series of a baseline's row under another name.

    A sweep names batch and scale in its rows, and a run with one of each does not; and the workloads of a named series
    may have different names. None if there is no such row.

    Raises:
        RunError: several workloads have the series, so it is not clear which is meant.
    """
    keys = {case["series_key"] for case in cases} - {None}
    same = (place for place, rows in after.items() if {case["series_key"] for case in rows} - {None} == keys != set())
    if (found := next((place for place in same if place not in before), None)) is not None:
        return found
    keys = {versions_key(case) for case in cases} - {None}
    same = (place for place, rows in after.items() if {versions_key(case) for case in rows} - {None} == keys != set())
    free = [place for place in same if place not in before]
    if len(free) > 1:
        raise RunError(
            f"{other.path}: the series {common(cases, 'series')} has the workloads "
            f"{' and '.join(workload for workload, _ in free)}; give each a series of its own"
        )
    return free[0] if free else None


def _pair(
    place: Place,
    before: Sequence[Record],
    after: Sequence[Record],
    baseline: Run,
    other: Run,
    force: bool,
    by_name: bool,
) -> Pair:
    state = State.PAIRED
    reason: str | None = None
    versions: list[ModelChange] = []
    measured_before, measured_after = (
        [case for case in cases if case["status"] in MEASURED] for cases in (before, after)
    )
    if not measured_before and not measured_after:
        # Not measured in the baseline either, such as a mode that the device does not support.
        state = State.PAIRED if before and after else State.MISSING if before else State.NEW
        reason = _why_not(after or before, place, other)
    elif not measured_after:
        state, reason = State.MISSING, _why_not(after, place, other)
    elif not measured_before:
        state, reason = State.NEW, f"in the baseline: {_why_not(before, place, baseline)}"
    else:
        keys = _series(measured_before, baseline), _series(measured_after, other)
        reason = _apart(*keys)
        if reason is not None:
            versions = model_changes(measured_before, measured_after)
            if one_series(measured_before, measured_after, by_name) and keys[0] is not None and keys[1] is not None:
                reason = _apart(without_model(keys[0]), without_model(keys[1]))
            else:
                reason = _apart(*keys, told=[change for change in versions if change is not UNSAID])
        if reason and (refused := _refused(measured_before, measured_after)):
            reason += f" ({refused})"
        state = State.NOT_COMPARABLE if reason and not force else State.PAIRED
    waiting = (_waiting(baseline, before[0].place if before else place), _waiting(other, place))
    known = (baseline.plan_known, other.plan_known)
    return Pair(*place, state, reason, before, after, waiting, known, versions if state is State.PAIRED else ())


def _waiting(run: Run, place: Place) -> Sequence[Key]:
    """The processes of a row that were planned but not started."""
    workload, mode = place
    # Ids of cases have + for :, so a real + is recognised only if the run has a row of that workload.
    return run.waiting.get(place) or run.waiting.get((workload.replace("+", ":"), mode), [])


def _why_not(cases: Sequence[Record], place: Place, run: Run) -> str:
    if cases:
        return "; ".join(dict.fromkeys(f"{case['status']}: {case['status_reason']}" for case in cases))
    return NOT_STARTED if _waiting(run, place) else NO_SUCH_ROW


def _refused(before: Sequence[Record], after: Sequence[Record]) -> str | None:
    """What XLA refused in one of two runs and not in the other."""
    if {case["jit"] for case in before} == {case["jit"] for case in after}:
        return None
    for cases, where in ((before, "the baseline"), (after, "the other run")):
        if what := next((case["xla_refused"] for case in cases if case["xla_refused"] is not None), None):
            return f"in {where} XLA cannot compile {what}"
    return None


def _series(cases: Sequence[Record], run: Run) -> str | None:
    keys = list(dict.fromkeys(case["series_key"] for case in cases if case["series_key"] is not None))
    if len(keys) > 1:
        raise RunError(
            f"{run.path}: {cases[0]['workload']} {cases[0]['mode']} occurs in {len(keys)} series "
            f"({keys[0]} and {keys[1]}); compare one run at a time"
        )
    return keys[0] if keys else None


def _side(name: str, fact: str | None, default: str | None) -> str:
    if fact is not None:
        return f"{name} {fact}"
    return f"no {name}" if default is None else f"{name} {default} (the default)"


def _apart(before: str | None, after: str | None, told: Sequence[ModelChange] = ()) -> str | None:
    """How two series differ; None if they are the same.

    Args:
        before: key of the one.
        after: key of the other.
        told: how their models differ, in place of the digests and the batch.
    """
    if before == after and before is not None:
        return None
    if before is None or after is None:
        return "a series key is missing"
    one, two = SeriesKey.facts(before), SeriesKey.facts(after)
    differing = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
    found = []
    if told and "digest" in differing:
        found.append(f"the model, its training or its data differ: {in_words(told)}")
        differing = [name for name in differing if name not in ("digest", "batch")]
    for name in differing:
        what = "the model, its training or its data differ: " if name == "digest" else ""
        sides = (_side(name, facts.get(name), SeriesKey.unsaid(name)) for facts in (one, two))
        found.append(what + " against ".join(sides))
    # Different keys are different series even if no known fact says why.
    return "; ".join(found) or f"series {before} against {after}"
