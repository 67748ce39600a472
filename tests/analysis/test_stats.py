"""Intervals against values worked out by hand from a printed t table."""

from __future__ import annotations

import math

import pytest

from mpscale.analysis.stats import geometric_interval, paired_ratio

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


def test_an_end_beyond_any_float_is_infinite():
    assert geometric_interval([1e-300, 1e300]).high == math.inf


def test_a_ratio_is_made_of_pairs_and_not_of_means():
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
def test_what_has_no_logarithm_is_refused(value):
    with pytest.raises(ValueError, match="positive, finite"):
        geometric_interval([1.0, value])
    with pytest.raises(ValueError, match="positive, finite"):
        paired_ratio({0: value}, {0: value})


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="no value"):
        geometric_interval([])
    with pytest.raises(ValueError, match="share no key"):
        paired_ratio({0: 1.0}, {1: 1.0})


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        geometric_interval([1.0, 2.0], confidence)
