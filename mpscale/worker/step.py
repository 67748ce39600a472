"""The compiled train step with the mode's loss scale. Steps are taken one by one with a log, or timed in blocks."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.core.case import Settings
from mpscale.core.loss_scale import RULES
from mpscale.core.mode import Mode
from mpscale.scaling import ArticleLossScale, LossScaleOptimizer
from mpscale.worker.model import weights_of

MOST_UNREAD = 1024
"""Most steps to take between two reads of the log: an unread step keeps some of the device's memory."""

DISPATCH_BOUND = 0.5
"""Share of dispatch above which a step time depends more on Python and TensorFlow than on the device."""

_WARM_UP_S = 0.4
_WARM_UP_BLOCK = 10
_DISPATCH_BLOCKS = 7
_DISPATCH_CALLS = 40


class StepRecord(NamedTuple):
    """The record of a step besides its loss. A value of None is not part of the compiled step, so it costs nothing.

    Args:
        scale: the loss scale that the step used, a float32 scalar; None if the mode has none.
        overflow: float32 scalar, 1 if a gradient was not finite, else 0; None if the mode does not check.
    """

    scale: Any = None
    overflow: Any = None


class StepScaler:
    """The bare optimizer; subclasses scale the loss. ``scale_loss`` and ``apply`` are traced into the train step.

    Modes without scaling use the bare one, since the baseline must be what a user would run: even a wrapper that does
    nothing would cost time.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer

    def scale_loss(self, loss: Any) -> Any:
        """The loss to differentiate."""
        return self.optimizer.scale_loss(loss)

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        """Update the weights."""
        self.optimizer.apply(grads, variables)
        return StepRecord()

    def overflow_steps(self, steps: int) -> int | None:
        """How many of the ``steps`` steps so far overflowed; None if the mode does not check."""
        return None


class Scaled(StepScaler):
    """mpscale's LossScaleOptimizer."""

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        scale = self.optimizer.loss_scale_value
        grads, finite = self.optimizer.unscale(grads)
        self.optimizer.apply(grads, variables, finite=finite)
        return StepRecord(scale, tf.cast(tf.logical_not(finite), tf.float32))

    def overflow_steps(self, steps: int) -> int | None:
        return int(self.optimizer.counters()["overflow"])


class KerasScaled(StepScaler):
    """Keras' own LossScaleOptimizer. It counts nothing, but its inner optimizer counts the steps that are applied."""

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        scale = tf.convert_to_tensor(self.optimizer.dynamic_scale.value)
        # The scale does not always show it: overflow halves the scale, but a scale of 0 stays 0.
        iterations = self.optimizer.inner_optimizer.iterations
        before = tf.identity(iterations.value)
        self.optimizer.apply(grads, variables)
        return StepRecord(scale, tf.cast(tf.equal(iterations.value, before), tf.float32))

    def overflow_steps(self, steps: int) -> int | None:
        return steps - int(self.optimizer.inner_optimizer.iterations.numpy())


class ArticleScaled(StepScaler):
    """The article's rule: the scaled loss moves the scale, and the gradients reach the optimizer still scaled."""

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        super().__init__(optimizer)
        self._rule = ArticleLossScale()
        self._scale = tf.Variable(self._rule.initial_state()["scale"], dtype=tf.float32, trainable=False)

    def scale_loss(self, loss: Any) -> Any:
        return loss * self._scale

    def apply(self, grads: Sequence[Any], variables: Sequence[Any], scaled_loss: Any) -> StepRecord:
        self.optimizer.apply(grads, variables)
        scale = self._scale.read_value()
        self._scale.assign(self._rule.next_state({"scale": scale}, scaled_loss)["scale"])
        return StepRecord(scale)


def scaler_for(mode: Mode, optimizer: keras.optimizers.Optimizer, settings: Settings) -> StepScaler:
    """Wrap a fresh optimizer in the loss scaling of ``mode``, with its arguments from ``settings``."""
    if mode.scaling is None:
        return StepScaler(optimizer)
    if mode.scaling.rule == "keras":
        names = {"initial": "initial_scale", "growth_interval": "dynamic_growth_steps"}
        chosen = {names[name]: value for name, value in mode.scale_arguments(settings).items()}
        return KerasScaled(keras.optimizers.LossScaleOptimizer(optimizer, **chosen))
    if mode.scaling.rule == "article":
        return ArticleScaled(optimizer)
    rule = RULES[mode.scaling.rule]
    return Scaled(LossScaleOptimizer(optimizer, rule(**mode.scale_arguments(settings))))


