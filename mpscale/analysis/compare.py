"""Two runs or more: row by row, what changed, by how much, and what could not be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from mpscale.analysis.noise_floor import NO_FLOORS, Floors, assumed_floor, floors_of, pair_noise
from mpscale.analysis.quantities import QUANTITIES, Change, Quantity, measure_change, with_verdicts
from mpscale.analysis.summary import Quality, judge_metric, overflow_rate
from mpscale.core.case import key_facts
from mpscale.core.columns import FAILED
from mpscale.core.record import Record, grouped
from mpscale.core.runs import Run, RunError, environment_differences, hardware, same_hardware
from mpscale.core.trainings import (
    MEASURED,
    NO_SUCH_ROW,
    NOT_STARTED,
    Key,
    Trainings,
    of_good_trainings,
    trainings,
)

NO_PLACES: Mapping[tuple[str, str], int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One workload and mode of a run, against the baseline's.

    Args:
        pair: the cases of both.
        changes: by the name of the quantity; only those that one of the two has.
        quality: the metric against the baseline's, seed by seed; None where the row is not paired or trains nothing.
        overflow_rates: overflow steps over attempted steps, of the baseline and of the run; None where no gradient
            is checked.
    """

    pair: Pair
    changes: dict[str, Change]
    quality: Quality | None
    overflow_rates: tuple[float | None, float | None]

    @property
    def name(self) -> str:
        """Workload and mode."""
        return f"{self.pair.workload} {self.pair.mode}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run against a baseline.

    Args:
        baseline: what is compared with.
        other: what is compared.
        same_device: whether both ran on the same kind of device. Only then do times have a verdict.
        hardware: of the baseline, and of the other run.
        differences: what else differs between the environments: name, value there, value here.
        in_turns: whether the two ran in turns, case by case, so that no state of the machine lies between them.
        floors: how much runs of the baseline's code differ, where that is known.
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
    anew: Mapping[tuple[str, str], int] = NO_PLACES,
) -> Comparison:
    """Compares ``other`` with ``baseline``.

    Rows are paired by series key. Step times of different devices get no verdict: how much faster a GPU is than
    another is not a regression, and what may be compared there are ratios within each.

    Args:
        baseline: what is compared with.
        other: what is compared.
        force: compare rows of one workload and mode though they were measured in different ways, or on different
            devices as if they were one.
        threshold: change of step time from which on it matters, as a share; 0.05 where none is given.
        floors: how much runs of the baseline's code differ; what is not in it is assumed.
        anew: rows of ``other`` that were measured anew, with the first repeat that counts for what drifts.

    Raises:
        NotComparable: the runs were measured in different ways; not with ``force``.
    """
    pairs = pair_rows(baseline, other, force)
    same = same_hardware(baseline, other)
    in_turns = ran_in_turns(baseline, other)
    paired = [pair for pair in pairs if pair.state == "paired"]
    changes: dict[str, dict[int, Change]] = {name: {} for name in QUANTITIES}
    for name, quantity in QUANTITIES.items():
        others = {pair.place: _since(pair.other, anew.get(pair.place, 0), quantity) for pair in pairs}
        sides = [
            {pair.place: pair.baseline for pair in paired},
            {pair.place: others[pair.place] for pair in paired},
        ]
        assumed = assumed_floor(sides, quantity)
        pairs_of = pair_noise(sides, quantity) if in_turns else {}
        found = {}
        for place, pair in enumerate(pairs):
            floor = floors.get(name, pair.place) or assumed
            change = measure_change(
                pair.baseline,
                others[pair.place],
                quantity,
                len(paired),
                floor,
                pairs_of.get(pair.place),
                pair.not_started,
            )
            if pair.state == "paired" and change is not None:
                found[place] = change
        if same or force:
            limit = threshold if name == "step_time" else None
            changes[name] = dict(zip(found, with_verdicts(list(found.values()), limit), strict=True))
        else:
            changes[name] = {
                place: replace(change, verdict="not-comparable", reason="another device")
                for place, change in found.items()
            }
    rows = [
        ComparedRow(
            pair,
            {name: of_rows[place] for name, of_rows in changes.items() if place in of_rows},
            judge_metric(pair.baseline, pair.other, pair.seeds) if pair.state == "paired" else None,
            (overflow_rate(pair.baseline), overflow_rate(pair.other)),
        )
        for place, pair in enumerate(pairs)
    ]
    return Comparison(
        baseline,
        other,
        same,
        (hardware(baseline), hardware(other)),
        environment_differences(baseline, other),
        in_turns,
        floors,
        rows,
    )


