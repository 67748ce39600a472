"""Intervals against values worked out by hand from a printed t table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from mpscale.analysis.stats import (
    LogChange,
    Paired,
    geometric_interval,
    holm,
    log_change,
    paired_difference,
    paired_ratio,
    pairs_that_would_tell,
)

T_95_DF1 = 12.7062
T_95_DF2 = 4.30265
T_90_DF2 = 2.91999


def test_the_interval_of_three_values():
    # Logarithms to base 2 are 0, 1, 2: mean 1, standard deviation 1, so the ends are 2 ** (1 -+ t / sqrt(3)).
    found = geometric_interval([1.0, 2.0, 4.0])
    assert found.estimate == pytest.approx(2.0)
    assert found.low == pytest.approx(2 ** (1 - T_95_DF2 / math.sqrt(3)), rel=1e-5)
    assert found.high == pytest.approx(2 ** (1 + T_95_DF2 / math.sqrt(3)), rel=1e-5)
    assert found.n == 3


def test_a_lower_confidence_gives_a_narrower_interval():
    found = geometric_interval([1.0, 2.0, 4.0], confidence=0.9)
    assert found.high == pytest.approx(2 ** (1 + T_90_DF2 / math.sqrt(3)), rel=1e-5)


def test_one_value_has_no_interval():
    found = geometric_interval([7.5])
    assert (found.estimate, found.low, found.high, found.n) == (pytest.approx(7.5), None, None, 1)


def test_equal_values_have_an_interval_of_no_width():
    found = geometric_interval([3.0, 3.0])
    assert (found.low, found.high) == (pytest.approx(3.0), pytest.approx(3.0))


def test_an_end_too_large_for_a_float_is_infinite():
    assert geometric_interval([1e-300, 1e300]).high == math.inf


def test_a_ratio_is_over_pairs_rather_than_means():
    # The machine is four times slower for seed 1, in both modes alike: every pair says 2.
    found = paired_ratio({(0, 0): 10.0, (1, 0): 40.0}, {(0, 0): 5.0, (1, 0): 20.0})
    assert (found.estimate, found.low, found.high) == (pytest.approx(2.0),) * 3


def test_the_interval_of_a_ratio():
    # Ratios 1 and 4: logarithms to base 2 are 0 and 2, mean 1, standard deviation sqrt(2), over sqrt(2): 1.
    found = paired_ratio({0: 8.0, 1: 8.0}, {0: 8.0, 1: 2.0})
    assert found.estimate == pytest.approx(2.0)
    assert found.low == pytest.approx(2 ** (1 - T_95_DF1), rel=1e-4)
    assert found.high == pytest.approx(2 ** (1 + T_95_DF1), rel=1e-4)


def test_keys_that_one_side_lacks_are_left_out():
    found = paired_ratio({0: 6.0, 1: 1.0}, {0: 3.0, 2: 100.0})
    assert (found.estimate, found.n) == (pytest.approx(2.0), 1)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_values_without_a_logarithm_are_refused(value):
    with pytest.raises(ValueError, match="positive, finite"):
        geometric_interval([1.0, value])
    with pytest.raises(ValueError, match="positive, finite"):
        paired_ratio({0: value}, {0: value})


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        geometric_interval([1.0, 2.0], confidence)


def test_the_change_of_two_by_two_values():
    # Logarithms to base 2: 0, 2 against 3, 5. Means 1 and 4, variances 2 and 2, standard error sqrt(2), 2 degrees.
    found = log_change([1.0, 4.0], [8.0, 32.0])
    assert found.change == pytest.approx(2**3 - 1)
    assert found.degrees == pytest.approx(2.0)
    low, high = found.interval()
    assert low == pytest.approx(2 ** (3 - T_95_DF2 * math.sqrt(2)) - 1, rel=1e-4)
    assert high == pytest.approx(2 ** (3 + T_95_DF2 * math.sqrt(2)) - 1, rel=1e-4)


def test_welch_allows_unequal_spreads():
    # scipy.stats.ttest_ind(log b, log a, equal_var=False): the textbook's other way to the same numbers.
    baseline, other = [1.0, 1.1, 0.9, 1.05], [1.4, 2.1, 1.1]
    found = log_change(baseline, other)
    expected = ttest_ind([math.log(x) for x in other], [math.log(x) for x in baseline], equal_var=False)
    assert found.degrees == pytest.approx(expected.df)
    assert found.p_increase() == pytest.approx(expected.pvalue / 2)
    low, high = expected.confidence_interval()
    assert found.interval() == (pytest.approx(math.expm1(low)), pytest.approx(math.expm1(high)))


@pytest.mark.parametrize(("baseline", "other"), [([1.0], [2.0, 2.1]), ([1.0, 1.1], [2.0])])
def test_a_single_value_on_either_side_gives_a_change_without_an_interval(baseline, other):
    found = log_change(baseline, other)
    assert found.change > 0
    assert (found.interval(), found.p_increase(), found.detectable()) == (None, None, None)


@pytest.mark.parametrize(("other", "p"), [(2.0, 1.0), (3.0, 0.0), (1.0, 1.0)])
def test_values_without_spread_differ_with_certainty_or_not_at_all(other, p):
    found = log_change([2.0, 2.0], [other, other])
    assert found.interval() == (pytest.approx(other / 2 - 1), pytest.approx(other / 2 - 1))
    assert found.p_increase() == p
    assert found.detectable() == 0.0


def test_a_change_of_the_detectable_size_is_found_as_often_as_the_power_says():
    random, found, n, sigma = np.random.default_rng(1), 0, 5, 0.03
    # The expected standard error, with the degrees of freedom of n and n values.
    size = LogChange(0.0, sigma * math.sqrt(2 / n), 2 * n - 2).detectable()
    for _ in range(2000):
        baseline = np.exp(random.normal(0.0, sigma, n))
        other = np.exp(random.normal(math.log1p(size), sigma, n))
        low, _ = log_change(baseline, other).interval()
        found += low > 0
    assert found / 2000 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.02], [0.02]),
        # Holm's own order: 3 x 0.01, 2 x 0.02, 1 x 0.03 and no smaller than the one before.
        ([0.03, 0.01, 0.02], [0.04, 0.03, 0.04]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.0, 0.04], [0.0, 0.04]),
    ],
)
def test_holm(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted)


def test_the_interval_of_paired_differences():
    found = paired_difference([0.0, 1.0, 2.0])
    assert (found.mean, found.spread, found.n) == (1.0, 1.0, 3)
    assert found.low == pytest.approx(1 - T_90_DF2 / math.sqrt(3), rel=1e-5)
    assert found.high == pytest.approx(1 + T_90_DF2 / math.sqrt(3), rel=1e-5)


def test_one_difference_has_no_interval():
    assert paired_difference([0.5]) == Paired(0.5, None, None, None, 1)


@pytest.mark.parametrize(
    ("mean", "spread", "margin", "pairs"),
    [
        # t(0.95, n - 1) / sqrt(n) falls below 1 at n = 5 (2.132 / 2.236), where 4 give 1.177.
        pytest.param(0.0, 1.0, 1.0, 5, id="not worse by the margin"),
        pytest.param(-2.0, 2.0, 1.0, 5, id="worse than nothing"),
        pytest.param(0.0, 0.0, 1.0, 2, id="all alike"),
        pytest.param(-1.0, 1.0, 1.0, 5, id="on the margin, which is worse"),
        pytest.param(0.0, 1.0, 1e-6, None, id="too many"),
        pytest.param(0.0, 1.0, 0.0, None, id="no margin and no difference"),
        pytest.param(0.0, None, 1.0, None, id="a single pair"),
    ],
)
def test_how_many_pairs_would_tell(mean, spread, margin, pairs):
    found = Paired(mean, None, None, spread, 3)
    assert pairs_that_would_tell(found, margin) == pairs


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: geometric_interval([]), "no value"),
        (lambda: paired_ratio({0: 1.0}, {1: 1.0}), "share no key"),
        (lambda: log_change([], [1.0]), "at least one value"),
        (lambda: log_change([1.0], [0.0]), "positive"),
        (lambda: paired_difference([]), "no pair"),
    ],
)
def test_nothing_to_compare_is_an_error(use, message):
    with pytest.raises(ValueError, match=message):
        use()
