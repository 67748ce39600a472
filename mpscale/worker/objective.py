"""The loss of a train step: one number for a batch of labels and outputs.

:class:`Objective` checks it before the training, :class:`NotedLoss` describes it so that the modes can be compared.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mpscale.core.lint import Check
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.scaling.skip import all_nodes
from mpscale.worker import labels as label_forms
from mpscale.worker.precision import computes_below_float32
from mpscale.worker.refused import Refused
from mpscale.workloads.metric import kind_of
from mpscale.workloads.workload import COMPILE_IT, sparse_cross_entropy

Loss = Callable[[Any, Any], Any]

PROBE_SEED = 17
"""Of the outputs for which the losses of modes are compared."""

_NOT_REPEATABLE = re.compile(r"Assign|ResourceScatter|Random|Multinomial|RngRead|RngSkip|PyFunc")
"""Operations that make a loss return another value each time."""


class Objective:
    """``(labels, outputs) -> loss``: a scalar in float32 or wider, as Keras' ``fit`` computes it.

    Labels get the shape that the loss takes (see labels.py). Outputs in half precision are cast to float32 first.
    Losses of single examples are averaged, leaving out what the model masks.

    Args:
        loss: as in :class:`~mpscale.workloads.Workload`.
        labels: of the training set, to check them and to find out which shape the loss takes.

    Raises:
        ValueError: Keras knows no loss of that name, or the labels cannot be trained on.
    """

    def __init__(self, loss: Loss | str, labels: npt.NDArray[Any]) -> None:
        self._labels = labels
        # For these names Keras picks the cross-entropy that fits the shapes.
        self._loss: Loss | None = None if loss in ("crossentropy", "ce") else _resolved(loss)
        self._traced: Loss | None = None
        self._form: label_forms.Form | None = None
        self.output: tuple[int | None, ...] = ()
        """Shape of one example's output; known once the loss has been traced."""
        self._squashed_by: str | None = None  # softmax or sigmoid, if the trace shows that the model ends in one
        if labels.dtype.kind in "US":
            raise label_forms.text_labels("the labels")

    def __call__(self, labels: Any, outputs: Any) -> Any:
        """The loss of a batch of labels (batch, ...) and the model's outputs.

        Raises:
            ValueError: labels and outputs do not fit each other or the loss, or the loss is not a number.
        """
        check_outputs(outputs)
        if self._form is None:
            with tf.init_scope():
                self._settle(outputs)
        assert self._form is not None and self._loss is not None and self._traced is not None
        labels, mask = self._form(labels), getattr(outputs, "_keras_mask", None)
        if isinstance(self._loss, keras.losses.Loss):
            return _scalar(self._traced(labels, outputs))
        if outputs.dtype in (tf.float16, tf.bfloat16):
            outputs = tf.cast(outputs, tf.float32)
        if mask is not None and self._loss is sparse_cross_entropy:
            # It averages by itself, and would count masked places.
            losses = keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)
        else:
            losses = self._traced(labels, outputs)
        return _scalar(_reduced(losses, mask))

    def threshold(self) -> float | None:
        """For a model with one output, the value at which the loss is the same for labels 0 and 1.

        It is 0 for logits and 0.5 for probabilities. None if it is neither, if the loss cannot be computed for one
        example, or if the loss takes logits but the model ends in a sigmoid, a contradiction.
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
        """Choose loss and form of the labels, and check the labels, when the first batch is traced."""
        self.output = tuple(outputs.shape[1:])
        tail = self._labels.shape[1:]
        if self._loss is None:
            if not self.output or self.output[-1] == 1:
                self._loss = keras.losses.binary_crossentropy
            elif len(tail) < len(self.output) or tail[-1:] == (1,):
                self._loss = keras.losses.sparse_categorical_crossentropy
            else:
                self._loss = keras.losses.categorical_crossentropy
        last = getattr(getattr(outputs, "op", None), "type", "")
        self._squashed_by = last.lower() if last in ("Softmax", "Sigmoid") else None
        kind = kind_of(self._loss) if self._loss is not sparse_cross_entropy else "sparse_categorical_crossentropy"
        self._traced = self._loss if kind else _converted(self._loss)
        if kind:
            check_finite(self._labels)
            self._form = label_forms.keras_form(kind, tail, self.output)
            label_forms.check_fit(kind, self._form(self._labels).shape[1:], self.output)
            options = {"from_logits": True} if self._loss is sparse_cross_entropy else options_of(self._loss)
            check_logits(kind, options, self._squashed_by)
            check_values(kind, options, self._labels, self.output[-1] if self.output else None)
            return
        if None in self.output:
            # Without a shape nothing can be tried out.
            self._form = label_forms.as_they_are
            return
        examples = outputs.shape[0] or label_forms.PROBED
        labels = self._as_taken(self._loss, label_forms.sample_of(self._labels, examples))
        loss, draw = label_forms.repeatable(self._loss), label_forms.outputs_like(labels, self.output, 0)
        if not np.isfinite(np.asarray(self._labels, float)).all():
            # A loss of the user's own may ignore missing labels. Then its result is finite.
            missing = labels.copy()
            missing[::2] = np.nan
            forms = label_forms.forms(tail, self.output)
            if all(label_forms.mean(loss, form(missing), draw) is None for form in forms):
                check_finite(self._labels)
        form = label_forms.form_for(loss, labels, self.output, "loss", examples)
        dtype = tf.as_dtype(labels.dtype)
        self._form = form if labels.dtype == self._labels.dtype else lambda labels: tf.cast(form(labels), dtype)

    def _as_taken(self, loss: Loss, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Cast labels to the dtype that a loss of the user's own takes.

        Keras casts the labels of every loss to float. Integers stay integers if the loss accepts them and its result is
        the same: in uint8, for example, 0 - 1 is 255.
        """
        outputs = label_forms.outputs_like(labels, self.output, 0)
        floats = labels.astype(np.float32)
        forms = label_forms.forms(labels.shape[1:], self.output)

        def runs(labels: Any) -> bool:
            for form in forms:
                try:
                    label_forms.traced_with(loss, form(labels), outputs)
                    return True
                except Exception:  # from the user's code, which may not be made for this dtype
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


