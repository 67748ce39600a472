"""The loss as a train step computes it: one number of labels and outputs, checked before anything is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.worker import labels as label_forms
from mpscale.workloads.metric import kind_of
from mpscale.workloads.workload import sparse_cross_entropy

Loss = Callable[[Any, Any], Any]

_BY_SHAPE = ("crossentropy", "ce")
"""Names by which Keras picks the cross-entropy that fits the shapes."""


class Objective:
    """``(labels, outputs) -> loss``, a scalar in float32 or wider, as Keras' own ``fit`` makes it of the same loss.

    Labels get the shape that the loss takes them in (see labels.py), float16 outputs are cast to float32 first, and
    losses of single examples are averaged over those that the model does not mask.

    Args:
        loss: as :class:`~mpscale.workloads.Workload` takes it.
        labels: the training set's, to check them and to see which shape of them the loss takes.

    Raises:
        ValueError: Keras knows no loss of that name, or the labels cannot be trained on.
    """

    def __init__(self, loss: Loss | str, labels: npt.NDArray[Any]) -> None:
        self._labels = labels
        self._loss: Loss | None = None if loss in _BY_SHAPE else _resolved(loss)
        self._form: label_forms.Form | None = None
        self.output: tuple[int | None, ...] = ()
        """Shape of one example's output, known once the loss has been traced."""
        self._squashed_by: str | None = None
        if labels.dtype.kind in "US":
            raise ValueError(f"the labels are text ({labels.dtype}); give each class a number from 0")

    def __call__(self, labels: Any, outputs: Any) -> Any:
        """The loss of a batch.

        Args:
            labels: (batch, ...).
            outputs: what the model returned.

        Raises:
            ValueError: outputs and labels do not fit each other or the loss, or the loss is no number.
        """
        check_outputs(outputs)
        if self._form is None:
            with tf.init_scope():
                self._settle(outputs)
        assert self._form is not None and self._loss is not None
        labels, mask = self._form(labels), getattr(outputs, "_keras_mask", None)
        if isinstance(self._loss, keras.losses.Loss):
            return _scalar(self._loss(labels, outputs))
        if outputs.dtype in (tf.float16, tf.bfloat16):
            outputs = tf.cast(outputs, tf.float32)
        # The mean that the default loss takes itself would count what is masked.
        of_each = mask is not None and self._loss is sparse_cross_entropy
        return _scalar(_reduced((_cross_entropies if of_each else self._loss)(labels, outputs), mask))

    def threshold(self) -> float | None:
        """For a model with one output: the value at which the loss is indifferent between labels 0 and 1.

        0 for logits, 0.5 for probabilities; None where it is neither, or the loss takes logits and the model's last
        operation is a sigmoid, so that one of the two is not meant, or the loss does not take one example alone.
        """
        if None in self.output:
            return None
        loss = label_forms.repeatable(self)
        for value in (0.0, 0.5):
            outputs = np.full([1, *map(int, self.output)], value, np.float32)  # type: ignore[arg-type]
            zero, one = (
                label_forms.mean(loss, np.full((1, *self._labels.shape[1:]), label, self._labels.dtype), outputs)
                for label in (0, 1)
            )
            if zero is not None and one is not None and np.isclose(zero, one, rtol=1e-4):
                return None if value == 0.0 and self._squashed_by else value
        return None

    def _settle(self, outputs: Any) -> None:
        """Decides once, when the first batch is traced, and checks the labels."""
        self.output = tuple(outputs.shape[1:])
        tail = self._labels.shape[1:]
        if self._loss is None:
            sparse = len(tail) < len(self.output) or tail[-1:] == (1,)
            self._loss = (
                keras.losses.binary_crossentropy
                if self.output in ((), (1,)) or self.output[-1] == 1
                else keras.losses.sparse_categorical_crossentropy
                if sparse
                else keras.losses.categorical_crossentropy
            )
        self._squashed_by = _squashed_by(outputs)
        kind = kind_of(self._loss) if self._loss is not sparse_cross_entropy else "sparse_categorical_crossentropy"
        if kind:
            self._check_finite()
            self._form = label_forms.keras_form(kind, tail, self.output)
            label_forms.check_fit(kind, self._form(self._labels).shape[1:], self.output)
            self._check_values(kind)
            return
        if None in self.output:
            # Nothing can be tried without a shape.
            self._form = label_forms.as_they_are
            return
        examples = outputs.shape[0] or label_forms.PROBED
        labels = self._as_taken(self._loss, label_forms.sample_of(self._labels, examples))
        loss, draw = label_forms.repeatable(self._loss), label_forms.outputs_like(labels, self.output, 0)
        if not np.isfinite(np.asarray(self._labels, float)).all():
            # A loss of the user's may leave out labels that are missing; one that does says something finite.
            missing = labels.copy()
            missing[::2] = np.nan
            if all(
                label_forms.mean(loss, form(missing), draw) is None for form in label_forms.forms(tail, self.output)
            ):
                self._check_finite()
        form = label_forms.form_for(loss, labels, self.output, "loss", examples)
        dtype = tf.as_dtype(labels.dtype)
        self._form = form if labels.dtype == self._labels.dtype else lambda labels: tf.cast(form(labels), dtype)

    def _as_taken(self, loss: Loss, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Labels in the dtype that a function of the user's takes them in.

        Keras hands every loss its labels as floats. Whole numbers stay what they are if the loss can do with them and
        says the same: of uint8, 0 less 1 is 255.
        """
        outputs = label_forms.outputs_like(labels, self.output, 0)
        floats = labels.astype(np.float32)
        forms = label_forms.forms(labels.shape[1:], self.output)

        def runs(labels: Any) -> bool:
            for form in forms:
                try:
                    label_forms.traced_with(loss, form(labels), outputs)
                    return True
                except Exception:  # the user's code, on a dtype that it may not be made for
                    continue
            return False

        if labels.dtype.kind == "f":
            return floats if runs(floats) or not runs(labels) else labels
        if not runs(labels):
            return floats
        if runs(floats):
            tried = label_forms.repeatable(loss)
            for form in forms:
                whole, real = (label_forms.mean(tried, form(given), outputs) for given in (labels, floats))
                if real is not None and (whole is None or not np.isclose(whole, real, rtol=1e-3)):
                    return floats
        return labels

    def _check_finite(self) -> None:
        labels = self._labels
        if labels.dtype.kind == "f" and not np.isfinite(labels).all():
            raise ValueError(f"{np.sum(~np.isfinite(labels))} of the training labels are not finite")

    def _check_values(self, kind: str) -> None:
        """Checks labels and outputs against a loss of Keras'."""
        options = _options(self._loss)
        logits = True if self._loss is sparse_cross_entropy else options.get("from_logits", False)
        if logits and self._squashed_by:
            raise ValueError(
                f"the model's last operation is a {self._squashed_by}, but the loss takes logits and would apply "
                "another one; leave the activation out, or take a loss with from_logits=False, such as "
                f"loss={kind!r} by its name"
            )
        labels = self._labels
        low, high = labels.min(), labels.max()
        if kind == "sparse_categorical_crossentropy" and self.output[-1] is not None:
            counted = labels[labels != options["ignore_class"]] if options.get("ignore_class") is not None else labels
            whole = (counted == np.floor(counted)).all() if counted.dtype.kind == "f" else True
            if counted.size and not (whole and counted.min() >= 0 and counted.max() < self.output[-1]):
                raise ValueError(
                    f"the training labels go from {low:g} to {high:g}, but a model with {self.output[-1]} outputs "
                    f"has classes 0 to {self.output[-1] - 1}; number the classes from 0, or, if this is no "
                    "classification of that kind, give its loss, such as loss='mse' or "
                    "loss=keras.losses.BinaryCrossentropy(from_logits=True)"
                )
        if kind in ("binary_crossentropy", "binary_focal_crossentropy") and not 0 <= low <= high <= 1:
            raise ValueError(f"{kind} takes labels from 0 to 1, but the training labels go from {low:g} to {high:g}")


def check_outputs(outputs: Any) -> None:
    """Checks that a model returned one tensor of numbers, an example a row.

    Raises:
        ValueError: it returned something else.
    """
    if isinstance(outputs, dict | list | tuple):
        raise ValueError(
            f"the model returns a {type(outputs).__name__} of {len(outputs)} outputs; "
            "mpscale trains models with one output so far: build one that returns the output that is trained"
        )
    if not tf.is_tensor(outputs) or isinstance(outputs, tf.RaggedTensor | tf.SparseTensor):
        raise ValueError(f"the model returns a {type(outputs).__name__}, not a tensor")
    if outputs.shape.rank is None or outputs.shape.rank == 0 or not outputs.dtype.is_floating:
        raise ValueError(
            f"the model returns {outputs.dtype.name} of shape {outputs.shape}; "
            "floating-point outputs (examples, ...) are needed"
        )


def _resolved(given: Loss | str) -> Loss:
    try:
        loss: Loss = keras.losses.get(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"Keras knows no loss called {given!r}; give a name such as 'mse', or the loss") from error
    if isinstance(loss, type) and issubclass(loss, keras.losses.Loss):
        loss = loss()
    if isinstance(loss, keras.losses.Loss) and loss.reduction in (None, "none"):
        raise ValueError(f"{type(loss).__name__} has reduction=None, so it is no number; leave reduction out")
    return loss


def _cross_entropies(labels: Any, logits: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)


def _options(loss: Any) -> dict[str, Any]:
    """The options that a loss of Keras' was made with, as far as they can be seen."""
    if isinstance(loss, functools.partial):
        return _options(loss.func) | loss.keywords
    return dict(loss.get_config()) if isinstance(loss, keras.losses.Loss) else {}


def _squashed_by(outputs: Any) -> str | None:
    """``softmax`` or ``sigmoid`` where that is what the model ends in, as far as the trace tells."""
    return {"Softmax": "softmax", "Sigmoid": "sigmoid"}.get(getattr(getattr(outputs, "op", None), "type", ""))


def _reduced(losses: Any, mask: Any) -> Any:
    """The mean, over what is not masked; what is one number already stays as it is."""
    losses = tf.convert_to_tensor(losses)
    if losses.shape.rank == 0:
        return losses
    if mask is not None:
        weights = tf.cast(mask, losses.dtype)
        if weights.shape.rank == losses.shape.rank:
            return tf.math.divide_no_nan(tf.reduce_sum(losses * weights), tf.reduce_sum(weights))
    return tf.reduce_mean(losses)


def _scalar(loss: Any) -> Any:
    """``loss`` as a scalar in float32 or wider."""
    if loss.shape.rank != 0 or not loss.dtype.is_floating:
        raise ValueError(
            f"the loss returns {loss.dtype.name} of shape {loss.shape}; one floating-point number is needed"
        )
    return tf.cast(loss, tf.float32) if loss.dtype in (tf.float16, tf.bfloat16) else loss
