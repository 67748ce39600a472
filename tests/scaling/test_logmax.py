"""LogMaxLossScale, which follows the statistics of the largest gradient."""

import math

import numpy as np
import pytest
import tensorflow as tf
from support.trajectories import scales_of

from mpscale.scaling import LogMaxLossScale

hypothesis = pytest.importorskip("hypothesis")
example, given, settings, st = hypothesis.example, hypothesis.given, hypothesis.settings, hypothesis.strategies

LOG_65504 = math.log2(65504)
WIDE = {"minimum": 2.0**-100, "maximum": 2.0**100}


def formula(x, mean_decay=0.99, deviation_decay=0.999, deviations=3.09, minimum=1.0, maximum=2.0**14):
    """Return the scale after each x, in float64, with averages kept as Adam keeps them."""
    mean = slow = square = 0.0
    scales = []
    for n, value in enumerate(x, 1):
        mean = mean_decay * mean + (1 - mean_decay) * value
        slow = deviation_decay * slow + (1 - deviation_decay) * value
        square = deviation_decay * square + (1 - deviation_decay) * value**2
        fast_correction, slow_correction = 1 - mean_decay**n, 1 - deviation_decay**n
        sigma = math.sqrt(max(square / slow_correction - (slow / slow_correction) ** 2, 0))
        exponent = 16 - (mean / fast_correction + deviations * sigma)
        scales.append(2 ** float(np.clip(exponent, math.log2(minimum), math.log2(maximum))))
    return np.array(scales)


