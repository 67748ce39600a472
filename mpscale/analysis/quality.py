"""Whether a training is as good as its baseline: non-inferiority of the metric, seed by seed.

A difference that is not significant is no evidence that there is none: three seeds hide a loss of two points. So the
question is the other way round: can a loss of more than the workload's margin be ruled out? Piaggio et al., "Reporting
of noninferiority and equivalence randomized trials", JAMA 2012;308:2594.

Who looks at the survivors alone finds what they wish: had the seed that ran out of memory been trained, it might have
been the bad one. So a loss is ruled out over all seeds or not at all. Fleming, "Addressing missing data in clinical
trials", Annals of Internal Medicine 2011;154:113: what is missing for a reason biases what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mpscale.analysis.stats import Paired, paired_difference, pairs_that_would_tell
from mpscale.analysis.trainings import NO_SUCH_ROW, Row, Trainings, by_reason, common, seeds_text

Verdict = Literal["non-inferior", "worse", "inconclusive"]

_SAID_OF_A_METRIC = {"metric_name": "name", "metric_margin": "margin", "metric_higher_is_better": "direction"}
_LOST_HOW = "the training diverged, stalled or ended without a metric"


@dataclass(frozen=True, slots=True)
class Quality:
    """A metric against its baseline's.

    Args:
        verdict: ``non-inferior``: a loss of the margin or more is ruled out, one-sided at 95 %. ``worse``: no loss is
            ruled out and it is estimated beyond the margin; or a seed was lost. Else, or where a seed is not known
            that could speak against it, ``inconclusive``.
        difference: metric less that of the baseline, in its own unit and direction, with its 90 % interval; None
            where no seed has both.
        seeds: how many would tell, None where they told already or that is not known.
        reason: why the verdict is what it is, where the numbers do not show it.
        left_out: which seeds are not in the difference, and why; None where all are.
    """

    verdict: Verdict
    difference: Paired | None
    seeds: int | None = None
    reason: str | None = None
    left_out: str | None = None

    @property
    def why(self) -> str:
        """Reason and what was left out, in one line; empty where there is neither."""
        return "; ".join(filter(None, (self.reason, self.left_out)))


def judge(
    differences: Sequence[float],
    margin: float | None,
    higher_is_better: bool | None,
    lost: Sequence[int] = (),
    unknown: Sequence[int] = (),
) -> Quality:
    """The verdict on a metric.

    Args:
        differences: metric less that of the baseline, one a seed.
        margin: how much worse still counts as equal, in units of the metric; None where nobody said.
        higher_is_better: the metric's direction; None where it is not known.
        lost: seeds that diverged, stalled or ended without a metric although they did not in the baseline.
        unknown: seeds of which it is not known how they would have ended.
    """
    difference = paired_difference(differences) if differences else None
    if lost:
        return Quality("worse", difference, reason=f"lost {seeds_text(lost)}: {_LOST_HOW}")
    if difference is None:
        return Quality("inconclusive", None, reason="no seed has a metric under both")
    if margin is None:
        return Quality("inconclusive", difference, reason="the workload has no margin")
    if higher_is_better is None:
        return Quality("inconclusive", difference, reason="it is not known which way the metric is better")
    better = paired_difference([value if higher_is_better else -value for value in differences])
    if better.low is None or better.high is None:
        return Quality("inconclusive", difference, reason="one seed gives no spread")
    if better.low > -margin:
        if unknown:
            reason = f"a loss is ruled out over {len(differences)} seeds, and nothing is known of {seeds_text(unknown)}"
            return Quality("inconclusive", difference, reason=reason)
        return Quality("non-inferior", difference)
    if better.high < 0.0 and better.mean < -margin:
        return Quality("worse", difference)
    return Quality("inconclusive", difference, pairs_that_would_tell(better, margin))


def judge_metric(baseline: Sequence[Row], other: Sequence[Row], seeds: tuple[Trainings, Trainings]) -> Quality | None:
    """The verdict on the metric of ``other``; None where one of the two was never to be trained.

    Args:
        baseline: its cases of one workload and mode.
        other: likewise.
        seeds: what became of the trainings of both.
    """
    before, after = seeds
    if not before.seeds or not after.seeds:
        return None
    # A seed that is lost in the baseline as well is no fault of the other's.
    lost = sorted(after.lost.keys() - before.lost.keys())
    pairs = [seed for seed in sorted(after.metric) if seed in before.metric and seed not in before.lost]
    left_out = _left_out(before, after, pairs)
    unknown = sorted(_unknown(before, after) - before.lost.keys())
    with_metric = [
        [case for case in cases if case["repeat"] == 0 and case["seed"] in side.metric]
        for cases, side in zip((baseline, other), seeds, strict=True)
    ]
    differences = [] if _names_differ(with_metric) else [after.metric[seed] - before.metric[seed] for seed in pairs]
    disagreement = _disagreement(with_metric)
    if disagreement is not None and not lost:
        found = Quality("inconclusive", paired_difference(differences) if differences else None, reason=disagreement)
    else:
        margin, better = (common(with_metric[1], name) for name in ("metric_margin", "metric_higher_is_better"))
        found = judge(differences, margin, better, lost, unknown)
    if not left_out:
        return found
    total = len(before.seeds | after.seeds)
    return replace(found, left_out=f"{len(pairs)} of {total} seeds; {by_reason(left_out)}")


def _unknown(before: Trainings, after: Trainings) -> set[int]:
    """Seeds whose training has no outcome on one of the sides although it should have one, or may have had one."""
    found = {*before.unknown, *after.unknown}
    for side, theirs in ((before, after), (after, before)):
        if not side.plan_known:
            found |= theirs.seeds - side.seeds
    return found


def _left_out(before: Trainings, after: Trainings, pairs: Sequence[int]) -> dict[int, str]:
    """Seeds that are no pair, and why."""
    found = {}
    for seed in (before.seeds | after.seeds) - set(pairs):
        there, here = _outcome(before, seed), _outcome(after, seed)
        if there == here:
            found[seed] = f"{here} in both"
        else:
            parts = [here] if here else []
            found[seed] = ", ".join(parts + ([f"{there} in the baseline"] if there else []))
    return found


def _outcome(side: Trainings, seed: int) -> str | None:
    """Why a seed is not to be had from a side, None where it is."""
    if seed in side.lost or seed in side.unknown:
        return side.lost.get(seed) or side.unknown[seed]
    return None if seed in side.metric else "not planned" if side.plan_known else NO_SUCH_ROW


def _names_differ(with_metric: Sequence[Sequence[Row]]) -> bool:
    """Whether the cases of the two sides are of several metrics, between which there is no difference to take."""
    return len({case["metric_name"] for cases in with_metric for case in cases} - {None}) > 1


def _disagreement(with_metric: Sequence[Sequence[Row]]) -> str | None:
    """What the cases of the two sides say differently of one and the same metric, so that no verdict is to be had."""
    for column, what in _SAID_OF_A_METRIC.items():
        said = dict.fromkeys(case[column] for cases in with_metric for case in cases if case[column] is not None)
        if len(said) > 1:
            return f"the cases do not agree on the metric's {what}: {', '.join(map(str, said))}"
        lacking = [case["seed"] for case in with_metric[1] if case[column] is None]
        if said and 0 < len(lacking) < len(with_metric[1]):
            return f"the metric's {what} is not known of {seeds_text(lacking)}"
    return None
