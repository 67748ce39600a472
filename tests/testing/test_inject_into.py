"""An overflow injected into `fit`: what scalers and bare optimizers do about it, and where the block ends."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpscale
from mpscale.testing import inject_overflow


def fitting(optimizer, **compile_arguments):
    """Return a model and a function that trains it for one step with a gradient for every weight."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")])
    model.compile(optimizer, "mse", **compile_arguments)

    def fit():
        model.fit(np.ones((4, 2)), np.full((4, 1), 9.0), batch_size=4, verbose=0)
        return [weight.copy() for weight in model.get_weights()]

    return model, fit


def same(weights, others):
    return all(np.array_equal(one, other) for one, other in zip(weights, others, strict=True))


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        pytest.param(
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=64.0),
            lambda optimizer: float(optimizer.dynamic_scale),
            id="Keras",
        ),
        pytest.param(
            lambda: mpscale.LossScaleOptimizer(
                keras.optimizers.SGD(1e-3), mpscale.DynamicLossScale(initial=64.0, maximum=64.0)
            ),
            lambda optimizer: float(optimizer.loss_scale_value),
            id="mpscale",
        ),
    ],
)
def test_a_loss_scale_optimizer_skips_the_step_in_fit_and_halves_its_scale(make, scale):
    optimizer = make()
    model, fit = fitting(optimizer)
    with inject_overflow(step=1, variable="dense/kernel").into(model):
        steps = [(fit(), scale(optimizer)) for _ in range(3)]
    assert [one for _, one in steps] == [64.0, 32.0, 32.0]
    assert same(steps[0][0], steps[1][0])
    assert not same(steps[1][0], steps[2][0])


@pytest.mark.parametrize("arguments", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_a_bare_optimizer_lets_the_overflow_into_the_weight(arguments):
    optimizer = keras.optimizers.SGD(1e-3)
    _, fit = fitting(optimizer, **arguments)
    with inject_overflow(step=1, variable="kernel").into(optimizer):
        before, after = fit(), fit()
    assert all(np.isfinite(weight).all() for weight in before)
    assert not np.isfinite(after[0][0]).any()
    assert np.isfinite(after[0][1:]).all() and np.isfinite(after[1]).all()


@pytest.mark.parametrize("by", ["model", "optimizer"])
def test_nothing_is_injected_before_or_after_the_block(by):
    optimizer = keras.optimizers.SGD(1e-3)
    model, fit = fitting(optimizer)
    inject = inject_overflow(step=[0, 2])
    for _ in range(2):
        fit()
    with inject_overflow(step=9).into(model):
        fit()
    with inject.into(model if by == "model" else optimizer):
        model.train_function = None if by == "optimizer" else model.train_function
        assert not np.isfinite(fit()[0]).all()
        model.set_weights([np.ones((2, 1)), np.ones(1)])
        fit()
    for _ in range(2):
        assert all(np.isfinite(weight).all() for weight in fit())
    assert inject.calls == 2
    assert "apply" not in vars(optimizer)


def test_a_function_traced_in_one_block_is_injected_into_in_the_next():
    optimizer = keras.optimizers.SGD(1e-3)
    _, fit = fitting(optimizer)
    inject = inject_overflow(step=1)
    with inject.into(optimizer):
        fit()
    fit()
    with inject.into(optimizer):
        assert not np.isfinite(fit()[0]).all()


def test_apply_works_as_usual_inside_the_block():
    optimizer, weight = keras.optimizers.SGD(1.0), keras.Variable(3.0, name="w")
    with inject_overflow(step=3, variable="w").into(optimizer):
        optimizer.apply([tf.constant(1.0)], [weight])
        optimizer.apply([tf.constant(1.0)])
        optimizer.apply_gradients(zip([tf.constant(1.0)], [weight], strict=True))
        assert float(weight) == 0.0
        optimizer.apply([tf.constant(1.0)])
    assert math.isinf(float(weight))


def test_optimizer_is_restored_if_training_fails():
    optimizer, inject = keras.optimizers.SGD(), inject_overflow(0)
    with pytest.raises(ZeroDivisionError), inject.into(optimizer):
        raise ZeroDivisionError
    assert "apply" not in vars(optimizer)
    assert not inject._inside


def block(target, inside=lambda: None):
    with inject_overflow(0).into(target):
        inside()


def apply_a_step_that_was_judged():
    optimizer, weight = mpscale.LossScaleOptimizer(keras.optimizers.SGD()), keras.Variable(1.0)
    optimizer.build([weight])
    block(optimizer, lambda: optimizer.apply([tf.constant(1.0)], [weight], finite=tf.constant(True)))


def fit_what_was_traced_before():
    optimizer = keras.optimizers.SGD()
    _, fit = fitting(optimizer)
    fit()
    block(optimizer, fit)


def nest():
    inject, optimizer = inject_overflow(0), keras.optimizers.SGD()
    with inject.into(optimizer), inject.into(optimizer):
        pass


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (apply_a_step_that_was_judged, ValueError, "call the injector on the gradients before unscale"),
        (fit_what_was_traced_before, RuntimeError, "set model.train_function = None"),
        (nest, RuntimeError, "make another with inject_overflow"),
        (lambda: block(keras.optimizers.Adam()), RuntimeError, "no gradients were passed to the apply of Adam"),
        (lambda: tf.function(lambda: block(keras.optimizers.SGD()))(), RuntimeError, "is inside a tf.function"),
        (lambda: block("sgd"), TypeError, "takes a compiled Keras model or a Keras optimizer, not 'sgd'"),
        (lambda: block(keras.Sequential(name="m")), ValueError, "the model 'm' has no optimizer; compile it"),
    ],
)
def test_wrong_use_of_a_block_is_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()