@dataclass(frozen=True)
class Batches:
    """Examples, and the order in which a training sees them.

    Args:
        x: examples (examples, ...).
        y: labels (examples, ...).
        order: indices into both, int64 (steps, batch); after the last row the first comes again.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    order: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Log:
    """The log of some steps, in order.

    Args:
        loss: float32 (steps,), unscaled.
        scale: the loss scale of each step, float32 (steps,); None if the mode has none.
        overflow: whether a gradient was not finite, bool (steps,); None if the mode does not check.
    """

    loss: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32] | None = None
    overflow: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @classmethod
    def joined(cls, pieces: Sequence[Log]) -> Log:
        """The log of all steps of ``pieces``, which are logs of one mode."""
        columns = {name: [vars(piece)[name] for piece in pieces] for name in cls.__dataclass_fields__}
        return cls(**{name: np.concatenate(parts) for name, parts in columns.items() if parts[0] is not None})


class TrainStep:
    """One batch and one update, without arguments and without synchronisation.

    Examples, labels and their order lie on the device. The step finds its batch with a counter that lies there too. It
    returns its loss, and loss scale and overflow if the mode has them, as tensors that stay on the device until
    :meth:`read_log` fetches those of many steps.

    It does not write them into a variable: under XLA a scatter into rows is slow, and without XLA TensorFlow optimises
    a function less if it returns nothing. Both were visible in the step time of the smallest workload.

    Args:
        model: a built Keras model.
        scaler: the mode's scaling, whose optimizer is not built yet.
        loss: ``(labels, outputs) -> scalar``; losses that the model adds itself are added here.
        jit: compile with XLA.
        steps_per_call: how many steps a call of the compiled program takes in :meth:`take` and :meth:`block`, like
            Keras' ``steps_per_execution``. The loop over them is part of the program.
    """

    def __init__(
        self,
        model: keras.Model,
        scaler: StepScaler,
        loss: Callable[[Any, Any], Any],
        batches: Batches,
        jit: bool,
        steps_per_call: int = 1,
    ) -> None:
        self._model, self.scaler, self._loss = model, scaler, loss
        self.steps_per_call = steps_per_call
        self.first_call_s: float | None = None
        """Seconds of the first call of several steps, from :meth:`first_call`; None before it."""
        scaler.optimizer.build(model.trainable_variables)
        # int64 throughout: TensorFlow keeps the int32 tensors of a GPU program in host memory.
        self._x, self._y, self._order = tf.constant(batches.x), tf.constant(batches.y), tf.constant(batches.order)
        self._position = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._unread: list[tuple[tf.Tensor, ...]] = []
        self._logged: tuple[str, ...] = ()  # the log's columns in this mode
        self.added_losses = 0
        """How many losses the model adds itself; known once the step has been traced."""

        # Small functions: on every call TensorFlow's retracing detector looks up the function's code twice, which takes
        # 2 us longer for the code of a whole step.
        def step() -> tuple[tf.Tensor, ...]:
            return self._step()

        def several_steps() -> tuple[tf.Tensor, ...]:
            return self._several_steps()

        def empty_step() -> tf.Tensor:
            return self._empty_step()

        self._function = tf.function(step, input_signature=[], jit_compile=jit, autograph=False)
        self._several = tf.function(several_steps, input_signature=[], jit_compile=jit, autograph=False)
        self._empty_function = tf.function(empty_step, input_signature=[], jit_compile=jit, autograph=False)

    def trace(self) -> float:
        """Trace a single step into a graph; return the seconds that took."""
        start = time.perf_counter()
        self._function.get_concrete_function()
        return time.perf_counter() - start

    @property
    def graph(self) -> Any:
        """Of a single step."""
        return self._function.get_concrete_function().graph

    def __call__(self) -> None:
        """Take one step. On a GPU this returns once the step is enqueued, before it is done."""
        self._unread.append(self._function())

    def first_call(self, at_most: int) -> int:
        """Take the first call of several steps, which traces and compiles it, and wait for its end.

        Args:
            at_most: how many steps may be taken.

        Returns:
            How many steps were taken: 0 if a call takes one step or too many, or the first call has been taken.
        """
        if self.steps_per_call == 1 or self.steps_per_call > at_most or self.first_call_s is not None:
            return 0
        self.synchronise()
        start = time.perf_counter()
        self._unread.append(self._several())
        self.synchronise()
        self.first_call_s = time.perf_counter() - start
        return self.steps_per_call

    def take(self, steps: int) -> None:
        """Take ``steps`` steps: in calls of several while enough are left, then one by one."""
        calls, single = self._calls(steps)
        self._unread += (self._several() for _ in range(calls))
        for _ in range(single):
            self()

    def whole_calls(self, steps: int) -> int:
        """The multiple of the steps of a call, above 0, that is nearest to ``steps``."""
        return max(round(steps / self.steps_per_call), 1) * self.steps_per_call

    def _calls(self, steps: int) -> tuple[int, int]:
        """How many calls of several steps, and how many single steps, make up ``steps``."""
        return (0, steps) if self.steps_per_call == 1 else divmod(steps, self.steps_per_call)

    def empty(self) -> None:
        """Call a function that takes the same variables and tensors and does no work: the cost of dispatch."""
        self._empty_function()

    def block(self, steps: int, one_per_call: bool = False) -> None:
        """Take ``steps`` steps, at least one, that are not logged. Returns when the device is done with them.

        This is the loop that a user would write: each result is dropped when the next one arrives, and only the last
        one is awaited. ``one_per_call``: never take several steps in a call.
        """
        calls, single = (0, steps) if one_per_call else self._calls(steps)
        for _ in range(calls):
            last = self._several()
        for _ in range(single):
            last = self._function()
        # On a GPU a copy to the host waits for everything before it on the stream, and so for the whole last step.
        last[0].numpy()

    def synchronise(self) -> None:
        """Wait until the device has done all steps."""
        self._position.numpy()

    def overflow_steps(self) -> int | None:
        """Wait for the device; return how many steps overflowed so far, or None if the mode does not check."""
        return self.scaler.overflow_steps(int(self._position.numpy()))

    def weights_finite(self) -> bool:
        """Whether every weight of the model is finite, statistics that are not trained included."""
        return all(bool(np.isfinite(v.numpy()).all()) for v in weights_of(self._model.variables))

    def read_log(self) -> Log:
        """Wait for the device; return the log of the steps since the last call."""
        # One copy from the device for each column, whatever the number of steps.
        columns = [_flat(values).numpy() for values in zip(*self._unread, strict=True)]
        self._unread.clear()
        known = dict(zip(self._logged, columns or [np.zeros(0, np.float32)] * len(self._logged), strict=True))
        if "overflow" in known:
            known["overflow"] = known["overflow"] == 1.0
        return Log(**known)

    def _differentiated(self, others: Callable[[], Sequence[Any]] = tuple) -> tuple[Any, Any, list[Any], list[Any]]:
        """Take the next batch, and return its loss, the scaled loss, and the gradients of this for the weights.

        ``others`` is called when the loss has been traced; the tensors that it returns get their gradients, too.
        """
        # tf.gather and not order[position]: indexing with a tensor in Python's slice syntax recompiles at every step.
        batch = tf.gather(self._order, self._position % self._order.shape[0])
        self._position.assign_add(1)
        x, y = tf.gather(self._x, batch), tf.gather(self._y, batch)
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.cast(self._loss(y, self._model(x, training=True)), tf.float32)
            # Regularizers and add_loss are part of the loss, as in Keras' fit.
            added = [tf.reduce_sum(tf.cast(more, tf.float32)) for more in self._model.losses]
            self.added_losses = len(added)
            loss = tf.add_n([loss, *added]) if added else loss
            scaled = self.scaler.scale_loss(loss)
        grads = tape.gradient(scaled, [*variables, *others()])
        return loss, scaled, grads[: len(variables)], grads[len(variables) :]

    def _step(self) -> tuple[tf.Tensor, ...]:
        loss, scaled, grads, _ = self._differentiated()
        variables = self._model.trainable_variables
        row = {"loss": loss, **self.scaler.apply(grads, variables, scaled)._asdict()}
        known = {name: value for name, value in row.items() if value is not None}
        self._logged = tuple(known)
        # Not stacked into one tensor: XLA fused that with the loss, which made a convolution's step 4 to 9 % slower.
        return tuple(known.values())

    def _several_steps(self) -> tuple[tf.Tensor, ...]:
        """The steps of a call; each column of the log is a tensor (steps,). A single step has been traced before."""

        def take(number: Any, *columns: Any) -> tuple[Any, ...]:
            return number + 1, *(c.write(number, value) for c, value in zip(columns, self._step(), strict=True))

        steps = self.steps_per_call
        # Of int32, which is in host memory: the device need not be asked whether the loop goes on.
        start = (tf.constant(0), *(tf.TensorArray(tf.float32, steps, element_shape=()) for _ in self._logged))
        _, *columns = tf.while_loop(lambda number, *_: number < steps, take, start, parallel_iterations=1)
        return tuple(column.stack() for column in columns)

    def _empty_step(self) -> tf.Tensor:
        for variable in (*self._model.variables, *self.scaler.optimizer.variables):
            variable.value.read_value()
        for tensor in (self._x, self._y, self._order):
            tf.identity(tensor)
        self._position.assign_add(0)
        return tf.zeros(3)


def _flat(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Scalars, of single steps, and vectors, of calls of several, in one vector."""
    runs = itertools.groupby(values, lambda value: value.shape.rank)
    pieces = [tf.concat(list(run), 0) if rank else tf.stack(list(run)) for rank, run in runs]
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, 0)


