"""Which labels a compiled model compares with which outputs by a loss of Keras, as the traced step shows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.reason import Code, Reason
from mpscale.worker.compiled.update import Compared, FitUpdate
from mpscale.worker.objective import PROBE_SEED, NotedLoss, check_values, options_of
from mpscale.worker.refused import Refused
from mpscale.worker.step import TrainStep
from mpscale.worker.traced import source
from mpscale.workloads.data import Structure, leaves
from mpscale.workloads.metric import kind_of

_ALL_NUMBERS = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient"})
"""Operations after which all the numbers are there, as they are not after a slice."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Labels that a loss of Keras compares with outputs.

    Args:
        name: of the array, such as ``train_y['kind']``.
        kind: of the loss, its name in snake case.
        options: of the loss.
        label: the shape of a label as the loss gets it; None for an unknown size.
        output: the same of the outputs.
        squashed_by: softmax or sigmoid, if these outputs come from one.
    """

    name: str
    kind: str
    options: Mapping[str, Any]
    label: tuple[int | None, ...]
    output: tuple[int | None, ...]
    squashed_by: str | None

    @property
    def classes(self) -> int | None:
        """Of how many classes a label is the number of one; None if it is none, or that is not known."""
        return self.output[-1] if self.kind == "sparse_categorical_crossentropy" and self.output else None


def judged_of(step: TrainStep) -> list[Judged]:
    """The labels of a compiled model that a loss of Keras compares with outputs, as far as the trace shows them."""
    update = step.update
    if not isinstance(update, FitUpdate):
        return []
    _, y, _ = keras.utils.unpack_x_y_sample_weight(step.batch)
    places = {_place(tensor): f"train_y{path}" for path, tensor in ([] if y is None else leaves(y))}
    return [each for compared in update.compared if (each := _judged(compared, places)) is not None]


def beyond_classes(step: TrainStep, labels: Structure) -> dict[str, Refused]:
    """Class numbers that a traced step has no output for, by the name of the array: with them a loss is NaN.

    Args:
        step: of a compiled model.
        labels: those of the training set.
    """
    arrays = {f"train_y{path}": array for path, array in ([] if labels is None else leaves(labels))}
    found = {}
    for each in judged_of(step):
        if each.classes is not None and arrays[each.name].size and arrays[each.name].dtype.kind not in "US":
            try:
                check_values(each.kind, each.options, arrays[each.name], each.classes, f"the labels in {each.name}")
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
    """None if it is a loss of the user's own, or gets something else than labels of the data and one tensor."""
    loss, labels, outputs = compared.loss, compared.labels, compared.outputs
    if not all(tf.is_symbolic_tensor(each) and each.shape.rank for each in (labels, outputs)):
        return None
    if kind_of(loss) == "loss_function_wrapper":  # Keras' own around a function that compile was given
        loss = functools.partial(loss.fn, **loss._fn_kwargs)
    kind, name, last = kind_of(loss), places.get(_place(labels)), source(outputs).type
    if not kind or name is None:
        return None
    squashed_by = last.lower() if last in ("Softmax", "Sigmoid") else None
    return Judged(name, kind, options_of(loss), tuple(labels.shape[1:]), tuple(outputs.shape[1:]), squashed_by)


def _place(tensor: Any) -> tuple[int, str]:
    """What identifies a tensor among those of the step and of the functions in it, whatever its dtype and shape."""
    op = tensor.op
    while op.type in _ALL_NUMBERS and op.inputs:
        op = op.inputs[0].op
    return id(op.graph), op.name