class NotedLoss:
    """A loss ``(labels, outputs) -> scalar`` that notes shapes and dtypes of its arguments when it is traced."""

    def __init__(self, loss: Callable[[Any, Any], Any]) -> None:
        self._loss = loss
        self.outputs: Any = None
        """The model's outputs, tensors of the graph that was traced last."""
        self._outputs: Any = None
        self._labels: Any = None

    def __call__(self, labels: Any, outputs: Any) -> Any:
        self.note(labels, outputs)
        return self._loss(labels, outputs)

    def note(self, labels: Any, outputs: Any) -> None:
        """Note the arguments of a call, tensors of a graph."""
        self.outputs = outputs
        self._labels, self._outputs = (tf.nest.map_structure(_spec, value) for value in (labels, outputs))

    def columns(self, labels: Any) -> Findings:
        """The columns of a record about the loss, once it has been traced; ``labels`` are those of the first batch."""
        # The dtypes of outputs depend on the mode.
        given = " and ".join(f"{spec.dtype.name} {tuple(spec.shape)}" for spec in tf.nest.flatten(self._labels))
        outputs = " and ".join(str(tuple(spec.shape)) for spec in tf.nest.flatten(self._outputs))
        found = Findings({"loss_inputs": f"labels {given}; outputs {outputs}"})
        found.put("loss_probe", self.probed(labels))
        return found

    def probed(self, labels: Any, seed: int = PROBE_SEED) -> float | Reason:
        """The loss of ``labels`` and of outputs that are drawn with ``seed``, or why there is none."""
        try:
            probe = self._probe(labels, seed=seed)
        except Exception as error:  # from the user's code, away from its model and device
            probe = f"the loss does not run by itself: {type(error).__name__}"
        if isinstance(probe, str):
            return Reason(Code.NOT_COMPARABLE, probe)
        return probe if np.isfinite(probe) else Reason(Code.NOT_FINITE, "not finite on outputs between 0 and 1")

    def adds_up(self, labels: Any, parts: int) -> bool | None:
        """Whether the loss of ``labels`` (examples, ...) is the sum of the losses of its ``parts``, those of replicas.

        False if it is their mean, as of a loss that averages; None if it is neither, or unknown.
        """
        width = len(labels) // parts
        places = [slice(None), *(slice(part * width, (part + 1) * width) for part in range(parts))]
        try:
            found = [self._probe(labels, place) for place in places]
        except Exception:  # from the user's code, away from its model and device
            return None
        if not all(isinstance(each, float) for each in found):
            return None
        whole, *of_parts = np.asarray(found, float)
        is_mean, is_sum = (np.isclose(whole, of(of_parts), rtol=1e-4) for of in (np.mean, np.sum))
        return None if is_mean == is_sum else bool(is_sum)

    def differs_within(self, scope: contextlib.AbstractContextManager[Any], labels: Any) -> bool:
        """Whether the loss of ``labels`` is another one in ``scope``, or refuses to be computed there.

        So it is in the scope of a strategy if the loss itself divides by the number of replicas.
        """
        try:
            alone = self._probe(labels)
        except Exception:  # from the user's code, away from its model and device
            return False
        try:
            with scope:
                within = self._probe(labels)
        except RuntimeError:  # of tf.nn.compute_average_loss and its like
            return True
        return isinstance(alone, float) and isinstance(within, float) and not np.isclose(alone, within, rtol=1e-4)

    def _probe(self, labels: Any, place: slice = slice(None), seed: int = PROBE_SEED) -> float | str:
        """The loss of ``labels`` and of outputs that are the same in every mode, or why it cannot be computed.

        ``place`` selects some of the examples.

        It is traced first, since a loss that changes its own state must not run. It runs on the CPU to take none of
        the memory that is measured.
        """

        def call(labels: Any, outputs: Any) -> Any:
            return self._loss(labels, outputs)

        with tf.device("CPU:0"):
            # First in the precision of the model's outputs, which the loss may require.
            for dtype in (None, tf.float32):
                draw = functools.partial(_probed, dtype=dtype, examples=len(labels), seed=seed)
                outputs = tf.nest.map_structure(lambda spec, draw=draw: draw(spec)[place], self._outputs)
                given = tf.nest.map_structure(lambda each: tf.constant(each[place]), labels)
                specs = tf.nest.map_structure(_spec, (given, outputs))
                traced = tf.function(call, autograph=False).get_concrete_function(*specs)
                nodes = all_nodes(traced.graph.as_graph_def())
                if any(_NOT_REPEATABLE.search(node.op) for node in nodes):
                    return "the loss draws random numbers, changes variables or calls Python"
                if not computes_below_float32(nodes):
                    return float(np.sum(np.asarray(traced(given, outputs), np.float64)))
        return "the loss computes in less than float32"


