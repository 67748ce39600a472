"""The metric of a model on a set of examples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.training import labels as label_forms
from mpscale.training.objective import check_outputs
from mpscale.workloads.metric import ACCURACY, accuracy, is_keras_metric, kind_of

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
