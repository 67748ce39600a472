"""A training whose gradients are looked at: those of the weights and those of the outputs of its layers.

Gradients are counted on the device, so that only counts are fetched. Numbers are sorted by their bits and not by
comparisons, because TensorFlow on a CPU takes numbers below 2**-126 for zero in some operations.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.magnitudes import BINS, PLACES, SECOND, THIRD, Magnitudes, Place
from mpscale.core.processes.events import Channel, Looked, Phase
from mpscale.core.reason import Code, Reason
from mpscale.worker.step import MOST_UNREAD, TrainStep
from mpscale.worker.update import key_of, loss_of

_MAGNITUDE, _MANTISSA, _ONE = 0x7FFFFFFF, 0x007FFFFF, 0x3F800000  # bits of a float32
_MANTISSA_BITS = 23
_TEXT = 400  # characters of an exception


def looks_at(steps: int, looks: int) -> list[int]:
    """The steps, from 0, at which a training of ``steps`` is looked at: the first, the last, and evenly between."""
    return sorted({round(place) for place in np.linspace(0, steps - 1, min(looks, steps))}) if looks > 1 else [0]


def count(values: Any) -> tuple[Any, Any]:
    """Count float32 values by bin: int32 (BINS,), and the largest finite magnitude, a float32 scalar."""
    flat = tf.reshape(values, [-1])
    bits = tf.bitwise.bitwise_and(tf.bitcast(flat, tf.int32), _MAGNITUDE)
    # All mantissas as numbers from 1 to 2: comparisons of floats run on every device, and none of these is tiny.
    ones = tf.bitwise.bitwise_or(tf.bitwise.bitwise_and(bits, _MANTISSA), _ONE)
    mantissa = tf.bitcast(ones, tf.float32)
    beyond = mantissa > 1.0, mantissa >= SECOND, mantissa >= THIRD
    place = tf.add_n([tf.cast(each, tf.float32) for each in beyond])
    exponent = tf.bitwise.left_shift(tf.bitwise.right_shift(bits, _MANTISSA_BITS), PLACES.bit_length() - 1)
    number = tf.bitwise.bitwise_or(exponent, tf.cast(place, tf.int32))
    # Not tf.math.bincount, whose size is not a constant, as XLA needs it.
    counts = tf.raw_ops.DenseBincount(input=number, size=BINS, weights=tf.constant([], tf.int32), binary_output=False)
    finite = tf.where(tf.math.is_finite(flat), tf.abs(flat), tf.zeros_like(flat))
    return counts, tf.maximum(tf.reduce_max(finite), 0.0)  # -inf of nothing


@dataclass(eq=False)
class Call:
    """A call of a layer: its outputs in the step's own graph, and the calls within it."""

    layer: Any
    label: str
    outputs: list[Any] = field(default_factory=list)
    inside: list[Call] = field(default_factory=list)


@contextlib.contextmanager
def noted_calls(model: keras.Model) -> Iterator[list[Call]]:
    """Note every call of a layer while a step is traced. The list has the calls that no other call contains.

    ``model``: what the paths of layers begin below.
    """
    graph = tf.compat.v1.get_default_graph()
    top: list[Call] = []
    stack: list[Call] = []
    labels: dict[int, str] = {}
    original = keras.layers.Layer.__call__

    def label_of(layer: Any) -> str:
        """The path of a layer. A layer that is called again keeps its own."""
        if id(layer) not in labels:
            path = "/".join([*(call.layer.name for call in stack if call.layer is not model), layer.name])
            same = sum(label == path or label.startswith(f"{path} #") for label in labels.values())
            labels[id(layer)] = f"{path} #{same + 1}" if same else path
        return labels[id(layer)]

    def noted(layer: Any, *arguments: Any, **options: Any) -> Any:
        call = Call(layer, label_of(layer))
        (stack[-1].inside if stack else top).append(call)
        stack.append(call)
        try:
            outputs = original(layer, *arguments, **options)
        finally:
            stack.pop()
        # Tensors in the body of a loop belong to another graph, and no gradient of theirs leaves it.
        call.outputs = [
            each
            for each in tf.nest.flatten(outputs)
            if isinstance(each, tf.Tensor) and getattr(each, "graph", None) is graph and each.dtype.is_floating
        ]
        return outputs

    keras.layers.Layer.__call__ = noted
    try:
        yield top
    finally:
        keras.layers.Layer.__call__ = original


