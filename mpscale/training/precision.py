"""The precision that a model really computes in, read from its layers and from the traced train step.

A mode only asks for a precision: a model function may pin layers to another one, or change Keras' policy behind the
mode's back. What is read here is what is trained, and :func:`objection` holds it against what the mode promises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from mpscale.modes import Mode
from mpscale.scaling.gate import all_nodes

_PRODUCT = re.compile(
    r"MatMul|Einsum|Dot(?:V2)?$|Conv(?:\d[Dd]|V\d|$)|CudnnRNN(?!Params|Canonical)|BlockLSTM|LSTMBlock|GRUBlock"
)
"""Operations that multiply matrices, convolutions and recurrent layers of cuDNN among them, forward and backward."""

_ELEMENT_TYPES = (
    "T",
    "DstT",
    "Ta",
    "Tb",
    "T1",
    "T2",
    "LhsT",
    "RhsT",
    "lhs_type",
    "rhs_type",
    "Tlhs",
    "Trhs",
    "Tin",
    "type",
)
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_LOW = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}

_OTHER = re.compile(
    r"(?:Relu6?|Elu|Selu|LeakyRelu|Softplus|Softsign|Tanh|Sigmoid|Erfc?|Softmax|LogSoftmax|BiasAdd)(?:Grad)?$"
    r"|(?:Max|Avg)Pool|CrossEntropy|CTCLoss|Random(?:Uniform|Normal)|TruncatedNormal"
)
"""Operations beside products that come from model and loss alone, whatever the precision.

