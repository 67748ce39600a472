"""The small model, step and loop that the tests of LossScaleOptimizer share."""

import keras
import numpy as np
import tensorflow as tf

from mpscale.scaling import LossScaleOptimizer, StaticLossScale

HOW = ("eager", "graph", "xla")
X = np.arange(20, dtype=np.float32).reshape(5, 4) / 20


def small_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])


def compiled(function, how):
    return function if how == "eager" else tf.function(function, jit_compile=how == "xla")


def step_function(model, optimizer, how):
    """Return ``step(factor, data)``: one step on shifted data, with its gradients multiplied by ``factor``."""

    def step(factor, data):
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(tf.reduce_mean(model(tf.constant(X) + data) ** 2))
        grads = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply([g * factor for g in grads], model.trainable_variables)

    function = compiled(step, how)
    return lambda factor=1.0, data=0.0: function(tf.constant(factor, tf.float32), tf.constant(data, tf.float32))


def state_of(model, optimizer):
    """Return every value that a skipped step must not change."""
    return [v.numpy() for v in (*model.variables, *optimizer.inner_optimizer.variables)]


def same(before, after):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(before, after, strict=True))


class Loop:
    """A custom loop over three weights of two elements, whose gradients are all ``factor``; SGD with rate 1."""

    scale = 16.0

    def __init__(self, loss_scale=None, **options):
        self.variables = [keras.Variable([0.0, 0.0], name=name) for name in "abc"]
        loss_scale = loss_scale or StaticLossScale(self.scale)
        self.optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale, **options)

    def gradients(self, factor=1.0, variables=None, scaled=True):
        sources = [v.value for v in variables or self.variables]
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(v) for v in sources) * factor
            loss = self.optimizer.scale_loss(loss) if scaled else loss
        return tape.gradient(loss, sources)

    def constants(self):
        """Return gradients that look like scaled ones and come from nowhere."""
        return [tf.fill(v.shape, self.scale) for v in self.variables]

    def apply(self, grads, finite=None):
        self.optimizer.apply(grads, self.variables, finite=finite)

    def fall(self):
        """Return how far the weights fell, the same for all."""
        values = np.stack([v.numpy() for v in self.variables])
        assert np.unique(values).size == 1
        return -float(values[0, 0])


def clipped(grads):
    """Return new tensors with the same values, clipped at a limit out of reach."""
    return tf.clip_by_global_norm(grads, 1e3)[0]
