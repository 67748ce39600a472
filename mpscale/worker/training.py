"""A training from its first batch to its metric: the order of the data, the loop, the evaluation."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.worker import labels as label_forms
from mpscale.worker.compiled.course import Course
from mpscale.worker.objective import check_outputs
from mpscale.worker.step import MOST_UNREAD, Log, TrainStep
from mpscale.workloads import Workload
from mpscale.workloads.metric import ACCURACY, accuracy, is_keras_metric, kind_of

FINAL_LOSSES = 100
"""Steps at the end over which the training loss is averaged; if none of their losses is finite, it has diverged."""

STALLED_SHARE = 0.95
"""A training that skips at least this share of its steps has stalled."""

Mask = npt.NDArray[np.bool_] | None
Score = Callable[[npt.NDArray[Any], npt.NDArray[Any], Mask], float]

_NO_METRICS = {
    "accuracy": "counts outputs that equal their label to the last bit; use metric='accuracy', which takes the "
    "likeliest class, or a metric with a threshold, such as keras.metrics.BinaryAccuracy()",
    "mean": "averages values and ignores labels; use a metric of labels and outputs",
    "sum": "adds values up and ignores labels; use a metric of labels and outputs",
}
"""Keras metrics that do not measure a model, by kind, and why."""


def batches(examples: int, batch_size: int, steps: int, seed: int, repeat: bool = False) -> npt.NDArray[np.int64]:
    """The order of the data, from the seed alone: indices (steps, batch_size).

    Every epoch is a fresh permutation without its incomplete last batch.

    With ``repeat``, a batch that is larger than the training set holds its examples several times.

    Raises:
        ValueError: the batch is larger than the training set.
    """
    if repeat and batch_size > examples:
        return np.resize(np.random.default_rng(seed).permutation(examples), (steps, batch_size)).astype(np.int64)
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"a batch of {batch_size} cannot be drawn from a training set of {examples}; "
            f"choose a batch_size from 1 to {examples}"
        )
    random = np.random.default_rng(seed)
    per_epoch = examples // batch_size
    epochs = [random.permutation(examples)[: per_epoch * batch_size] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, batch_size)[:steps].astype(np.int64)


@dataclass(frozen=True)
class Training:
    """The result of a training.

    Args:
        log: of every step.
        wall_time_s: seconds spent on steps and on reading their log, without evaluations, the first step and the first
            call of several steps.
        weights_finite: whether all weights are finite at the end.
        steps_to_target: steps after which the metric reached the workload's target; None if it did not.
        time_to_target_s: ``wall_time_s`` at that step.
    """

    log: Log
    wall_time_s: float
    weights_finite: bool
    steps_to_target: int | None = None
    time_to_target_s: float | None = None

    @property
    def status(self) -> tuple[str, str | None]:
        """``ok``, ``stalled`` or ``diverged``, and why."""
        steps = len(self.log)
        skipped = 0 if self.log.overflow is None else int(self.log.overflow.sum())
        if not self.weights_finite:
            return "diverged", f"the weights were not finite after {steps} steps"
        if skipped / steps >= STALLED_SHARE:
            return "stalled", f"{skipped} of {steps} steps overflowed and were skipped"
        if not np.isfinite(self.log.loss[-FINAL_LOSSES:]).any():
            return "diverged", f"the loss was not finite in any of the last {min(FINAL_LOSSES, steps)} steps"
        return "ok", None

    def values(self) -> dict[str, Any]:
        """The columns of a record that follow from the log."""
        loss = self.log.loss.astype(float)
        values: dict[str, Any] = {
            "attempted_steps": len(loss),
            "nonfinite_loss_steps": int(np.sum(~np.isfinite(loss))),
            "train_loss_first": float(loss[0]),
            "train_loss_final": float(np.mean(loss[-FINAL_LOSSES:])),
            "train_wall_time_s": self.wall_time_s,
        }
        if (scale := self.log.scale) is not None:
            values |= {
                "loss_scale_initial": float(scale[0]),
                "loss_scale_final": float(scale[-1]),
                "loss_scale_min": float(np.min(scale)),
                "loss_scale_max": float(np.max(scale)),
            }
        if (overflow := self.log.overflow) is not None:
            where = np.flatnonzero(overflow)
            values |= {
                "overflow_steps": len(where),
                "skipped_steps": len(where),
                "applied_steps": len(overflow) - len(where),
                "longest_skip_run": max((sum(run) for _, run in itertools.groupby(overflow.tolist())), default=0),
                "first_overflow_step": int(where[0]) if len(where) else None,
                "last_overflow_step": int(where[-1]) if len(where) else None,
            }
        return values


def first_pause(evaluate_every: int, steps: int) -> int:
    """Steps after which a training of ``steps`` first looks at its weights and its metric; not after its first step."""
    return min(max(evaluate_every, 2), steps)


def train(
    step: TrainStep,
    steps: int,
    workload: Workload,
    evaluate: Callable[[], float] | None,
    progress: Callable[[int], None],
    opening_s: float = 0.0,
    course: Course | None = None,
    metrics: Callable[[], dict[str, Any]] | None = None,
) -> Training:
    """Take the remaining steps of a training whose opening steps have been taken and are not read yet.

    These are its first step, or more up to :func:`first_pause`; the result does not depend on how many. The training
    ends early if the weights are no longer finite, since nothing can bring them back.

    Args:
        step: the train step.
        steps: length of the training.
        workload: has the target, and how often to evaluate.
        evaluate: returns the metric on the progress set; None if the workload has no metric.
        progress: called with the number of steps taken, every ``workload.evaluate_every`` of them.
        opening_s: seconds spent on the opening steps after the first.
        course: the callbacks, whose training has begun; None if there are none. Their epochs end with each of
            ``workload.evaluate_every`` steps, and at the end.
        metrics: returns all metrics on the progress set, for the callbacks; None without such a set.
    """
    log = [step.read_log()]
    taken, wall = len(log[0]), opening_s
    reached: tuple[int, float] | tuple[None, None] = (None, None)
    pausing = 1 < taken == first_pause(workload.evaluate_every, steps)
    # The first pause comes after as many steps as if only one had been taken.
    most = MOST_UNREAD + 1 - taken
    while True:
        if pausing:
            if not np.isfinite(log[-1].loss[-1]) and not step.weights_finite():
                break
            due = reached[0] is None and workload.target is not None and taken % workload.evaluate_every == 0
            if due and evaluate is not None and step.agreed(workload.reached(evaluate())):
                reached = (taken, wall)
            if course is not None and (taken % workload.evaluate_every == 0 or taken >= steps):
                course.end_epoch(metrics, taken < steps)
            progress(taken)
        if taken >= steps:
            break
        block = min(workload.evaluate_every - taken % workload.evaluate_every, steps - taken, most)
        if course is not None and course.of_steps:
            wall += _step_by_step(step, course, block)
            log.append(step.read_log())
        else:
            compiled = step.first_call(block)
            start = time.perf_counter()
            step.take(block - compiled)
            log.append(step.read_log())
            wall += time.perf_counter() - start
        taken += block
        pausing, most = True, MOST_UNREAD
    return Training(Log.joined(log), wall, step.weights_finite(), *reached)


def _step_by_step(step: TrainStep, course: Course, steps: int) -> float:
    """Take steps one by one, with callbacks before and after each; return the seconds of the steps alone."""
    seconds = 0.0
    for _ in range(steps):
        course.begin_step()
        start = time.perf_counter()
        step()
        step.synchronise()
        seconds += time.perf_counter() - start
        course.end_step(step.last_loss)
    return seconds


class Evaluator:
    """A model's metric over whole sets of examples.

    The model runs in batches of the training's size, so it is compiled once, models of fixed batch size work, and it
    needs less memory than a training step. Variables that evaluation changes, such as the state of a recurrent layer,
    are restored: the training goes on as if nothing had been evaluated. ``jit`` compiles with XLA.
    """

    def __init__(self, model: keras.Model, score: Score, jit: bool, batch: int) -> None:
        self._score, self._batch = score, batch
        self._trained = {id(v.value) for v in model.trainable_variables}
        self._touched: list[tf.Variable] | None = None

        def forward(x: Any) -> Any:
            outputs = model(x, training=False)
            check_outputs(outputs)
            mask = getattr(outputs, "_keras_mask", None)
            fits = mask is not None and mask.shape.rank <= outputs.shape.rank
            return (tf.cast(outputs, tf.float32), mask) if fits else (tf.cast(outputs, tf.float32),)

        self._forward = tf.function(forward, jit_compile=jit, autograph=False)

    def __call__(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
        """The metric over all of ``x`` (examples, ...) and ``y`` (examples, ...)."""
        return self.over([(x, y)])

    def over(self, batches: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> float:
        """The metric over all of some batches of any size.

        Labels and outputs of all batches are kept in host memory, inputs are not.

        Raises:
            ValueError: the batches differ in the shape of an example's label or output.
        """
        labels, parts = [], []
        for x, y in batches:
            with self._restored(x):
                starts = range(0, len(x), self._batch)
                parts += [self._outputs(x[start : start + self._batch]) for start in starts]
            labels.append(y)
        if len({(y.shape[1:], part[0].shape[1:]) for y in labels for part in parts}) > 1:
            raise ValueError(
                "batches of the test set differ in the shape of an example's label or output, so there is no metric "
                "over all of them; pad them to one shape, for example with .padded_batch(n, padded_shapes=...)"
            )
        y = labels[0] if len(labels) == 1 else np.concatenate(labels)
        return self._value(y, *_joined(parts))

    def try_out(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        """Raise now what the metric would raise after the training: call it with all labels and a few outputs."""
        with self._restored(x):
            few = self._outputs(x[np.linspace(0, len(x) - 1, min(self._batch, len(x))).astype(int)])
        outputs, mask = _joined([tuple(np.resize(part, (len(y), *part.shape[1:])) for part in few)])
        value = self._value(y, outputs, mask)
        missing = np.sum(~np.isfinite(y)) if y.dtype.kind == "f" else 0
        if missing and not np.isfinite(value) and np.isfinite(outputs).all():
            raise ValueError(
                f"{missing} of the test labels are not finite, which makes the metric {value}; leave these examples "
                "out, or use a metric that ignores them"
            )

    def _value(self, y: npt.NDArray[Any], outputs: npt.NDArray[Any], mask: Mask) -> float:
        try:
            return self._score(y, outputs, mask)
        except Exception:  # from the user's code
            if np.isfinite(outputs).all():
                raise
            # A metric may refuse the outputs of a diverged training, as those of scikit-learn do.
            return float("nan")

    def _outputs(self, x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """The outputs, and the mask if there is one, of at most a batch of examples."""
        # A smaller batch is filled up with its own examples, whose outputs are cut off again.
        filled = np.resize(x, (self._batch, *x.shape[1:]))
        return tuple(part.numpy()[: len(x)] for part in self._forward(tf.constant(filled)))

    @contextlib.contextmanager
    def _restored(self, x: npt.NDArray[Any]) -> Iterator[None]:
        """Restore the variables that a forward pass changes. The first pass finds out which these are."""
        watched = self._touched
        if watched is None:
            spec = tf.TensorSpec((self._batch, *x.shape[1:]), tf.as_dtype(x.dtype))
            used = self._forward.get_concrete_function(spec).graph.variables
            watched = [v for v in used if id(v) not in self._trained]
        kept = [(v, v.numpy()) for v in watched]
        yield
        changed = [(v, value) for v, value in kept if not np.array_equal(v.numpy(), value)]
        if self._touched is None:
            self._touched = [v for v, _ in changed]
        for variable, value in changed:
            variable.assign(value)


def is_accuracy(metric: Any) -> bool:
    """Whether ``metric`` is the accuracy that mpscale computes itself."""
    return metric is accuracy or (isinstance(metric, str) and metric.lower() in ("accuracy", "acc"))


def score_for(
    workload: Workload, labels: npt.NDArray[Any], outputs: tuple[int | None, ...], threshold: float | None
) -> Score:
    """A workload's metric as a function ``(labels, outputs, mask) -> float`` without memory of earlier calls.

    The mask (examples, ...) is False at places that the model masks, or None if it masks nothing. A function of the
    user's own gets all outputs: it can see from the labels which of them count.

    Args:
        workload: has the metric.
        labels: of the test set.
        outputs: shape of one example's output.
        threshold: for an accuracy of one output, the value above which it means label 1; None if unknown.

    Raises:
        ValueError: Keras knows no metric of that name, or labels and outputs do not fit it.
    """
    metric: Any = workload.metric
    if is_accuracy(metric):

        def share(labels: npt.NDArray[Any], outputs: npt.NDArray[Any], mask: Mask) -> float:
            if mask is None:
                return accuracy(labels, outputs, threshold)
            # A mask (examples, places) selects places of arrays that begin with these axes.
            return accuracy(labels[mask], outputs[mask], threshold)

        return share
    if isinstance(metric, str):
        try:
            metric = keras.metrics.get(metric)
        except ValueError as error:
            message = f"Keras knows no metric called {metric!r}; give a name such as 'mae', or the metric itself"
            raise ValueError(message) from error
    kind = kind_of(metric)
    if isinstance(metric, type) and issubclass(metric, keras.metrics.Metric):
        metric = metric()
    of_keras = is_keras_metric(metric)
    if of_keras and kind in _NO_METRICS:
        raise ValueError(f"keras.metrics.{type(metric).__name__} {_NO_METRICS[kind]}")
    if kind == "mean_metric_wrapper":
        # The wrapper is Keras'; what it wraps need not be.
        kind = ""

    def function(labels: Any, outputs: Any) -> Any:
        if not of_keras:
            return metric(labels, outputs)
        # On the host: the outputs of all examples at once might need more of a GPU's memory than the training.
        with tf.device("CPU:0"):
            metric.reset_state()
            metric.update_state(labels, outputs)
            return metric.result()

    if kind:
        form = label_forms.keras_form(kind, labels.shape[1:], outputs)
    else:
        form = label_forms.form_for(function, labels, outputs, "metric")
    label_forms.check_fit(kind, form(labels[:1]).shape[1:], outputs)

    def score(labels: npt.NDArray[Any], outputs: npt.NDArray[Any], mask: Mask) -> float:
        given: Any = outputs
        if of_keras and mask is not None:
            # Where Keras' own evaluation looks for it.
            with tf.device("CPU:0"):
                given = tf.constant(outputs)
                given._keras_mask = tf.constant(mask)
        return _number(function(form(labels), given), len(labels), str(workload.metric_name), mask)

    return score


def _joined(parts: list[tuple[npt.NDArray[Any], ...]]) -> tuple[npt.NDArray[Any], Mask]:
    """The outputs and the mask of all examples."""
    joined = [np.concatenate(each) for each in zip(*parts, strict=True)]
    return joined[0], joined[1].astype(bool) if len(joined) > 1 else None


def _number(value: Any, examples: int, name: str, mask: Mask) -> float:
    """A metric's result as one number. Like Keras, average values of examples, without masked places."""
    try:
        array = np.asarray(value)
        # NumPy would turn None, from a function without ``return``, into NaN, and text into numbers.
        unusable = array.dtype == object and any(item is None or isinstance(item, str) for item in array.flat)
        if unusable or array.dtype.kind in "SUMmc":
            raise TypeError("not numeric")
        array = array.astype(float)
    except (TypeError, ValueError) as error:
        given = None if value is None else type(value).__name__
        raise ValueError(f"the metric {name} returned {given}; it must return one number") from error
    if array.size == 1:
        number = float(array.reshape(()))
    elif array.ndim and len(array) == examples:
        number = float((array if mask is None or array.shape != mask.shape else array[mask]).mean())
    else:
        raise ValueError(f"the metric {name} returned an array of shape {array.shape}; it must return one number")
    if name == ACCURACY and (number < 0 or number > 1):
        raise ValueError(
            f"the metric named accuracy returned {number:g}; return a share from 0 to 1, or give it another metric_name"
        )
    return number
