"""A traced train step by layers: its forward products with their sizes, what is cast, and which layer does it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras

from mpscale.worker.flops import BRANCHES, CALLS, LOOPS, flops_of, flops_of_product
from mpscale.worker.precision import MOVES, PRODUCT

_BACKWARD = "gradient_tape/"
WITHIN = "within"
"""What a size is if neither factor is a weight, as in attention."""
_ACTIVATES = frozenset({"BiasAdd", "AddV2", "Softmax", "LogSoftmax", "Sigmoid", "Tanh", "Relu", "Softplus", "Exp"})
"""Operations between the last product of a model and its outputs."""
_NUMBERED = re.compile(r"_\d+\Z")
"""What TensorFlow adds to the scope of a layer that is called again."""
_OF_ANOTHER_REPLICA = re.compile(r"(?:\A|/)replica_[1-9]\d*/")
"""In the names of operations of all replicas but the first, which do the same."""


@dataclass(frozen=True, slots=True)
class Size:
    """A size of a matrix product.

    Args:
        number: how many.
        what: such as ``outputs``; for people.
        given: whether the data or the labels decide it, not the model: features and classes.
    """

    number: int
    what: str
    given: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """A product of the forward pass.

    Args:
        op: the operation, possibly in a function.
        layer: the name of its layer; the operation's own if it is in none.
        sizes: the sizes of its matrices, as far as they are known; not those of the batch.
        inside: whether it is in a function, such as the body of a loop.
    """

    op: Any
    layer: str
    sizes: tuple[Size, ...]
    inside: bool

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self.op.outputs[0].dtype.name)


@dataclass(frozen=True, slots=True)
class Given:
    """Sizes that a product may have because of the data: features of an example, and numbers of outputs."""

    features: frozenset[int | None]
    classes: frozenset[int | None]


class Traced:
    """The graph of a train step.

    Args:
        model: the model that it trains.
        graph: the traced FuncGraph.
        inputs: the batches of the arrays of examples in this graph, tensors by name.
        outputs: what reaches the loss in this graph, tensors; none if that is not known.
    """

    def __init__(self, model: keras.Model, graph: Any, inputs: Mapping[str, Any], outputs: Sequence[Any]) -> None:
        self.graph = graph
        self._labels, self._owners = _layers(model)
        self._named: dict[str, list[str]] = {}
        for label in self._labels.values():
            self._named.setdefault(label.rpartition("/")[2], []).append(label)
        variables = {id(v.value.handle): v for v in model.variables if hasattr(v.value, "handle")}
        self._variables = {
            inner.op.name: variables[id(outer)] for outer, inner in graph.captures if id(outer) in variables
        }
        self._inputs = inputs
        self._features = frozenset(tensor.shape[-1] for tensor in inputs.values() if (tensor.shape.rank or 0) > 1)
        self._drawn = {tensor.name for tensor in inputs.values()}
        self.outputs = list(outputs)
        """What reaches the loss."""

    def label(self, layer: keras.layers.Layer) -> str:
        """The name of a layer, with its path below other layers."""
        return self._labels.get(id(layer), layer.name)

    def owner(self, variable: Any) -> str:
        """The label of the layer to which a variable belongs."""
        return self._owners.get(id(variable), str(variable.path))

    def layer_of(self, op: Any, outer: str = "") -> str:
        """The label of the layer that an operation belongs to, by its scope; empty if it belongs to none.

        Args:
            op: the operation.
            outer: the name of the operation that calls the function in which it is.
        """
        found = ""
        for token in (*outer.removeprefix(_BACKWARD).split("/"), *op.name.removeprefix(_BACKWARD).split("/")):
            labels = self._named.get(token) or self._named.get(_NUMBERED.sub("", token), [])
            inside = [label for label in labels if label.startswith(f"{found}/")]
            found = (inside or labels or [found])[0]
        return found

    @cached_property
    def products(self) -> list[Product]:
        """The products of the forward pass, in order; recurrent kernels of cuDNN and depthwise ones are left out."""
        forward = [
            (op, outer)
            for op, outer in operations(self.graph)
            if PRODUCT.search(op.type)
            and not (name := f"{outer}/{op.name}".lstrip("/")).startswith(_BACKWARD)
            and not _OF_ANOTHER_REPLICA.search(name)
        ]
        classes = frozenset(outputs.shape[-1] for outputs in self.outputs if outputs.shape.rank)
        last = {op.name for op in map(_last_product, self.outputs) if op is not None}
        found = []
        for number, (op, outer) in enumerate(forward, 1):
            weight = next((v for each in op.inputs if (v := self._weight(each)) is not None), None)
            layer = (self.layer_of(op, outer) or op.name) if weight is None else self.owner(weight)
            given = Given(
                self._features if number == 1 else frozenset(),
                classes if op.name in last or number > len(forward) - len(self.outputs) else frozenset(),
            )
            found.append(Product(op, layer, tuple(self._sizes(op, given, weight is not None)), bool(outer)))
        return found

    def casts_of(self, name: str) -> dict[str, str]:
        """{dtype: the first layer, or nothing} of what examples are cast to before anything is computed with them."""
        found: dict[str, str] = {}
        todo, seen = [self._inputs[name]], set()
        while todo:
            tensor = todo.pop(0)
            for user in tensor.consumers():
                if user.name in seen:
                    continue
                if user.type == "Cast":
                    found.setdefault(user.outputs[0].dtype.name, self._reader(user))
                elif not (_moves(user) and user.inputs[0].name == tensor.name):
                    continue
                seen.add(user.name)
                todo += user.outputs
        return found

    def _reader(self, op: Any) -> str:
        """The layer of an operation, or of the first that uses its outputs: Keras casts before it opens a scope."""
        todo = [op]
        for each in todo:
            if label := self.layer_of(each):
                return label
            if _moves(each):
                todo += [user for output in each.outputs for user in output.consumers()]
        return ""

    def share(self, products: list[Product]) -> float | None:
        """The share of these in the FLOPs of all products of the forward pass; None if it is not known."""
        if any(each.inside for each in self.products):
            # How often a function runs, only a walk through the whole graph tells, which takes longer.
            total, part = self._walked(self.products), self._walked(products)
            return None if total is None or part is None else part / total
        numbers = {each.op.name: flops_of_product(each.op) for each in self.products}
        known = [number for number in numbers.values() if number is not None]
        if len(known) < len(numbers) or not known:
            return None
        return sum(numbers[each.op.name] or 0 for each in products) / sum(known)

    def _walked(self, products: list[Product]) -> int | None:
        """The FLOPs of these by a walk through the whole graph; None if they are unknown."""
        counted = {(id(each.op.graph), each.op.name) for each in products}
        flops = flops_of(self.graph, lambda op: (id(op.graph), op.name) in counted)
        return flops if isinstance(flops, int) else None

    def _weight(self, tensor: Any) -> Any:
        """The variable that a factor is, cast or moved; None if it is something else."""
        while tensor.op.inputs and _moves(tensor.op):
            tensor = tensor.op.inputs[0]
        return self._variables.get(tensor.op.name)

    def _of_data(self, tensor: Any) -> bool:
        """Whether a factor is the batch of examples, cast or moved."""
        while tensor.name not in self._drawn and tensor.op.inputs and _moves(tensor.op):
            tensor = tensor.op.inputs[0]
        return tensor.name in self._drawn

    def _sizes(self, op: Any, given: Given, weighted: bool) -> Iterator[Size]:
        """The sizes of a product.

        Args:
            op: the product.
            given: which sizes the data decides, if this is the first or the last product.
            weighted: whether a factor is a weight, so that rows are those of the batch.
        """
        numbers = _numbers(op)
        if numbers is None:
            return
        rows, inner, columns = numbers
        if not weighted:
            yield from (Size(number, WITHIN) for number in (inner, columns) if number)
            return
        if self._weight(op.inputs[0]) is not None and not _is_convolution(op.type):
            rows, columns = columns, rows  # the weight comes first
        if inner:
            yield Size(inner, "inputs", inner in given.features or any(map(self._of_data, op.inputs)))
        if columns:
            yield Size(columns, "outputs", columns in given.classes)


def operations(graph: Any, outer: str = "") -> Iterator[tuple[Any, str]]:
    """The operations of a FuncGraph and of the functions that it calls, each with the names of the calls."""
    for op in graph.get_operations():
        yield op, outer
        names: list[str] = []
        if op.type in CALLS:
            names = ["f"]
        elif op.type in LOOPS:
            names = ["body"]
        elif op.type in BRANCHES:
            names = ["then_branch", "else_branch"] if op.type.endswith("If") else ["branches"]
        for name in names:
            functions = op.get_attr(name)
            for function in functions if isinstance(functions, list) else [functions]:
                inner = graph._get_function(function.name)
                if inner is not None:
                    yield from operations(inner.graph, f"{outer}/{op.name}".lstrip("/"))


def source(tensor: Any) -> Any:
    """The operation that computes a tensor, which may be cast or moved since."""
    while tensor.op.inputs and _moves(tensor.op):
        tensor = tensor.op.inputs[0]
    return tensor.op


def _moves(op: Any) -> bool:
    """Whether an operation only casts or moves the numbers of its first input; a table that it looks up is none."""
    return op.type == "Cast" or (MOVES.match(op.type) is not None and "Gather" not in op.type)


def _layers(model: keras.Model) -> tuple[dict[int, str], dict[int, str]]:
    """{id of a layer: its label}, and {id of a variable: the label of the innermost layer that has it}."""
    labels: dict[int, str] = {}
    owners: dict[int, str] = {}

    def visit(layer: Any, path: str) -> None:
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            if id(inner) not in labels:
                labels[id(inner)] = f"{path}{inner.name}"
                owners.update({id(variable): labels[id(inner)] for variable in inner.variables})
                visit(inner, f"{labels[id(inner)]}/")

    visit(model, "")
    return labels, owners


def _last_product(outputs: Any) -> Any:
    """The product that outputs come from by an activation and a bias at most; None if there is more between."""
    op = source(outputs)
    while not PRODUCT.search(op.type):
        if op.type not in _ACTIVATES or not op.inputs:
            return None
        op = source(op.inputs[0])
    return op


def _is_convolution(kind: str) -> bool:
    return kind.startswith("Conv")


_Numbers = tuple[int | None, int | None, int | None]
"""Rows, what is summed over, and columns of a matrix product; None for what is unknown."""


def _numbers(op: Any) -> _Numbers | None:
    """The sizes of a product, None if it runs on no Tensor Core or its form is unknown."""
    if op.type == "MatMul" or op.type.startswith("BatchMatMul"):
        first, second = ("transpose_a", "transpose_b") if op.type == "MatMul" else ("adj_x", "adj_y")
        left, right = (_dims(each) for each in op.inputs)
        if len(left) < 2 or len(right) < 2:
            return None
        rows, inner = (left[-1], left[-2]) if op.get_attr(first) else (left[-2], left[-1])
        return rows, inner, right[-2] if op.get_attr(second) else right[-1]
    if op.type == "Einsum" and len(op.inputs) == 2:
        return _einsum(op)
    if _is_convolution(op.type):
        backward = "BackpropInput" in op.type  # of a transposed convolution, whose kernel is (..., outputs, inputs)
        kernel = _dims(op.inputs[1])
        if "BackpropFilter" in op.type or len(kernel) < 3:
            return None
        return None, kernel[-1 if backward else -2], kernel[-2 if backward else -1]
    return None


def _einsum(op: Any) -> _Numbers | None:
    """Each group of labels is one size: those of one factor, and those that are summed over."""
    left, right = op.get_attr("equation").decode().replace(" ", "").split("->")
    parts = left.split(",")
    if "..." in left:
        return None
    sizes: dict[str, int | None] = {}
    for part, factor in zip(parts, op.inputs, strict=True):
        sizes |= dict(zip(part, _dims(factor), strict=True))
    first, second = map(set, parts)

    def product(labels: set[str]) -> int | None:
        total = 1
        for label in labels:
            if (size := sizes[label]) is None:
                return None
            total *= size
        return total if labels else None

    kept = set(right)
    return product(first - second), product(first & second - kept), product(second - first)


def _dims(tensor: Any) -> list[int | None]:
    return list(tensor.shape.as_list()) if tensor.shape.rank is not None else []
