"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from mpscale.report import table as cells


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, cells.DASH),
        (0.0, "0"),
        (7.9149, "7.91"),
        (0.0123456, "0.0123"),
        (1557.4, "1557"),
        (1e9, "1e+09"),
        (1e-7, "1e-07"),
        (-2.5, "-2.50"),
        (math.inf, "inf"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert cells.number(value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((7.914, 7.8, 8.02, " ms"), "7.91 [7.80, 8.02] ms"),
        ((7.914, None, None, " ms"), "7.91 ms"),
        ((0.981, 0.95, 1.0149, "x", 2), "0.98x [0.95, 1.01]"),
        ((1.0, None, None, "x", 2), "1.00x"),
        ((None, None, None, " ms"), cells.DASH),
    ],
)
def test_intervals_share_the_decimals_of_their_estimate(arguments, text):
    assert cells.interval(*arguments) == text


@pytest.mark.parametrize(
    ("value", "text"), [(32768.0, "32768"), (2.0**24, "16777216"), (2.0**126, "8.50706e+37"), (0.9, "0.9")]
)
def test_loss_scales_are_shown_in_full_while_they_are_readable(value, text):
    assert cells.loss_scale(value) == text


@pytest.mark.parametrize(
    ("difference", "name", "text"),
    [
        (-0.0012, "accuracy", "0.12 points below"),
        (0.0034, "accuracy", "0.34 points above"),
        (0.00001, "accuracy", "no different from"),
        (0.25, "perplexity", "0.250 above"),
        (0.0, "perplexity", "no different from"),
    ],
)
def test_differences_of_a_metric_are_said_in_its_unit(difference, name, text):
    assert cells.metric_change(difference, name) == text
