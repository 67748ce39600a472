"""Compare runs row by row: what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mpscale.analysis.change import Change, measure_change, with_verdicts
from mpscale.analysis.noise_floor import NO_FLOORS, Floors, assumed_floor, floors_of, pair_noise
from mpscale.analysis.pairs import NotComparable, Pair, State, pair_rows
from mpscale.analysis.quantities import COSTS, Cost, Verdict
from mpscale.analysis.replicas import Scaling, scaling
from mpscale.analysis.summary import Quality, judge_metric
from mpscale.analysis.trainings import overflow_rate
from mpscale.core.case import Place
from mpscale.core.columns import FAILED
from mpscale.core.machines import environment_differences, hardware, same_machine
from mpscale.core.record import Record, of_good_trainings
from mpscale.core.runs import Run


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One workload and mode of a run, against the baseline's.

    Args:
        pair: the cases of both.
        changes: by the name of the cost; only those that one of the two has.
        quality: the metric against the baseline's, seed by seed; None if the row is not paired or trains nothing.
        overflow_rates: overflow steps over attempted steps, of the baseline and of the run; None if the mode checks no
            gradient.
        scaling: the efficiency, if the two differ in the number of replicas alone.
    """

    pair: Pair
    changes: dict[str, Change]
    quality: Quality | None
    overflow_rates: tuple[float | None, float | None]
    scaling: Scaling | None = None


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
    over_replicas: bool = False,
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
        over_replicas: also compare runs that only differ in the number of replicas. Their rows have a scaling
            efficiency and no verdicts.

    Raises:
        NotComparable: the runs were measured in different ways; not with ``force``.
    """
    if baseline.name != other.name and baseline.origins & other.origins and not force:
        raise NotComparable(
            f"{baseline.name} and {other.name} hold the same measurements, since one was merged from the other or from "
            "the same runs; compare with a run that was measured at another time",
            only_models=False,
        )
    pairs = pair_rows(baseline, other, force, by_name, over_replicas)
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
    scaled = _scaled([pair for pair in pairs if pair.replicas])
    rows = [
        ComparedRow(
            pair,
            {name: of_rows[pair.place] for name, of_rows in changes.items() if pair.place in of_rows},
            judge_metric(pair.baseline, pair.other, pair.seeds) if pair.state is State.PAIRED else None,
            (overflow_rate(pair.baseline), overflow_rate(pair.other)),
            scaled.get(pair.place),
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


def _scaled(pairs: Sequence[Pair]) -> dict[Place, Scaling]:
    """The scaling efficiency of each row."""
    time = COSTS["step_time"]
    sides = [{pair.place: pair.baseline for pair in pairs}, {pair.place: pair.other for pair in pairs}]
    between = assumed_floor(sides, time)
    return {
        pair.place: scaling(
            *pair.replicas,
            measure_change(pair.baseline, pair.other, time, len(pairs), between, None, pair.not_started),
        )
        for pair in pairs
        if pair.replicas
    }


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
    over_replicas: bool = False,
) -> list[Comparison]:
    """Compare every run but the first with the first.

    Args:
        runs: the baseline first.
        force: see :func:`compare`.
        threshold: see :func:`compare`.
        results: the results folder, which may hold further runs of the baseline's code.
        by_name: see :func:`compare`.
        over_replicas: see :func:`compare`.
    """
    how: dict[str, Any] = {"force": force, "threshold": threshold, "by_name": by_name, "over_replicas": over_replicas}
    return [compare(runs[0], other, floors=floors_for(runs[0], other, results), **how) for other in runs[1:]]


def floors_for(baseline: Run, other: Run, results: Path | None = None) -> Floors:
    """How much runs of the baseline's code differ, without the run to be judged."""
    return floors_of(baseline, results, leave_out=tuple(other.origins))
