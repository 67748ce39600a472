"""Checks that a training loop scales its loss and unscales its gradients exactly once: errors raise, doubts warn.

Gradients are recognised by what they were computed from: each call of ``unscale`` is a source, and a tensor comes from
the sources of all values it was computed from. In a graph, the operations between two tensors can be read. Eager
execution keeps no such record: operations are watched as they run, from a call of ``unscale`` to the end of its step.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_callbacks

_FROM = "_mpscale_from"
_NOTHING: frozenset[Any] = frozenset()
_FUNCTIONS = {"While": ["body"], "If": ["then_branch", "else_branch"], "Case": ["branches"], "PartitionedCall": ["f"]}
"""Attributes that hold the functions an operation runs, by type of operation."""


class UnscaledLossWarning(UserWarning):
    """Gradients are divided by the loss scale although no loss was multiplied by it, or the reverse."""


@dataclass(eq=False)  # Two calls are never the same.
class Unscaling:
    """One call of ``unscale``."""

    flags: tf.Tensor | None
    """1 for each gradient that was not finite, int64 (gradients,); None if they need not be counted later."""


class ScalingGuard:
    """Follows the gradients of one optimizer by where they come from, not by when they arrive."""

    def __init__(self) -> None:
        self._scales_losses = self._reads_scale = self._unscales = self._has_warned = False
        self._pending: set[Unscaling] = set()
        self._scaled = object()  # the source of gradients that were passed to unscale
        self._watch = _Watch()

    def note_scaling(self) -> None:
        """Note that a loss is scaled, which begins the next step."""
        self._scales_losses = True
        self.end_step()

    def note_reading(self) -> None:
        """Note that the scale was read, perhaps to scale or unscale by hand."""
        self._reads_scale = True

    def note_unscaling(self, scaled: Sequence[Any], true: Sequence[Any], unscaling: Unscaling) -> None:
        """Note that ``unscaling`` computed the gradients ``true`` from ``scaled``."""
        self._unscales = True
        for before, after in zip(scaled, true, strict=True):
            if after is not None:
                before._mpscale_role, after._mpscale_role = "scaled", "unscaled"
        mark(scaled, self._scaled)
        mark(true, unscaling, alone=True)
        self._pending.add(unscaling)
        # The operations of several replicas run in threads of their own.
        if tf.executing_eagerly() and not tf.distribute.has_strategy():
            self._watch.start()

    def end_step(self) -> None:
        """Note that the steps of all gradients unscaled so far are over: applied or dropped."""
        self._pending.clear()
        self._watch.stop()

    def check_scaled(self, grads: Sequence[Any]) -> None:
        """Check gradients that are about to be divided by the loss scale.

        Raises:
            ValueError: ``unscale`` returned one of them, or it was computed from what ``unscale`` returned in this
                step.
        """
        remedy = "pass them to apply(grads, variables, finite=finite) with the finite that unscale returned"
        if "unscaled" in map(_role, grads):
            raise ValueError(
                f"these gradients are unscaled already, and would be divided by the loss scale twice; {remedy}"
            )
        # Scaled gradients times a factor computed from true ones are still scaled.
        if self._pending and any(self._pending & found and self._scaled not in found for found in origins(grads)):
            raise ValueError(
                "unscale was called in this step, but apply got other gradients and no finite: they were computed "
                f"from what unscale returned, and would be divided by the loss scale twice; {remedy}"
            )
        if not (self._scales_losses or self._reads_scale):
            self._warn(
                "gradients are divided by the loss scale, but no loss was multiplied by it: every update is too small "
                "by that factor. Differentiate optimizer.scale_loss(loss)"
            )

    def check_unscaled(self, grads: Sequence[Any]) -> None:
        """Check gradients that came with a ``finite`` and are therefore not divided.

        Raises:
            ValueError: one of them was passed to ``unscale``.
        """
        if "scaled" in map(_role, grads):
            raise ValueError(
                "these are the scaled gradients that were passed to unscale; pass those that it returned, or leave "
                "finite out so that apply unscales them"
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


def mark(tensors: Iterable[Any], source: Any, alone: bool = False) -> None:
    """Note that ``tensors`` come from ``source``, any hashable object, and ``alone`` from nothing else; skip None."""
    for tensor in tensors:
        tensor = _values(tensor)
        if tensor is not None:
            setattr(tensor, _FROM, frozenset({source}) if alone else _sources(tensor) | {source})
            if _in_graph(tensor):
                _marked(tensor.graph)[tensor.name] = _sources(tensor), alone


def origins(tensors: Iterable[Any]) -> list[frozenset[Any]]:
    """Return, for each of ``tensors``, every source it was computed from, directly or indirectly; none for None."""
    flows = dict[Any, dict[str, frozenset[Any]]]()

    def of(tensor: Any) -> frozenset[Any]:
        flow = _flow(tensor.graph, flows).get(tensor.name, _NOTHING) if _in_graph(tensor) else _NOTHING
        return _sources(tensor) | flow

    return [of(_values(tensor)) for tensor in tensors]


def within_reach(tensor: Any) -> bool:
    """Return whether ``tensor`` can be used here, which a tensor of a finished loop or branch cannot; None can."""
    if not _in_graph(tensor):
        return True
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


class _Watch:
    """Passes the sources of an eager operation's inputs to its outputs, also through variables, which accumulate."""

    def __init__(self) -> None:
        self._remove: Any = None

    def start(self) -> None:
        """Watch this thread from here on."""
        self.stop()
        handles = dict[int, tuple[Any, frozenset[Any]]]()  # with the handle, so that its id is not used again

        def pass_on(
            op_type: Any, inputs: Any, attrs: Any, outputs: Any, op_name: Any = None, graph: Any = None
        ) -> None:
            if graph is not None:
                return
            found = _NOTHING
            for tensor in inputs:
                found |= _sources(tensor) | handles.get(id(tensor), (None, _NOTHING))[1]
            if not found:
                return
            for tensor in outputs:
                setattr(tensor, _FROM, _sources(tensor) | found)
            for tensor in inputs:
                if tensor.dtype == tf.resource:
                    handles[id(tensor)] = (tensor, found)

        op_callbacks.add_op_callback(pass_on)
        # Not a bound method, through which TensorFlow would keep this object and its optimizer alive.
        self._remove = weakref.finalize(self, _remove_callback, pass_on)
        self._remove.atexit = False

    def stop(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None


def _remove_callback(callback: Any) -> None:
    with contextlib.suppress(KeyError):  # It was added in another thread.
        op_callbacks.remove_op_callback(callback)


def _sources(tensor: Any) -> frozenset[Any]:
    """Return what ``tensor`` itself was marked with, or what a watched eager operation computed it from."""
    found: frozenset[Any] = getattr(_values(tensor), _FROM, _NOTHING)
    return found


def _marked(graph: Any) -> dict[str, tuple[frozenset[Any], bool]]:
    """Return the marks of ``graph`` by tensor name: the sources, and whether there are no others."""
    if not hasattr(graph, _FROM):
        setattr(graph, _FROM, {})
    found: dict[str, tuple[frozenset[Any], bool]] = getattr(graph, _FROM)
    return found


def _flow(graph: Any, known: dict[Any, dict[str, frozenset[Any]]]) -> dict[str, frozenset[Any]]:
    """Return the sources of every tensor of ``graph`` that has any, by name, those of outer graphs included."""
    if id(graph) in known:
        return known[id(graph)]
    marked = _marked(graph)
    flow = known[id(graph)] = {name: found for name, (found, _) in marked.items()}
    for outer, inner in getattr(graph, "captures", ()):
        found = _sources(outer)
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
            # The outputs of a loop, a branch or a called function are those of the operation.
            for outer, inner in zip(operation.outputs, nested.outputs, strict=False):
                found = _flow(nested, known).get(inner.name, _NOTHING)
                if found:
                    flow[outer.name] = flow.get(outer.name, _NOTHING) | found
    return flow


def _nested(operation: Any) -> list[Any]:
    """Return the graphs whose outputs ``operation`` returns: the body of a loop, branches, a called function."""
    names = _FUNCTIONS.get(operation.type.removeprefix("Stateless").removeprefix("Stateful"), ())
    values = [operation.get_attr(name) for name in names]
    functions = [each for value in values for each in (value if isinstance(value, list) else [value])]
    known = [operation.graph._get_function(function.name) for function in functions]
    return [function.graph for function in known if getattr(function, "graph", None) is not None]


def _role(grad: Any) -> str | None:
    return getattr(grad, "_mpscale_role", None)


def _values(tensor: Any) -> Any:
    return tensor.values if isinstance(tensor, tf.IndexedSlices) else tensor


def _in_graph(tensor: Any) -> bool:
    return isinstance(tensor, tf.Tensor) and not isinstance(tensor, tf.__internal__.EagerTensor)
