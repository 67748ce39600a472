"""Which rows of two runs belong together, and why others cannot be compared."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from mpscale.analysis.quantities import Ranked
from mpscale.analysis.replicas import batch_of_a_replica, replicas_of
from mpscale.analysis.trainings import NO_SUCH_ROW, NOT_STARTED, Trainings, trainings
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
from mpscale.core.machines import hardware, same_machine
from mpscale.core.record import Key, Record, common, grouped
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
        replicas: of the baseline and of the other run, and the batch of a replica, if nothing else differs.
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
    replicas: tuple[tuple[int, int], int] | None = None

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


def pair_rows(
    baseline: Run, other: Run, force: bool = False, by_name: bool = False, over_replicas: bool = False
) -> list[Pair]:
    """Pair rows by series key: those of the baseline first, in its order. None is left out.

    Args:
        baseline: the run to compare with.
        other: the run that is compared.
        force: pair rows of one workload and mode even if their series differ.
        by_name: see :func:`compare`.
        over_replicas: see :func:`compare`.

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
    scales = over_replicas and any(pair.replicas for pair in apart)
    if apart and not scales and not any(pair.state is State.PAIRED for pair in pairs):
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
    scaled: tuple[tuple[int, int], int] | None = None
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
        if reason and (numbers := replicas_of(str(keys[0]), str(keys[1]))):
            same = same_machine(hardware(baseline), hardware(other))
            batch = batch_of_a_replica((str(keys[0]), str(keys[1])), numbers, (measured_before, measured_after), same)
            if isinstance(batch, int):
                scaled = numbers, batch
            else:
                reason += f" (no scaling efficiency: {batch})"
        state = State.NOT_COMPARABLE if reason and not force else State.PAIRED
    waiting = (_waiting(baseline, before[0].place if before else place), _waiting(other, place))
    known = (baseline.plan_known, other.plan_known)
    told = versions if state is State.PAIRED else ()
    return Pair(*place, state, reason, before, after, waiting, known, told, scaled)


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
