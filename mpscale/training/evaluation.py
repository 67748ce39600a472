"""The metric of a model on a set of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.training import labels as label_forms
from mpscale.training.objective import check_outputs
from mpscale.workloads.metric import ACCURACY, accuracy, is_keras_metric, kind_of

Score = Callable[[npt.NDArray[Any], npt.NDArray[Any]], float]


class Evaluator:
    """Runs the model over whole sets in batches of one shape, so that it is compiled once.

    The batch is that of the training: a model of fixed batch size works, and the peak of memory is the training's.

    Args:
        model: a built Keras model; it runs under the dtype policy it was built with.
        score: ``(labels, outputs) -> float`` on NumPy arrays.
        jit: compile with XLA.
        batch: examples at once.
    """

    def __init__(self, model: keras.Model, score: Score, jit: bool, batch: int) -> None:
        self._score, self._batch = score, batch

        def forward(x: Any) -> Any:
            outputs = model(x, training=False)
            check_outputs(outputs)
            return tf.cast(outputs, tf.float32)

        self._forward = tf.function(forward, jit_compile=jit)

    def __call__(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
        """The metric over all of ``x`` (examples, ...) and ``y`` (examples, ...)."""
        outputs = [self._outputs(x[start : start + self._batch]) for start in range(0, len(x), self._batch)]
        return self._score(y, np.concatenate(outputs))

    def try_out(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        """Raises what the metric will raise when it is needed: it sees all labels, and some outputs over and over."""
        outputs = self._outputs(x[np.linspace(0, len(x) - 1, min(self._batch, len(x))).astype(int)])
        self._score(y, np.resize(outputs, (len(y), *outputs.shape[1:])))

    def _outputs(self, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Outputs of at most a batch of examples."""
        # A smaller one is filled up with its own examples, whose outputs are cut off again.
        filled = np.resize(x, (self._batch, *x.shape[1:]))
        outputs: npt.NDArray[np.float32] = self._forward(tf.constant(filled)).numpy()[: len(x)]
        return outputs


def score_for(
    metric: Any, name: str, labels: npt.NDArray[Any], outputs: tuple[int | None, ...], threshold: float | None
) -> Score:
    """A workload's metric as a function of labels and outputs, each call by itself.

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
    if metric is accuracy or (isinstance(metric, str) and metric.lower() in ("accuracy", "acc")):
        return lambda labels, outputs: accuracy(labels, outputs, threshold)
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
    if is_keras_metric(metric):
        function, form = _afresh(metric), label_forms.keras_form(kind, labels.shape[1:], outputs)
    else:
        function = metric
        form = (
            label_forms.keras_form(kind, labels.shape[1:], outputs)
            if kind
            else label_forms.form_for(function, labels, outputs, "metric")
        )
    label_forms.check_fit(kind, form(labels[:1]).shape[1:], outputs)

    def score(labels: npt.NDArray[Any], outputs: npt.NDArray[Any]) -> float:
        return _number(function(form(labels), outputs), len(labels), name)

    return score


def _afresh(metric: keras.metrics.Metric) -> Callable[[Any, Any], Any]:
    """A metric of Keras without what it has seen before."""

    def result(labels: Any, outputs: Any) -> Any:
        metric.reset_state()
        metric.update_state(labels, outputs)
        return metric.result()

    return result


def _holds_no_numbers(array: npt.NDArray[Any]) -> bool:
    """Whether NumPy would make numbers of what is none: NaN of None, where a function has no ``return``."""
    if array.dtype.kind == "O":
        return any(item is None or isinstance(item, str) for item in array.flat)
    return array.dtype.kind in "SUMmc"


def _number(value: Any, examples: int, name: str) -> float:
    """What a metric said as one number; a value of each example is averaged, as Keras does."""
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
        number = float(array.mean())
    else:
        raise ValueError(f"the metric {name} returned an array of shape {array.shape}; it must return one number")
    if name == ACCURACY and (number < 0 or number > 1):
        raise ValueError(f"the metric is called accuracy, a share from 0 to 1, but returned {number:g}")
    return number
