"""Variables that get a new value instead of a gradient, such as the scales of float8 layers."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import HOW, compiled

from mpscale.scaling import DynamicLossScale, LogMaxLossScale, LossScaleOptimizer, StaticLossScale

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype(np.float32)
Y = (X.sum(1) > 0).astype(np.float32)


def trained(optimizer, jit):
    """Return all variables of a model with two float8 layers after eight steps."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.EinsumDense("ab,bc->ac", 4, bias_axes="c"),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    for layer in model.layers[:2]:
        layer.quantize("float8")
    model.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=jit)
    model.fit(X, Y, batch_size=20, epochs=4, shuffle=False, verbose=0)
    assert sum(variable.overwrite_with_gradient for variable in model.trainable_variables) == 12
    return [variable.numpy() for variable in model.trainable_variables]


INNER = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "AdamW that accumulates and clips": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, global_clipnorm=0.1, gradient_accumulation_steps=2
    ),
}


@functools.cache
def trained_by_keras(inner, scale, jit):
    return trained(keras.optimizers.LossScaleOptimizer(INNER[inner](), initial_scale=scale), jit)


# tests/situations/test_float8.py compiles training in float8 by XLA.
@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("inner", "loss_scale", "options", "overflows"),
    [
        ("Adam", DynamicLossScale(2.0**22), {"skip": "gate", "blame": True}, None),
        pytest.param("AdamW that accumulates and clips", StaticLossScale(2.0**15), {}, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_float8_layers_train_as_with_keras_optimizer(mixed_float16, inner, loss_scale, options, overflows, jit):
    optimizer = LossScaleOptimizer(INNER[inner](), loss_scale, **options)
    ours = trained(optimizer, jit)
    scale = loss_scale.initial_state()["scale"]
    for a, b in zip(ours, trained_by_keras(inner, scale, jit), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    counted = optimizer.counters()["overflow"]
    assert counted == overflows if overflows is not None else 0 < counted < 8


def kernel_and_state(state=0.0):
    """Return a variable that is trained and one that is overwritten."""
    kernel, new = keras.Variable(np.ones(2, np.float32)), keras.Variable(np.float32(state))
    new.overwrite_with_gradient = True
    return kernel, new


def stepper(optimizer, variables, how):
    """Return ``step(gradient, new)``: one step with a true gradient and a new value."""

    def step(gradient, new):
        optimizer.apply([gradient * optimizer.loss_scale_value, new], variables)

    function = compiled(step, how)
    return lambda gradient, new: function(tf.constant(gradient, tf.float32), tf.constant(new, tf.float32))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("skip", ["branch", "gate"])
@pytest.mark.parametrize("loss_scale", [DynamicLossScale(8.0), StaticLossScale(0.5), LogMaxLossScale()], ids=str)
def test_new_value_is_assigned_unchanged_and_is_no_overflow(how, skip, loss_scale):
    """Not even an infinity, such as the start of a running minimum; and the largest gradient ignores it."""
    kernel, state = variables = kernel_and_state()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), loss_scale, skip=skip, blame=True)
    optimizer.build(variables)
    step = stepper(optimizer, variables, how)
    for new in (7.0, -3e38, np.inf):
        step([1.0, 0.0], new)
        assert state.numpy() == np.float32(new)
    np.testing.assert_array_equal(kernel, [-0.5, 1.0])
    assert optimizer.counters()["overflow"] == 0
    assert optimizer.counters()["by_variable"] == {}
    if isinstance(loss_scale, LogMaxLossScale):
        assert float(optimizer.loss_scale_value) == 2.0**14  # Its maximum, because the largest gradient was 1.


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("skip", ["branch", "gate"])
def test_skipped_step_takes_no_new_value(how, skip):
    """As in Keras: the values of an overflow step say nothing about those at a lower scale."""
    kernel, state = variables = kernel_and_state(5.0)
    optimizer = LossScaleOptimizer(
        keras.optimizers.SGD(0.5, use_ema=True), DynamicLossScale(8.0), skip=skip, blame=True
    )
    optimizer.build(variables)
    step = stepper(optimizer, variables, how)
    step([np.inf, 0.0], 7.0)
    assert state.numpy() == 5.0
    np.testing.assert_array_equal(kernel, [1.0, 1.0])
    assert float(optimizer.loss_scale_value) == 4.0
    assert list(optimizer.counters()["by_variable"].values()) == [1]
    step([1.0, 0.0], 7.0)
    assert state.numpy() == 7.0


@pytest.mark.parametrize("how", HOW)
def test_window_takes_the_largest_new_value(how):
    """As in Keras, except that the largest of a window may be below 0. A bad window takes none."""
    kernel, state = variables = kernel_and_state(5.0)
    inner = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    optimizer = LossScaleOptimizer(inner, DynamicLossScale(8.0))
    optimizer.build(variables)
    step = stepper(optimizer, variables, how)
    for bad, first, second, expected in (
        (1.0, 3.0, 2.0, 3.0),
        (np.inf, 9.0, 9.0, 3.0),
        (1.0, -3.0, -4.0, -3.0),
        (1.0, 1.0, 6.0, 6.0),
    ):
        before = state.numpy()
        step([bad, 0.0], first)
        assert state.numpy() == before
        step([1.0, 0.0], second)
        assert state.numpy() == expected
    np.testing.assert_array_equal(kernel, [1 - 3 * 0.5, 1.0])


def test_strategy_takes_the_new_value():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        layer = keras.layers.Layer()
        kernel = layer.add_weight(shape=(2,), initializer="ones")
        state = layer.add_weight(shape=(), initializer="zeros", overwrite_with_gradient=True)
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.5), DynamicLossScale(8.0))
        optimizer.build([kernel, state])

    def step(gradient):
        grads = [tf.stack([gradient, 0.0]) * optimizer.loss_scale_value, tf.constant(7.0)]
        optimizer.apply(grads, [kernel, state])

    run = tf.function(lambda gradient: strategy.run(step, (gradient,)), autograph=False)
    run(tf.constant(np.inf))
    assert state.numpy() == 0.0
    run(tf.constant(1.0))
    assert state.numpy() == 7.0
    np.testing.assert_array_equal(kernel, [0.5, 1.0])


