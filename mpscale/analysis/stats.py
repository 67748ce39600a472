"""Intervals over processes, and tests between runs.

Each process gives one number, the median of its blocks: blocks of a process are autocorrelated and agree far better
with each other than with those of the next process, so an interval over blocks would be too narrow. Times are compared
as ratios, hence the logarithms. Metrics are compared seed by seed, as differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy.special import fdtrc, stdtr, stdtrit

K = TypeVar("K", bound=Hashable)

_NOISY = 0.01
"""Significance level at which processes count as noisier than in earlier runs."""
_MOST_PAIRS = 10_000
"""Nobody trains this often, so larger numbers are not searched."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        estimate: in the unit of the values.
        low: lower end; None if a single value gives no spread.
        high: upper end.
        n: the number of values or pairs.
    """

    estimate: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Between:
    """How much a figure differs between runs of the same code, on logarithms.

    Args:
        variance: of the figure of a run. If it was measured, it includes the contribution of the processes; if it is
            assumed, it does not.
        degrees: of freedom of the variance.
        runs: the number of runs from which it was measured; 0 if it is assumed.
        within: variance of processes within a run.
        within_degrees: its degrees of freedom; 0 if every run had a single process.
    """

    variance: float
    degrees: float
    runs: int
    within: float = 0.0
    within_degrees: int = 0

    @property
    def limit(self) -> float:
        """95 % limit on the relative difference between two runs of the same code.

        ISO 5725-6:1994, 4.1.4, the limit of repeatability and reproducibility: 1.96 sqrt(2) standard deviations.
        """
        return _exp(1.96 * math.sqrt(2 * self.variance)) - 1.0


@dataclass(frozen=True, slots=True)
class LogChange:
    """The logarithm of other / baseline, with its standard error.

    Args:
        estimate: mean logarithm of the other minus that of the baseline.
        standard_error: of the estimate; None if too few values give no spread.
        degrees: of freedom; None in the same case.
    """

    estimate: float
    standard_error: float | None
    degrees: float | None

    @property
    def change(self) -> float:
        """Relative to the baseline: 0.05 is 5 % more."""
        return math.expm1(self.estimate)

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """The two-sided interval of :attr:`change`; None without a spread."""
        if self.standard_error is None or self.degrees is None:
            return None
        half_width = _quantile(self.degrees, (1.0 + confidence) / 2.0) * self.standard_error
        return _exp(self.estimate - half_width) - 1.0, _exp(self.estimate + half_width) - 1.0

    def p_increase(self) -> float | None:
        """Probability of at least this increase if there is none (one-sided p value); None without a spread."""
        if self.standard_error is None or self.degrees is None:
            return None
        if self.standard_error == 0.0:
            return 0.0 if self.estimate > 0.0 else 1.0
        return float(stdtr(self.degrees, -self.estimate / self.standard_error))

    def detectable(self, confidence: float = 0.95, power: float = 0.8) -> float | None:
        """The smallest change that would have been significant with the given power; None without a spread.

        (t of the two-sided confidence + t of the power) standard errors. Bloom, "Minimum detectable effects",
        Evaluation Review 1995;19:547.
        """
        if self.standard_error is None or self.degrees is None:
            return None
        errors = _quantile(self.degrees, (1.0 + confidence) / 2.0) + _quantile(self.degrees, power)
        return _exp(errors * self.standard_error) - 1.0


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean of paired differences.

    Args:
        mean: in the unit of the values.
        low: lower end of its two-sided interval; None if a single pair gives no spread.
        high: upper end.
        spread: sample standard deviation of the differences.
        n: the number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    spread: float | None
    n: int


def geometric_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Geometric mean of ``values`` and its t interval.

    With m and s the mean and the sample standard deviation of the n logarithms, and t the quantile
    (1 + confidence) / 2 of Student's t with n - 1 degrees of freedom: exp(m), from exp(m - t s / sqrt(n)) to
    exp(m + t s / sqrt(n)). Bland and Altman, "Transformations, means, and confidence intervals", BMJ 1996;312:1079.

    Args:
        values: positive and independent, for instance one median step time per process, in ms.
        confidence: of the two-sided interval, between 0 and 1.

    Raises:
        ValueError: there is no value, one is not positive and finite, or ``confidence`` is not between 0 and 1.
    """
    return _interval([_log(value) for value in values], confidence)


def paired_ratio(baseline: Mapping[K, float], other: Mapping[K, float], confidence: float = 0.95) -> Interval:
    """Speed-up of ``other``: the geometric mean of baseline / other over the keys that both have.

    Above 1, ``other`` is faster. Processes of one key ran next to each other, so whatever slowed the machine slowed
    both and cancels in their ratio. This is the paired t interval on logarithms. Bland and Altman, "The use of
    transformation when comparing two means", BMJ 1996;312:1153.

    Args:
        baseline: time by key, for instance by (seed, repeat); positive.
        other: times in the same unit. Keys that only one of the two has are left out.
        confidence: of the two-sided interval, between 0 and 1.

    Raises:
        ValueError: no key is shared, a time is not positive and finite, or ``confidence`` is not between 0 and 1.
    """
    shared = [key for key in baseline if key in other]
    if not shared:
        raise ValueError("baseline and other share no key, so there is no pair to compare")
    return _interval([_log(baseline[key]) - _log(other[key]) for key in shared], confidence)


