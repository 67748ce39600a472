"""What XLA refuses to compile: which operation, and in which layer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
from tensorflow.python.eager import context
from tensorflow.python.framework import errors

from mpscale.core.processes.events import Channel
from mpscale.worker.errors import XlaRefused, is_of_an_operation, lacks_memory, text_of, unwrapped

_REFUSALS = (errors.INVALID_ARGUMENT, errors.UNIMPLEMENTED, errors.FAILED_PRECONDITION, errors.NOT_FOUND)
_FUNCTION = re.compile(r"\[Op:(\S+)\]")
_NODE = re.compile(r"\{\{node ([^}]+)\}\}|\bnode `([^`]+)`")
_UNIQUE = re.compile(r"_\d+$")
_NAMED = 3
"""Most operations that are named."""
_LONGEST = 60
"""Most characters of the name of a layer."""


@dataclass(frozen=True)
class Operation:
    """An operation that XLA refuses.

    Args:
        kind: such as ``AsString``; None if it is not known.
        layer: the innermost that it is in; None if it is in none.
    """

    kind: str | None
    layer: keras.layers.Layer | None

    def __str__(self) -> str:
        what = self.kind or "an operation"
        if self.layer is None:
            return f"{what} outside of any layer"
        return f"{what} in layer {self.layer.name[:_LONGEST]!r} ({type(self.layer).__name__[:_LONGEST]})"


@dataclass(frozen=True)
class Refusal:
    """What XLA refuses of a function.

    Args:
        operations: as far as TensorFlow's message and the functions that it names tell them.
        error: TensorFlow's.
    """

    operations: tuple[Operation, ...]
    error: BaseException

    def __str__(self) -> str:
        known = list(dict.fromkeys(map(str, self.operations)))
        more = f" and {len(known) - _NAMED} more" if len(known) > _NAMED else ""
        return ", ".join(known[:_NAMED]) + more or "an operation that it does not name"


def refusal_in(error: BaseException, model: keras.Model, jit: bool) -> Refusal | None:
    """What XLA refuses if that is what an exception says, else None.

    Args:
        error: as raised while the model was trained or evaluated.
        model: its layers are named.
        jit: whether XLA compiles train step and evaluation; if not, a refusal is that of a function of the user's own.
    """
    first = unwrapped(error)
    if not jit or lacks_memory(error) or not is_of_an_operation(first) or not _is_refusal(first):
        return None
    return Refusal(_operations(text_of(first), model), first)


@contextlib.contextmanager
def refusals_of(model: keras.Model, jit: bool, channel: Channel) -> Iterator[None]:
    """Name what XLA refuses while the model is trained and evaluated, and report it.

    Only an error of TensorFlow's compiler is a refusal. Lack of memory is none, nor is an exception of the user's code
    or an error of a program that was compiled.

    Args:
        model: as for :func:`refusal_in`.
        jit: the same.
        channel: takes the column ``xla_refused``.

    Raises:
        XlaRefused: for TensorFlow's error.
    """
    try:
        yield
    except Exception as error:
        if (refusal := refusal_in(error, model, jit)) is None:
            raise
        channel.values({"xla_refused": str(refusal)})
        raise XlaRefused(str(refusal), refusal.error) from error


def _is_refusal(error: BaseException) -> bool:
    """Whether XLA could not compile a function.

    No operation of a compiled program fails with one of these codes, so compiling it failed. Whether a function must
    be compiled is an attribute of its definition, which only the message names. If the definition is gone by now, the
    message contains the attribute or XLA's device.
    """
    text = text_of(error)
    if getattr(error, "error_code", None) == errors.INTERNAL:
        # On a GPU a compiled program can also fail with this code. XLA's autotuner runs before there is a program.
        return text.startswith("Autotuner ")
    if getattr(error, "error_code", None) not in _REFUSALS:
        return False
    named = _FUNCTION.search(text)
    if named is not None and context.context().has_function(named[1]):
        return bool(context.context().get_function_def(named[1]).attr["_XlaMustCompile"].b)
    return any(mark in text for mark in ("_XlaMustCompile=true", "XLA_CPU_JIT", "XLA_GPU_JIT"))


def _operations(text: str, model: keras.Model) -> tuple[Operation, ...]:
    named, nodes = _FUNCTION.search(text), list(dict.fromkeys(one or other for one, other in _NODE.findall(text)))
    graph = {} if named is None else _nodes(named[1])
    layers = {layer.name: layer for layer in model._flatten_layers()}
    found = []
    for name in nodes:
        path, node = graph.get(name, (name, None))
        if node is None or not _calls(node):
            found.append(Operation(None if node is None else node.op, _layer_of(path, layers)))
    return tuple(found)


def _nodes(function: str) -> dict[str, tuple[str, Any]]:
    """The nodes of a function and of those that it calls, by name: path through the calls, and node.

    Of two with one name, the first counts.
    """
    found: dict[str, tuple[str, Any]] = {}
    seen, left = {function}, [("", function)]
    while left:
        where, name = left.pop(0)
        if not context.context().has_function(name):
            continue
        for node in context.context().get_function_def(name).node_def:
            path = f"{where}{node.name}"
            found.setdefault(node.name, (path, node))
            for called in _calls(node):
                if called not in seen:
                    seen.add(called)
                    left.append((f"{path}/", called))
    return found


def _calls(node: Any) -> list[str]:
    """The functions that a node calls."""
    return [each.func.name for each in node.attr.values() if each.HasField("func")] + [
        each.name for value in node.attr.values() for each in value.list.func
    ]


def _layer_of(path: str, layers: Mapping[str, keras.layers.Layer]) -> keras.layers.Layer | None:
    # From the innermost one. TensorFlow numbers a scope that it enters again.
    for part in reversed(path.split("/")[:-1]):
        for name in (part, _UNIQUE.sub("", part)):
            if name in layers:
                return layers[name]
    return None
