"""One train step with one kind of loss scaling, timed on request.

    python scaling_contestant.py MODEL SCALING on|off

It compiles with or without XLA and then answers lines of JSON: interleave.Contestant speaks to it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from mpscale.scaling import DynamicLossScale, LogMaxLossScale, LossScaleOptimizer, StaticLossScale

BATCH = 64
SCALINGS: dict[str, Callable[[keras.Optimizer], keras.Optimizer]] = {
    "unscaled": lambda inner: inner,
    "keras": keras.optimizers.LossScaleOptimizer,
    "static": lambda inner: LossScaleOptimizer(inner, StaticLossScale(1024.0)),
    "dynamic": lambda inner: LossScaleOptimizer(inner, DynamicLossScale()),
    "branch": lambda inner: LossScaleOptimizer(inner, DynamicLossScale(), skip="branch"),
    "gate": lambda inner: LossScaleOptimizer(inner, DynamicLossScale(), skip="gate"),
    "blame": lambda inner: LossScaleOptimizer(inner, DynamicLossScale(), blame=True),
    "logmax": lambda inner: LossScaleOptimizer(inner, LogMaxLossScale()),
}


def wide() -> keras.Model:
    """1.9 million parameters in 6 variables."""
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((784,)), dense(1024, "relu"), dense(1024, "relu"), dense(10, dtype="float32")])


def deep() -> keras.Model:
    """60 small layers, 182 variables."""
    layers = [keras.Input((64,))]
    for i in range(60):
        layers.append(keras.layers.Dense(64, "relu"))
        if i % 2:
            layers.append(keras.layers.LayerNormalization())
    return keras.Sequential([*layers, keras.layers.Dense(10, dtype="float32")])


def cnn() -> keras.Model:
    """Three convolutions, which spend nearly all time in the forward and backward pass."""
    convolution = keras.layers.Conv2D
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            convolution(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            convolution(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            convolution(32, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


MODELS = {"wide": wide, "deep": deep, "cnn": cnn}


class Contestant:
    """A compiled step, and a factor that can make its loss infinite."""

    def __init__(self, model: str, scaling: str, jit: bool) -> None:
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy("mixed_float16")
        self._model = MODELS[model]()
        self._inner = keras.optimizers.Adam(1e-4)
        self._optimizer = SCALINGS[scaling](self._inner)
        self._optimizer.build(self._model.trainable_variables)
        random = np.random.default_rng(0)
        self._x = tf.constant(random.normal(size=(BATCH, *self._model.input_shape[1:])).astype(np.float32))
        self._y = tf.constant(random.integers(0, 10, BATCH))
        self._factor = tf.Variable(1.0)
        self._step = tf.function(self._train, jit_compile=jit, autograph=False)
        start = time.perf_counter()
        self._step().numpy()
        self.compile_s = time.perf_counter() - start

    def block(self, steps: int) -> float:
        """Return the seconds per step, without the first step, which wakes the process up."""
        self._step().numpy()
        start = time.perf_counter()
        for _ in range(steps):
            loss = self._step()
        loss.numpy()
        return (time.perf_counter() - start) / steps

    def overflow_changes_nothing(self) -> bool:
        """Return whether an infinite loss changes no bit of the weights and the optimizer."""
        before = self._state()
        self._factor.assign(float("inf"))
        self._step().numpy()
        self._factor.assign(1.0)
        return before == self._state()

    def _state(self) -> list[bytes]:
        return [variable.numpy().tobytes() for variable in (*self._model.variables, *self._inner.variables)]

    def _train(self) -> tf.Tensor:
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            outputs = self._model(self._x, training=True)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(self._y, outputs, from_logits=True))
            scaled = self._optimizer.scale_loss(loss) * self._factor
        self._optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss


def main() -> None:
    model, scaling, jit = sys.argv[1:]
    contestant = Contestant(model, scaling, jit == "on")
    contestant.block(20)
    print(json.dumps({"compile_s": contestant.compile_s}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "end" in question:
            answer = {"exact": contestant.overflow_changes_nothing()}
        else:
            answer = {"step_s": contestant.block(question["steps"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
