"""Whether the timed blocks of a process fall into two groups, as if the machine had two speeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate

from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings

FASTER, SLOWER = "step_time_ms_faster_blocks", "step_time_ms_slower_blocks"

EXPLAINED = 0.9
"""The least share of the variance that two groups must explain.

The best cut through normal noise explains 64 % of its variance, through uniform noise 75 %. Of 277 recorded processes,
on a GPU, on a quiet and on a busy CPU, five pass, each of which shows two levels to the eye. Blocks drawn at random
from the others pass in 0.3 % of cases if there are 50 of them, and in 2.7 % if there are 10. So do simulated blocks
with one level and so much noise that the ratio below is often met: 0 to 0.4 % of 50, 0.1 to 6 % of 10.
"""

RATIO = 1.3
"""The least ratio of the groups' medians: less cannot change what a run shows."""

_LEAST_SHARE, _LEAST = 0.1, 3
"""Each group has at least this share of the blocks, and this many: a few slow blocks are not a second level."""

_FEWEST = 10


def two_groups(times: Sequence[float]) -> tuple[float, float] | None:
    """Return the medians of the faster and of the slower group of blocks; None if the blocks form one group.

    The blocks are cut where that explains most of the variance of their logarithms (Otsu, "A threshold selection method
    from gray-level histograms", 1979). The widest gap would be simpler, but one block during which the speed changed
    lies in the middle of it.
    """
    times = sorted(times)
    number, least = len(times), max(_LEAST, math.ceil(_LEAST_SHARE * len(times)))
    if number < _FEWEST or times[0] <= 0:
        return None
    logs = [math.log(time) for time in times]
    mean = statistics.fmean(logs)
    sums = list(accumulate(log - mean for log in logs))
    variance = math.fsum((log - mean) ** 2 for log in logs)
    # The variance between a first group of n blocks, whose logs sum to s, and the others, whose logs sum to -s.
    between = {n: sums[n - 1] ** 2 * (1 / n + 1 / (number - n)) for n in range(least, number - least + 1)}
    cut = max(between, key=between.__getitem__)
    faster, slower = statistics.median(times[:cut]), statistics.median(times[cut:])
    apart = between[cut] >= EXPLAINED * variance > 0 and slower >= RATIO * faster
    return (faster, slower) if apart else None


def group_columns(step_s: Sequence[float]) -> Findings:
    """The columns on groups, from the seconds per step of each block."""
    found, groups = Findings(), two_groups(step_s)
    if groups is not None:
        found.values |= {FASTER: groups[0] * 1e3, SLOWER: groups[1] * 1e3}
    elif len(step_s) < _FEWEST:
        found.miss((FASTER, SLOWER), Reason(Code.TOO_FEW_SAMPLES, f"fewer than {_FEWEST} blocks were timed"))
    else:
        found.miss((FASTER, SLOWER), Reason(Code.NEVER_HAPPENED, "the timed blocks form one group"))
    return found
