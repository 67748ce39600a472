"""Whether a training is as good as its baseline: non-inferiority of the metric, seed by seed.

A difference that is not significant is no evidence that there is none: three seeds hide a loss of two points. So the
question is the other way round: can a loss of more than the workload's margin be ruled out? Piaggio et al., "Reporting
of noninferiority and equivalence randomized trials", JAMA 2012;308:2594.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpscale.analysis.stats import Paired, paired_difference, pairs_that_would_tell

Verdict = Literal["non-inferior", "worse", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Quality:
    """A metric against its baseline's.

    Args:
        verdict: ``non-inferior``: a loss of the margin or more is ruled out, one-sided at 95 %. ``worse``: no loss is
            ruled out and it is estimated beyond the margin; or a seed was lost. Else ``inconclusive``.
        difference: metric less that of the baseline, in its own unit and direction, with its 90 % interval; None
            where no seed has both.
        seeds: how many would tell, None where they told already or that is not known.
        reason: why the verdict is what it is, where the numbers do not show it.
    """

    verdict: Verdict
    difference: Paired | None
    seeds: int | None = None
    reason: str | None = None


def judge(
    differences: Sequence[float], margin: float | None, higher_is_better: bool, lost: Sequence[int] = ()
) -> Quality:
    """The verdict on a metric.

    Args:
        differences: metric less that of the baseline, one a seed.
        margin: how much worse still counts as equal, in units of the metric; None where nobody said.
        higher_is_better: the metric's direction.
        lost: seeds that diverged or stalled although they did not in the baseline.
    """
    difference = paired_difference(differences) if differences else None
    if lost:
        return Quality("worse", difference, reason=f"lost {_seeds(lost)}: the training diverged or stalled")
    if difference is None:
        return Quality("inconclusive", None, reason="no seed has a metric under both")
    if margin is None:
        return Quality("inconclusive", difference, reason="the workload has no margin")
    better = paired_difference([value if higher_is_better else -value for value in differences])
    if better.low is None or better.high is None:
        return Quality("inconclusive", difference, reason="one seed gives no spread")
    if better.low > -margin:
        return Quality("non-inferior", difference)
    if better.high < 0.0 and better.mean < -margin:
        return Quality("worse", difference)
    return Quality("inconclusive", difference, pairs_that_would_tell(better, margin))


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
