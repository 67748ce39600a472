"""Intervals over processes, and tests between runs.

One process gives one number, the median of its blocks: blocks of one process are autocorrelated and agree far better
with each other than with those of the next process, so an interval over blocks is too narrow. Times are compared as
ratios, hence logarithms. Metrics are compared seed by seed, as differences.
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
_MOST_PAIRS = 10_000
"""Beyond which no one trains as often, so that an exact number is of no use."""


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


@dataclass(frozen=True, slots=True)
class Between:
    """How much a figure moves from one run of the same code to the next, on logarithms.

    Args:
        variance: of a run's figure; of known runs with what their processes contribute, of an assumption without.
        degrees: of freedom of the variance.
        runs: from how many runs it is known; 0 where it is assumed.
        within: variance of processes within a run.
        within_degrees: its degrees of freedom, 0 where every run had one process.
    """

    variance: float
    degrees: float
    runs: int
    within: float = 0.0
    within_degrees: int = 0

    @property
    def limit(self) -> float:
        """By how much two runs of the same code differ at most in 19 of 20 cases, as a share.

        ISO 5725-6:1994, 4.1.4, the limit of repeatability and reproducibility: 1.96 sqrt(2) standard deviations.
        """
        return _exp(1.96 * math.sqrt(2 * self.variance)) - 1.0


@dataclass(frozen=True, slots=True)
class LogChange:
    """The logarithm of other / baseline, with its standard error.

    Args:
        estimate: mean logarithm of the one less that of the other.
        standard_error: of the estimate, None where too few values give no spread.
        degrees: of freedom; None likewise.
    """

    estimate: float
    standard_error: float | None
    degrees: float | None

    @property
    def change(self) -> float:
        """As a share of the baseline: 0.05 is 5 % more."""
        return math.expm1(self.estimate)

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Ends of the two-sided interval of :attr:`change`, None where there is no spread to make it of."""
        if self.standard_error is None or self.degrees is None:
            return None
        half_width = _quantile(self.degrees, (1.0 + confidence) / 2.0) * self.standard_error
        return _exp(self.estimate - half_width) - 1.0, _exp(self.estimate + half_width) - 1.0

    def p_increase(self) -> float | None:
        """How likely an increase of at least this size is where there is none; None without a spread."""
        if self.standard_error is None or self.degrees is None:
            return None
        if self.standard_error == 0.0:
            return 0.0 if self.estimate > 0.0 else 1.0
        return float(stdtr(self.degrees, -self.estimate / self.standard_error))

    def detectable(self, confidence: float = 0.95, power: float = 0.8) -> float | None:
        """The smallest change that values of this spread and number would have shown with the given power.

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
        low: lower end of its two-sided interval, None where a single pair gives no spread.
        high: upper end, likewise.
        spread: sample standard deviation of the differences, None likewise.
        n: pairs.
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


def log_change(baseline: Sequence[float], other: Sequence[float], between: Between | None = None) -> LogChange:
    """How much larger ``other`` is, of two runs that nothing pairs.

    Without ``between`` by Welch's comparison of the logarithms, which takes unequal variances. Where it is assumed, its
    variance comes on top, once for each side. Where it is known from runs, a side has that variance, which holds what
    processes contribute: a single process will do. Only a side whose processes differ by more than they did in those
    runs (F test, 1 %) has its own instead, if that is larger. Degrees of freedom by Satterthwaite.

    Welch, "The generalization of Student's problem when several different population variances are involved",
    Biometrika 1947;34:28.

    Args:
        baseline: positive and independent, for instance one median step time a process.
        other: likewise, in the same unit.
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
    """How much larger ``other`` is, of processes that ran in turns: by the paired differences of the logarithms.

    Args:
        baseline: by key, for instance (seed, repeat); positive.
        other: likewise, in the same unit. Keys that only one of the two has are left out.
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
    """Whether processes differ by more than they did in earlier runs, so much that their mean is worth less."""
    if len(logs) < 2 or not between.within_degrees:
        return False
    own = statistics.variance(logs)
    if own / len(logs) <= between.variance:
        return False
    return between.within == 0.0 or fdtrc(len(logs) - 1, between.within_degrees, own / between.within) < _NOISY


def _with_error(estimate: float, parts: Sequence[tuple[float, float]]) -> LogChange:
    """Parts are variances with their degrees of freedom. Satterthwaite, Biometrics Bulletin 1946;2:110."""
    total = math.fsum(variance for variance, _ in parts)
    below = math.fsum(variance**2 / degrees for variance, degrees in parts)
    # Values that are all alike have no variance and so no degrees of freedom to work out; any number will do.
    degrees = total**2 / below if below > 0.0 else max(1.0, math.fsum(degrees for _, degrees in parts))
    return LogChange(estimate, math.sqrt(total), degrees)


def holm(p_values: Sequence[float]) -> list[float]:
    """``p_values`` adjusted for their number: testing all at 5 % then errs anywhere in at most 5 % of cases.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979;6:65.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired_difference(differences: Sequence[float], confidence: float = 0.9) -> Paired:
    """Mean and t interval of differences, one a pair.

    Args:
        differences: for instance the metric of each seed in one mode less that in another.
        confidence: of the two-sided interval; at 0.9 either end alone is one-sided at 95 %.

    Raises:
        ValueError: there is none.
    """
    if not differences:
        raise ValueError("there is no pair to take a difference of")
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Paired(mean, None, None, None, 1)
    spread = statistics.stdev(differences)
    half_width = _quantile(n - 1, (1.0 + confidence) / 2.0) * spread / math.sqrt(n)
    return Paired(mean, mean - half_width, mean + half_width, spread, n)


def pairs_that_would_tell(found: Paired, margin: float, confidence: float = 0.9) -> int | None:
    """How many pairs of the same spread and mean would put an end of the interval beyond 0 or above ``-margin``.

    Args:
        found: what there is so far; its differences count upwards as better.
        margin: how much worse still counts as equal.
        confidence: of the two-sided interval.

    Returns:
        None where a single pair gives no spread, or the mean lies on the margin so that no number would do.
    """
    if found.spread is None:
        return None
    distance = found.mean + margin if found.mean > -margin else -found.mean
    if distance <= 0.0:
        return None
    for n in range(2, _MOST_PAIRS):
        if _quantile(n - 1, (1.0 + confidence) / 2.0) * found.spread / math.sqrt(n) < distance:
            return n
    return None


def _interval(logs: list[float], confidence: float) -> Interval:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not be {confidence}")
    n = len(logs)
    if n == 0:
        raise ValueError("there is no value to make an interval of")
    mean = math.fsum(logs) / n
    if n == 1:
        return Interval(math.exp(mean), None, None, 1)
    half_width = _quantile(n - 1, (1.0 + confidence) / 2.0) * statistics.stdev(logs) / math.sqrt(n)
    return Interval(math.exp(mean), _exp(mean - half_width), _exp(mean + half_width), n)


def _quantile(degrees: float, probability: float) -> float:
    """Of Student's t."""
    return float(stdtrit(degrees, probability))


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
