"""Two runs or more: row by row, what changed, by how much, and what could not be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from mpscale.analysis.noise_floor import (
    NO_FLOORS,
    Floors,
    assumed_floor,
    floors_of,
    pair_noise,
)
from mpscale.analysis.pairing import Pair, environment_differences, hardware, pair_rows, same_hardware
from mpscale.analysis.quality import Quality, judge_metric
from mpscale.analysis.quantities import QUANTITIES, Change, Quantity, measure_change, with_verdicts
from mpscale.analysis.runs import Run
from mpscale.analysis.summary import overflow_rate
from mpscale.analysis.trainings import Row, of_good_trainings
from mpscale.columns import FAILED

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


def _since(cases: Sequence[Row], first: int, quantity: Quantity) -> Sequence[Row]:
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
