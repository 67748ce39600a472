"""Which labels a compiled model compares with which outputs, as the traced step shows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.core.reason import Code, Reason
from mpscale.worker.compiled.update import Compared, FitUpdate
from mpscale.worker.labels import PROBED, text_labels
from mpscale.worker.model import overrides
from mpscale.worker.objective import PROBE_SEED, NotedLoss, check_finite, check_values, options_of
from mpscale.worker.refused import Refused
from mpscale.worker.step import TrainStep
from mpscale.worker.traced import source
from mpscale.workloads.data import Structure, leaves
from mpscale.workloads.metric import kind_of

_ALL_NUMBERS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient"})
"""Operations after which all the numbers are there, as they are not after a slice."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Labels that a loss compares with outputs.

    Args:
        name: of the array, such as ``train_y['kind']``.
        kind: of the loss, its name in snake case; empty for one of the user's own.
        options: of the loss.
        label: the shape of a label as the loss gets it; None for an unknown size.
        output: the same of the outputs.
        squashed_by: softmax or sigmoid, if these outputs come from one.
        loss: as it was called.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    label: tuple[int | None, ...]
    output: tuple[int | None, ...]
    squashed_by: str | None
    loss: NotedLoss

    def is_spoiled_by(self, labels: npt.NDArray[Any]) -> bool:
        """Whether labels that are not finite make a loss so, as it is known of those that do not leave them out."""
        if labels.dtype.kind != "f" or None in self.label:
            return False
        rows = np.isfinite(labels).reshape(len(labels), -1).all(axis=1)
        sample = labels[np.argsort(rows, kind="stable")[:PROBED]].reshape(-1, *self.label)
        if rows.all():
            return False
        found, without = (self.loss.probed(given) for given in (sample, np.where(np.isfinite(sample), sample, 0)))
        return isinstance(found, Reason) and found.code is Code.NOT_FINITE and not isinstance(without, Reason)

    @property
    def classes(self) -> int | None:
        """Of how many classes a label is the number of one; None if it is none, or that is not known."""
        return self.output[-1] if self.kind == "sparse_categorical_crossentropy" and self.output else None


def judged_of(step: TrainStep) -> list[Judged]:
    """The labels of a compiled model that a ``keras.losses.Loss`` compares with outputs, as far as the trace shows."""
    update = step.update
    if not isinstance(update, FitUpdate):
        return []
    places = _named(step, "train_y")
    return [each for compared in update.compared if (each := _judged(compared, places)) is not None]


def cast_texts(step: TrainStep, part: str = "train_y") -> list[str]:
    """The names of arrays of a part that are text, and that a traced step casts to numbers, which TensorFlow cannot."""
    places = _named(step, part)
    texts = (
        op.inputs[0] for op in step.graph.get_operations() if op.type == "Cast" and op.inputs[0].dtype == tf.string
    )
    return sorted({places[place] for text in texts if (place := _place(text)) in places})


def refused_labels(step: TrainStep, labels: Structure) -> dict[str, Refused]:
    """Labels that a traced step cannot be trained on, by the name of the array.

    They are text, or numbers of classes for which there is no output, or not finite. The latter are refused if the step
    is Keras' own: a train_step of the model's may leave them out after a loss has been NaN.

    Args:
        step: of a compiled model.
        labels: those of the training set.

    Raises:
        ValueError: examples are text, and the model takes numbers.
    """
    if texts := cast_texts(step, "train_x"):
        raise ValueError(
            f"{' and '.join(texts)}: examples are text, and the model casts them to numbers, which TensorFlow cannot; "
            "make numbers of them where the data is made, for instance with keras.layers.TextVectorization or "
            "StringLookup, or in a layer of the model"
        )
    own = any(overrides(step.update.model, name) for name in ("train_step", "compute_loss"))
    arrays = {f"train_y{path}": array for path, array in ([] if labels is None else leaves(labels))}
    found = {name: text_labels(f"the labels in {name}") for name in cast_texts(step)}
    for each in judged_of(step):
        array, what = arrays[each.name], f"the labels in {each.name}"
        if array.dtype.kind in "US":
            continue
        try:
            if each.classes is not None or (not own and each.is_spoiled_by(array)):
                check_finite(array, what)
            if each.classes is not None and array.size:
                check_values(each.kind, each.options, array, each.classes, what)
        except Refused as refused:
            found[each.name] = refused
    return found