def _all_outputs(calls: Sequence[Call]) -> list[Any]:
    """The outputs of all calls, at any depth, each tensor once."""
    found: dict[int, Any] = {}
    for call in calls:
        found |= {id(each): each for each in (*call.outputs, *_all_outputs(call.inside))}
    return list(found.values())


class _Places:
    """Sorts gradients by layer.

    Gradients of activations are those of the innermost calls that any gradient reaches. A layer stands for what is
    within it where none does: in a loop, in a function of TensorFlow's, or where the gradient is the user's own.

    Args:
        calls: of layers, as the step was traced.
        gradients: of their outputs, by id of the tensor; None if the loss does not depend on it by a known way.
    """

    def __init__(self, calls: Sequence[Call], gradients: dict[int, Any]) -> None:
        self._gradients = gradients
        self._taken: set[int] = set()
        self._owner: dict[int, str] = {}
        self.layers: dict[str, Any] = {}
        """The layer of each label that stands for gradients or weights."""
        self.activations: list[tuple[str, Any]] = []
        for call in calls:
            self._visit(call)

    def owner(self, variable: Any) -> str:
        """The label of the layer to which a weight belongs, a variable of Keras or the one of TensorFlow in it."""
        path = str(getattr(variable, "path", variable.name))
        return self._owner.get(key_of(variable)) or path.rpartition("/")[0] or path

    def _visit(self, call: Call) -> bool:
        """Take the gradients of a call; return whether any reaches it."""
        before = dict(self._owner)
        own = {key_of(variable): call.label for variable in call.layer.trainable_variables}
        self.layers[call.label], self._owner = call.layer, before | own
        reached_inside = [self._visit(each) for each in call.inside]
        if any(reached_inside):
            return True
        reached = [each for each in call.outputs if self._gradients.get(id(each)) is not None]
        # What is within it is not seen by itself. A call that this loss does not depend on says nothing about others.
        self._owner = before | own if reached else own | before
        for each in reached:
            # A layer may return what another layer returned.
            if id(each) not in self._taken:
                self._taken.add(id(each))
                self.activations.append((call.label, self._gradients[id(each)]))
        return bool(reached)


