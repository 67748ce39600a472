"""The shape in which a loss or a metric takes its labels.

Labels (examples,) and outputs (examples, 1), or (examples, 1) and (examples, classes), broadcast to a matrix of every
label against every output: nothing fails, and the result is wrong. Keras' own losses and metrics get the shape that
Keras would give them. A function of the user's own is tried out: its result must change when the labels are moved. That
of an all-against-all matrix does not. If this does not decide, its result for several examples must be the mean, or the
sum, of its results for each one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.core.lint import Check
from mpscale.worker.refused import Refused

Shape = Sequence[int | None]
"""Shape of one example's label or output; None for an unknown size."""

Function = Callable[[Any, Any], Any]
"""A loss or a metric: ``(labels, outputs)`` to a number or an array of numbers."""

Form = Callable[[Any], Any]
"""Reshapes labels, a NumPy array or a tensor, for a loss or metric."""

PROBED = 16
"""Examples on which a function is tried out."""
_SHIFTS = (1, 2, 5)  # places by which labels are moved
_RTOL = 1e-3

_HAVE_SPARSE = ("categorical_crossentropy", "categorical_accuracy", "top_k_categorical_accuracy")
_SHAPES_OF_THEIR_OWN = ("ctc", "circle", "io_u", "mean_io_u", "one_hot_io_u", "one_hot_mean_io_u")


def text_labels(what: str) -> Refused:
    """Why labels that are text cannot be trained on; ``what`` names them."""
    return Refused(
        Check.LABELS_MISFIT,
        f"{what} are text, which no loss of Keras takes",
        "number the classes from 0: np.unique(labels, return_inverse=True)[1] of arrays; in a pipeline, map labels by "
        "keras.layers.StringLookup(vocabulary=[...], num_oov_indices=0)",
    )


def as_they_are(labels: Any) -> Any:
    """Keep labels that fit already."""
    return labels


def _expanded(labels: Any) -> Any:
    return labels[..., None]


def _squeezed(labels: Any) -> Any:
    return labels[..., 0]


def forms(labels: Shape, outputs: Shape) -> list[Form]:
    """The forms that labels may be meant to have, Keras' choice last."""
    found: list[Form] = [as_they_are]
    if len(labels) + 1 == len(outputs) and outputs[-1] == 1:
        found.append(_expanded)
    more_axes = len(labels) - len(outputs)
    if labels and labels[-1] == 1 and (more_axes == 1 or (more_axes == 0 and outputs[-1] != 1)):
        found.append(_squeezed)
    return found


def _takes_classes(kind: str) -> bool:
    """Whether a Keras loss or metric takes class numbers."""
    return kind.startswith("sparse") or kind == "categorical_generalized_cross_entropy"


def keras_form(kind: str, labels: Shape, outputs: Shape) -> Form:
    """The form that a Keras loss or metric gives its labels; ``kind`` is its name in snake case."""
    if _takes_classes(kind):
        return _squeezed if labels and labels[-1] == 1 and len(labels) == len(outputs) else as_they_are
    return forms(labels, outputs)[-1]


def check_fit(kind: str, labels: Shape, outputs: Shape) -> None:
    """Check labels for a Keras loss or metric, which would broadcast labels that do not fit.

    Args:
        kind: its name in snake case; empty for a function of the user's own, which is not checked.
        labels: in their final form.
        outputs: the model's.

    Raises:
        ValueError: they do not fit.
    """
    if not kind or kind in _SHAPES_OF_THEIR_OWN:
        return
    sparse = _takes_classes(kind)
    if sparse and not outputs:
        raise Refused(
            Check.LABELS_MISFIT,
            f"{kind} needs one output per class, but the model's outputs have shape (examples,)",
            "end the model with one unit per class",
        )
    if not tf.TensorShape(labels).is_compatible_with(outputs[:-1] if sparse else outputs):
        if sparse and len(labels) == len(outputs):
            cure = f"{kind} takes class numbers; for one-hot labels use categorical_crossentropy or the like"
        elif sparse:
            cure = f"{kind} takes one class number per example"
        else:
            cure = f"{kind} takes labels of the outputs' shape; for class numbers "
            cure += "use its 'sparse' relative" if kind in _HAVE_SPARSE else "pass keras.utils.to_categorical(labels)"
        text = f"labels of shape {_shape(labels)} do not fit outputs of shape {_shape(outputs)}"
        raise Refused(Check.LABELS_MISFIT, text, cure)


