"""Gradient accumulation: one decision per window of micro-batches."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import HOW, same, small_model, state_of, step_function

from mpscale.scaling import DynamicLossScale, LogMaxLossScale, LossScaleOptimizer, StaticLossScale

WINDOW = 3


def accumulating(inner=keras.optimizers.Adam, **options):
    return inner(0.01, gradient_accumulation_steps=WINDOW, **options)


@pytest.mark.parametrize("how", HOW)
def test_without_overflow_it_trains_as_keras_does(how):
    """Except for EMA, which Keras updates with every micro-batch."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
    keras_model, our_model = small_model(), small_model()
    optimizers = [
        keras.optimizers.AdamW(schedule, gradient_accumulation_steps=WINDOW, clipnorm=0.5, weight_decay=0.1)
        for _ in range(2)
    ]
    keras_step = step_function(keras_model, optimizers[0], how)
    our_step = step_function(our_model, LossScaleOptimizer(optimizers[1], StaticLossScale(16.0)), how)
    for i in range(3 * WINDOW + 1):
        keras_step(data=i / 10)
        our_step(data=i / 10)
        assert int(optimizers[0].iterations) == int(optimizers[1].iterations)
    # Two XLA programs round differently.
    for a, b in zip(keras_model.variables, our_model.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_one_bad_micro_batch_costs_its_window_and_nothing_else(how):
    """At each place of a window, and in each way; all with one program, which takes long to compile."""
    model = small_model()
    optimizer = LossScaleOptimizer(
        accumulating(use_ema=True, weight_decay=0.01), DynamicLossScale(8.0, growth_interval=2)
    )
    step = step_function(model, optimizer, how)
    for _ in range(WINDOW):
        step()
    expected = [(0, 8.0)]
    for number, (bad, place) in enumerate(itertools.product([np.inf, np.nan], range(WINDOW))):
        before = state_of(model, optimizer)
        for i in range(WINDOW):
            step(bad if i == place else 1.0)
        assert same(before, state_of(model, optimizer)), (bad, place)
        assert float(optimizer.loss_scale_value) == 4.0
        for _ in range(2 * WINDOW):
            step()
        assert not same(before, state_of(model, optimizer))
        assert all(np.isfinite(value).all() for value in state_of(model, optimizer))
        # Two good windows, not six good micro-batches, double the scale.
        expected += [(3 * number + 2, 4.0), (3 * number + 4, 8.0)]
    counters = optimizer.counters()
    assert [counters[name] for name in ("attempted", "applied", "overflow", "first_overflow")] == [19, 13, 6, 1]
    assert optimizer.trajectory() == expected


def test_window_continues_after_a_checkpoint(tmp_path):
    """A bad micro-batch before the checkpoint still costs the window that ends after it."""
    model = small_model()
    optimizer = LossScaleOptimizer(accumulating(), DynamicLossScale(8.0))
    step = step_function(model, optimizer, "graph")
    before = [v.numpy() for v in model.variables]
    step(np.inf)
    path = tf.train.Checkpoint(model=model, optimizer=optimizer).save(tmp_path / "window")

    model = small_model()
    optimizer = LossScaleOptimizer(accumulating(), DynamicLossScale(8.0))
    optimizer.build(model.trainable_variables)
    tf.train.Checkpoint(model=model, optimizer=optimizer).restore(path).assert_consumed()
    step = step_function(model, optimizer, "graph")
    step()
    step()
    assert same(before, [v.numpy() for v in model.variables])
    assert optimizer.counters()["overflow"] == 1


def test_statistics_use_the_largest_gradient_of_the_window():
    """After one window, and so one sample, the scale is 2**16 over that sample."""
    model = small_model()
    optimizer = LossScaleOptimizer(accumulating(keras.optimizers.SGD), LogMaxLossScale())
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function(jit_compile=True)
    def step(largest):
        # One element of that size, times the scale as if it came from a scaled loss.
        grads = [tf.ones(v.shape) * largest * optimizer.loss_scale_value for v in variables]
        optimizer.apply(grads, variables)

    for windows in ([16.0, 64.0, 4.0], [64.0, 4.0, 16.0]):
        for largest in windows:
            step(tf.constant(largest))
        assert float(optimizer.loss_scale_value) == pytest.approx(2.0**16 / 64, rel=1e-4)


def test_windows_inside_several_optimizers_are_refused():
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    model, inner = small_model(), accumulating()
    optimizer = LossScaleOptimizer(keras.optimizers.MultiOptimizer(lambda variable: inner))
    with pytest.raises(ValueError, match="inside a MultiOptimizer has gradient_accumulation_steps"):
        optimizer.build(model.trainable_variables)
