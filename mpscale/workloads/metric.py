"""Accuracy, and the names and directions of Keras' metrics."""

from __future__ import annotations

import functools
import re
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

ACCURACY = "accuracy"
"""The name of the metric that fills the column final_accuracy: a share from 0 to 1, higher is better."""

_ACCURACIES = ("accuracy", "acc", "binary_accuracy", "categorical_accuracy", "sparse_categorical_accuracy")
_HIGHER = (
    *_ACCURACIES,
    "top_k_categorical_accuracy",
    "sparse_top_k_categorical_accuracy",
    "auc",
    "precision",
    "recall",
    "precision_at_recall",
    "recall_at_precision",
    "sensitivity_at_specificity",
    "specificity_at_sensitivity",
    "true_positives",
    "true_negatives",
    "f1_score",
    "f_beta_score",
    "io_u",
    "binary_io_u",
    "mean_io_u",
    "one_hot_io_u",
    "one_hot_mean_io_u",
    "r2_score",
    "cosine_similarity",
    "concordance_correlation",
    "pearson_correlation",
)
_LOWER = (
    "mse",
    "mean_squared_error",
    "root_mean_squared_error",
    "mae",
    "mean_absolute_error",
    "mape",
    "mean_absolute_percentage_error",
    "msle",
    "mean_squared_logarithmic_error",
    "log_cosh_error",
    "log_cosh",
    "huber",
    "hinge",
    "squared_hinge",
    "categorical_hinge",
    "kl_divergence",
    "poisson",
    "bce",
    "binary_crossentropy",
    "categorical_crossentropy",
    "sparse_categorical_crossentropy",
    "false_positives",
    "false_negatives",
)


def accuracy(labels: npt.NDArray[Any], outputs: npt.NDArray[Any], threshold: float | None = None) -> float:
    """Share of examples that are classified correctly. Like Keras, infer the kind of labels from their shape.

    An output with a NaN counts as wrong: argmax would return the NaN's own class.

    Args:
        labels: classes (examples, ...) or (examples, ..., 1), or one-hot (examples, ..., classes).
        outputs: (examples, ..., classes); a single output means label 1 if it is above ``threshold``, else label 0.
        threshold: needed for a single output.

    Raises:
        ValueError: labels are not classes or do not fit the outputs, or a threshold is missing.
    """
    shapes = f"labels of shape {labels.shape} and outputs of shape {outputs.shape}"
    if outputs.ndim == 1 or outputs.shape[-1] == 1:
        if labels.size != outputs.size or len(labels) != len(outputs):
            raise ValueError(f"{shapes} do not fit: a model with one output needs one label per example")
        if threshold is None:
            raise ValueError(
                "the threshold above which the model's one output means label 1 does not follow from this loss; set a "
                "metric such as keras.metrics.BinaryAccuracy(threshold=0.5), with threshold=0.0 for logits"
            )
        labels, outputs = labels.reshape(-1), outputs.reshape(-1)
        _check_classes(labels, 2, "an accuracy of one output needs labels 0 and 1")
        return float(np.mean(((outputs > threshold) == (labels > 0)) & ~np.isnan(outputs)))
    classes = outputs.shape[-1]
    if labels.shape == outputs.shape:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(axis=-1) == 1).all()):
            raise ValueError(
                f"{shapes}: an accuracy needs class numbers or one-hot labels, and these are neither; set another "
                "metric, such as 'mae', or keras.metrics.BinaryAccuracy() for several labels per example"
            )
        labels = labels.argmax(axis=-1)
    elif labels.shape == (*outputs.shape[:-1], 1):
        labels = labels[..., 0]
    elif labels.shape != outputs.shape[:-1]:
        raise ValueError(f"{shapes} do not fit: an accuracy needs one class number per example, or one-hot labels")
    _check_classes(labels, classes, f"outputs of shape {outputs.shape} have classes 0 to {classes - 1}")
    right = np.argmax(outputs, axis=-1) == labels
    return float(np.mean(right & ~np.isnan(outputs).any(axis=-1)))


def _check_classes(labels: npt.NDArray[Any], classes: int, have: str) -> None:
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"an accuracy needs numeric labels, not {labels.dtype}; number the classes from 0")
    if not ((labels >= 0) & (labels < classes) & (labels == np.floor(labels))).all():
        raise ValueError(
            f"{have}, but the labels range from {labels.min():g} to {labels.max():g}; number the classes from 0, or, "
            "if this is not a classification, set another metric, such as 'mae'"
        )


def names(metric: Any) -> tuple[str | None, bool | None]:
    """The name of Keras' ``metric``, and whether higher is better; None for what only its author knows.

    Args:
        metric: a name, an instance or a class of ``keras.metrics.Metric``, or a function of Keras; for anything else
            both are None.
    """
    while isinstance(metric, functools.partial):
        metric = metric.func
    if isinstance(metric, str):
        kind, name = _snake(metric), metric
    elif is_keras_metric(metric):
        kind, name = kind_of(metric), str(metric.name)
    elif _of_keras(metric) and isinstance(metric, type | FunctionType):
        kind = name = kind_of(metric)
        if metric.__module__.endswith("losses"):
            # Keras' loss cosine_similarity is the negative of its metric of that name.
            return name, False if kind in (*_LOWER, "cosine_similarity") else None
    else:
        return None, None
    if kind in _ACCURACIES:
        return ACCURACY, True
    return name, True if kind in _HIGHER else False if kind in _LOWER else None


def is_keras_metric(candidate: Any) -> bool:
    """Whether ``candidate`` is an instance of Keras' Metric. This does not import Keras."""
    return is_instance_of_keras(candidate, "Metric")


def is_instance_of_keras(candidate: Any, kind: str) -> bool:
    """Whether ``candidate`` is an instance of Keras' class ``kind``, such as Optimizer. This does not import Keras."""
    return any(base.__name__ == kind and _of_keras(base) for base in type(candidate).__mro__)


def kind_of(thing: Any) -> str:
    """Keras' name of one of its own losses or metrics, in snake case; empty for everything else.

    That includes classes derived from Keras', which may mean something else.

    Args:
        thing: an instance, a class or a function; or a ``functools.partial`` of one.
    """
    while isinstance(thing, functools.partial):
        thing = thing.func
    named = thing if isinstance(thing, type | FunctionType) else type(thing)
    return _snake(named.__name__) if _of_keras(named) else ""


def _of_keras(named: Any) -> bool:
    return str(getattr(named, "__module__", "")).partition(".")[0] == "keras"


def _snake(name: str) -> str:
    """``MeanSquaredError`` as mean_squared_error, as Keras does it; abbreviations such as MSE in lower case."""
    if name.isupper():
        return name.lower()
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
