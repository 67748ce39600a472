"""Errors of Keras 3.15's LossScaleOptimizer, shown on it, and corrected here.

Two more are in test_replicas.py, because they need two replicas: an overflow on the second one, and jit_compile.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import X, same, small_model, step_function

from mpscale.scaling import DynamicLossScale, LossScaleOptimizer, StaticLossScale
from mpscale.testing import inject_overflow

KerasOptimizer = keras.optimizers.LossScaleOptimizer
GOOD, BAD = 1.0, np.inf


def sgd(**options):
    return keras.optimizers.SGD(0.1, **options)


def run(optimizer, factors):
    """Return whether the weights are finite after steps with these factors, and whether each step changed them."""
    model = small_model()
    optimizer.build(model.trainable_variables)
    step = step_function(model, optimizer, "graph")
    changed = []
    for factor in factors:
        before = [v.numpy() for v in model.variables]
        step(factor)
        changed.append(not same(before, [v.numpy() for v in model.variables]))
    return all(np.isfinite(v.numpy()).all() for v in model.variables), changed


def test_static_scale_is_possible():
    with pytest.raises(ValueError, match="no longer supports"):
        KerasOptimizer(sgd(), dynamic=False)
    _, changed = run(LossScaleOptimizer(sgd(), StaticLossScale(128.0)), [GOOD, BAD, GOOD])
    assert changed == [True, False, True]


def test_static_scale_survives_compile_under_mixed_float16(mixed_float16):
    keras_model, our_model = small_model(), small_model()
    keras_model.compile(sgd(loss_scale_factor=128.0), "mse")
    our_model.compile(LossScaleOptimizer(sgd(), StaticLossScale(128.0)), "mse")
    assert isinstance(keras_model.optimizer, KerasOptimizer)
    assert keras_model.optimizer.inner_optimizer.loss_scale_factor is None
    assert our_model.optimizer.loss_scale == StaticLossScale(128.0)


def test_scale_has_a_floor():
    """200 overflows take Keras' scale to zero, and the next good step divides by it."""
    factors = [BAD] * 200 + [GOOD]
    theirs = KerasOptimizer(sgd())
    finite, _ = run(theirs, factors)
    assert not finite and float(theirs.dynamic_scale) == 0.0
    ours = LossScaleOptimizer(sgd())
    finite, changed = run(ours, factors)
    assert finite and changed[-1] and float(ours.loss_scale_value) == 1.0


def test_scale_has_a_cap():
    """If it grows with every step, Keras' scale becomes infinite, and so does every gradient."""
    theirs = KerasOptimizer(sgd(), dynamic_growth_steps=1)
    run(theirs, [GOOD] * 130)
    assert float(theirs.dynamic_scale) == np.inf
    ours = LossScaleOptimizer(sgd(), DynamicLossScale(growth_interval=1, maximum=2.0**126))
    _, changed = run(ours, [GOOD] * 130)
    assert changed[-1] and float(ours.loss_scale_value) == 2.0**126


def test_scale_whose_reciprocal_flushes_to_zero_is_refused():
    reciprocal = tf.function(lambda scale: 1.0 / scale, jit_compile=True)
    assert float(reciprocal(tf.constant(2.0**127))) == 0.0 < float(reciprocal(tf.constant(2.0**126)))
    KerasOptimizer(sgd(), initial_scale=2.0**127)
    for make in (lambda: StaticLossScale(2.0**127), lambda: DynamicLossScale(maximum=2.0**127)):
        with pytest.raises(ValueError, match="flushes to zero"):
            make()


def test_growth_counts_windows_of_accumulated_gradients_and_not_micro_batches():
    theirs = KerasOptimizer(sgd(gradient_accumulation_steps=4), initial_scale=8.0, dynamic_growth_steps=2)
    run(theirs, [GOOD] * 4)
    assert float(theirs.dynamic_scale) == 32.0
    ours = LossScaleOptimizer(sgd(gradient_accumulation_steps=4), DynamicLossScale(8.0, growth_interval=2))
    run(ours, [GOOD] * 4)
    assert float(ours.loss_scale_value) == 8.0


def test_window_with_an_overflow_is_skipped_as_a_whole():
    """Keras drops the micro-batch and completes the window with the first one of the next window."""
    factors = [GOOD, BAD, GOOD, GOOD]
    _, changed = run(KerasOptimizer(sgd(gradient_accumulation_steps=2)), factors)
    assert changed == [False, False, True, False]
    _, changed = run(LossScaleOptimizer(sgd(gradient_accumulation_steps=2)), factors)
    assert changed == [False, False, False, True]


def clipped_step(optimizer, clip):
    """One step whose gradient is infinite, clipped to at most 1; whether it changed the weights."""
    model = small_model()
    variables = model.trainable_variables
    optimizer.build(variables)
    with tf.GradientTape() as tape:
        scaled = optimizer.scale_loss(tf.reduce_mean(model(tf.constant(X)) ** 2))
    grads = inject_overflow(step=0)(tape.gradient(scaled, variables))
    before = [v.numpy() for v in variables]
    clip(optimizer, grads, variables)
    return not same(before, [v.numpy() for v in variables])


def clip_by_value(grads):
    return [tf.clip_by_value(grad, -1.0, 1.0) for grad in grads]


def test_clipping_does_not_hide_an_overflow():
    """Keras has no way to the true gradients: what is clipped is scaled, and an infinity becomes a 1."""
    assert not hasattr(KerasOptimizer(sgd()), "unscale")
    assert clipped_step(KerasOptimizer(sgd()), lambda o, grads, v: o.apply(clip_by_value(grads), v))

    def unscale_clip_apply(optimizer, grads, variables):
        grads, finite = optimizer.unscale(grads)
        optimizer.apply(clip_by_value(grads), variables, finite=finite)

    assert not clipped_step(LossScaleOptimizer(sgd()), unscale_clip_apply)


def test_weights_of_the_optimizer_can_be_set_as_a_whole():
    """Keras' variables are those of both optimizers, but its set_weights stops after the first few."""

    def after_setting(make):
        source, target = make(), make()
        run(source, [GOOD] * 3)
        target.build(small_model().trainable_variables)
        target.set_weights([v.numpy() for v in source.variables])
        return int(target.iterations)

    assert after_setting(lambda: KerasOptimizer(sgd())) == 0
    assert after_setting(lambda: LossScaleOptimizer(sgd())) == 3