def only_gradients(change, grads, variables):
    """Return ``grads`` with ``change`` applied to those that are gradients."""
    changed = iter(change([g for g, v in zip(grads, variables, strict=True) if not v.overwrite_with_gradient]))
    return [g if v.overwrite_with_gradient else next(changed) for g, v in zip(grads, variables, strict=True)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("turned", "named"), [(False, False), (False, True), (True, True)], ids=["as built", "named", "other order, named"]
)
def test_clipping_in_a_custom_loop_leaves_new_values_alone(how, turned, named):
    """(3, 4) clipped to a norm of 1 is (0.6, 0.8); with the new value, the norm would be 50."""
    kernel, state = built = kernel_and_state()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), StaticLossScale(8.0))
    optimizer.build(built)
    variables = built[::-1] if turned else built

    def step():
        grads = [tf.constant([24.0, 32.0]), tf.constant(50.0)]
        grads, finite = optimizer.unscale(grads[::-1] if turned else grads, variables if named else None)
        grads = only_gradients(lambda true: tf.clip_by_global_norm(true, 1.0)[0], grads, variables)
        optimizer.apply(grads, variables, finite=finite)

    compiled(step, how)()
    np.testing.assert_allclose(kernel, [0.4, 0.2], rtol=1e-6)
    assert state.numpy() == 50.0


CHANGES = {
    "clipped by the norm of all": lambda grads: tf.clip_by_global_norm(grads, 1.0)[0],
    "clipped by value": lambda grads: [tf.clip_by_value(grad, -1.0, 1.0) for grad in grads],
    "added up": lambda grads: [grad + grad for grad in grads],
    "in another order": lambda grads: grads[::-1],
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_new_values_that_were_treated_like_gradients_are_refused(how, change):
    kernel, state = variables = kernel_and_state()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), StaticLossScale(8.0))
    optimizer.build(variables)

    def step():
        grads, finite = optimizer.unscale([tf.constant([24.0, 32.0]), tf.constant(50.0)])
        optimizer.apply(change(grads), variables, finite=finite)

    with pytest.raises(ValueError, match=r"not what unscale returned for it[^$]*global_clipnorm"):
        compiled(step, how)()
    assert state.numpy() == 0.0
    np.testing.assert_array_equal(kernel, [1.0, 1.0])


def test_gradients_that_cannot_be_told_from_new_values_are_refused():
    kernel, state = kernel_and_state()
    grads = [tf.constant(50.0), tf.constant([24.0, 32.0])]
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), StaticLossScale(8.0))
    optimizer.build([kernel, state])
    with pytest.raises(ValueError, match=r"1 gradients came for 2 variables[^$]*unscale\(grads, variables\)"):
        optimizer.unscale(grads[1:])
    # Taken to be in the order of build, and detected when the variables arrive.
    grads, finite = optimizer.unscale(grads)
    with pytest.raises(ValueError, match=r"unscale\(grads, variables\) with the variables of apply"):
        optimizer.apply(grads, [state, kernel], finite=finite)
