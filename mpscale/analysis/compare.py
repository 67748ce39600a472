"""Two runs or more: row by row, what changed, by how much, and what could not be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mpscale.analysis.pairing import Pair, environment_differences, hardware, pair_rows, same_hardware
from mpscale.analysis.quality import Quality
from mpscale.analysis.quantities import QUANTITIES, Change, measure_change, with_verdicts
from mpscale.analysis.runs import Run
from mpscale.analysis.summary import judge_metric, overflow_rate


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
        rows: those of the baseline in its order, then new ones.
    """

    baseline: Run
    other: Run
    same_device: bool
    hardware: tuple[dict[str, object], dict[str, object]]
    differences: list[tuple[str, str, str]]
    rows: list[ComparedRow] = field(default_factory=list)


def compare(baseline: Run, other: Run, *, force: bool = False, threshold: float | None = None) -> Comparison:
    """Compares ``other`` with ``baseline``.

    Rows are paired by series key. Step times of different devices get no verdict: how much faster a GPU is than
    another is not a regression, and what may be compared there are ratios within each.

    Args:
        baseline: what is compared with.
        other: what is compared.
        force: compare rows of one workload and mode though they were measured in different ways, or on different
            devices as if they were one.
        threshold: change of step time from which on it matters, as a share; 0.05 where none is given.

    Raises:
        NotComparable: the runs were measured in different ways; not with ``force``.
    """
    pairs = pair_rows(baseline, other, force)
    same = same_hardware(baseline, other)
    paired = sum(pair.state == "paired" for pair in pairs)
    changes: dict[str, dict[int, Change]] = {name: {} for name in QUANTITIES}
    for name, quantity in QUANTITIES.items():
        found = {
            place: change
            for place, pair in enumerate(pairs)
            if pair.state == "paired"
            and (change := measure_change(pair.baseline, pair.other, quantity, paired)) is not None
        }
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
            judge_metric(pair.baseline, pair.other) if pair.state == "paired" else None,
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
        rows,
    )


def compare_all(runs: Sequence[Run], *, force: bool = False, threshold: float | None = None) -> list[Comparison]:
    """Every run but the first against the first."""
    return [compare(runs[0], other, force=force, threshold=threshold) for other in runs[1:]]
