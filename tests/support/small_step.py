"""The small model and step that the tests of LossScaleOptimizer share."""

import keras
import numpy as np
import tensorflow as tf

COMPILED = {"eager": None, "graph": False, "xla": True}
X = np.arange(20, dtype=np.float32).reshape(5, 4) / 20


def small_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])


def step_function(model, optimizer, how):
    """``step(factor)``: one step whose gradients are multiplied by ``factor``, on data that depend on ``data``."""

    def step(factor, data):
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(tf.reduce_mean(model(tf.constant(X) + data) ** 2))
        grads = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply([g * factor for g in grads], model.trainable_variables)

    compiled = COMPILED[how]
    function = step if compiled is None else tf.function(step, jit_compile=compiled)
    return lambda factor=1.0, data=0.0: function(tf.constant(factor, tf.float32), tf.constant(data, tf.float32))


def state_of(model, optimizer):
    """Every value that a skipped step has to leave alone."""
    return [v.numpy() for v in (*model.variables, *optimizer.inner_optimizer.variables)]


def same(before, after):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True))
