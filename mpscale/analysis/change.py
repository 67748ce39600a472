"""The change of a cost of one workload and mode between two runs, and the verdict on it."""

from __future__ import annotations

import statistics
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from mpscale.analysis.quantities import COSTS, Cost, Verdict
from mpscale.analysis.stats import Between, holm, log_change, paired_log_change
from mpscale.analysis.trainings import by_reason, without_figure
from mpscale.core.record import Key, Record, of_good_trainings

CONFIDENCE = 0.95
"""Confidence level of the intervals that are shown."""

ERROR_RATE = 0.01
"""How often a comparison of runs that do not differ may give a verdict on any of its rows by chance."""

SINGLE_RUN = "single-run baseline"
"""A baseline whose code was measured in too few runs to know how much they differ."""


@dataclass(frozen=True, slots=True)
class Change:
    """One cost of one row, in two runs.

    Args:
        quantity: its name.
        baseline: geometric mean over the baseline's processes, in the unit of the cost; None if there is none.
        other: the same for the other run.
        change: other / baseline - 1.
        low: lower end of its 95 % interval; None if a single process gives no spread.
        high: upper end.
        detectable: the smallest change that four of five such comparisons would have found.
        p_increase: probability of an increase this large by chance.
        processes: how many, of the baseline and of the other run.
        noise_floor: 95 % limit on the relative difference between two runs of the same code; None for interleaved runs
            and for costs that do not drift.
        floor_runs: the number of runs that it was measured from; 0 if it is assumed, for a single-run baseline.
        verdict: see :func:`with_verdicts`.
        reason: why there is no verdict.
        missing: processes without a figure, of the baseline and of the other run, with the reason; empty if all have
            one.
    """

    quantity: str
    baseline: float | None
    other: float | None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    p_increase: float | None = None
    processes: tuple[int, int] = (0, 0)
    noise_floor: float | None = None
    floor_runs: int | None = None
    verdict: Verdict = Verdict.CANNOT_TELL
    reason: str | None = None
    missing: tuple[str, str] = ("", "")

    @property
    def left_out(self) -> str:
        """How many processes of each side have no figure and why, for people; empty if all have one."""
        sides = zip(self.missing, self.processes, (" in the baseline", ""), strict=True)
        return "; ".join(
            f"{has} process{'' if has == 1 else 'es'}{where} {'has' if has == 1 else 'have'} a figure, not {lack}"
            for lack, has, where in sides
            if lack
        )


def measure_change(
    baseline: Sequence[Record],
    other: Sequence[Record],
    cost: Cost,
    tries: int = 1,
    between: Between | None = None,
    pairs: tuple[float, float] | None = None,
    not_started: tuple[Sequence[Key], Sequence[Key]] = ((), ()),
) -> Change | None:
    """How ``cost`` changed, without a verdict yet; None if neither side has it.

    Args:
        baseline: cases of one row.
        other: cases of the same row in the other run.
        cost: what is compared.
        tries: the number of rows that will be judged together, which decides what each could have shown.
        between: how much runs of the same code differ.
        pairs: variance of the logarithms of pairs and its degrees of freedom, if the runs were interleaved, so that
            processes of one seed and repeat are a pair.
        not_started: processes of each side that were planned and have no case.
    """
    sides = [cost.by_process(cases) for cases in (baseline, other)]
    before, after = (list(side.values()) for side in sides)
    if not before and not after:
        return None
    means = Change(
        cost.name,
        statistics.geometric_mean(before) if before else None,
        statistics.geometric_mean(after) if after else None,
        processes=(len(before), len(after)),
        missing=(
            by_reason(without_figure(baseline, cost.column, not_started[0], cost.of_trainings)),
            by_reason(without_figure(other, cost.column, not_started[1], cost.of_trainings)),
        ),
    )
    if not before or not after:
        cases, side = (other, "the run") if before else (baseline, "the baseline")
        why = next((str(reason) for case in cases if (reason := case.why_empty(cost.column))), "no case has it")
        return replace(means, reason=f"unknown for {side}: {why}")
    kinds = _kinds(baseline, cost, sides[0]) | _kinds(other, cost, sides[1]) if cost.is_of else set()
    if len(kinds) > 1:
        said = " and ".join(sorted(", ".join(str(value or "unknown") for value in kind) for kind in kinds))
        return replace(means, reason=f"figures of different things ({' and '.join(cost.is_of)}: {said})")
    if pairs is None:
        found = log_change(before, after, between)
    else:
        found = paired_log_change(sides[0], sides[1], *pairs)
    interval = found.interval(CONFIDENCE)
    low, high = interval or (None, None)
    floor = between if pairs is None else None
    return replace(
        means,
        change=found.change,
        low=low,
        high=high,
        detectable=found.detectable(1 - ERROR_RATE / tries),
        p_increase=found.p_increase(),
        noise_floor=None if floor is None else floor.limit,
        floor_runs=None if floor is None else floor.runs,
        reason=None if interval else "one process gives no spread: measure at least two on each side",
    )


def with_verdicts(changes: Sequence[Change], threshold: float | None = None) -> list[Change]:
    """The same changes with verdicts, found together because chance has one try per row.

    More (or less): the change reaches the threshold and is significant at 1 % over all rows, adjusted by Holm. Same:
    the whole interval lies within the threshold in both directions. Otherwise there is no verdict. Nor can it be less
    or same if a process has no figure: the one that timed out was the slowest.

    Args:
        changes: of one cost.
        threshold: the smallest relative change that matters; that of the cost if None.
    """
    p_values = [None if (p := change.p_increase) is None else 2 * min(p, 1 - p) for change in changes]
    return [_judged(change, p, threshold) for change, p in zip(changes, holm(p_values), strict=True)]


def _judged(change: Change, p_value: float | None, threshold: float | None) -> Change:
    cost = COSTS[change.quantity]
    above = cost.threshold if threshold is None else threshold
    below = 1 / (1 + above) - 1
    if p_value is None or change.change is None or change.low is None or change.high is None:
        return change
    significant = p_value <= ERROR_RATE and not below < change.change < above
    if significant and change.change > 0:
        return replace(change, verdict=cost.more)
    if significant or (below < change.low and change.high < above):
        if change.left_out:
            return replace(change, reason=change.left_out)
        return replace(change, verdict=cost.less if significant else Verdict.SAME)
    single = f"; {SINGLE_RUN}" if change.floor_runs == 0 else ""
    return replace(change, reason=f"too noisy for {above:.0%}{single}")


def _kinds(cases: Sequence[Record], cost: Cost, counted: Container[Key]) -> set[tuple[object, ...]]:
    """What exactly was measured in the processes that count."""
    return cost.kinds(case for case in of_good_trainings(cases) if case.key in counted)
