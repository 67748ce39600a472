"""The compiled train step. Steps are taken one by one with a log, or in blocks without one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.worker.batches import Source
from mpscale.worker.model import weights_of
from mpscale.worker.update import Update

MOST_UNREAD = 1024
"""Most steps to take between two reads of the log: an unread step keeps some of the device's memory."""


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
    """One batch and one update, without synchronisation.

    Arrays lie on the device with their order, and the step finds its batch with a counter that lies there too. A batch
    of a pipeline is an argument. The step returns its loss, and loss scale and overflow if the mode has them, as
    tensors that stay on the device until :meth:`read_log` fetches those of many steps.

    It does not write them into a variable: under XLA a scatter into rows is slow, and without XLA TensorFlow optimises
    a function less if it returns nothing. Both were visible in the step time of the smallest workload.

    Args:
        update: what a step does with a batch.
        batches: where it gets its batches from.
        jit: compile with XLA.
        steps_per_call: how many steps a call of the compiled program takes in :meth:`take` and :meth:`block`, like
            Keras' ``steps_per_execution``. The loop over them is part of the program.
    """

    def __init__(self, update: Update, batches: Source, jit: bool, steps_per_call: int = 1) -> None:
        self.update, self.batches = update, batches
        self.steps_per_call = steps_per_call
        self.batch: Any = None
        """The batch as the trace has it, tensors of its graph; known once a step has been traced."""
        self.first_call_s: float | None = None
        """Seconds of the first call of several steps, from :meth:`first_call`; None before it."""
        self._unread: list[tuple[tf.Tensor, ...]] = []
        self._logged: tuple[str, ...] = ()  # the log's columns in this mode

        # Small functions: on every call TensorFlow's retracing detector looks up the function's code twice, which takes
        # 2 us longer for the code of a whole step.
        def step(*batch: Any) -> tuple[tf.Tensor, ...]:
            return self._step(*batch)

        def several_steps() -> tuple[tf.Tensor, ...]:
            return self._several_steps()

        def empty_step(*batch: Any) -> tf.Tensor:
            return self._empty_step(*batch)

        options = {"jit_compile": jit, "autograph": False}
        # As Keras' fit: the second shape of a batch leads to a trace for all shapes.
        fed: dict[str, Any] = {"reduce_retracing": True} if batches.specs else {"input_signature": []}
        self._function = tf.function(step, **fed, **options)
        self._several = tf.function(several_steps, input_signature=[], **options)
        self._empty_function = tf.function(empty_step, **fed, **options)

    def trace(self) -> float:
        """Trace a single step into a graph; return the seconds that took."""
        start = time.perf_counter()
        self._function.get_concrete_function(*self.batches.specs)
        return time.perf_counter() - start

    @property
    def graph(self) -> Any:
        """Of a single step; of a pipeline, with a batch like the first."""
        return self._function.get_concrete_function(*self.batches.specs).graph

    def __call__(self) -> None:
        """Take one step. On a GPU this returns once the step is enqueued, before it is done."""
        self._unread.append(self._function(*self.batches.arguments()))

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
        """The multiple of the steps of a call, and of the batches that are shown in turn, that is nearest to ``steps``.

        It is above 0.
        """
        whole = self.steps_per_call * self.batches.cycle
        return max(round(steps / whole), 1) * whole

    def _calls(self, steps: int) -> tuple[int, int]:
        """How many calls of several steps, and how many single steps, make up ``steps``."""
        return (0, steps) if self.steps_per_call == 1 else divmod(steps, self.steps_per_call)

    def empty(self) -> None:
        """Call a function that takes the same variables and tensors and does no work: the cost of dispatch."""
        self._empty_function(*self.batches.arguments())

    def block(self, steps: int, one_per_call: bool = False) -> None:
        """Take ``steps`` steps, at least one, that are not logged. Returns when the device is done with them.

        This is the loop that a user would write: each result is dropped when the next one arrives, and only the last
        one is awaited. ``one_per_call``: never take several steps in a call.
        """
        calls, single = (0, steps) if one_per_call else self._calls(steps)
        for _ in range(calls):
            last = self._several()
        for _ in range(single):
            last = self._function(*self.batches.arguments())
        # On a GPU a copy to the host waits for everything before it on the stream, and so for the whole last step.
        last[0].numpy()

    def synchronise(self) -> None:
        """Wait until the device has done all steps."""
        self.batches.position.numpy()

    def agreed(self, value: Any) -> Any:
        """``value``, a number or an array, or that of the first worker if several processes train together.

        All of them have to take the same steps, so it decides whatever could differ, such as how many take a second.
        """
        return value

    def overflow_steps(self) -> int | None:
        """Wait for the device; return how many steps overflowed so far, or None if the mode does not check."""
        return self.update.overflow_steps(int(self.batches.position.numpy()))

    def weights_finite(self) -> bool:
        """Whether every weight of the model is finite, statistics that are not trained included."""
        return all(bool(np.isfinite(v.numpy()).all()) for v in weights_of(self.update.model.variables))

    def last_loss(self) -> float:
        """Wait for the device; return the loss of the latest step, which :meth:`read_log` has not returned yet."""
        return float(_flat([self._unread[-1][0]]).numpy()[-1])

    def read_log(self) -> Log:
        """Wait for the device; return the log of the steps since the last call."""
        # One copy from the device for each column, whatever the number of steps.
        columns = [_flat(values).numpy() for values in zip(*self._unread, strict=True)]
        self._unread.clear()
        known = dict(zip(self._logged, columns or [np.zeros(0, np.float32)] * len(self._logged), strict=True))
        if "overflow" in known:
            known["overflow"] = known["overflow"] == 1.0
        return Log(**known)

    def _step(self, *batch: Any) -> tuple[tf.Tensor, ...]:
        self.batch = self.batches.take(*batch)
        row = self.update(self.batch)
        self._logged = tuple(row)
        # Not stacked into one tensor: XLA fused that with the loss, which made a convolution's step 4 to 9 % slower.
        return tuple(row.values())

    def _several_steps(self) -> tuple[tf.Tensor, ...]:
        """The steps of a call; each column of the log is a tensor (steps,). A single step has been traced before."""

        def take(number: Any, *columns: Any) -> tuple[Any, ...]:
            return number + 1, *(c.write(number, value) for c, value in zip(columns, self._step(), strict=True))

        steps = self.steps_per_call
        # Of int32, which is in host memory: the device need not be asked whether the loop goes on.
        start = (tf.constant(0), *(tf.TensorArray(tf.float32, steps, element_shape=()) for _ in self._logged))
        _, *columns = tf.while_loop(lambda number, *_: number < steps, take, start, parallel_iterations=1)
        return tuple(column.stack() for column in columns)

    def _empty_step(self, *batch: Any) -> tf.Tensor:
        for variable in self.update.variables:
            variable.value.read_value()
        for tensor in (*self.batches.tensors, *tf.nest.flatten(batch)):
            tf.identity(tensor)
        self.batches.position.assign_add(0)
        return tf.zeros(3)


def _flat(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Scalars, of single steps, and vectors, of calls of several, in one vector."""
    runs = itertools.groupby(values, lambda value: value.shape.rank)
    pieces = [tf.concat(list(run), 0) if rank else tf.stack(list(run)) for rank, run in runs]
    return pieces[0] if len(pieces) == 1 else tf.concat(pieces, 0)
