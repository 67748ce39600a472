"""What a comparison of two runs answers as a whole: is the second as good as the first?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.pairs import State
from mpscale.analysis.quantities import COSTS, Outcome, Ranked, Verdict

REAL = (Verdict.SLOWER, Verdict.MORE, Verdict.FASTER, Verdict.LESS, Verdict.WORSE)
"""Verdicts that say that something has changed."""


class Overall(Ranked):
    """Whether a run is as good as its baseline."""

    WORSE = "worse"
    """A row is slower, needs more, trains worse or fails."""
    BETTER = "better"
    """A row is faster or needs less, and none is worse."""
    SAME = "same"
    """In every row of the baseline, any difference in step time is ruled out down to the threshold."""
    NO_DIFFERENCE = "no-difference"
    """None was shown, and none of a certain size was ruled out either."""
    CANNOT_TELL = "cannot-tell"
    """No row could be judged."""


@dataclass(frozen=True, slots=True)
class RealChange:
    """Something that has changed in a row, beyond noise.

    Args:
        row: the row.
        quantity: name of the cost, ``metric``, or ``failed`` for cases that failed only in the other run.
        verdict: on it; None for failed cases.
        is_worse: whether the other run is the worse one.
        size: the relative change of a cost, the difference of a metric; None if there is none.
    """

    row: ComparedRow
    quantity: str
    verdict: Verdict | None
    is_worse: bool
    size: float | None


@dataclass(frozen=True, slots=True)
class OverallAnswer:
    """The answer of a comparison.

    Args:
        answer: in a word.
        worse: how many rows have something that is worse.
        better: rows in which something is better and nothing worse.
        judged: rows with a verdict on anything, or with an interval at least.
        rows: all rows of the two runs.
        changes: what has changed, the largest relative change first, what is worse before what is better.
    """

    answer: Overall
    worse: int
    better: int
    judged: int
    rows: int
    changes: list[RealChange]


def overall_of(comparison: Comparison) -> OverallAnswer:
    """Summarise the verdicts of a comparison; this judges nothing anew."""
    changes = [change for row in comparison.rows for change in real_changes(row)]
    worse = {change.row.pair.place for change in changes if change.is_worse}
    better = {change.row.pair.place for change in changes} - worse
    judged = [row for row in comparison.rows if is_judged(row)]
    # A case that failed has no size, and that of a metric has a unit of its own: both come before the ratios.
    changes.sort(key=lambda change: (not change.is_worse, change.quantity in COSTS, -abs(change.size or 0.0)))
    if worse:
        answer = Overall.WORSE
    elif better:
        answer = Overall.BETTER
    elif not judged:
        answer = Overall.CANNOT_TELL
    elif all(_same_time(row) for row in comparison.rows if row.pair.state is not State.NEW):
        answer = Overall.SAME
    else:
        answer = Overall.NO_DIFFERENCE
    return OverallAnswer(answer, len(worse), len(better), len(judged), len(comparison.rows), changes)


def real_changes(row: ComparedRow) -> Iterator[RealChange]:
    """What has changed in a row beyond noise."""
    if failed_here(row):
        yield RealChange(row, "failed", None, True, None)
    if row.quality is not None and row.quality.verdict in REAL:
        mean = None if row.quality.difference is None else row.quality.difference.mean
        yield RealChange(row, "metric", row.quality.verdict, row.quality.verdict.outcome is Outcome.FIRED, mean)
    for name, change in row.changes.items():
        if change.verdict in REAL and not COSTS[name].aside:
            yield RealChange(row, name, change.verdict, change.verdict.outcome is Outcome.FIRED, change.change)


def failed_here(row: ComparedRow) -> list[str]:
    """Cases that failed in the other run alone, in a row that the baseline has: a new row cannot have become worse."""
    return row.pair.newly_failed if row.pair.baseline or row.pair.not_started[0] else []


def is_judged(row: ComparedRow) -> bool:
    """Whether a row says anything about a difference: it has a verdict, or an interval that is too wide for one.

    A metric alone says nothing about a row whose costs are those of another device.
    """
    if failed_here(row):
        return True
    if any(change.verdict is Verdict.NOT_COMPARABLE for change in row.changes.values()):
        return False
    has_interval = any(change.low is not None for name, change in row.changes.items() if not COSTS[name].aside)
    return has_interval or (row.quality is not None and row.quality.verdict is not Verdict.INCONCLUSIVE)


def _same_time(row: ComparedRow) -> bool:
    time = row.changes.get("step_time")
    return time is not None and time.verdict is Verdict.SAME