@dataclass(frozen=True)
class Timing:
    """The time of blocks of steps, each with one synchronisation at its end.

    Args:
        block_s: seconds of each block (blocks,).
        steps_per_block: steps in each block.
        overflow_steps: how many of all these steps overflowed; None if the mode does not check.
        steps_per_call: steps in each call of the compiled program.
    """

    block_s: npt.NDArray[np.float64]
    steps_per_block: int
    overflow_steps: int | None
    steps_per_call: int = 1

    @property
    def step_s(self) -> npt.NDArray[np.float64]:
        """Seconds per step, by block."""
        return self.block_s / self.steps_per_block

    @property
    def steps(self) -> int:
        return len(self.block_s) * self.steps_per_block

    def values(self, batch_size: int, empty_call_s: float) -> dict[str, Any]:
        """The columns of a record that follow from the timing.

        Args:
            batch_size: examples per step.
            empty_call_s: seconds of a call that does no work, from :func:`time_empty_call`.
        """
        step_ms = self.step_s * 1e3
        median = float(np.median(step_ms))
        share = min(empty_call_s * 1e3 / (self.steps_per_call * median), 1.0)
        values: dict[str, Any] = {
            "step_time_ms_median": median,
            "step_time_ms_p10": float(np.percentile(step_ms, 10)),
            "step_time_ms_p90": float(np.percentile(step_ms, 90)),
            "examples_per_s": batch_size / median * 1e3,
            "timed_blocks": len(step_ms),
            "timed_steps": self.steps,
            "dispatch_share": share,
            "dispatch_bound": share > DISPATCH_BOUND,
        }
        if self.overflow_steps is not None:
            applied = self.steps - self.overflow_steps
            values["timed_overflow_steps"] = self.overflow_steps
            values["step_time_ms_per_applied"] = float(self.block_s.sum()) * 1e3 / applied if applied else None
        return values


