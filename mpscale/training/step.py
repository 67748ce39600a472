"""The compiled train step and the log it keeps on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.training.scalers import StepScaler

LOG_CAPACITY = 1024
"""Steps that the log holds; it has to be read before it wraps around."""


class TrainStep:
    """One batch, one update, without arguments and without a synchronisation.

    Data, labels and their order lie on the device. The step finds its batch by a counter that lies there too, and
    leaves loss, loss scale and overflow in a ring buffer that :meth:`read_log` fetches a block at a time.

    Args:
        model: a built Keras model.
        scaler: the mode's scaling, not built yet.
        loss: ``(labels, outputs) -> scalar``.
        x: examples (examples, ...).
        y: labels (examples, ...).
        order: indices into them, int64 (steps, batch); after the last row the first comes again.
        jit: compile with XLA.
    """

    def __init__(
        self,
        model: keras.Model,
        scaler: StepScaler,
        loss: Callable[[Any, Any], Any],
        x: npt.NDArray[Any],
        y: npt.NDArray[Any],
        order: npt.NDArray[np.int64],
        jit: bool,
    ) -> None:
        self._model, self._scaler, self._loss = model, scaler, loss
        scaler.build(model.trainable_variables)
        # int64 throughout: TensorFlow keeps int32 tensors of a GPU program in host memory.
        self._x, self._y = tf.constant(x), tf.constant(y)
        self._order = tf.constant(order)
        self._position = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._log = tf.Variable(tf.zeros((LOG_CAPACITY, 3)), trainable=False)
        self._taken = 0
        self._unread = 0
        self._function = tf.function(self._step, input_signature=[], jit_compile=jit)
        self._empty_function = tf.function(self._empty_step, input_signature=[], jit_compile=jit)

    def trace(self) -> float:
        """Traces the step into a graph; the seconds that took."""
        start = time.perf_counter()
        self._function.get_concrete_function()
        return time.perf_counter() - start

    def __call__(self) -> None:
        """Takes one step. Returns when it is enqueued, which on a GPU is before it is done."""
        self._function()
        self._taken += 1
        self._unread += 1

    def empty(self) -> None:
        """Calls a function that is handed the same variables and tensors and does no work: what dispatch costs."""
        self._empty_function()

    def synchronise(self) -> None:
        """Waits until the device has done all steps."""
        self._position.numpy()

    def read_log(self) -> npt.NDArray[np.float32]:
        """Waits for the device; loss, loss scale and overflow (steps, 3) of the steps since the last call.

        Raises:
            RuntimeError: more than LOG_CAPACITY steps were taken since then, so that some were overwritten.
        """
        if self._unread > LOG_CAPACITY:
            raise RuntimeError(f"{self._unread} steps since the last look at a log that holds {LOG_CAPACITY}")
        log = self._log.numpy()
        rows = np.arange(self._taken - self._unread, self._taken) % LOG_CAPACITY
        self._unread = 0
        return np.asarray(log[rows])

    def _step(self) -> None:
        position = self._position.read_value()
        # tf.gather and not order[position]: indexing with a Python-sliced tensor recompiles at every step.
        batch = tf.gather(self._order, position % self._order.shape[0])
        x, y = tf.gather(self._x, batch), tf.gather(self._y, batch)
        scale = self._scaler.scale()
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.cast(self._loss(y, self._model(x, training=True)), tf.float32)
            scaled = self._scaler.scale_loss(loss)
        grads = tape.gradient(scaled, variables)
        overflow = self._scaler.apply(grads, variables, scaled)
        row = tf.stack([loss, tf.cast(scale, tf.float32), tf.cast(overflow, tf.float32)])
        self._log.scatter_nd_update([[position % LOG_CAPACITY]], row[tf.newaxis])
        self._position.assign_add(1)

    def _empty_step(self) -> None:
        for variable in (*self._model.variables, *self._scaler.optimizer.variables):
            variable.value.read_value()
        for tensor in (self._x, self._y, self._order, self._log):
            tf.identity(tensor)
        self._position.assign_add(0)