def check_outputs(outputs: Any) -> None:
    """Check that a model returned one tensor of floating-point numbers (examples, ...).

    Raises:
        ValueError: it returned something else.
    """
    if isinstance(outputs, dict | list | tuple):
        raise Refused(
            Check.OUTPUTS,
            f"the model returns a {type(outputs).__name__} of {len(outputs)} outputs, but this workload has a loss of "
            "one",
            COMPILE_IT,
        )
    if not tf.is_tensor(outputs) or isinstance(outputs, tf.RaggedTensor | tf.SparseTensor):
        found = f"a {type(outputs).__name__}"
    elif not outputs.shape.rank or not outputs.dtype.is_floating:
        found = f"{outputs.dtype.name} of shape {outputs.shape}"
    else:
        return
    cure = "it must return one dense tensor of floating-point numbers (examples, ...)"
    raise Refused(Check.OUTPUTS, f"the model returns {found}", cure)


def check_finite(labels: npt.NDArray[Any], what: str = "the training labels") -> None:
    """Check that labels are finite.

    Raises:
        Refused: some are not; ``what`` names them.
    """
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise Refused(
            Check.LABELS_NOT_FINITE,
            f"{np.sum(~np.isfinite(labels))} of {what} are not finite",
            "leave these examples out, or use a loss that ignores them",
        )


def check_logits(kind: str, options: Mapping[str, Any], squashed_by: str | None, ends: str = "the model ends") -> None:
    """Check that a loss of logits gets some.

    Args:
        kind: of the loss, its name in snake case.
        options: of the loss.
        squashed_by: softmax or sigmoid, if the model ends in one.
        ends: says what ends so.

    Raises:
        Refused: the model ends in softmax or sigmoid, and the loss applies another one.
    """
    if options.get("from_logits", False) and squashed_by:
        raise Refused(
            Check.SOFTMAX_TWICE,
            f"{ends} in a {squashed_by}, but the loss takes logits and would apply another one",
            f"remove the activation, or use a loss with from_logits=False, such as loss={kind!r}",
        )


