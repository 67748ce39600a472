"""Trains a case to its end."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.worker import labels as label_forms
from mpscale.worker.objective import check_outputs
from mpscale.worker.step import MOST_UNREAD, UNKNOWN, TrainStep
from mpscale.workloads import Data, Workload
from mpscale.workloads.metric import ACCURACY, accuracy, is_keras_metric, kind_of

FINAL_LOSSES = 100
"""Steps over which the final training loss is averaged, and that tell a diverged training."""

STALLED_SHARE = 0.95
"""Share of skipped steps from which on a training counts as stalled."""


@dataclass(frozen=True)
class Training:
    """What a training left behind.

    ``log`` is loss, loss scale and overflow of every step (steps, 3), with UNKNOWN where the mode has none.
    """

    log: npt.NDArray[np.float32]
    wall_time_s: float
    steps_to_target: int | None
    time_to_target_s: float | None
    weights_finite: bool

    @property
    def status(self) -> tuple[str, str | None]:
        """``ok``, ``stalled`` or ``diverged``, and why."""
        losses, overflow = self.log[:, 0], self.log[:, 2]
        skipped = float(np.mean(overflow == 1.0))
        if not self.weights_finite:
            return "diverged", f"the weights were not finite after {len(self.log)} steps"
        if skipped >= STALLED_SHARE:
            return (
                "stalled",
                f"{np.sum(overflow == 1.0)} of {len(self.log)} steps overflowed and were skipped",
            )
        if not np.isfinite(losses[-FINAL_LOSSES:]).any():
            return (
                "diverged",
                f"the loss was not finite in any of the last {min(FINAL_LOSSES, len(losses))} steps",
            )
        return "ok", None

    def values(self) -> dict[str, Any]:
        """The columns of a record that follow from the log."""
        loss, scale, overflow = self.log.T.astype(float)
        last = loss[-FINAL_LOSSES:]
        values: dict[str, Any] = {
            "attempted_steps": len(loss),
            "nonfinite_loss_steps": int(np.sum(~np.isfinite(loss))),
            "train_loss_first": float(loss[0]),
            "train_loss_final": float(np.mean(last)),
            "train_wall_time_s": self.wall_time_s,
            "steps_to_target": self.steps_to_target,
            "time_to_target_s": self.time_to_target_s,
        }
        if scale[0] != UNKNOWN:
            values |= {
                "loss_scale_initial": scale[0],
                "loss_scale_final": scale[-1],
                "loss_scale_min": np.min(scale),
                "loss_scale_max": np.max(scale),
            }
        if overflow[0] != UNKNOWN:
            bad = overflow == 1.0
            where = np.flatnonzero(bad)
            values |= {
                "overflow_steps": int(bad.sum()),
                "skipped_steps": int(bad.sum()),
                "applied_steps": int((~bad).sum()),
                "longest_skip_run": _longest_run(bad),
                "first_overflow_step": int(where[0]) if len(where) else None,
                "last_overflow_step": int(where[-1]) if len(where) else None,
            }
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def train(
    step: TrainStep,
    model: keras.Model,
    evaluate: Evaluator,
    workload: Workload,
    data: Data,
    steps: int,
    progress: Callable[[int], None],
) -> Training:
    """Takes ``steps`` steps, the first of which has been taken already.

    Ends early where the weights are no longer finite: nothing can bring them back.

    Args:
        step: the train step.
        model: the model it trains.
        evaluate: the model's metric.
        workload: says when to look at the metric and which value is its target.
        data: says on which examples.
        steps: how many steps the training has.
        progress: called with the number of steps taken, every ``workload.evaluate_every`` of them.
    """
    log = [step.read_log()]
    taken, wall = 1, 0.0
    reached: tuple[int, float] | None = None
    while taken < steps:
        start = time.perf_counter()
        block = min(workload.evaluate_every - taken % workload.evaluate_every, steps - taken, MOST_UNREAD)
        for _ in range(block):
            step()
        log.append(step.read_log())
        wall += time.perf_counter() - start
        taken += block
        if not np.isfinite(log[-1][-1, 0]) and not weights_finite(model):
            break
        if reached is None and workload.target is not None and taken % workload.evaluate_every == 0:
            if workload.reached(evaluate(*data.progress)):
                reached = (taken, wall)
        progress(taken)
    return Training(
        np.concatenate(log),
        wall,
        reached[0] if reached else None,
        reached[1] if reached else None,
        weights_finite(model),
    )


def weights_finite(model: keras.Model) -> bool:
    """Whether every weight of the model is finite, statistics that are not trained included."""
    return all(bool(np.isfinite(v.numpy()).all()) for v in model.variables)


def _longest_run(flags: npt.NDArray[np.bool_]) -> int:
    """Length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int(max(edges[1::2] - edges[::2], default=0))


