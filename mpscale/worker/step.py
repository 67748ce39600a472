"""The compiled train step, taken one by one with a log of what it did, or in blocks to be timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.worker.scalers import StepScaler

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


# Steady-state step time of one process.

DISPATCH_BOUND = 0.5
"""Share of dispatch above which a step time says more about Python and TensorFlow than about the device."""

_WARM_UP_S = 0.4
_WARM_UP_BLOCK = 10
_DISPATCH_BLOCKS = 7
_DISPATCH_CALLS = 40


@dataclass(frozen=True)
class Timing:
    """Blocks of steps, each with one synchronisation at its end.

    Args:
        block_s: seconds of each block (blocks,).
        steps_per_block: steps in each.
        overflow_steps: steps with a non-finite gradient among them, None where the mode does not know.
    """

    block_s: npt.NDArray[np.float64]
    steps_per_block: int
    overflow_steps: int | None

    @property
    def step_s(self) -> npt.NDArray[np.float64]:
        """Seconds per step, of each block."""
        return self.block_s / self.steps_per_block

    @property
    def steps(self) -> int:
        """Steps in all blocks."""
        return len(self.block_s) * self.steps_per_block

    def values(self, batch_size: int, empty_call_s: float) -> dict[str, Any]:
        """The columns of a record that follow from it.

        Args:
            batch_size: examples per step.
            empty_call_s: seconds of a call that does no work, as :func:`time_empty_call` says.
        """
        step_ms = self.step_s * 1e3
        median = float(np.median(step_ms))
        steps = self.steps
        share = min(empty_call_s * 1e3 / median, 1.0)
        values: dict[str, Any] = {
            "step_time_ms_median": median,
            "step_time_ms_p10": float(np.percentile(step_ms, 10)),
            "step_time_ms_p90": float(np.percentile(step_ms, 90)),
            "examples_per_s": batch_size / median * 1e3,
            "timed_blocks": len(step_ms),
            "timed_steps": steps,
            "dispatch_share": share,
            "dispatch_bound": share > DISPATCH_BOUND,
        }
        if self.overflow_steps is not None:
            applied = steps - self.overflow_steps
            values["timed_overflow_steps"] = self.overflow_steps
            values["step_time_ms_per_applied"] = float(self.block_s.sum()) * 1e3 / applied if applied else None
        return values


def warm_up(step: TrainStep) -> float:
    """Takes steps until caches and clocks have settled; returns when the device is done.

    Returns:
        About how many seconds a step takes: the median over the second half of the steps taken.
    """
    end = time.perf_counter() + _WARM_UP_S
    times: list[float] = []
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        step.block(_WARM_UP_BLOCK)
        times.append((time.perf_counter() - start) / _WARM_UP_BLOCK)
    return float(np.median(times[len(times) // 2 :]))


def time_steps(step: TrainStep, about_s: float, seconds: float, min_blocks: int) -> Timing:
    """Times steps for ``seconds`` and at least ``min_blocks`` blocks.

    Args:
        step: the train step, warm.
        about_s: about how many seconds it takes, as :func:`warm_up` says.
        seconds: how long to time.
        min_blocks: fewest blocks.

    Blocks are as long as ``seconds / min_blocks`` where steps are quick, and one step where they are slow. Each ends
    with one synchronisation, and nothing but the clock is between two of them: the first steps after anything else find
    the processor's caches cold.
    """
    per_block = max(1, round(seconds / min_blocks / about_s))
    blocks: list[float] = []
    overflows = step.overflow_steps()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(blocks) < min_blocks or time.perf_counter() < end:
            start = time.perf_counter_ns()
            step.block(per_block)
            blocks.append((time.perf_counter_ns() - start) / 1e9)
    finally:
        if collecting:
            gc.enable()
    return Timing(np.array(blocks), per_block, _more_than(overflows, step))


def keep_going(step: TrainStep, per_block: int, seconds: float) -> tuple[int, int | None]:
    """Takes steps as :func:`time_steps` does for ``seconds``, so that the energy of many can be counted.

    Returns:
        How many were taken, and with a non-finite gradient among them; None for that where the mode does not know.
    """
    steps = 0
    overflows = step.overflow_steps()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        step.block(per_block)
        steps += per_block
    return steps, _more_than(overflows, step)


def _more_than(overflows: int | None, step: TrainStep) -> int | None:
    """Overflow steps since there were ``overflows`` of them, None where the mode does not know."""
    now = step.overflow_steps()
    return None if overflows is None or now is None else now - overflows


def time_empty_call(step: TrainStep) -> float:
    """Seconds of an empty call, the median over blocks of calls."""
    step.empty()
    step.synchronise()
    times = []
    for _ in range(_DISPATCH_BLOCKS):
        start = time.perf_counter()
        for _ in range(_DISPATCH_CALLS):
            step.empty()
        step.synchronise()
        times.append((time.perf_counter() - start) / _DISPATCH_CALLS)
    return float(np.median(times))