Others do not: Keras clips and casts more in float16, and a loss scale has operations of its own.
"""


_MOVES = re.compile(
    r"(?:Placeholder|Identity|IdentityN|Const|Reshape|ReadVariableOp|ExpandDims|Squeeze|Pack|Unpack|Split|SplitV"
    r"|ConcatV2|Slice|StridedSlice|Transpose|Tile|GatherV2|GatherNd|ResourceGather|PreventGradient|StopGradient)$"
)
"""Operations that only move numbers, which may well be data in float16 on the way to a layer in float32."""


class Precision:
    """What a train step computes in.

    Args:
        model: the model, built.
        graph: the traced graph of the train step; nested functions count.
    """

    def __init__(self, model: keras.Model, graph: Any) -> None:
        self._layers = _working_layers(model)
        nodes = all_nodes(graph.as_graph_def())
        self._products = [(node, _dtype(node)) for node in nodes if _PRODUCT.search(node.op)]
        self._others = Counter(node.op for node in nodes if _OTHER.match(node.op.removeprefix("Stateless")))
        self._dtypes = [(node.name, _dtype(node)) for node in nodes if not _MOVES.match(node.op)]
        self.layers = Counter(_compute_dtype(layer) for layer in self._layers)
        """Layers by the dtype that they compute in, those that are only containers left out."""
        self.products = Counter(dtype for _, dtype in self._products)
        """Products of the step, gradients included, by the dtype of what is multiplied."""

    def columns(self) -> tuple[dict[str, Any], dict[str, str]]:
        """{column: value} and {column: reason}."""
        values = {"layer_dtypes": counted(self.layers), "product_dtypes": counted(self.products)}
        values["step_operations"] = counted(self._others + Counter(node.op for node, _ in self._products))
        reasons = {
            "layer_dtypes": "the model has no layers",
            "product_dtypes": "the train step multiplies no matrices",
            "step_operations": "the train step has none of the operations that are counted",
        }
        return {name: text for name, text in values.items() if text}, {
            name: reasons[name] for name, text in values.items() if not text
        }

    def objection(self, mode: Mode) -> str | None:
        """What was found, what ``mode`` promises instead and what to do; None where they agree."""
        low = _LOW.get(mode.policy)
        allowed = {"float32", low}
        wrong = [
            f"{number} {'product' if what is self.products else 'layer'}{'s' * (number > 1)} in {dtype}"
            for what in (self.products, self.layers)
            for dtype, number in sorted(what.items())
            if dtype in _FLOATS and dtype not in allowed
        ]
        if not wrong:
            # Nothing of weight; but a layer may well cast to another precision between two that do not.
            halves = [(name, dtype) for name, dtype in self._dtypes if dtype in _LOW.values() and dtype != low]
            wrong = [f"{name.removeprefix('gradient_tape/')} in {dtype}" for name, dtype in halves[:1]]
        if wrong:
            promise = f"{low} and float32 alone" if low else "float32 throughout"
            if mode.graph_rewrite:
                promise = "a float32 model, which TensorFlow rewrites"
            return (
                f"the train step computes {' and '.join(wrong)}{self._named(allowed)}, and {mode.name} promises "
                f"{promise}: take calls of set_dtype_policy, casts and fixed dtypes other than float32 out of the "
                "workload, since the mode sets the policy"
            )
        if low and not self._computes_in(low):
            found = f"its products are {counted(self.products)}" if self.products else "it multiplies no matrices"
            return (
                f"nothing of weight computes in {low}, which {mode.name} promises: {found}, its layers "
                f"{counted(self.layers)}; take dtype='float32' and set_dtype_policy out of the workload, and leave "
                "float32 to the last layer alone"
            )
        return None

    def _named(self, allowed: set[str | None]) -> str:
        """The first few layers that compute in a dtype that is not allowed."""
        names = [layer.name for layer in self._layers if _compute_dtype(layer) in set(_FLOATS) - allowed]
        more = ", ..." if len(names) > 3 else ""
        return f" ({', '.join(names[:3])}{more})" if names else ""

    def _computes_in(self, low: str) -> bool:
        """Whether a product is taken in ``low``, or work that is no product is done in it.

        A table that is looked up is such work. Where a model has products, a normalisation in ``low`` does not make up
        for them, and of a layer that has products these count and not its policy.
        """
        if self.products[low]:
            return True
        layers = [layer for layer in self._layers if _compute_dtype(layer) == low]
        if any(dtype in _FLOATS for dtype in self.products):
            return any(self._looks_up(layer) for layer in layers)
        weighted = [layer for layer in self._layers if _own_rank(layer) >= 0]
        return any(layer in layers for layer in weighted or self._layers)

    def _looks_up(self, layer: keras.layers.Layer) -> bool:
        """Whether it holds a table: Keras' embedding, or a layer of the user's own with a matrix and no product."""
        if isinstance(layer, keras.layers.Embedding):
            return True
        if type(layer).__module__.startswith("keras.") or _own_rank(layer) < 2:
            return False
        # TensorFlow numbers the scope of a layer that is called more than once.
        scope = re.compile(rf"{re.escape(layer.name)}(_\d+)*")
        return not any(scope.fullmatch(part) for node, _ in self._products for part in node.name.split("/"))


def counted(numbers: Counter[str]) -> str:
    """``"float16 12, float32 2"``: the most frequent first."""
    return ", ".join(
        f"{name} {number}" for name, number in sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    )


def computes_below_float32(nodes: Iterable[Any]) -> bool:
    """Whether one of ``nodes`` of a graph computes in float16 or bfloat16, or rounds to it."""
    return any(_dtype(node) in _LOW.values() for node in nodes if not _MOVES.match(node.op))


def _working_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model at any depth, without inputs and without those that only hold others."""
    layers = model._flatten_layers(include_self=True)
    return [
        layer
        for layer in layers
        if not isinstance(layer, keras.layers.InputLayer)
        and (_own_rank(layer) >= 0 or not list(layer._flatten_layers(include_self=False)))
    ]


def _own_rank(layer: keras.layers.Layer) -> int:
    """The largest rank of the weights that a layer holds itself, -1 where it has none."""
    below = {id(v) for inner in layer._flatten_layers(include_self=False) for v in inner.weights}
    return max((len(v.shape) for v in layer.weights if id(v) not in below), default=-1)


def _compute_dtype(layer: keras.layers.Layer) -> str:
    return str(layer.compute_dtype)


def _dtype(node: Any) -> str:
    """The narrowest type of what a node computes with."""
    types = [tf.as_dtype(node.attr[name].type) for name in _ELEMENT_TYPES if name in node.attr and node.attr[name].type]
    return str(min(types, key=lambda dtype: int(dtype.size)).name) if types else "unknown"