# The metric of a model on a set of examples.

Mask = npt.NDArray[np.bool_] | None
Score = Callable[[npt.NDArray[Any], npt.NDArray[Any], Mask], float]

_NO_METRICS = {
    "accuracy": "counts outputs that equal their label to the last bit; give metric='accuracy', which takes the "
    "likeliest class, or a metric with a threshold, such as keras.metrics.BinaryAccuracy()",
    "mean": "averages values, and knows no labels; give a metric of labels and outputs",
    "sum": "adds values up, and knows no labels; give a metric of labels and outputs",
}
"""Metrics of Keras' that say nothing of a model, by kind, and why."""


class Evaluator:
    """Runs the model over whole sets in batches of one shape, so that it is compiled once.

    The batch is that of the training: a model of fixed batch size works, and the peak of memory is the training's.
    What a model changes when it is only looked at, such as the state of a recurrent layer, is put back afterwards: the
    training goes on as if nobody had looked.

    Args:
        model: a built Keras model; it runs under the dtype policy it was built with.
        score: ``(labels, outputs, mask) -> float`` on NumPy arrays; the mask (examples, ...) is False for places that
            the model masks, None where it masks none.
        jit: compile with XLA.
        batch: examples at once.
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

        self._forward = tf.function(forward, jit_compile=jit)

    def __call__(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
        """The metric over all of ``x`` (examples, ...) and ``y`` (examples, ...)."""
        starts = range(0, len(x), self._batch)
        with self._undone(x):
            parts = [self._outputs(x[start : start + self._batch]) for start in starts]
        outputs, mask = _joined(parts)
        try:
            return self._score(y, outputs, mask)
        except Exception:  # the user's code, which ran when it was tried out
            if np.isfinite(outputs).all():
                raise
            # It may refuse, as those of scikit-learn do, what a diverged training comes to.
            return float("nan")

    def try_out(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        """Raises what the metric will raise when it is needed: it sees all labels, and some outputs over and over."""
        with self._undone(x):
            few = self._outputs(x[np.linspace(0, len(x) - 1, min(self._batch, len(x))).astype(int)])
        value = self._score(y, *_joined([tuple(np.resize(part, (len(y), *part.shape[1:])) for part in few)]))
        missing = np.sum(~np.isfinite(y)) if y.dtype.kind == "f" else 0
        if missing and not np.isfinite(value):
            raise ValueError(f"{missing} of the test labels are not finite, so that the metric is {value}")

    def _outputs(self, x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """Outputs, and the mask if there is one, of at most a batch of examples."""
        # A smaller one is filled up with its own examples, whose outputs are cut off again.
        filled = np.resize(x, (self._batch, *x.shape[1:]))
        return tuple(part.numpy()[: len(x)] for part in self._forward(tf.constant(filled)))

    @contextlib.contextmanager
    def _undone(self, x: npt.NDArray[Any]) -> Iterator[None]:
        """Puts back the variables that a forward pass changes; which those are is found out the first time."""
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
    """Whether ``metric`` is the accuracy that mpscale takes itself."""
    return metric is accuracy or (isinstance(metric, str) and metric.lower() in ("accuracy", "acc"))


def score_for(
    metric: Any, name: str, labels: npt.NDArray[Any], outputs: tuple[int | None, ...], threshold: float | None
) -> Score:
    """A workload's metric as a function of labels, outputs and mask, each call by itself.

    A function of the user's own gets all outputs: which of them count it tells from the labels.

    Args:
        metric: as :class:`~mpscale.workloads.Workload` takes it.
        name: the metric's name.
        labels: of the test set.
        outputs: shape of one example's output.
        threshold: for an accuracy of one output: from which value on it means label 1; None where unknown.

    Raises:
        ValueError: Keras knows no metric of that name, or labels and outputs do not fit it.
    """
    function: Callable[[Any, Any], Any]
    if is_accuracy(metric):

        def share(labels: npt.NDArray[Any], outputs: npt.NDArray[Any], mask: Mask) -> float:
            if mask is None:
                return accuracy(labels, outputs, threshold)
            # A mask (examples, places) takes the places out of arrays that begin with these axes.
            return accuracy(labels[mask], outputs[mask], threshold)

        return share
    kind = kind_of(metric)
    if isinstance(metric, str):
        try:
            metric = keras.metrics.get(metric)
        except ValueError as error:
            raise ValueError(
                f"Keras knows no metric called {metric!r}; give a name such as 'mae', or the metric"
            ) from error
        kind = kind_of(metric)
    if isinstance(metric, type) and issubclass(metric, keras.metrics.Metric):
        metric = metric()
    of_keras = is_keras_metric(metric)
    if of_keras and kind in _NO_METRICS:
        raise ValueError(f"keras.metrics.{type(metric).__name__} {_NO_METRICS[kind]}")
    if kind == "mean_metric_wrapper":
        # Of Keras', but what it wraps need not be.
        kind = ""
    function = _afresh(metric) if of_keras else metric
    form = (
        label_forms.keras_form(kind, labels.shape[1:], outputs)
        if kind
        else label_forms.form_for(function, labels, outputs, "metric")
    )
    label_forms.check_fit(kind, form(labels[:1]).shape[1:], outputs)

    def score(labels: npt.NDArray[Any], outputs: npt.NDArray[Any], mask: Mask) -> float:
        given: Any = outputs
        if of_keras and mask is not None:
            # Where Keras' own evaluation has it.
            given = tf.constant(outputs)
            given._keras_mask = tf.constant(mask)
        return _number(function(form(labels), given), len(labels), name, mask)

    return score


def _afresh(metric: keras.metrics.Metric) -> Callable[[Any, Any], Any]:
    """A metric of Keras without what it has seen before."""

    def result(labels: Any, outputs: Any) -> Any:
        metric.reset_state()
        metric.update_state(labels, outputs)
        return metric.result()

    return result


def _joined(parts: list[tuple[npt.NDArray[Any], ...]]) -> tuple[npt.NDArray[Any], Mask]:
    """Outputs and mask of all examples."""
    joined = [np.concatenate(each) for each in zip(*parts, strict=True)]
    return joined[0], joined[1].astype(bool) if len(joined) > 1 else None


def _holds_no_numbers(array: npt.NDArray[Any]) -> bool:
    """Whether NumPy would make numbers of what is none: NaN of None, where a function has no ``return``."""
    if array.dtype.kind == "O":
        return any(item is None or isinstance(item, str) for item in array.flat)
    return array.dtype.kind in "SUMmc"


def _number(value: Any, examples: int, name: str, mask: Mask) -> float:
    """What a metric said as one number; a value of each example is averaged, as Keras does, without masked places."""
    try:
        if _holds_no_numbers(np.asarray(value)):
            raise TypeError("there is no number in it")
        array = np.asarray(value, dtype=float)
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
        raise ValueError(f"the metric is called accuracy, a share from 0 to 1, but returned {number:g}")
    return number


# The order in which a training sees its examples: made from the seed alone, so it is the same in every mode.


def batches(examples: int, batch_size: int, steps: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices (steps, batch_size): every epoch a fresh permutation, its incomplete last batch left out.

    Raises:
        ValueError: the batch is larger than the training set.
    """
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"a batch of {batch_size} cannot be drawn from a training set of {examples}; "
            f"choose a batch_size from 1 to {examples}"
        )
    random = np.random.default_rng(seed)
    per_epoch = examples // batch_size
    epochs = [random.permutation(examples)[: per_epoch * batch_size] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, batch_size)[:steps].astype(np.int64)


def digest(arrays: Iterable[Any]) -> str:
    """SHA-256 over the bytes of arrays, as 16 hex digits."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]