def warm_up(step: TrainStep, one_per_call: bool = False) -> float:
    """Take steps until caches and clocks have settled; return about how many seconds a step takes.

    That is the median over the second half of the steps taken. ``one_per_call``: as in :meth:`TrainStep.block`.
    """
    steps = _WARM_UP_BLOCK if one_per_call else step.whole_calls(_WARM_UP_BLOCK)
    end = time.perf_counter() + _WARM_UP_S
    times: list[float] = []
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        step.block(steps, one_per_call)
        times.append((time.perf_counter() - start) / steps)
    return float(np.median(times[len(times) // 2 :]))


def time_steps(step: TrainStep, about_s: float, seconds: float, min_blocks: int, one_per_call: bool = False) -> Timing:
    """Time steps for ``seconds`` and at least ``min_blocks`` blocks.

    A block takes about ``seconds / min_blocks``, or one call if a call takes longer. It ends with one synchronisation,
    and only the clock is read between two blocks: the first steps after any other work find cold processor caches.

    Args:
        step: has been warmed up.
        about_s: about how many seconds it takes, from :func:`warm_up`.
        seconds: how long to time.
        min_blocks: fewest blocks.
        one_per_call: as in :meth:`TrainStep.block`.
    """
    per_block = max(1, round(seconds / min_blocks / about_s))
    per_block = per_block if one_per_call else step.whole_calls(per_block)
    blocks: list[float] = []
    overflows = step.overflow_steps()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(blocks) < min_blocks or time.perf_counter() < end:
            start = time.perf_counter_ns()
            step.block(per_block, one_per_call)
            blocks.append((time.perf_counter_ns() - start) / 1e9)
    finally:
        if collecting:
            gc.enable()
    steps_per_call = 1 if one_per_call else step.steps_per_call
    return Timing(np.array(blocks), per_block, _overflows_since(overflows, step), steps_per_call)


def time_one_per_call(step: TrainStep, seconds: float, min_blocks: int) -> float:
    """Milliseconds of a step when each is a call of its own: the median over blocks, as in :func:`time_steps`."""
    about_s = warm_up(step, one_per_call=True)
    return float(np.median(time_steps(step, about_s, seconds, min_blocks, one_per_call=True).step_s)) * 1e3


def keep_going(step: TrainStep, per_block: int, seconds: float) -> tuple[int, int | None]:
    """Take steps for ``seconds`` as :func:`time_steps` does, so that the energy of many steps can be counted.

    Returns:
        How many steps were taken, and how many of them overflowed; None if the mode does not check.
    """
    steps = 0
    overflows = step.overflow_steps()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        step.block(per_block)
        steps += per_block
    return steps, _overflows_since(overflows, step)


def _overflows_since(before: int | None, step: TrainStep) -> int | None:
    """How many steps have overflowed since there were ``before`` of them; None if the mode does not check."""
    now = step.overflow_steps()
    return None if before is None or now is None else now - before


def time_empty_call(step: TrainStep) -> float:
    """Seconds of a call that does no work: the median over blocks of calls."""
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