def _since(cases: Sequence[Record], first: int, quantity: Quantity) -> Sequence[Record]:
    """The cases whose figures count where a row was measured anew.

    The first times were picked for being long; together with the new ones they would still be too long by chance.
    """
    if not first or not quantity.drifts:
        return cases
    good = of_good_trainings(cases)
    return [case for case in cases if case["repeat"] >= first and (case in good or case["status"] in FAILED)]


def ran_in_turns(baseline: Run, other: Run) -> bool:
    """Whether `mpscale ab` made the two runs together."""
    one, two = (run.info.get("interleaved") for run in (baseline, other))
    return isinstance(one, dict) and isinstance(two, dict) and one.get("id") == two.get("id") is not None


def compare_all(
    runs: Sequence[Run], *, force: bool = False, threshold: float | None = None, results: Path | None = None
) -> list[Comparison]:
    """Every run but the first against the first.

    Args:
        runs: the baseline first.
        force: as :func:`compare` takes it.
        threshold: likewise.
        results: the results folder, where further runs of the baseline's code may be.
    """
    return [
        compare(runs[0], other, force=force, threshold=threshold, floors=floors_for(runs[0], other, results))
        for other in runs[1:]
    ]


def floors_for(baseline: Run, other: Run, results: Path | None = None) -> Floors:
    """What is known of the noise between runs of the baseline's code, the run to be judged left out."""
    return floors_of(baseline, results, leave_out=(other.name,))


# Which rows of two runs belong together, and whether the two runs may be compared at all.

State = Literal["paired", "missing", "new", "not-comparable"]

_HOW_TO_FORCE = "use --force to compare them all the same"


class NotComparable(RunError):
    """Two runs were measured in different ways. The message says in which, and what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The cases of one workload and mode in two runs.

    Args:
        workload: its name.
        mode: its name.
        state: ``paired``; ``missing``, measured in the baseline alone; ``new``, in the other run alone; or
            ``not-comparable``: in both, of different series.
        reason: why it is not paired, or what is odd although it is.
        baseline: cases of the baseline.
        other: cases of the other run.
        not_started: processes that were planned and not started, of the baseline and of the other run.
        plan_known: whether the plans of both are known, likewise.
    """

    workload: str
    mode: str
    state: State
    reason: str | None
    baseline: Sequence[Record]
    other: Sequence[Record]
    not_started: tuple[Sequence[Key], Sequence[Key]] = ((), ())
    plan_known: tuple[bool, bool] = (False, False)

    @property
    def place(self) -> tuple[str, str]:
        """Workload and mode."""
        return self.workload, self.mode

    @property
    def seeds(self) -> tuple[Trainings, Trainings]:
        """What became of the trainings of the baseline, and of the other run."""
        sides = zip((self.baseline, self.other), self.not_started, self.plan_known, strict=True)
        before, after = (trainings(*side) for side in sides)
        return before, after

    @property
    def newly_failed(self) -> list[str]:
        """Cases that failed or were not started in the other run, and did not fail in the baseline, with the reason."""
        before = {(case["seed"], case["repeat"]) for case in self.baseline if case["status"] in FAILED}
        before |= set(self.not_started[0])
        failed = [
            f"{case['case_id']} {case['status']}"
            for case in self.other
            if case["status"] in FAILED and (case["seed"], case["repeat"]) not in before
        ]
        waiting = [key for key in self.not_started[1] if key not in before]
        return failed + [f"seed {seed} repeat {repeat} {NOT_STARTED}" for seed, repeat in waiting]


