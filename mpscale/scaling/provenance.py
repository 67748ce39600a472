"""Where a tensor comes from: which calls of ``unscale`` the values that it was computed from passed through.

In a graph the operations between two tensors can be read. In eager execution nothing keeps them, so they are watched
as they run, from a call of ``unscale`` until the step that it belongs to is over.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import op_callbacks

_FROM = "_mpscale_from"
_NOTHING: frozenset[Any] = frozenset()


def mark(tensors: Iterable[Any], source: Any) -> None:
    """Notes that ``tensors`` come from ``source``, any hashable object."""
    for tensor in tensors:
        tensor = _values(tensor)
        if tensor is not None:
            setattr(tensor, _FROM, sources(tensor) | {source})
            if _in_graph(tensor):
                _marked(tensor.graph)[tensor.name] = sources(tensor)


def sources(tensor: Any) -> frozenset[Any]:
    """What ``tensor`` itself was marked with, and what a watched eager operation computed it from."""
    found: frozenset[Any] = getattr(_values(tensor), _FROM, _NOTHING)
    return found


def origins(tensors: Iterable[Any]) -> frozenset[Any]:
    """Every source that one of ``tensors`` was computed from, directly or not.

    Args:
        tensors: dense tensors or ``tf.IndexedSlices``, all of the graph that is being traced or eager; None is skipped.
    """
    found, flows = _NOTHING, dict[Any, dict[str, frozenset[Any]]]()
    for tensor in map(_values, tensors):
        found |= sources(tensor)
        if _in_graph(tensor):
            found |= _flow(tensor.graph, flows).get(tensor.name, _NOTHING)
    return found


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


def _marked(graph: Any) -> dict[str, frozenset[Any]]:
    """What was marked in ``graph``, by the names of its tensors."""
    if not hasattr(graph, _FROM):
        setattr(graph, _FROM, {})
    found: dict[str, frozenset[Any]] = getattr(graph, _FROM)
    return found


def _flow(graph: Any, known: dict[Any, dict[str, frozenset[Any]]]) -> dict[str, frozenset[Any]]:
    """The sources of every tensor of ``graph`` that has any, by name; those from the graphs around it included."""
    if id(graph) in known:
        return known[id(graph)]
    flow = known[id(graph)] = dict(_marked(graph))
    for outer, inner in getattr(graph, "captures", ()):
        found = sources(outer)
        if _in_graph(outer):
            found |= _flow(outer.graph, known).get(outer.name, _NOTHING)
        if found:
            flow[inner.name] = found
    if not flow:
        return flow
    for operation in graph.get_operations():
        found = _NOTHING
        for tensor in operation.inputs:
            found |= flow.get(tensor.name, _NOTHING)
        if found:
            written = [tensor for tensor in operation.inputs if tensor.dtype == tf.resource]
            for tensor in (*operation.outputs, *written):
                flow[tensor.name] = flow.get(tensor.name, _NOTHING) | found
    return flow


def _values(tensor: Any) -> Any:
    return tensor.values if isinstance(tensor, tf.IndexedSlices) else tensor


def _in_graph(tensor: Any) -> bool:
    return isinstance(tensor, tf.Tensor) and not isinstance(tensor, tf.__internal__.EagerTensor)