def probed_loss(step: TrainStep, batch: tuple[Structure, Structure, Structure]) -> float | Reason:
    """The sum of what a compiled model's losses of Keras' class are for labels and outputs that every mode has.

    These are the labels of the first batch, and outputs that are drawn (:class:`~mpscale.worker.objective.NotedLoss`),
    for each loss others. A loss that compares a model's outputs with each other has no labels that every mode has.

    Args:
        step: of a compiled model, traced.
        batch: examples, labels and weights of the first batch as the step gets them, arrays; None for no such.
    """
    update = step.update
    if not isinstance(update, FitUpdate) or not update.compared:
        return Reason(Code.NOT_COMPARABLE, "the model computes its loss without a keras.losses.Loss")
    known: dict[tuple[int, str], Any] = {}
    for traced, given in zip(keras.utils.unpack_x_y_sample_weight(step.batch), batch, strict=True):
        if given is not None:
            arrays = dict(leaves(given))
            known |= {_place(tensor): arrays[path] for path, tensor in leaves(traced)}
    total = 0.0
    for number, each in enumerate(update.compared):
        labels = _values(each.labels, known)
        if labels is None or not all(map(tf.is_symbolic_tensor, tf.nest.flatten(each.outputs))):
            return Reason(Code.NOT_COMPARABLE, f"{each.loss.name} compares with other things than the data")
        loss = NotedLoss(each.loss)
        loss.note(each.labels, each.outputs)
        found = loss.probed(labels, PROBE_SEED + number)
        if isinstance(found, Reason):
            return found
        total += found
    return total


def _named(step: TrainStep, part: str) -> dict[tuple[int, str], str]:
    """The names of the arrays of a part, ``train_x`` or ``train_y``, by their places in the trace."""
    x, y, _ = keras.utils.unpack_x_y_sample_weight(step.batch)
    given = x if part == "train_x" else y
    return {_place(tensor): f"{part}{path}" for path, tensor in ([] if given is None else leaves(given))}


def _values(labels: Any, known: Mapping[tuple[int, str], Any]) -> Any:
    """The values of labels in the first batch, an array; None if they are not all there."""
    if not tf.is_tensor(labels) or not labels.shape.rank or None in labels.shape[1:]:
        return None
    array = known.get(_place(labels)) if tf.is_symbolic_tensor(labels) else None
    array = tf.get_static_value(labels) if array is None else array
    if array is None:
        return None
    # What is cast to half precision here is so in some modes alone.
    dtype = tf.float32 if labels.dtype in (tf.float16, tf.bfloat16) else labels.dtype
    return np.reshape(array, (-1, *labels.shape[1:])).astype(dtype.as_numpy_dtype)


def _judged(compared: Compared, places: dict[tuple[int, str], str]) -> Judged | None:
    """None if it gets something else than labels of the data and one tensor."""
    loss, labels, outputs = compared.loss, compared.labels, compared.outputs
    if not all(tf.is_symbolic_tensor(each) and each.shape.rank for each in (labels, outputs)):
        return None
    if kind_of(loss) == "loss_function_wrapper":  # Keras' own around a function that compile was given
        loss = functools.partial(loss.fn, **loss._fn_kwargs)
    kind, name, last = kind_of(loss), places.get(_place(labels)), source(outputs).type
    if name is None:
        return None
    squashed_by, noted = last.lower() if last in ("Softmax", "Sigmoid") else None, NotedLoss(compared.loss)
    noted.note(labels, outputs)
    return Judged(
        name,
        kind,
        options_of(loss) if kind else {},
        tuple(labels.shape[1:]),
        tuple(outputs.shape[1:]),
        squashed_by,
        noted,
    )


def _place(tensor: Any) -> tuple[int, str]:
    """What identifies a tensor among those of the step and of the functions in it, whatever its dtype and shape."""
    op = tensor.op
    while op.type in _ALL_NUMBERS and op.inputs:
        op = op.inputs[0].op
    return id(op.graph), op.name
