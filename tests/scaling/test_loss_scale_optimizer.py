"""LossScaleOptimizer around real Keras optimizers, in eager execution, in a graph and under XLA."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import HOW, same, small_model, state_of, step_function

from mpscale.scaling import DynamicLossScale, LossScaleOptimizer, NoLossScale, StaticLossScale

NOT_INNER = ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
SHIPPED = sorted(
    name
    for name, value in vars(keras.optimizers).items()
    if inspect.isclass(value) and issubclass(value, keras.optimizers.Optimizer) and name not in NOT_INNER
)


COMPILED = ("Adam", "Adafactor", "Muon")
"""Optimizers of different kinds, to compile by XLA; for the others a graph is enough, which takes half as long."""


@pytest.mark.parametrize(
    ("name", "how", "skip"),
    [(name, "eager", "auto") for name in SHIPPED]
    + [(name, "graph", "gate") for name in SHIPPED if name not in COMPILED]
    + [pytest.param(name, "xla", "gate", marks=[] if name in COMPILED else pytest.mark.slow) for name in SHIPPED]
    # A branch is exact whatever it contains; masking depends on how each optimizer writes.
    + [("Adam", "graph", "auto"), ("Muon", "graph", "auto"), ("Adam", "xla", "branch")]
    + [pytest.param("Muon", "xla", "branch", marks=pytest.mark.slow)],
)
def test_overflow_step_changes_nothing(name, how, skip):
    """With everything on that may write in other ways: decay, moving average and its overwriting, clipping."""
    model = small_model()
    inner = getattr(keras.optimizers, name)(
        learning_rate=0.01, weight_decay=0.01, clipnorm=1.0, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=2
    )
    optimizer = LossScaleOptimizer(inner, DynamicLossScale(initial=8.0), skip=skip)
    step = step_function(model, optimizer, how)
    step(1.0)
    before = state_of(model, optimizer)
    for overflow in (np.inf, np.nan):
        step(overflow)
        assert same(before, state_of(model, optimizer))
    step(1.0)
    assert not same(before, state_of(model, optimizer))
    assert optimizer.counters()["skipped"] == 2
    assert optimizer.trajectory() == [(0, 8.0), (2, 4.0), (3, 2.0)]
    assert float(optimizer.loss_scale_value) == 2.0


@pytest.mark.parametrize("skip", ["branch", "gate"])
def test_overflow_step_changes_nothing_for_several_optimizers_in_one(skip):
    model = small_model()
    first, second = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.01, momentum=0.9)
    last = model.trainable_variables[-1]
    inner = keras.optimizers.MultiOptimizer(lambda variable: second if variable is last else first)
    optimizer = LossScaleOptimizer(inner, DynamicLossScale(initial=8.0), skip=skip)
    step = step_function(model, optimizer, "xla")
    step(1.0)
    before = state_of(model, optimizer)
    step(np.inf)
    assert same(before, state_of(model, optimizer))


@functools.cache
def trained_with(loss_scale, how):
    """The weights after five steps."""
    model = small_model()
    step = step_function(model, LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), loss_scale), how)
    for _ in range(5):
        step(1.0)
    return [variable.numpy() for variable in model.variables]


@pytest.mark.parametrize("scale", [1.0, 128.0, 3.0, 2.0**24])
@pytest.mark.parametrize("how", HOW)
def test_scaled_training_equals_unscaled_training(scale, how):
    """In float32 a scale cancels out: exactly for powers of two, to rounding otherwise."""
    plain, scaled = trained_with(NoLossScale(), how), trained_with(StaticLossScale(scale), how)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(a, b, rtol=0 if np.log2(scale) % 1 == 0 else 1e-5, atol=1e-7)


def test_without_skipping_an_overflow_reaches_the_weights_and_is_counted():
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), StaticLossScale(8.0, skip_nonfinite=False))
    step_function(model, optimizer, "xla")(np.inf)
    assert not np.isfinite(model.trainable_variables[0].numpy()).all()
    assert optimizer.counters()["overflow"] == 1
    assert optimizer.counters()["skipped"] == 0


def test_unscale_returns_true_gradients_in_float32():
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), StaticLossScale(1024.0))
    dense = tf.constant([2.0**-24 * 512, 4.0], tf.float16)
    sparse = tf.IndexedSlices(tf.constant([[2048.0]]), tf.constant([3]), tf.constant([8, 1]))
    (a, none, b), finite = optimizer.unscale([dense, None, sparse])
    assert a.dtype == tf.float32
    np.testing.assert_array_equal(a, [2.0**-25, 4.0 / 1024])
    assert none is None
    np.testing.assert_array_equal(b.values, [[2.0]])
    assert bool(finite)


@pytest.mark.parametrize("where", ["dense", "sparse"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_bad_element_anywhere_is_an_overflow(where, value):
    values = np.ones((50, 2), np.float32)
    values[17, 1] = value
    bad = tf.constant(values)
    if where == "sparse":
        bad = tf.IndexedSlices(bad, tf.range(50), tf.constant([100, 2]))
    _, finite = LossScaleOptimizer(keras.optimizers.SGD(0.1)).unscale([tf.ones(3), bad, None])
    assert not bool(finite)


def test_embedding_gradients_are_scaled_and_skipped_like_others():
    model = keras.Sequential([keras.Input((2,), dtype="int32"), keras.layers.Embedding(10, 3), keras.layers.Dense(1)])
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.1), DynamicLossScale(initial=4.0))

    def step(factor):
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(tf.reduce_mean(model(tf.constant([[1, 2], [3, 1]])) ** 2)) * factor
        optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)

    step(1.0)
    before = state_of(model, optimizer)
    step(np.inf)
    assert same(before, state_of(model, optimizer))
    step(1.0)
    assert not same(before, state_of(model, optimizer))


def test_compile_does_not_wrap_it_again_and_fit_trains(mixed_float16):
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.Adam(0.01), StaticLossScale(128.0))
    model.compile(optimizer, "mse", jit_compile=True)
    assert model.optimizer is optimizer
    before = [v.numpy() for v in model.variables]
    model.fit(np.ones((20, 4), np.float32), np.zeros((20, 2), np.float32), batch_size=10, epochs=2, verbose=0)
    assert not same(before, [v.numpy() for v in model.variables])
    assert optimizer.counters()["attempted"] == optimizer.counters()["applied"] == 4
    assert float(optimizer.loss_scale_value) == 128.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LossScaleOptimizer("adam"), TypeError, "must be a Keras optimizer"),
        (lambda: LossScaleOptimizer(keras.optimizers.SGD(), 128), TypeError, "StaticLossScale"),
        (lambda: LossScaleOptimizer(keras.optimizers.SGD(loss_scale_factor=8.0)), ValueError, "unscaled twice"),
        (lambda: LossScaleOptimizer(LossScaleOptimizer(keras.optimizers.SGD())), ValueError, "already"),
        (
            lambda: LossScaleOptimizer(keras.optimizers.SGD()).apply([tf.ones(1)]),
            ValueError,
            "pass trainable_variables",
        ),
    ],
)
def test_wrong_use_is_refused_with_a_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()
