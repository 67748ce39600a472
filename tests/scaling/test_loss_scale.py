"""The loss scales as pure state machines."""

import doctest
import math

import keras
import numpy as np
import pytest

from mpscale.core import loss_scale as rules
from mpscale.scaling import ArticleLossScale, DynamicLossScale, LogMaxLossScale, NoLossScale, StaticLossScale

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies


def run(loss_scale, finites):
    """Return the scale before each step and after the last."""
    state = loss_scale.initial_state()
    scales = [float(state["scale"])]
    for finite in finites:
        state = loss_scale.next_state(state, finite)
        scales.append(float(state["scale"]))
    return scales


GOOD, BAD = True, False


@pytest.mark.parametrize(
    ("arguments", "finites", "scales"),
    [
        pytest.param({"growth_interval": 3}, [GOOD] * 3, [8, 8, 8, 16], id="grows at step N and not before"),
        pytest.param({"growth_interval": 1}, [GOOD] * 3, [8, 16, 32, 64], id="interval of one grows every step"),
        pytest.param(
            {"growth_interval": 2}, [GOOD, BAD, GOOD, GOOD], [8, 8, 4, 4, 8], id="overflow restarts the count"
        ),
        pytest.param({}, [BAD, BAD], [8, 4, 2], id="each overflow backs off"),
        pytest.param({"minimum": 4.0}, [BAD] * 100, [8] + [4] * 100, id="floor holds after 100 backoffs"),
        pytest.param({"growth_interval": 1, "maximum": 16.0}, [GOOD] * 3, [8, 16, 16, 16], id="cap holds"),
        pytest.param(
            {"growth_interval": 1, "maximum": 12.0}, [GOOD] * 2, [8, 12, 12], id="cap that is not a power of two"
        ),
        pytest.param({"hysteresis": 2}, [BAD, GOOD, BAD, GOOD], [8] * 5, id="single overflows are tolerated"),
        pytest.param(
            {"hysteresis": 2}, [BAD, BAD, BAD], [8, 8, 4, 2], id="in a row, each one past the tolerance counts"
        ),
        pytest.param(
            {"hysteresis": 2, "growth_interval": 2},
            [GOOD, BAD, GOOD, GOOD],
            [8, 8, 8, 8, 16],
            id="a tolerated overflow restarts the count too",
        ),
        pytest.param({"growth_factor": 4.0, "growth_interval": 1}, [GOOD], [8, 32], id="growth factor"),
        pytest.param({"backoff_factor": 0.25}, [BAD], [8, 2], id="backoff factor"),
    ],
)
def test_dynamic_scale_follows_its_rule(arguments, finites, scales):
    assert run(DynamicLossScale(initial=8.0, **arguments), finites) == scales


@pytest.mark.parametrize("loss_scale", [StaticLossScale(8.0), StaticLossScale(8.0, skip_nonfinite=False)])
def test_static_scale_never_moves(loss_scale):
    assert run(loss_scale, [GOOD, BAD, BAD, GOOD]) == [8.0] * 5


