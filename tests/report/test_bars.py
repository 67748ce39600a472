"""Small bars beside numbers."""

from __future__ import annotations

import math

import pytest

from mpscale.report import bars


@pytest.mark.parametrize(
    ("ratios", "end"), [([], 2), ([1.0], 2), ([0.5, 1.3], 2), ([0.42], 4), ([2.0, 4.1], 8), ([1e9, math.inf, 0.0], 16)]
)
def test_an_axis_for_ratios_ends_at_a_power_of_two(ratios, end):
    assert bars.widest(ratios) == end


@pytest.mark.parametrize(("value", "place"), [(0.25, 0.0), (0.5, 0.25), (1.0, 0.5), (2.0, 0.75), (4.0, 1.0)])
def test_ratios_lie_on_a_logarithmic_axis_around_one(value, place):
    drawn = bars.ratio(value, (value / 2, value * 2), 4.0)
    assert (drawn.at, drawn.line) == (pytest.approx(place), 0.5)
    assert drawn.ends == (pytest.approx(place - 0.25), pytest.approx(place + 0.25))


@pytest.mark.parametrize(("higher_is_better", "sign"), [(True, 1), (False, -1)])
def test_a_worse_metric_lies_to_the_left_and_a_loss_within_the_margin_in_the_band(higher_is_better, sign):
    within = bars.difference(-0.01 * sign, (-0.015 * sign, 0.01 * sign), 0.02, higher_is_better)
    beyond = bars.difference(-0.04 * sign, None, 0.02, higher_is_better)
    assert beyond.at < within.band[0] < within.ends[0] < within.at < within.line < within.ends[1] < within.band[1] == 1
    assert beyond.band == within.band


@pytest.mark.parametrize(
    ("ends", "arrows"), [((0.9, 1.1), 0), ((0.1, 1.1), 1), ((0.9, math.inf), 1), ((0.0, 99.0), 2), (None, 0)]
)
def test_what_lies_beyond_the_axis_is_an_arrow(ends, arrows):
    assert bars.ratio(1.0, ends, 2.0).svg().count("<path") == arrows


@pytest.mark.parametrize(
    "made",
    [
        lambda odd: bars.ratio(odd, None, 2.0),
        lambda odd: bars.length(odd, 1.0, "it"),
        lambda odd: bars.difference(odd, None, 1.0, True),
    ],
)
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_has_no_place_is_not_drawn(made, odd):
    assert made(odd) is None


def test_nothing_is_drawn_against_nothing():
    assert bars.length(0.0, 0.0, "it") is bars.ratio(0.0, None, 2.0) is bars.difference(0.1, None, 0.0, True) is None
