"""Whether a loop scales its loss and unscales its gradients once: the wrong is refused, the doubtful is said."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_callbacks


class UnscaledLossWarning(UserWarning):
    """Gradients are divided by the loss scale although no loss was multiplied by it, or the reverse."""


class Unscaling:
    """One call of ``unscale``.

    Args:
        flags: which of its gradients were not finite, int64 (gradients,); None where that is not to be counted later.
    """

    def __init__(self, flags: tf.Tensor | None) -> None:
        self.flags = flags


class ScalingGuard:
    """Follows the gradients of one optimizer by where they come from, not by when they come."""

    def __init__(self) -> None:
        self._scales_losses = self._reads_scale = self._unscales = self._has_warned = False
        self._under_way: set[Unscaling] = set()
        self._scaled = object()  # the source of gradients that unscale was given
        self._watch = Watch()

    def scaling(self) -> None:
        """Notes that the loss of a further step is scaled."""
        self._scales_losses = True
        self.over()

    def reading(self) -> None:
        """Notes that the scale was read, perhaps to scale or unscale by hand."""
        self._reads_scale = True

    def over(self) -> None:
        """Notes that the steps whose gradients were unscaled so far are over, applied or left out."""
        self._under_way.clear()
        self._watch.stop()

    def unscaled(self, scaled: Sequence[Any], true: Sequence[Any], unscaling: Unscaling) -> None:
        """Notes that ``true`` came of ``scaled``."""
        self._unscales = True
        for before, after in zip(scaled, true, strict=True):
            if after is not None:
                before._mpscale_role, after._mpscale_role = "scaled", "unscaled"
        mark(scaled, self._scaled)
        mark(true, unscaling, alone=True)
        self._under_way.add(unscaling)
        # Operations of several replicas run in threads of their own.
        if tf.executing_eagerly() and not tf.distribute.has_strategy():
            self._watch.start()

    def check_scaled(self, grads: Sequence[Any]) -> None:
        """Checks gradients that are about to be divided by the loss scale.

        Raises:
            ValueError: one of them is what ``unscale`` returned, or in this step was computed from that.
        """
        remedy = "pass them to apply(grads, variables, finite=finite) with the finite that unscale returned"
        if "unscaled" in map(_role, grads):
            raise ValueError(
                f"these gradients are unscaled already, and would be divided by the loss scale twice; {remedy}"
            )
        # Scaled gradients times a factor that was found with the help of true ones are scaled.
        if self._under_way and any(self._under_way & found and self._scaled not in found for found in origins(grads)):
            raise ValueError(
                "unscale was called in this step, but apply got other gradients and no finite: these were computed "
                f"from what unscale returned, and would be divided by the loss scale twice; {remedy}"
            )
        if not (self._scales_losses or self._reads_scale):
            self._warn(
                "gradients are divided by the loss scale, but no loss has been multiplied by it: every update is too "
                "small by that factor. Differentiate optimizer.scale_loss(loss)"
            )

    def check_unscaled(self, grads: Sequence[Any]) -> None:
        """Checks gradients that came with a ``finite``, so that nothing will divide them.

        Raises:
            ValueError: one of them is what ``unscale`` was given.
        """
        if "scaled" in map(_role, grads):
            raise ValueError(
                "these are the scaled gradients that unscale was given; pass those that it returned, "
                "or leave finite out, so that apply unscales by itself"
            )
        if self._scales_losses and not (self._unscales or self._reads_scale):
            self._warn(
                "apply was given finite, which says that the gradients are unscaled, but unscale was never called: "
                "every update is too large by the loss scale. Use grads, finite = optimizer.unscale(grads)"
            )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, UnscaledLossWarning, stacklevel=6)


def _role(grad: Any) -> str | None:
    return getattr(grad, "_mpscale_role", None)


# Where a tensor comes from: which calls of ``unscale`` the values that it was computed from passed through. In a
# graph the operations between two tensors can be read. In eager execution nothing keeps them, so they are watched as
# they run, from a call of ``unscale`` until the step that it belongs to is over.

_FROM = "_mpscale_from"
_NOTHING: frozenset[Any] = frozenset()
_FUNCTIONS = {"While": ["body"], "If": ["then_branch", "else_branch"], "Case": ["branches"], "PartitionedCall": ["f"]}
"""Attributes with the functions that an operation runs, by its type."""


def mark(tensors: Iterable[Any], source: Any, alone: bool = False) -> None:
    """Notes that ``tensors`` come from ``source``, any hashable object.

    Args:
        tensors: dense tensors or ``tf.IndexedSlices``; None is skipped.
        source: where they come from.
        alone: and from nothing else, whatever they were computed from.
    """
    for tensor in tensors:
        tensor = _values(tensor)
        if tensor is not None:
            setattr(tensor, _FROM, frozenset({source}) if alone else sources(tensor) | {source})
            if _in_graph(tensor):
                _marked(tensor.graph)[tensor.name] = sources(tensor), alone


def sources(tensor: Any) -> frozenset[Any]:
    """What ``tensor`` itself was marked with, and what a watched eager operation computed it from."""
    found: frozenset[Any] = getattr(_values(tensor), _FROM, _NOTHING)
    return found


def origins(tensors: Iterable[Any]) -> list[frozenset[Any]]:
    """For each of ``tensors``, every source that it was computed from, directly or not.

    Args:
        tensors: dense tensors or ``tf.IndexedSlices``, all of the graph that is being traced or eager; None has none.
    """
    flows = dict[Any, dict[str, frozenset[Any]]]()

    def of(tensor: Any) -> frozenset[Any]:
        flow = _flow(tensor.graph, flows).get(tensor.name, _NOTHING) if _in_graph(tensor) else _NOTHING
        return sources(tensor) | flow

    return [of(_values(tensor)) for tensor in tensors]


def within_reach(tensor: Any) -> bool:
    """Whether ``tensor`` can be used here, and is not of a loop or a branch that is over; None can."""
    if not _in_graph(tensor):
        return True
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


class Watch:
    """Hands the sources of every eager operation's inputs on to its outputs, while it is on.

    A variable that such a value is written to hands it on as well, so that gradients may be added up in variables.
    """

    def __init__(self) -> None:
        self._callback: Any = None

    def start(self) -> None:
        """From here on, in this thread."""
        self.stop()
        handles = dict[int, tuple[Any, frozenset[Any]]]()  # the handle, too, so that no other takes its number

        def hand_on(
            op_type: Any, inputs: Any, attrs: Any, outputs: Any, op_name: Any = None, graph: Any = None
        ) -> None:
            if graph is not None:
                return
            found = _NOTHING
            for tensor in inputs:
                found |= sources(tensor) | handles.get(id(tensor), (None, _NOTHING))[1]
            if not found:
                return
            for tensor in outputs:
                setattr(tensor, _FROM, sources(tensor) | found)
            for tensor in inputs:
                if tensor.dtype == tf.resource:
                    handles[id(tensor)] = (tensor, found)

        op_callbacks.add_op_callback(hand_on)
        # Not a bound method: TensorFlow would keep this object, and its optimizer, for ever.
        self._callback = weakref.finalize(self, _remove, hand_on)
        self._callback.atexit = False

    def stop(self) -> None:
        """No further."""
        if self._callback is not None:
            self._callback()
            self._callback = None


def _remove(callback: Any) -> None:
    with contextlib.suppress(KeyError):  # It was added in another thread.
        op_callbacks.remove_op_callback(callback)


def _marked(graph: Any) -> dict[str, tuple[frozenset[Any], bool]]:
    """What was marked in ``graph``, by the names of its tensors: the sources, and whether there are no others."""
    if not hasattr(graph, _FROM):
        setattr(graph, _FROM, {})
    found: dict[str, tuple[frozenset[Any], bool]] = getattr(graph, _FROM)
    return found


def _flow(graph: Any, known: dict[Any, dict[str, frozenset[Any]]]) -> dict[str, frozenset[Any]]:
    """The sources of every tensor of ``graph`` that has any, by name; those from the graphs around it included."""
    if id(graph) in known:
        return known[id(graph)]
    marked = _marked(graph)
    flow = known[id(graph)] = {name: found for name, (found, _) in marked.items()}
    for outer, inner in getattr(graph, "captures", ()):
        found = sources(outer)
        if _in_graph(outer):
            found |= _flow(outer.graph, known).get(outer.name, _NOTHING)
        if found:
            flow[inner.name] = found
    for operation in graph.get_operations():
        found = _NOTHING
        for tensor in operation.inputs:
            found |= flow.get(tensor.name, _NOTHING)
        if found:
            written = [tensor for tensor in operation.inputs if tensor.dtype == tf.resource]
            for tensor in (*operation.outputs, *written):
                if not marked.get(tensor.name, (_NOTHING, False))[1]:
                    flow[tensor.name] = flow.get(tensor.name, _NOTHING) | found
        for nested in _nested(operation):
            # Of a loop, a branch or a function that is called, the outputs are those of the operation.
            for outer, inner in zip(operation.outputs, nested.outputs, strict=False):
                found = _flow(nested, known).get(inner.name, _NOTHING)
                if found:
                    flow[outer.name] = flow.get(outer.name, _NOTHING) | found
    return flow


def _nested(operation: Any) -> list[Any]:
    """The graphs whose outputs ``operation`` hands out: the body of a loop, branches, a function that is called."""
    names = _FUNCTIONS.get(operation.type.removeprefix("Stateless").removeprefix("Stateful"), ())
    values = [operation.get_attr(name) for name in names]
    functions = [each for value in values for each in (value if isinstance(value, list) else [value])]
    known = [operation.graph._get_function(function.name) for function in functions]
    return [function.graph for function in known if getattr(function, "graph", None) is not None]


def _values(tensor: Any) -> Any:
    return tensor.values if isinstance(tensor, tf.IndexedSlices) else tensor


def _in_graph(tensor: Any) -> bool:
    return isinstance(tensor, tf.Tensor) and not isinstance(tensor, tf.__internal__.EagerTensor)