def test_no_scale_is_one_and_checks_nothing():
    assert run(NoLossScale(), [GOOD, BAD]) == [1.0] * 3
    assert not NoLossScale().checks_finite


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticLossScale(0), "scale must be a number above 0"),
        (lambda: StaticLossScale(-1.0), "scale must be a number above 0"),
        (lambda: StaticLossScale(math.inf), "at most 2\\*\\*126"),
        (lambda: StaticLossScale(math.nan), "scale must be a number above 0"),
        (lambda: StaticLossScale(2.0**127), "reciprocal of a larger scale flushes to zero"),
        (lambda: StaticLossScale("128"), "not '128'"),
        (lambda: StaticLossScale(True), "not True"),
        (lambda: DynamicLossScale(initial=2.0**40), "not within minimum 1 and maximum"),
        (lambda: DynamicLossScale(initial=0.5), "not within minimum 1 and maximum"),
        (lambda: DynamicLossScale(minimum=2.0, maximum=1.0), "widen them"),
        (lambda: DynamicLossScale(growth_factor=1.0), "growth_factor must be finite and above 1"),
        (lambda: DynamicLossScale(growth_factor=math.inf), "growth_factor must be finite and above 1"),
        (lambda: DynamicLossScale(backoff_factor=1.0), "backoff_factor must be between 0 and 1"),
        (lambda: DynamicLossScale(growth_interval=0), "growth_interval must be an integer of at least 1"),
        (lambda: DynamicLossScale(growth_interval=2.5), "growth_interval must be an integer"),
        (lambda: DynamicLossScale(hysteresis=0), "hysteresis must be an integer of at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "loss_scale",
    [
        NoLossScale(),
        StaticLossScale(3.0, False),
        DynamicLossScale(16.0, 4.0, 0.25, 7, 3, 2.0, 2.0**30),
        LogMaxLossScale(16.0, 0.9, 0.95, 2.0, 2.0, 2.0**20),
    ],
)
def test_config_makes_an_equal_loss_scale(loss_scale):
    assert type(loss_scale).from_config(loss_scale.get_config()) == loss_scale
    serialized = keras.saving.serialize_keras_object(loss_scale)
    assert serialized["registered_name"] == f"mpscale>{type(loss_scale).__name__}"
    assert keras.saving.deserialize_keras_object(serialized) == loss_scale


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("hysteresis=2", {"hysteresis": 2}),
        ("initial=2**40, maximum = 2^50", {"initial": 2.0**40, "maximum": 2.0**50}),
        ("initial=1,minimum=1,maximum=1e3", {"initial": 1.0, "minimum": 1.0, "maximum": 1000.0}),
    ],
)
def test_settings_as_text(text, arguments):
    found = DynamicLossScale.parse(text)
    assert found == arguments
    assert {name: type(value) for name, value in found.items()} == {
        name: type(DynamicLossScale.defaults()[name]) for name in found
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start=4", "'start' is not one of initial, growth_factor"),
        ("hysteresis", "expected a number such as 1024 or 2\\*\\*24, not ''"),
        ("initial=2**9999", "expected a number"),
        ("hysteresis=1.5", "hysteresis must be an integer of at least 1, not 1.5"),
        ("minimum=0", "minimum must be a number above 0"),
        ("initial=2**40", "not within minimum 1 and maximum"),
    ],
)
def test_text_that_makes_no_rule_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        DynamicLossScale.parse(text)


def test_example_of_the_dynamic_scale_runs():
    result = doctest.testmod(rules)
    assert result.attempted > 0
    assert result.failed == 0


@settings(max_examples=30, deadline=None)
@given(
    finites=st.lists(st.booleans(), max_size=60),
    floor=st.integers(0, 5),
    above=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    interval=st.integers(1, 4),
    hysteresis=st.integers(1, 4),
)
def test_scale_stays_a_power_of_two_within_its_bounds(finites, floor, above, interval, hysteresis):
    initial, cap = floor + above[0], floor + sum(above)
    loss_scale = DynamicLossScale(
        initial=2.0**initial,
        growth_interval=interval,
        hysteresis=hysteresis,
        minimum=2.0**floor,
        maximum=2.0**cap,
    )
    exponents = np.log2(run(loss_scale, finites))
    assert (exponents == np.round(exponents)).all()
    assert exponents.min() >= floor
    assert exponents.max() <= cap


@pytest.mark.parametrize(
    ("scale", "loss", "after"),
    [
        pytest.param(4.0, 1.5, 3.6, id="loss above one shrinks the scale"),
        pytest.param(4.0, 1.0, 4.0, id="loss of one leaves it"),
        pytest.param(4.0, 0.5, 4.0, id="loss of a half leaves it"),
        pytest.param(4.0, 0.4, 4.4, id="loss below a half grows it"),
        pytest.param(0.001, 0.4, 0.0011, id="whatever the scale is"),
    ],
)
def test_article_rule_compares_the_loss_with_one_and_a_half(scale, loss, after):
    state = ArticleLossScale().next_state({"scale": scale}, np.float32(scale * loss))
    assert float(state["scale"]) == pytest.approx(after)


def test_article_scale_has_no_bound():
    rule, state = ArticleLossScale(), ArticleLossScale().initial_state()
    for _ in range(1000):
        state = rule.next_state(state, state["scale"] * np.float32(0.1))
    assert float(state["scale"]) == math.inf