def pair_rows(baseline: Run, other: Run, force: bool = False) -> list[Pair]:
    """Pairs rows by their series key: those of the baseline first, in its order; none is left out.

    Args:
        baseline: what is compared with.
        other: what is compared.
        force: pair rows of one workload and mode whatever their series.

    Raises:
        NotComparable: the runs were measured by different methods, or no row of one has its series in the other;
            not with ``force``.
        RunError: a run holds a workload and mode in several series.
    """
    before, after = grouped(baseline.records), grouped(other.records)
    pairs = [
        _pair(name, before.get(name, []), after.get(name, []), baseline, other, force)
        for name in [*before, *(name for name in after if name not in before)]
    ]
    apart = [pair for pair in pairs if pair.state == "not-comparable"]
    if apart and not any(pair.state == "paired" for pair in pairs):
        reasons = "; ".join(dict.fromkeys(str(pair.reason) for pair in apart))
        raise NotComparable(f"{other.name} was not measured as {baseline.name} was: {reasons}; {_HOW_TO_FORCE}")
    return pairs


def _pair(
    name: tuple[str, str], before: Sequence[Record], after: Sequence[Record], baseline: Run, other: Run, force: bool
) -> Pair:
    state: State = "paired"
    reason = None
    measured_before, measured_after = (
        [case for case in cases if case["status"] in MEASURED] for cases in (before, after)
    )
    if not measured_before and not measured_after:
        # Not run in the baseline either, as a mode that the device does not have.
        state = "paired" if before and after else "missing" if before else "new"
        reason = _why_not(after or before, name, other)
    elif not measured_after:
        state, reason = "missing", _why_not(after, name, other)
    elif not measured_before:
        state, reason = "new", f"in the baseline: {_why_not(before, name, baseline)}"
    else:
        reason = _apart(_series(measured_before, baseline), _series(measured_after, other))
        state = "not-comparable" if reason and not force else "paired"
    waiting = [[key for *place, key in run.places_not_started if tuple(place) == name] for run in (baseline, other)]
    plans = (baseline.plan_known, other.plan_known)
    return Pair(*name, state, reason, before, after, (waiting[0], waiting[1]), plans)


def _why_not(cases: Sequence[Record], name: tuple[str, str], run: Run) -> str:
    if cases:
        return "; ".join(dict.fromkeys(f"{case['status']}: {case['status_reason']}" for case in cases))
    start = f"{name[0].replace(':', '+')}--{name[1]}--"
    if any(case_id.startswith(start) for case_id in run.not_started):
        return NOT_STARTED
    return NO_SUCH_ROW


def _series(cases: Sequence[Record], run: Run) -> str | None:
    keys = list(dict.fromkeys(case["series_key"] for case in cases if case["series_key"] is not None))
    if len(keys) > 1:
        raise RunError(
            f"{run.path}: {cases[0]['workload']} {cases[0]['mode']} is there in {len(keys)} series "
            f"({keys[0]} and {keys[1]}); compare one run at a time"
        )
    return keys[0] if keys else None


def _apart(before: str | None, after: str | None) -> str | None:
    """What tells two series apart, None where they are one."""
    if before == after and before is not None:
        return None
    if before is None or after is None:
        return "a series key is missing"
    one, two = key_facts(before), key_facts(after)
    differing = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
    found = []
    for name in differing:
        what = "the model, its training or its data differ: " if name == "digest" else ""
        sides = (f"{name} {facts[name]}" if name in facts else f"no {name}" for facts in (one, two))
        found.append(what + " against ".join(sides))
    # Two keys that differ are two series, also where nothing that is known here says why.
    return "; ".join(found) or f"series {before} against {after}"
