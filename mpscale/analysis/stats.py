"""Intervals over processes.

One process gives one number, the median of its blocks: blocks of one process are autocorrelated and agree far better
with each other than with those of the next process, so an interval over blocks is too narrow. Times are compared as
ratios, hence logarithms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from scipy.special import stdtrit

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        estimate: in the unit of the values it was made from.
        low: lower end, None where a single value gives no spread.
        high: upper end, None likewise.
        n: how many values, or pairs, it was made from.
    """

    estimate: float
    low: float | None
    high: float | None
    n: int


def geometric_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Geometric mean of ``values`` and its t interval.

    With m and s the mean and the sample standard deviation of the n logarithms, and t the quantile
    (1 + confidence) / 2 of Student's t with n - 1 degrees of freedom: exp(m), from exp(m - t s / sqrt(n)) to
    exp(m + t s / sqrt(n)). Bland and Altman, "Transformations, means, and confidence intervals", BMJ 1996;312:1079.

    Args:
        values: positive and independent, for instance one median step time a process, in ms.
        confidence: of the two-sided interval, between 0 and 1.

    Raises:
        ValueError: there is no value, one is not positive and finite, or ``confidence`` is not between 0 and 1.
    """
    return _interval([_log(value) for value in values], confidence)


def paired_ratio(baseline: Mapping[K, float], other: Mapping[K, float], confidence: float = 0.95) -> Interval:
    """Speed-up of ``other``: the geometric mean of baseline / other over the keys that both have.

    Above 1, ``other`` is faster. Processes of one key ran side by side, so what slowed the machine then slowed both,
    and the ratio of a pair is free of it: the paired t interval on logarithms. Bland and Altman, "The use of
    transformation when comparing two means", BMJ 1996;312:1153.

    Args:
        baseline: time by key, for instance by (seed, repeat); positive.
        other: likewise, in the same unit. Keys that only one of the two has are left out.
        confidence: of the two-sided interval, between 0 and 1.

    Raises:
        ValueError: no key is shared, a time is not positive and finite, or ``confidence`` is not between 0 and 1.
    """
    shared = [key for key in baseline if key in other]
    if not shared:
        raise ValueError("baseline and other share no key, so there is no pair to compare")
    return _interval([_log(baseline[key]) - _log(other[key]) for key in shared], confidence)


def _interval(logs: list[float], confidence: float) -> Interval:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not be {confidence}")
    n = len(logs)
    if n == 0:
        raise ValueError("there is no value to make an interval of")
    mean = math.fsum(logs) / n
    if n == 1:
        return Interval(math.exp(mean), None, None, 1)
    half_width = float(stdtrit(n - 1, (1.0 + confidence) / 2.0)) * statistics.stdev(logs) / math.sqrt(n)
    return Interval(math.exp(mean), _exp(mean - half_width), _exp(mean + half_width), n)


def _log(value: float) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"only positive, finite values have a geometric mean; got {value}")
    return math.log(value)


def _exp(logarithm: float) -> float:
    # Two values that are hundreds of decades apart have an interval that a float cannot hold.
    try:
        return math.exp(logarithm)
    except OverflowError:
        return math.inf
