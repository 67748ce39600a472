"""Gradients are divided by the loss scale once."""

import keras
import pytest
import tensorflow as tf
from support.small_step import small_model

from mpscale.scaling import LossScaleOptimizer, NoLossScale, StaticLossScale


def clipped(grads):
    return [tf.clip_by_value(grad, -1.0, 1.0) for grad in grads]


def unscale_twice(optimizer, grads, variables):
    grads, _ = optimizer.unscale(grads)
    optimizer.unscale(grads)


def forget_finite(optimizer, grads, variables):
    grads, _ = optimizer.unscale(grads)
    optimizer.apply(grads, variables)


def clip_and_forget_finite(optimizer, grads, variables):
    grads, _ = optimizer.unscale(grads)
    optimizer.apply(clipped(grads), variables)


def as_intended(optimizer, grads, variables):
    true, finite = optimizer.unscale(grads)
    optimizer.apply(clipped(true), variables, finite=finite)


def only_look(optimizer, grads, variables):
    true, _ = optimizer.unscale(grads)
    tf.linalg.global_norm(true)
    optimizer.apply(grads, variables)


def several_micro_batches(optimizer, grads, variables):
    true, finite = optimizer.unscale(grads)
    more, finite_too = optimizer.unscale([grad + 1 for grad in grads])
    total = [a + b for a, b in zip(true, more, strict=True)]
    optimizer.apply(total, variables, finite=finite & finite_too)


def run(how, optimizer, use):
    model = small_model()
    variables = model.trainable_variables
    optimizer.build(variables)
    before = [v.numpy() for v in variables]

    def step():
        use(optimizer, [tf.fill(v.shape, 8.0) for v in variables], variables)

    for _ in range(2):
        step() if how == "eager" else tf.function(step)()
    return [a - v.numpy() for a, v in zip(before, variables, strict=True)]


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (unscale_twice, "unscaled already"),
        (forget_finite, "unscaled already"),
        (clip_and_forget_finite, "got other gradients and no finite"),
    ],
)
def test_second_division_is_refused(how, use, message):
    with pytest.raises(ValueError, match=message):
        run(how, LossScaleOptimizer(keras.optimizers.SGD(1.0), StaticLossScale(16.0)), use)


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize(("use", "step"), [(as_intended, 0.5), (only_look, 0.5), (several_micro_batches, 0.5 + 9 / 16)])
def test_right_use_divides_once(how, use, step):
    changes = run(how, LossScaleOptimizer(keras.optimizers.SGD(1.0), StaticLossScale(16.0)), use)
    for change in changes:
        assert change == pytest.approx(2 * step, abs=1e-6)


def test_without_a_scale_there_is_nothing_to_guard():
    run("eager", LossScaleOptimizer(keras.optimizers.SGD(0.1), NoLossScale()), forget_finite_without_harm)


def forget_finite_without_harm(optimizer, grads, variables):
    grads, _ = optimizer.unscale(grads)
    optimizer.apply(grads, variables)