def original(x, finites):
    """LogMaxScaler of OpenSeq2Seq, where an overflow enters the averages of logarithms as 2**16 itself."""
    return formula(np.where(finites, x, 2.0**16))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="defaults"),
        pytest.param(WIDE, id="without bounds in reach"),
        pytest.param({"mean_decay": 0.5, "deviation_decay": 0.9, "deviations": 1.0, **WIDE}, id="short memory"),
        pytest.param({"deviations": 0.0, **WIDE}, id="no margin"),
        pytest.param({"minimum": 64.0, "maximum": 300.0, "initial": 100.0}, id="narrow bounds"),
    ],
)
@pytest.mark.parametrize(
    ("center", "spread"), [(4.0, 2.0), (10.0, 0.05), (-20.0, 0.5), (6.0, 0.0)], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("overflows", [0.0, 0.02])
def test_scale_equals_the_formula_in_double_precision(arguments, center, spread, overflows):
    rng = np.random.default_rng(0)
    largests = np.exp2(rng.normal(center, spread, 600)).astype(np.float32)
    finites = rng.random(600) >= overflows
    bounds = {name: value for name, value in arguments.items() if name != "initial"}
    expected = formula(np.where(finites, np.log2(largests, dtype=np.float64), LOG_65504), **bounds)
    np.testing.assert_allclose(scales_of(LogMaxLossScale(**arguments), finites, largests), expected, rtol=2e-5)


@pytest.mark.parametrize(
    ("x", "scale"),
    [
        pytest.param(5.0, 2.0**11, id="a margin up to 2**16 and none above it"),
        pytest.param(2.0, 2.0**14, id="exactly the cap"),
        pytest.param(1.0, 2.0**14, id="cap holds"),
        pytest.param(-126.0, 2.0**14, id="smallest normal number"),
        pytest.param(16.0, 1.0, id="exactly the floor"),
        pytest.param(20.0, 1.0, id="floor holds"),
        pytest.param(127.0, 1.0, id="largest power of two"),
    ],
)
def test_constant_gradients_leave_no_deviation(x, scale):
    scales = scales_of(LogMaxLossScale(initial=8.0), [True] * 3000, np.full(3000, 2.0**x))
    np.testing.assert_allclose(scales, scale, rtol=1e-5)


def test_first_step_sets_the_scale_whatever_the_initial_one():
    for initial in (1.0, 2.0**14):
        assert scales_of(LogMaxLossScale(initial=initial), [True], [64.0]) == pytest.approx(2.0**10)


@pytest.mark.parametrize("silent", [0.0, 2.0**-149, 2.0**-127], ids=["zero", "smallest subnormal", "subnormal"])
def test_gradients_without_a_logarithm_change_nothing(silent):
    loss_scale = LogMaxLossScale(initial=8.0)
    state = loss_scale.initial_state()
    assert same(loss_scale.next_state(state, True, silent), state)
    for largest in (3.0, 40.0):
        state = loss_scale.next_state(state, True, largest)
    assert same(loss_scale.next_state(state, True, silent), state)


@pytest.mark.parametrize("largest", [math.nan, math.inf, 0.0, 1e30, 1e-45], ids=str)
def test_overflow_counts_as_the_largest_float16_whatever_largest_is(largest):
    loss_scale = LogMaxLossScale()
    state = loss_scale.next_state(loss_scale.initial_state(), True, 64.0)
    assert same(loss_scale.next_state(state, False, largest), loss_scale.next_state(state, True, 65504.0), rtol=1e-6)


@pytest.mark.parametrize("largest", [math.nan, math.inf], ids=str)
def test_a_largest_gradient_beyond_float32_is_an_overflow(largest):
    loss_scale = LogMaxLossScale()
    state = loss_scale.initial_state()
    assert same(loss_scale.next_state(state, True, largest), loss_scale.next_state(state, False, largest))


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("largest", [0.0, 2.0**-149, 65504.0, math.inf, math.nan], ids=str)
def test_no_intermediate_value_is_nan(finite, largest):
    loss_scale, largest = LogMaxLossScale(), tf.constant(largest)
    state = loss_scale.next_state(loss_scale.initial_state(), True, 64.0)
    tf.debugging.enable_check_numerics()
    try:
        loss_scale.next_state(state, finite, largest)
    finally:
        tf.debugging.disable_check_numerics()


def same(state, other, rtol=0.0):
    assert state.keys() == other.keys()
    return all(np.isclose(float(state[name]), float(other[name]), rtol=rtol, atol=0) for name in state)


@pytest.mark.parametrize(
    ("x", "within"),
    [
        pytest.param(-5.0, 0, id="no effect far from the cap"),
        pytest.param(2.0, 650, id="at the cap"),
        pytest.param(5.0, 200, id="below the cap"),
    ],
)
def test_one_overflow_keeps_the_original_scale_down_for_10000_steps_but_not_this_one(x, within):
    """``within``: steps after which the scale is back at half of what it was, and stays there."""
    settled, after = 5000, 12_000
    finites = np.arange(settled + after) != settled
    values = np.full(settled + after, x)
    assert (original(values, finites)[settled : settled + 10_001] == 1.0).all()
    scales = scales_of(LogMaxLossScale(), finites, 2.0**values)
    assert scales[settled:].min() > scales[settled - 1] / 4
    assert (scales[settled + within :] >= scales[settled - 1] / 2).all()


def test_an_overflow_on_the_first_step_of_all_is_overcome_in_800_steps():
    """The worst moment, because for some steps the averages contain little else."""
    scales = scales_of(LogMaxLossScale(), np.arange(800) > 0, np.full(800, 32.0))
    assert scales[1] == 1.0
    assert (scales[20:] > 1.0).all()
    assert scales[-1] >= 2.0**11 / 2


@pytest.mark.parametrize("overflows_after", [0, 1, 5000])
@pytest.mark.parametrize("minimum", [0.25, 1.0])
def test_overflow_after_overflow_ends_at_the_floor(overflows_after, minimum):
    loss_scale = LogMaxLossScale(minimum=minimum)
    finites = np.arange(overflows_after + 5000) < overflows_after
    scales = scales_of(loss_scale, finites, np.full(len(finites), 0.5))
    assert bool(loss_scale.at_floor({"scale": scales[-1]}))


def test_floor_is_the_minimum():
    loss_scale = LogMaxLossScale(minimum=32.0)
    assert bool(loss_scale.at_floor({"scale": 32.0}))
    assert not bool(loss_scale.at_floor({"scale": 32.5}))
    assert not bool(loss_scale.at_floor(loss_scale.initial_state()))


STEPS = 40
ODD = [0.0, 2.0**-149, 2.0**-126, 65504.0, 3.4e38, math.inf, -math.inf, math.nan]
ANYTHING = st.one_of(st.sampled_from(ODD), st.floats(width=32), st.floats(2.0**-20, 2.0**10, width=32))


@settings(max_examples=200, deadline=None)
@given(
    finites=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS),
    largests=st.lists(ANYTHING, min_size=STEPS, max_size=STEPS),
    loss_scale=st.sampled_from([LogMaxLossScale(), LogMaxLossScale(deviations=100.0, **WIDE)]),
)
@example([True] * STEPS, [2.0**-126, 3.4e38] * (STEPS // 2), LogMaxLossScale(deviations=100.0, **WIDE))
@example([True] * STEPS, ODD * (STEPS // len(ODD)), LogMaxLossScale())
def test_the_scale_stays_within_its_bounds_for_any_input(finites, largests, loss_scale):
    scales = scales_of(loss_scale, finites, largests)
    assert np.isfinite(scales).all()
    assert scales.min() >= loss_scale.minimum
    assert scales.max() <= loss_scale.maximum


def test_eager_and_compiled_states_agree():
    rng = np.random.default_rng(0)
    largests = [*np.exp2(rng.normal(5, 3, 20)), math.nan, 0.0, math.inf, *np.exp2(rng.normal(5, 3, 10))]
    finites = np.isfinite(largests)
    loss_scale = LogMaxLossScale()
    compiled = tf.function(loss_scale.next_state, jit_compile=True)
    eager_state = compiled_state = loss_scale.initial_state()
    for finite, largest in zip(finites, largests, strict=True):
        step = (tf.constant(finite), tf.constant(largest, tf.float32))
        eager_state = loss_scale.next_state(eager_state, *step)
        compiled_state = compiled(compiled_state, *step)
        # Not to the last bit: XLA contracts multiplication and addition.
        assert same(eager_state, compiled_state, rtol=1e-4)
        assert eager_state["scale"].dtype == compiled_state["scale"].dtype == tf.float32
        assert eager_state["samples"].dtype == compiled_state["samples"].dtype == tf.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": 2.0**40}, "not within minimum 1 and maximum"),
        ({"minimum": 0.0}, "minimum must be a number above 0"),
        ({"mean_decay": 1.0}, "mean_decay must be between 0 and 1, not 1.0"),
        ({"mean_decay": math.nan}, "mean_decay must be between 0 and 1"),
        ({"deviation_decay": 0.0}, "deviation_decay must be between 0 and 1, not 0.0"),
        ({"deviation_decay": "0.9"}, "deviation_decay must be between 0 and 1, not '0.9'"),
        ({"deviations": -1.0}, "deviations must be a number from 0 to 100, not -1.0"),
        ({"deviations": math.inf}, "deviations must be a number from 0 to 100"),
        ({"deviations": True}, "deviations must be a number from 0 to 100, not True"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogMaxLossScale(**arguments)
