"""The evaluation of a compiled model: its own ``test_step`` over all of the validation data, as Keras' ``evaluate``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.worker.replicas import alone, look, on_replicas, restored
from mpscale.workloads import Workload
from mpscale.workloads import metric as metrics
from mpscale.workloads.metric import ACCURACY


class FitEvaluator:
    """All metrics of a compiled model on the validation data.

    Whatever an evaluation changes, such as the state of metrics, is restored: the training goes on as if nothing had
    been evaluated.

    Args:
        model: compiled; a train step of it has been traced.
        batches: returns the validation data by batch, of the structure that ``test_step`` takes.
        jit: compile with XLA.
        first: a batch like the first one.
        strategy: of replicas, of which one evaluates; None without one.
        agreed: returns the first worker's value (:meth:`~mpscale.worker.step.TrainStep.agreed`). Each worker evaluates
            by itself, and callbacks decide by what it finds.

    Raises:
        ValueError: ``test_step`` does not run, or returns no metrics.
    """

    def __init__(
        self,
        model: keras.Model,
        batches: Callable[[], Iterable[Any]],
        jit: bool,
        first: Any,
        strategy: tf.distribute.Strategy | None = None,
        agreed: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self._model, self._batches, self._first, self._agreed = model, batches, first, agreed
        self._here = contextlib.nullcontext if strategy is None else functools.partial(alone, strategy)

        def test_step(batch: Any) -> Any:
            with self._here():
                return model.test_step(batch)

        self._step = tf.function(test_step, jit_compile=jit, autograph=False)
        specs = tf.nest.map_structure(lambda array: tf.TensorSpec(np.shape(array), tf.as_dtype(array.dtype)), first)
        try:
            if strategy is not None:
                look(model.test_step, specs, strategy)
            traced = self._step.get_concrete_function(specs)
        except ValueError as error:
            if "No loss to compute" not in str(error):
                raise
            raise ValueError(
                f"{type(model).__name__} is compiled without a loss, so its test_step has nothing to evaluate: define "
                "test_step, or compute_loss, or leave validation out"
            ) from error
        found = traced.structured_outputs
        if not isinstance(found, dict) or not found:
            raise ValueError(
                f"test_step of {type(model).__name__} returns {type(found).__name__}; it must return a dictionary of "
                "metrics, as Keras' own does"
            )
        self.shapes: dict[str, tuple[int | None, ...]] = {
            name: tuple(value.shape) for name, value in _flat(found).items()
        }
        """The shapes of the metrics by name, as in the logs of ``fit`` without ``val_``."""
        trained = {id(each) for variable in model.trainable_variables for each in on_replicas(variable.value)}
        state = [each for variable in model.metrics_variables for each in on_replicas(variable.value)]
        used = {id(each): each for each in (*traced.graph.variables, *state) if id(each) not in trained}
        self._changeable = list(used.values())

    def __call__(self) -> dict[str, Any]:
        """The metrics over all of the validation data, each a number or an array."""
        return {name: self._agreed(value) for name, value in self._over(self._batches()).items()}

    def try_out(self) -> None:
        """Raise now what an evaluation would raise after the training: evaluate a batch."""
        self._over([self._first])

    def _over(self, batches: Iterable[Any]) -> dict[str, Any]:
        rows, sizes = [], []
        with restored(self._changeable):
            self._model.reset_metrics()
            for batch in batches:
                given = tf.nest.map_structure(tf.convert_to_tensor, batch)
                rows.append(self._step(given))
                sizes.append(tf.nest.flatten(given)[0].shape[0])
            with self._here():
                known = _flat(self._model.get_metrics_result())
        if not rows:
            raise ValueError("the validation data has no batches")
        if known.keys() == self.shapes.keys():
            return {name: np.asarray(value) for name, value in known.items()}
        # Its own test_step returns something else than the state of metrics: what it found in each batch.
        found = [_flat(row) for row in rows]
        weights = np.array(sizes) / sum(sizes)
        return {
            name: sum(weight * np.asarray(row[name], float) for weight, row in zip(weights, found, strict=True))
            for name in self.shapes
        }


class Judge:
    """The metric by which a workload of a compiled model is judged.

    Args:
        workload: of a compiled model.
        model: its model.
        evaluator: of the model.

    Raises:
        ValueError: the model has no such metric, it is not one number, or its direction is unknown.
    """

    def __init__(self, workload: Workload, model: keras.Model, evaluator: FitEvaluator) -> None:
        self.evaluator, names = evaluator, evaluator.shapes
        compiled, losses, own = _metrics_of(model)
        asked = None if workload.metric is None else str(workload.metric)
        if asked is not None and asked not in names:
            raise ValueError(
                f"workload {workload.name}: the model has no metric called {asked!r}; it has {', '.join(names)}"
            )
        self.key = asked or next(key for key in (*compiled, "loss", *names) if key in names)
        if any(size != 1 for size in names[self.key]):
            raise ValueError(
                f"workload {workload.name}: the metric {self.key} is an array of shape {names[self.key]}, but modes "
                "are judged by one number; for F1Score say average='macro', or choose another metric of the model: "
                "metric='...'"
            )
        metric: Any = compiled.get(self.key, own.get(self.key))
        name, higher = (None, False) if self.key == "loss" or self.key in losses else _named(metric)
        shown = "val_loss" if self.key == "loss" else self.key
        if name == ACCURACY and self.key == metric.name:
            shown = ACCURACY
        self.workload = workload.judged_by(shown, higher, name == ACCURACY)
        """With the name and the direction of the metric."""

    def __call__(self) -> float:
        """The metric on the validation data."""
        return float(np.asarray(self.evaluator()[self.key]).reshape(()))


def _flat(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs without the dictionaries that some metrics return, as Keras flattens them."""
    flat: dict[str, Any] = {}
    for name, value in logs.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def _metrics_of(model: keras.Model) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """The compiled metrics by name in the logs, the names of losses of single outputs, and the model's own metrics."""
    compiled: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for metric in model.metrics:
        if type(metric).__name__ == "CompileMetrics":
            compiled = dict(zip(metric.result(), metric.metrics, strict=True))
        else:
            own[metric.name] = metric
    losses = getattr(getattr(model, "_compile_loss", None), "metrics", [])
    return compiled, [metric.name for metric in losses], own


def _named(metric: Any) -> tuple[str | None, bool | None]:
    """Name and direction of a metric, also of a function of Keras' that ``compile`` has wrapped; None if unknown."""
    if type(metric) is keras.metrics.MeanMetricWrapper:
        metric = metric._fn
    return metrics.names(metric)