def form_for(function: Function, labels: npt.NDArray[Any], outputs: Shape, what: str, examples: int = PROBED) -> Form:
    """The form in which a function of the user's own takes its labels.

    Args:
        function: a loss or metric.
        labels: of the training or test set (examples, ...).
        outputs: shape of one example's output.
        what: ``"loss"`` or ``"metric"``, for the message.
        examples: batch size for trying it out.

    Raises:
        ValueError: the forms lead to different results, and nothing shows which one is meant.
    """
    candidates = forms(labels.shape[1:], outputs)
    if len(candidates) == 1 or None in outputs:
        return candidates[0]
    sample = sample_of(labels, examples)
    draws = [outputs_like(sample, outputs, seed) for seed in range(2)]
    results = {form: [mean(function, form(sample), draw) for draw in draws] for form in candidates}
    running = [form for form in candidates if None not in results[form]]
    pairing = [form for form in running if _pairs(function, form(sample), draws, results[form])]
    if len(pairing) == 1:
        return pairing[0]
    running = pairing or running
    for form in running:
        if all(_adds_up(function, form(sample), draw, results[form][place]) for place, draw in enumerate(draws)):
            return form
    if not running or all(np.allclose(results[form], results[running[0]], _RTOL) for form in running):  # type: ignore[arg-type]
        # If nothing runs, the error of the first real batch is a better explanation than that of a probe.
        return running[0] if running else candidates[0]
    raise Refused(
        Check.LABELS_MISFIT,
        f"the {what} broadcasts labels of shape {_shape(labels.shape[1:])} against outputs of shape {_shape(outputs)}, "
        "and it is unclear what is meant",
        f"give the labels the shape {_shape(outputs)}, or reshape one of them in the {what}",
    )


def repeatable(function: Function) -> Function:
    """Turn a function of tensors into one of arrays that leaves its variables unchanged.

    Every call is traced anew, as the train step will be, so all calls draw the same random numbers.
    """

    def call(labels: Any, outputs: Any) -> Any:
        given = tf.constant(labels), tf.constant(outputs)
        traced = traced_with(function, *given)
        kept = [(variable, variable.read_value()) for variable in traced.graph.variables]
        try:
            return np.asarray(traced(*given))
        finally:
            for variable, value in kept:
                variable.assign(value)

    return call


def traced_with(function: Function, labels: Any, outputs: Any) -> Any:
    """Trace ``function`` for tensors of the shapes and dtypes of these."""

    def call(labels: Any, outputs: Any) -> Any:
        return tf.convert_to_tensor(function(labels, outputs))

    specs = (tf.TensorSpec(np.shape(given), given.dtype) for given in (labels, outputs))
    return tf.function(call).get_concrete_function(*specs)


def sample_of(labels: npt.NDArray[Any], examples: int = PROBED) -> npt.NDArray[Any]:
    """Pick ``examples`` labels, different ones if possible: equal labels would hide a mix-up."""
    _, first = np.unique(labels.reshape(len(labels), -1)[:, 0], return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, min(len(first), -(-examples // 2))).astype(int)]
    return np.resize(labels[np.concatenate([chosen, np.arange(len(labels))])[:examples]], (examples, *labels.shape[1:]))


def outputs_like(labels: npt.NDArray[Any], shape: Shape, seed: int) -> npt.NDArray[np.float32]:
    """Outputs between 0 and 1 of a model that is mostly right: if all were wrong, every form would have one result."""
    random = np.random.default_rng(seed)
    outputs = random.uniform(0.05, 0.5, (len(labels), *shape))  # type: ignore[arg-type]
    values = np.nan_to_num(labels.astype(float))
    if values.size == outputs.size and (not shape or shape[-1] == 1):
        low, high = values.min(), values.max()
        outputs += 0.45 * ((values - low) / (high - low or 1.0)).reshape(outputs.shape)
    elif shape and values.size * outputs.shape[-1] == outputs.size:
        right = random.random(len(labels)) < 0.75
        place = np.clip(values, 0, outputs.shape[-1] - 1).astype(int).reshape(*outputs.shape[:-1], 1)
        np.put_along_axis(outputs, place, np.where(right.reshape(-1, *[1] * (place.ndim - 1)), 0.95, 0.3), axis=-1)
    return outputs.astype(np.float32)


def _pairs(function: Function, labels: Any, draws: Sequence[Any], results: Sequence[float | None]) -> bool:
    """Whether the function's result depends on which label goes with which output."""
    for draw, whole in zip(draws, results, strict=True):
        for shift in _SHIFTS:
            moved = mean(function, np.roll(labels, shift, axis=0), draw)
            if moved is not None and not np.isclose(moved, whole, _RTOL):  # type: ignore[arg-type]
                return True
    return False


def _adds_up(function: Function, labels: Any, outputs: Any, whole: float | None) -> bool:
    """Whether the result for all examples, ``whole``, is the mean or the sum of the results for each one."""
    if len(outputs) > PROBED:
        labels, outputs = labels[:PROBED], outputs[:PROBED]
        whole = mean(function, labels, outputs)
    singles = [mean(function, labels[i : i + 1], outputs[i : i + 1]) for i in range(len(outputs))]
    if None in singles or whole is None:
        return False
    total = float(np.sum(singles))  # type: ignore[arg-type]
    return bool(np.isclose(whole, total / len(singles), _RTOL) or np.isclose(whole, total, _RTOL))


def mean(function: Function, labels: Any, outputs: Any) -> float | None:
    """The function's result for arrays, averaged; None if it fails or is not finite."""
    try:
        value = float(np.mean(np.asarray(function(labels, outputs), dtype=float)))
    except Exception:  # from the user's code, which may not be made for this shape
        return None
    return value if np.isfinite(value) else None


def _shape(example: Shape) -> str:
    inside = ", ".join(["examples", *("?" if size is None else str(size) for size in example)])
    return f"({inside}{',' if not example else ''})"