def log_change(baseline: Sequence[float], other: Sequence[float], between: Between | None = None) -> LogChange:
    """How much larger ``other`` is, for two unpaired runs.

    Without ``between`` this is Welch's comparison of the logarithms, which allows unequal variances. An assumed
    ``between`` adds its variance once per side. A measured one replaces the variance of each side, because it includes
    the contribution of the processes; a single process is enough then. But a side whose processes differ by more than
    they did in those runs (F test, 1 %) keeps its own variance if that is larger. Degrees of freedom by Satterthwaite.

    Welch, "The generalization of Student's problem when several different population variances are involved",
    Biometrika 1947;34:28.

    Args:
        baseline: positive and independent, for instance one median step time per process.
        other: values in the same unit.
        between: how much runs of the same code differ.

    Raises:
        ValueError: one of them is empty, or holds a value that is not positive and finite.
    """
    logs = [[_log(value) for value in side] for side in (baseline, other)]
    if not all(logs):
        raise ValueError("both sides need at least one value")
    estimate = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    # Variances with their degrees of freedom.
    parts: list[tuple[float, float]] = []
    if between is not None and between.runs:
        noisy = [side for side in logs if _noisier(side, between)]
        parts += [(statistics.variance(side) / len(side), len(side) - 1.0) for side in noisy]
        if len(noisy) < 2:
            parts.append(((2 - len(noisy)) * between.variance, between.degrees))
    else:
        if min(map(len, logs)) < 2:
            return LogChange(estimate, None, None)
        parts += [(statistics.variance(side) / len(side), len(side) - 1.0) for side in logs]
        if between is not None:
            parts.append((2 * between.variance, between.degrees))
    return _with_error(estimate, parts)


def paired_log_change(
    baseline: Mapping[K, float], other: Mapping[K, float], variance: float, degrees: float
) -> LogChange:
    """How much larger ``other`` is, for interleaved runs: from the paired differences of the logarithms.

    Args:
        baseline: values by key, for instance (seed, repeat); positive.
        other: values in the same unit. Keys that only one of the two has are left out.
        variance: of the differences.
        degrees: of freedom of the variance.

    Raises:
        ValueError: no key is shared, or a value is not positive and finite.
    """
    differences = [_log(other[key]) - _log(baseline[key]) for key in baseline if key in other]
    if not differences:
        raise ValueError("baseline and other share no key, so there is no pair to compare")
    return _with_error(statistics.fmean(differences), [(variance / len(differences), degrees)])


def _noisier(logs: Sequence[float], between: Between) -> bool:
    """Whether processes differ by significantly more than in earlier runs, and by enough to make their mean worse."""
    if len(logs) < 2 or not between.within_degrees:
        return False
    own = statistics.variance(logs)
    if own / len(logs) <= between.variance:
        return False
    return between.within == 0.0 or fdtrc(len(logs) - 1, between.within_degrees, own / between.within) < _NOISY


def _with_error(estimate: float, parts: Sequence[tuple[float, float]]) -> LogChange:
    """Add up variances given with their degrees of freedom. Satterthwaite, Biometrics Bulletin 1946;2:110."""
    total = math.fsum(variance for variance, _ in parts)
    below = math.fsum(variance**2 / degrees for variance, degrees in parts)
    # Equal values have no variance and so no degrees of freedom; any number will do.
    degrees = total**2 / below if below > 0.0 else max(1.0, math.fsum(degrees for _, degrees in parts))
    return LogChange(estimate, math.sqrt(total), degrees)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """``p_values`` adjusted for their number: tests at 5 % then have at most 5 % false positives all together.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979;6:65.

    Args:
        p_values: None for what could not be tested, which stays None and does not count.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def paired_difference(differences: Sequence[float], confidence: float = 0.9) -> Paired:
    """Mean and t interval of differences, one per pair.

    Args:
        differences: for instance the metric of each seed in one mode minus that in another.
        confidence: of the two-sided interval; at 0.9 each end by itself is one-sided at 95 %.

    Raises:
        ValueError: there is no difference.
    """
    if not differences:
        raise ValueError("there is no pair to compare")
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Paired(mean, None, None, None, 1)
    spread = statistics.stdev(differences)
    half_width = _half_width(spread, n, confidence)
    return Paired(mean, mean - half_width, mean + half_width, spread, n)


def pairs_that_would_tell(found: Paired, margin: float, confidence: float = 0.9) -> int | None:
    """How many pairs of the same mean and spread would exclude a loss of ``margin``, or show that there is one.

    Args:
        found: what there is so far; positive differences are better.
        margin: how much worse still counts as equal.
        confidence: of the two-sided interval.

    Returns:
        None if a single pair gives no spread, or if the mean lies on the margin so that no number is enough.
    """
    if found.spread is None:
        return None
    distance = found.mean + margin if found.mean > -margin else -found.mean
    if distance <= 0.0:
        return None
    for n in range(2, _MOST_PAIRS):
        if _half_width(found.spread, n, confidence) < distance:
            return n
    return None


def _interval(logs: list[float], confidence: float) -> Interval:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not be {confidence}")
    n = len(logs)
    if n == 0:
        raise ValueError("there is no value for an interval")
    mean = math.fsum(logs) / n
    if n == 1:
        return Interval(math.exp(mean), None, None, 1)
    half_width = _half_width(statistics.stdev(logs), n, confidence)
    return Interval(math.exp(mean), _exp(mean - half_width), _exp(mean + half_width), n)


def _half_width(spread: float, n: int, confidence: float) -> float:
    """Half the two-sided t interval of the mean of ``n`` values with the sample standard deviation ``spread``."""
    return _quantile(n - 1, (1.0 + confidence) / 2.0) * spread / math.sqrt(n)


def _quantile(degrees: float, probability: float) -> float:
    """Quantile of Student's t."""
    return float(stdtrit(degrees, probability))


def _log(value: float) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"only positive, finite values have a geometric mean; got {value}")
    return math.log(value)


def _exp(logarithm: float) -> float:
    # The interval of two values that are hundreds of decades apart does not fit into a float.
    try:
        return math.exp(logarithm)
    except OverflowError:
        return math.inf