class ProbeStep(TrainStep):
    """A train step that can also count its gradients, which a program of its own does: the others stay as they are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counted: list[Place] = []
        self._layers: dict[str, Any] = {}

        def look(*batch: Any) -> tuple[tf.Tensor, ...]:
            return self._look(*batch)

        jit = options["jit"] if "jit" in options else arguments[2]
        self._looking = tf.function(look, jit_compile=jit, autograph=False)

    def look(self) -> tuple[float, dict[Place, Magnitudes]]:
        """Take a step; return its loss, and its gradients by layer, by what they belong to and by optimizer."""
        loss, counts, largest = (tensor.numpy() for tensor in self._looking(*self.batches.arguments()))
        found: dict[Place, Magnitudes] = {}
        for place, numbers, most in zip(self._counted, counts, largest, strict=True):
            (filled,) = np.nonzero(numbers)
            known = Counter(dict(zip(filled.tolist(), numbers[filled].tolist(), strict=True)))
            found.setdefault(place, Magnitudes()).add(Magnitudes(known, float(most)))
        return float(loss), found

    def in_float32(self, again: Callable[[], keras.Model]) -> list[str] | Reason:
        """The layers that mixed precision leaves in float32, because the model asks for it, once the step has looked.

        They do not differ from others in a float32 model, so ``again`` makes the model once more under mixed_float16.
        """
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_float16")
        try:
            twins = again()._flatten_layers()
            pairs = list(zip(self.update.model._flatten_layers(), twins, strict=True))
        except Exception as error:  # from the user's code
            # Keras' own messages have several lines, and colours.
            text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
            why = f"{type(error).__name__}: {text[:_TEXT]}{'…' if len(text) > _TEXT else ''}"
            return Reason(Code.OTHER, f"the model cannot be made under mixed_float16: {why}")
        finally:
            keras.config.set_dtype_policy(before)
        kept = {id(ours) for ours, twin in pairs if type(ours) is type(twin) and twin.compute_dtype == "float32"}
        return [label for label, layer in self._layers.items() if id(layer) in kept]

    def _look(self, *batch: Any) -> tuple[tf.Tensor, ...]:
        with noted_calls(self.update.model) as calls:
            every = self.update.applied(
                self.batches.take(*batch), lambda weights: _depending(_all_outputs(calls), weights)
            )
        found: list[tuple[Place, Any]] = []
        for each in every:
            places = _Places(calls, {id(tensor): grad for tensor, grad in each.others})
            found += [(Place(layer, "activations", each.name), grad) for layer, grad in places.activations]
            weights = zip(each.variables, each.grads, strict=True)
            found += [(Place(places.owner(v), "weights", each.name), grad) for v, grad in weights if grad is not None]
            self._layers |= places.layers
        self._counted = [place for place, _ in found]
        # A gradient of looked-up rows alone becomes one of the whole table.
        counted = [count(tf.cast(tf.convert_to_tensor(grad), tf.float32)) for _, grad in found]
        counts, largest = zip(*counted, strict=True)
        return loss_of(every), tf.stack(counts), tf.stack(largest)


def _depending(tensors: Iterable[Any], weights: Sequence[Any]) -> list[Any]:
    """Those of the tensors of a graph that depend on one of the weights.

    A training computes no gradients of others for these weights. A tape does if it is asked for them, as of what a
    GAN's generator returns when its discriminator is trained.
    """
    handles = {id(weight.handle) for weight in weights if hasattr(weight, "handle")}
    captures = tf.compat.v1.get_default_graph().captures
    left, found = [inner for outer, inner in captures if id(outer) in handles], set()
    while left:
        for op in left.pop().consumers():
            if op not in found and op.type not in ("StopGradient", "PreventGradient"):
                found.add(op)
                left += op.outputs
    return [tensor for tensor in tensors if tensor.op in found]


def watch(
    step: ProbeStep, steps: int, looks: int, again: Callable[[], keras.Model], channel: Channel
) -> tuple[str, str | None]:
    """Train, and report the gradients of some steps; return the status and why it is not ``ok``.

    The training ends if a gradient is not finite: nothing would be learnt about float16 from there on.

    Args:
        step: has not been taken yet.
        steps: length of the training.
        looks: how many steps to look at.
        again: makes a model that is built as the step's own was.
        channel: takes the reports.
    """
    due = set(looks_at(steps, looks))
    kept: list[str] | Reason = []
    for number in range(steps):
        if number not in due:
            step()
            if number % MOST_UNREAD == 0:
                step.read_log()
            continue
        step.read_log()
        loss, found = step.look()
        if number == 0:
            kept = step.in_float32(again)
        rows = [{**place._asdict(), **counted.to_json()} for place, counted in found.items()]
        channel.send(Looked(number + 1, loss, rows, kept))
        channel.progress(number + 1, steps)
        if number == 0:
            channel.phase(Phase.COMPILED)
        if bad := [place.layer for place, counted in found.items() if counted.not_finite]:
            return "diverged", f"gradients were not finite in float32 at step {number + 1}, first in {bad[0]}"
    if not step.weights_finite():
        return "diverged", f"the weights were not finite after {steps} steps in float32"
    channel.phase(Phase.TRAINED)
    return "ok", None
