"""The compiled train step, taken one by one with a log of what it did, or in blocks to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.training.scalers import StepScaler

UNKNOWN = -1.0
"""Stands in the log for a value that the mode does not have."""

MOST_UNREAD = 1024
"""Steps after which the log should be read: until then each keeps some of the device's memory."""


class TrainStep:
    """One batch, one update, without arguments and without a synchronisation.

    Data, labels and their order lie on the device. The step finds its batch by a counter that lies there too, and
    returns loss, loss scale and overflow, in so far as the mode has them, as tensors that stay there until
    :meth:`read_log` fetches those of many steps.

    Not in a variable: a scatter into its rows is slow under XLA, and without XLA TensorFlow optimises a function less
    that returns nothing. Both could be seen in the step time of the smallest workload.

    Args:
        model: a built Keras model.
        scaler: the mode's scaling, not built yet.
        loss: ``(labels, outputs) -> scalar``; what the model itself adds to it is added here.
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
        self._unread: list[tuple[tf.Tensor, ...]] = []
        self._columns: list[int] = []  # those of the log that the mode knows
        self.added_losses = 0
        """How many losses the model adds by itself, known once the step has been traced."""

        # Small functions: with every call TensorFlow's detector of retracing looks the Python function's code up twice,
        # which takes 2 us more for the code of a whole step than for theirs.
        def step() -> tuple[tf.Tensor, ...]:
            return self._step()

        def empty_step() -> tf.Tensor:
            return self._empty_step()

        self._function = tf.function(step, input_signature=[], jit_compile=jit)
        self._empty_function = tf.function(empty_step, input_signature=[], jit_compile=jit)

    def trace(self) -> float:
        """Traces the step into a graph; the seconds that took."""
        start = time.perf_counter()
        self._function.get_concrete_function()
        return time.perf_counter() - start

    @property
    def graph(self) -> Any:
        """The graph it is traced into."""
        return self._function.get_concrete_function().graph

    def __call__(self) -> None:
        """Takes one step. Returns when it is enqueued, which on a GPU is before it is done."""
        self._unread.append(self._function())

    def empty(self) -> None:
        """Calls a function that is handed the same variables and tensors and does no work: what dispatch costs."""
        self._empty_function()

    def block(self, steps: int) -> None:
        """Takes ``steps`` steps, at least one, that are not in the log; returns when the device is done with them.

        As a loop written by hand: what a step returned is gone when the next has, and the last one's is waited for.
        """
        for _ in range(steps):
            last = self._function()
        # On a GPU a copy to the host waits for all that was put on the stream before it, so for the whole last step.
        last[0].numpy()

    def synchronise(self) -> None:
        """Waits until the device has done all steps."""
        self._position.numpy()

    def overflow_steps(self) -> int | None:
        """Waits for the device; steps with a non-finite gradient so far, None where the mode does not know."""
        return self._scaler.overflow_steps(int(self._position.numpy()))

    def read_log(self) -> npt.NDArray[np.float32]:
        """Waits for the device; loss, loss scale and overflow (steps, 3) of the steps since the last call.

        UNKNOWN stands where the mode has no loss scale, or nobody looks for overflow.
        """
        log = np.full((len(self._unread), 3), UNKNOWN, np.float32)
        if self._unread:
            # One copy from the device for each column, whatever the number of steps.
            for column, values in zip(self._columns, zip(*self._unread, strict=True), strict=True):
                log[:, column] = tf.stack(values).numpy()
        self._unread.clear()
        return log

    def _step(self) -> tuple[tf.Tensor, ...]:
        # tf.gather and not order[position]: indexing with a Python-sliced tensor recompiles at every step.
        batch = tf.gather(self._order, self._position % self._order.shape[0])
        self._position.assign_add(1)
        x, y = tf.gather(self._x, batch), tf.gather(self._y, batch)
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.cast(self._loss(y, self._model(x, training=True)), tf.float32)
            # What the model asks for by itself, regularizers and add_loss, is a part of the loss, as in Keras' fit.
            added = [tf.reduce_sum(tf.cast(more, tf.float32)) for more in self._model.losses]
            self.added_losses = len(added)
            loss = tf.add_n([loss, *added]) if added else loss
            scaled = self._scaler.scale_loss(loss)
        grads = tape.gradient(scaled, variables)
        row = (loss, *self._scaler.apply(grads, variables, scaled))
        self._columns = [column for column, value in enumerate(row) if value is not None]
        # Not as one tensor: XLA made it in one kernel with the loss, and a convolution's step took 4 to 9 % longer.
        return tuple(row[column] for column in self._columns)

    def _empty_step(self) -> tf.Tensor:
        for variable in (*self._model.variables, *self._scaler.optimizer.variables):
            variable.value.read_value()
        for tensor in (self._x, self._y, self._order):
            tf.identity(tensor)
        self._position.assign_add(0)
        return tf.zeros(3)
