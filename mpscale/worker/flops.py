"""Floating-point operations of a train step, counted in its traced graph.

Counted are products, forward and backward: matrix products, Einsum, convolutions and cuDNN's recurrent layers. Each of
their multiply-adds is two operations (FLOPs), as in the literature. Operations on single elements are not counted.

TensorFlow's own statistics (``ops.RegisterStatistics``, which ``tf.compat.v1.profiler`` adds up) do not suffice: in
TensorFlow 2.21 they lack Einsum, the gradients of depthwise and three-dimensional convolutions and all that happens in
loops and functions, and they skip silently what they lack. XLA's cost analysis cannot be reached from Python, and it
would need a compilation. So the formulas are here. They agree with TensorFlow's where it has some, which is tested.

What nothing needs is not counted, since TensorFlow and XLA remove it: the gradient of the inputs of a recurrent first
layer, for example. Functions are counted at each call, and a loop as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import tensorflow as tf

from mpscale.core.reason import Code, Reason
from mpscale.worker.precision import PRODUCT

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
BRANCHES = frozenset({"If", "StatelessIf", "Case", "StatelessCase"})
LOOPS = frozenset({"While", "StatelessWhile"})
_OPAQUE = re.compile(
    r"PyFunc|XlaCallModule|XlaCustomCall|FFT|Cholesky|Matrix(?:Inverse|Determinant|Exponential|Logarithm|SquareRoot|"
    r"Solve|SolveLs|TriangularSolve)|TriangularSolve|TridiagonalMatMul|Tridiagonal|Lu$|Qr$|Svd$|Eig|LogMatrixDet"
)
"""Operations that may do as much work as products, and whose FLOPs are unknown."""

_SAME = frozenset({"Identity", "StopGradient", "PreventGradient", "Cast", "Squeeze", "Reshape", "EnsureShape"})
"""Operations that hand on a scalar."""

_GATES = {"lstm": 4, "gru": 3, "rnn_relu": 1, "rnn_tanh": 1}


class _Uncounted(Exception):
    """An operation whose FLOPs are unknown; the text is for people."""


def flops_of(graph: Any, counts: Callable[[Any], bool] = lambda op: True) -> int | Reason:
    """The FLOPs of one run of a FuncGraph, or the reason why they are unknown. Nothing runs, and no device is used.

    ``counts`` says which products count. All branches of a condition must have the same FLOPs, and the number of times
    that a loop runs must follow from constants. Otherwise the number depends on the data, and any figure would be wrong
    for some steps.
    """
    try:
        found = _Frame(graph, {}, counts).flops(range(len(graph.outputs)))
    except _Uncounted as uncounted:
        return Reason(Code.NOT_COUNTED, f"FLOPs were not counted: {uncounted}")
    return found if found else Reason(Code.NEVER_HAPPENED, "the train step multiplies no matrices")


def flops_of_product(op: Any) -> int | None:
    """The FLOPs of a product, each time that it runs; None if they are unknown."""
    try:
        return _PRODUCTS[op.type](op, set())
    except (KeyError, _Uncounted):
        return None


class _Frame:
    """A graph in one call of it.

    Args:
        graph: a FuncGraph.
        known: integers that are known of its arguments, by their place.
        counts: which products count.
    """

    def __init__(self, graph: Any, known: Mapping[int, int], counts: Callable[[Any], bool]) -> None:
        self._graph, self._counts = graph, counts
        self._known = {tensor.op.name: known.get(place) for place, tensor in enumerate(graph.inputs)}
        self._places = {tensor.op.name: place for place, tensor in enumerate(graph.inputs)}
        self.needed: set[int] = set()
        """The places of the arguments that :meth:`flops` needed."""

    def flops(self, outputs: Iterable[int]) -> int:
        """The FLOPs that these outputs, and what happens besides them, need."""
        roots, effects = [self._graph.outputs[place] for place in outputs], self._graph.control_outputs
        wanted: dict[str, set[int]] = {op.name: set() for op in effects}
        for tensor in roots:
            wanted.setdefault(tensor.op.name, set()).add(tensor.value_index)
        total = 0
        for op in reversed(_in_order([*effects, *(tensor.op for tensor in roots)])):
            if op.name not in wanted:
                continue  # an argument of a function, which does nothing with it that is needed
            own, used = self._operation(op, wanted[op.name])
            total += own
            for tensor in used:
                wanted.setdefault(tensor.op.name, set()).add(tensor.value_index)
            for other in op.control_inputs:
                wanted.setdefault(other.name, set())
        return total

    def _operation(self, op: Any, wanted: set[int]) -> tuple[int, Sequence[Any]]:
        """The FLOPs of an operation of which some outputs are wanted, and its inputs that this needs."""
        inputs = op.inputs
        if op.type == "Placeholder" and op.name in self._places:
            self.needed.add(self._places[op.name])
            return 0, ()
        if op.type in CALLS:
            inner = self._inner(op, "f", inputs)
            return inner.flops(wanted), [inputs[place] for place in inner.needed]
        if op.type in BRANCHES:
            return self._branches(op, wanted)
        if op.type in LOOPS:
            return self._loop(op, wanted)
        if op.type in ("Enter", "RefEnter") or _takes_functions(op.type, op):
            raise _Uncounted(f"how often {_named(op)} runs what it contains is unknown")
        if op.type in _PRODUCTS:
            return _PRODUCTS[op.type](op, wanted) if self._counts(op) else 0, inputs
        if PRODUCT.search(op.type) or _OPAQUE.search(op.type):
            raise _Uncounted(f"there is no formula for {_named(op)}")
        return 0, inputs

    def _inner(self, op: Any, attribute: str, inputs: Sequence[Any]) -> _Frame:
        function = op.get_attr(attribute)
        values = {place: self._value(tensor) for place, tensor in enumerate(inputs)}
        known = {place: v for place, v in values.items() if v is not None}
        return _Frame(self._function(function.name), known, self._counts)

    def _function(self, name: str) -> Any:
        found = self._graph._get_function(name)
        if found is None:
            raise _Uncounted(f"the function {name} is not in the graph")
        return found.graph

    def _branches(self, op: Any, wanted: set[int]) -> tuple[int, Sequence[Any]]:
        data = list(op.inputs)[1:]
        if op.type in ("If", "StatelessIf"):
            frames = [self._inner(op, name, data) for name in ("then_branch", "else_branch")]
        else:
            values = {place: v for place, tensor in enumerate(data) if (v := self._value(tensor)) is not None}
            functions = [self._function(branch.name) for branch in op.get_attr("branches")]
            frames = [_Frame(function, values, self._counts) for function in functions]
        found = {frame.flops(wanted) for frame in frames}
        if len(found) > 1:
            raise _Uncounted(f"the branches of {_named(op)} have different FLOPs, and which is taken depends on data")
        needed = set().union(*(frame.needed for frame in frames))
        return found.pop(), [op.inputs[0], *(data[place] for place in sorted(needed))]

    def _loop(self, op: Any, wanted: set[int]) -> tuple[int, Sequence[Any]]:
        """A loop variable is needed if it is wanted afterwards, or by the condition, or by one that is needed."""
        condition, body = self._loop_frames(op)
        each_test = condition.flops([0])
        needed, each_pass = wanted | condition.needed, 0
        while True:
            each_pass = body.flops(sorted(needed))
            if body.needed <= needed:
                break
            needed |= body.needed
        inputs = [op.inputs[place] for place in sorted(needed)]
        if not each_pass and not each_test:
            return 0, inputs
        passes = self._passes(op)
        if passes is None:
            raise _Uncounted(f"how often the loop {_named(op)} runs does not follow from constants")
        return passes * each_pass + (passes + 1) * each_test, inputs

    def _loop_frames(self, op: Any) -> tuple[_Frame, _Frame]:
        """Condition and body, with the values of loop variables that never change."""
        body = self._function(op.get_attr("body").name)
        fixed = [
            place for place, tensor in enumerate(body.outputs) if _source(tensor).op.name == body.inputs[place].op.name
        ]
        values = {place: v for place in fixed if (v := self._value(op.inputs[place])) is not None}
        condition = self._function(op.get_attr("cond").name)
        return _Frame(condition, values, self._counts), _Frame(body, values, self._counts)

    def _passes(self, op: Any) -> int | None:
        """How often a loop runs, if its condition is that counters are below limits, all of them known; else None."""
        condition, body = self._loop_frames(op)
        tests, ends = [condition._graph.outputs[0]], []
        while tests:
            test = _source(tests.pop()).op
            if test.type == "LogicalAnd":
                tests += test.inputs
                continue
            sides = list(test.inputs)
            if test.type in ("Greater", "GreaterEqual"):
                sides.reverse()
            elif test.type not in ("Less", "LessEqual"):
                return None
            counter, limit = _source(sides[0]), condition._value(sides[1])
            place = condition._places.get(counter.op.name)
            start = None if place is None else self._value(op.inputs[place])
            step = None if place is None else body._increment(place)
            if limit is None or start is None or step is None or step <= 0:
                return None
            limit += test.type in ("LessEqual", "GreaterEqual")
            ends.append(max(0, math.ceil((limit - start) / step)))
        return min(ends)

    def _increment(self, place: int) -> int | None:
        """By how much a pass of this body raises a loop variable, if it always is the same; else None."""
        add = _source(self._graph.outputs[place]).op
        if add.type not in ("Add", "AddV2"):
            return None
        for variable, other in (add.inputs, reversed(add.inputs)):
            if self._places.get(_source(variable).op.name) == place:
                return self._value(other)
        return None

    def _value(self, tensor: Any) -> int | None:
        """A scalar integer that is known when the graph is traced; None if it is not, or is something else."""
        if not tensor.dtype.is_integer or tensor.shape.rank != 0:
            return None
        op = _source(tensor).op
        if op.name in self._known:
            return self._known[op.name]
        if op.type in CALLS:
            inner = self._inner(op, "f", op.inputs)
            return inner._value(inner._graph.outputs[_source(tensor).value_index])
        if op.type in LOOPS:
            place = _source(tensor).value_index
            step, start = self._loop_frames(op)[1]._increment(place), self._value(op.inputs[place])
            passes = None if step is None or start is None else self._passes(op)
            return None if step is None or start is None or passes is None else start + passes * step
        if op.type == "Max":  # of a constant: the limit of Keras' loops over time
            values = tf.get_static_value(op.inputs[0])
            return None if values is None else int(values.max())
        constant = tf.get_static_value(tensor)
        return None if constant is None else int(constant)


def _in_order(roots: Iterable[Any]) -> list[Any]:
    """The operations that some others need, inputs before their users."""
    found: list[Any] = []
    seen: set[str] = set()
    stack = [(op, False) for op in roots]
    while stack:
        op, done = stack.pop()
        if done:
            found.append(op)
        elif op.name not in seen:
            seen.add(op.name)
            stack.append((op, True))
            stack += ((tensor.op, False) for tensor in op.inputs)
            stack += ((other, False) for other in op.control_inputs)
    return found


def _source(tensor: Any) -> Any:
    """Where the value of a scalar comes from."""
    while tensor.op.type in _SAME and tensor.op.inputs[0].shape.rank == 0:
        tensor = tensor.op.inputs[0]
    return tensor


@lru_cache(maxsize=4096)
def _has_functions(kind: str, attributes: tuple[str, ...]) -> bool:
    return any(attribute in ("func", "list(func)") for attribute in attributes)


def _takes_functions(kind: str, op: Any) -> bool:
    return _has_functions(kind, tuple(attribute.type for attribute in op.op_def.attr))


def _named(op: Any) -> str:
    return f"{op.type} ({op.name.removeprefix('gradient_tape/')})"


def _shape(op: Any, tensor: Any) -> list[int]:
    """The shape of a tensor, which must be known in full."""
    if not tensor.shape.is_fully_defined():
        raise _Uncounted(f"a shape of {_named(op)} is not known when the step is traced")
    if tensor.dtype.is_complex:
        raise _Uncounted(f"there is no formula for complex numbers in {_named(op)}")
    return list(tensor.shape.as_list())


def _size(op: Any, tensor: Any) -> int:
    return math.prod(_shape(op, tensor))


def _matrix_product(op: Any, wanted: set[int]) -> int:
    """(..., m, k) times (..., k, n)."""
    first = "transpose_a" if op.type == "MatMul" else "adj_x"
    inner = _shape(op, op.inputs[0])[-2 if op.get_attr(first) else -1]
    return 2 * _size(op, op.outputs[0]) * inner


def _einsum(op: Any, wanted: set[int]) -> int:
    """Each combination of labels is a multiply-add. Without a label to sum over, it is a product of elements."""
    if len(op.inputs) != 2:
        return 0
    left, right = op.get_attr("equation").decode().replace(" ", "").split("->")
    shapes = [_shape(op, tensor) for tensor in op.inputs]
    sizes: dict[str, int] = {}
    labels = []
    for subscript, shape in zip(left.split(","), shapes, strict=True):
        names = _labels(subscript, len(shape))
        labels.append(set(names))
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    result = set(_labels(right, op.outputs[0].shape.rank))
    if not labels[0] & labels[1] - result:
        return 0
    # A label of one side alone is summed before anything is multiplied.
    return 2 * math.prod(sizes[name] for name in labels[0] & labels[1] | result)


def _labels(subscript: str, rank: int) -> list[str]:
    """One label per dimension; those of an ellipsis are numbered from the last, since they are broadcast."""
    before, dots, after = subscript.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{hidden - place}" for place in range(hidden)), *after]


def _convolution(outputs: Callable[[Any], Any], kernel: Callable[[Any], Any], depthwise: bool) -> Callable[..., int]:
    """The formula of a convolution and its gradients, which have the same number of multiply-adds.

    Every element of the forward outputs is the sum over one window of the inputs: the size of the kernel divided by the
    number of outputs. Padding counts like any input. The kernel's last dimensions are (inputs of a group, outputs), or
    (inputs, outputs of each) if it is depthwise.

    Args:
        outputs: finds the forward outputs, or their gradient.
        kernel: finds the kernel, or its gradient.
        depthwise: whether each channel has a kernel of its own.
    """

    def flops(op: Any, wanted: set[int]) -> int:
        *window, inputs, _ = _shape(op, kernel(op))
        return 2 * _without_filling(op, outputs(op)) * math.prod(window) * (1 if depthwise else inputs)

    return flops


def _without_filling(op: Any, tensor: Any) -> int:
    """The size of outputs. TensorFlow computes a dilated convolution as a plain one of parts, which it fills up."""
    if tensor.op.type == "SpaceToBatchND":
        return _size(op, tensor.op.inputs[0])
    users = tensor.consumers()
    if len(users) == 1 and users[0].type == "BatchToSpaceND":
        return _size(op, users[0].outputs[0])
    return _size(op, tensor)


def _input(place: int) -> Callable[[Any], Any]:
    return lambda op: op.inputs[place]


def _output(op: Any) -> Any:
    return op.outputs[0]


def _cudnn(op: Any, wanted: set[int]) -> int:
    """Recurrent layers as one operation: inputs (time, batch, features), states (layers x directions, batch, units).

    Backward, cuDNN computes the gradients of the inputs, whether anything needs them or not. They are counted only if
    something does, as in a loop.
    """
    if op.get_attr("input_mode") != b"linear_input" or ("num_proj" in op.node_def.attr and op.get_attr("num_proj")):
        raise _Uncounted(f"there is no formula for this kind of {_named(op)}")
    (time, batch, features), (depth, _, units) = (_shape(op, op.inputs[place]) for place in (0, 1))
    directions = 2 if op.get_attr("direction") == b"bidirectional" else 1
    widths = [features, *[units * directions] * (depth // directions - 1)]
    each = 2 * time * batch * _GATES[op.get_attr("rnn_mode").decode()] * units * directions
    forward = each * (sum(widths) + units * len(widths))
    if "Backprop" not in op.type:
        return forward
    return 2 * forward - (0 if 0 in wanted else each * features)


_PRODUCTS: dict[str, Callable[[Any, set[int]], int]] = {
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _matrix_product),
    "Einsum": _einsum,
    **dict.fromkeys(("Conv2D", "Conv3D"), _convolution(_output, _input(1), False)),
    **dict.fromkeys(
        ("Conv2DBackpropInput", "Conv2DBackpropInputV2", "Conv3DBackpropInputV2"),
        _convolution(_input(2), _input(1), False),
    ),
    **dict.fromkeys(
        ("Conv2DBackpropFilter", "Conv2DBackpropFilterV2", "Conv3DBackpropFilterV2"),
        _convolution(_input(2), _output, False),
    ),
    "DepthwiseConv2dNative": _convolution(_output, _input(1), True),
    "DepthwiseConv2dNativeBackpropInput": _convolution(_input(2), _input(1), True),
    "DepthwiseConv2dNativeBackpropFilter": _convolution(_input(2), _output, True),
    **{f"CudnnRNN{way}{version}": _cudnn for way in ("", "Backprop") for version in ("", "V2", "V3")},
}
