"""DynamicLossScale decides as the loss scaling of TensorFlow, Keras and PyTorch does.

Each peer is the real class around a real optimizer, given gradients some of which overflow. The tests compare the scale
after every step, and which steps were applied: each of those lowers the weight by exactly 1.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.trajectories import scales_of

from mpscale.scaling import DynamicLossScale, LossScaleOptimizer

STEPS = 10_000
GRAD_SCALER = json.loads(Path(__file__).with_name("grad_scaler_trajectory.json").read_text())

# Limits of the comparison: float32 ends near these, and only mpscale has a cap.
NO_FLOOR, NO_CAP = 2.0**-120, 2.0**126


def of_mpscale(loss_scale):
    return _of_keras_3(LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale), lambda opt: opt.loss_scale_value)


def of_keras(initial, interval):
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), initial_scale=initial, dynamic_growth_steps=interval
    )
    return _of_keras_3(optimizer, lambda opt: opt.dynamic_scale.value)


def _of_keras_3(optimizer, scale_of):
    weights = keras.Variable(np.zeros(2, np.float32))
    optimizer.build([weights])

    def step(gradient):
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(tf.reduce_sum(weights.value * gradient))
        optimizer.apply(tape.gradient(scaled, [weights.value]), [weights])
        return scale_of(optimizer), weights.value

    return step


def of_tf_keras(initial, interval):
    tf_keras = pytest.importorskip("tf_keras")
    optimizer = tf_keras.mixed_precision.LossScaleOptimizer(
        tf_keras.optimizers.SGD(1.0), initial_scale=initial, dynamic_growth_steps=interval
    )
    weights = tf.Variable([0.0, 0.0])
    optimizer.build([weights])

    def step(gradient):
        with tf.GradientTape() as tape:
            scaled = optimizer.get_scaled_loss(tf.reduce_sum(weights * gradient))
        grads = optimizer.get_unscaled_gradients(tape.gradient(scaled, [weights]))
        optimizer.apply_gradients([(grads[0], weights)])
        return optimizer.loss_scale, weights

    return step


def decisions(step, finites):
    """Return the scale after each step, and how many steps had been applied by then.

    Args:
        step: takes a gradient of two elements, returns the loss scale and the two weights.
        finites: whether the gradient of each step is finite.
    """
    gradients = np.ones((len(finites), 2), np.float32)
    bad = np.flatnonzero(~finites)
    gradients[bad, 0] = np.resize([np.inf, -np.inf, np.nan], len(bad))

    @tf.function(jit_compile=True)
    def loop(gradients):
        seen = tf.TensorArray(tf.float32, len(finites))
        for i in tf.range(len(finites)):
            scale, weights = step(gradients[i])
            seen = seen.write(i, tf.stack([scale, -weights[1]]))
        return seen.stack()

    scales, applied = loop(tf.constant(gradients)).numpy().T
    return scales, applied


def random_finites(rate):
    return np.random.default_rng(0).random(STEPS) >= rate


def check_same(loss_scale, finites, scales, applied):
    """Check that the rule alone and the optimizer with it decide as given, at every step."""
    assert {-1.0, 0.0, 1.0} == set(np.sign(np.diff(scales)))
    np.testing.assert_array_equal(scales_of(loss_scale, finites), scales)
    ours, ours_applied = decisions(of_mpscale(loss_scale), finites)
    np.testing.assert_array_equal(ours, scales)
    np.testing.assert_array_equal(ours_applied, applied)


# Rates at which growth and backoff balance, so that the scale wanders; the last has the default interval.
BALANCED = [
    pytest.param(3, 0.2063, id="interval 3"),
    pytest.param(50, 0.0138, id="interval 50"),
    pytest.param(2000, 0.0003, id="interval 2000"),
]


@pytest.mark.parametrize(
    ("interval", "rate"),
    [
        *BALANCED,
        pytest.param(1, 0.6, id="interval 1, at the floor of 1 time and again"),
        pytest.param(10, 0.2, id="interval 10, at the floor of 1 most of the time"),
    ],
)
def test_same_decisions_as_tf_keras(interval, rate):
    """Including its floor of 1."""
    finites = random_finites(rate)
    scales, applied = decisions(of_tf_keras(2.0**15, interval), finites)
    assert scales.max() < NO_CAP
    loss_scale = DynamicLossScale(2.0**15, growth_interval=interval, minimum=1.0, maximum=NO_CAP)
    check_same(loss_scale, finites, scales, applied)


@pytest.mark.parametrize(("interval", "rate"), BALANCED)
def test_same_decisions_as_keras(interval, rate):
    """Keras has neither floor nor cap."""
    finites = random_finites(rate)
    scales, applied = decisions(of_keras(2.0**15, interval), finites)
    assert scales.min() > NO_FLOOR
    assert scales.max() < NO_CAP
    loss_scale = DynamicLossScale(2.0**15, growth_interval=interval, minimum=NO_FLOOR, maximum=NO_CAP)
    check_same(loss_scale, finites, scales, applied)


def id_of(run):
    return f"interval {run['growth_interval']}, {len(run['overflows_skipped'])} overflows"


@pytest.mark.parametrize("run", GRAD_SCALER["runs"], ids=id_of)
def test_same_decisions_as_torch(run):
    """As recorded by record_grad_scaler.py; GradScaler has neither floor nor cap."""
    finites = np.ones(run["steps"], bool)
    finites[run["overflows_skipped"]] = False
    exponents = np.full(run["steps"], run["log2_initial"])
    for step, exponent in run["changes"]:
        exponents[step:] = exponent
    scales = np.exp2(exponents)
    assert scales.min() > NO_FLOOR
    assert scales.max() < NO_CAP
    loss_scale = DynamicLossScale(
        2.0 ** run["log2_initial"],
        growth_factor=run["growth_factor"],
        backoff_factor=run["backoff_factor"],
        growth_interval=run["growth_interval"],
        minimum=NO_FLOOR,
        maximum=NO_CAP,
    )
    check_same(loss_scale, finites, scales, np.cumsum(finites))