def check_values(
    kind: str,
    options: Mapping[str, Any],
    labels: npt.NDArray[Any],
    classes: int | None,
    what: str = "the training labels",
) -> None:
    """Check labels against a Keras loss.

    Args:
        kind: of the loss, its name in snake case.
        options: of the loss.
        labels: (examples, ...).
        classes: how many outputs the model has for each label; None if that is not known.
        what: names the labels.

    Raises:
        Refused: some are outside of what the loss takes.
    """
    low, high = labels.min(), labels.max()
    if kind == "sparse_categorical_crossentropy" and classes is not None:
        counted = labels[labels != options["ignore_class"]] if options.get("ignore_class") is not None else labels
        if not ((counted == np.floor(counted)) & (counted >= 0) & (counted < classes)).all():
            raise Refused(
                Check.LABELS_OUT_OF_RANGE,
                f"{what} range from {low:g} to {high:g}, but a model with {classes} outputs "
                f"has classes 0 to {classes - 1}",
                "number the classes from 0, or, if this is not such a classification, set another loss, for "
                "example loss='mse' or loss=keras.losses.BinaryCrossentropy(from_logits=True)",
            )
    if kind in ("binary_crossentropy", "binary_focal_crossentropy") and not 0 <= low <= high <= 1:
        raise Refused(
            Check.LABELS_OUT_OF_RANGE,
            f"{kind} takes labels from 0 to 1, but {what} range from {low:g} to {high:g}",
            "rescale them, or use another loss",
        )


def _resolved(given: Loss | str) -> Loss:
    try:
        loss: Loss = keras.losses.get(given) if isinstance(given, str) else given
    except ValueError as error:
        message = f"Keras knows no loss called {given!r}; give a name such as 'mse', or the loss itself"
        raise ValueError(message) from error
    if isinstance(loss, type) and issubclass(loss, keras.losses.Loss):
        loss = loss()
    if isinstance(loss, keras.losses.Loss) and loss.reduction in (None, "none"):
        raise ValueError(
            f"{type(loss).__name__} has reduction=None, so it returns no single number; leave reduction out"
        )
    return loss


def _converted(loss: Loss) -> Loss:
    """A loss of the user's own, which may decide by tensors in Python as in a ``tf.function`` of theirs.

    Only this is converted: AutoGraph takes over a second for what is ours, and Keras converts no model either.
    """

    def call(labels: Any, outputs: Any) -> Any:
        return loss(labels, outputs)

    converted: Loss = tf.autograph.to_graph(call)
    return converted


def options_of(loss: Any) -> dict[str, Any]:
    """The options of a Keras loss, as far as they are known."""
    if isinstance(loss, functools.partial):
        return options_of(loss.func) | loss.keywords
    return dict(loss.get_config()) if isinstance(loss, keras.losses.Loss) else {}


def _reduced(losses: Any, mask: Any) -> Any:
    """The mean without masked places; a single number is returned as it is."""
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
            f"the loss returns {loss.dtype.name} of shape {loss.shape}; it must return one floating-point number, or "
            "one per example"
        )
    return tf.cast(loss, tf.float32) if loss.dtype in (tf.float16, tf.bfloat16) else loss


def _spec(value: Any) -> tf.TensorSpec:
    return tf.TensorSpec(value.shape, value.dtype)


def _probed(spec: tf.TensorSpec, dtype: tf.DType | None, examples: int, seed: int) -> tf.Tensor:
    """Outputs that could be probabilities or logits: multiples of 1/64, which every precision represents exactly.

    ``spec`` is of a replica's batch, which may be a part of the ``examples``.
    """
    shape = [spec.shape[0] and examples, *spec.shape.as_list()[1:]]
    if not spec.dtype.is_floating:
        return tf.zeros(shape, spec.dtype)
    values = np.random.default_rng(seed).integers(1, 64, shape) / 64.0
    return tf.constant(values, dtype or spec.dtype)
