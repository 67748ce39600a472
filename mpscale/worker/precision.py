"""The precision in which a model really computes, and the global settings that decide it.

A mode only asks for a precision: a model function may pin layers to another one or change Keras' policy.
:class:`Precision` reads the real one from the layers and the traced train step. :class:`Arithmetic` sets the mode's
global settings and detects changes. Both object to what the mode does not promise.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework.config import is_op_determinism_enabled

from mpscale.core.device import Device
from mpscale.core.mode import Mode
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.scaling.skip import all_nodes
from mpscale.worker.autotuning import users_variable
from mpscale.worker.device import set_arithmetic

PRODUCT = re.compile(
    r"MatMul|Einsum|Dot(?:V2)?$|Conv(?:\d[Dd]|V\d|$)|CudnnRNN(?!Params|Canonical)|BlockLSTM|LSTMBlock|GRUBlock"
)
"""Operations that multiply matrices, forward and backward, including convolutions and cuDNN's recurrent layers."""

_ELEMENT_TYPES = (
    "T", "DstT", "Ta", "Tb", "T1", "T2", "LhsT", "RhsT", "lhs_type", "rhs_type", "Tlhs", "Trhs", "Tin", "type",
)  # fmt: skip
FLOAT8 = "float8"
"""Layers and products whose factors are rounded to float8: to E4M3, gradients to E5M2."""

_FLOATS = (FLOAT8, "float16", "bfloat16", "float32", "float64")
LOW = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}
"""{policy: the dtype that it computes in below float32}."""

_OTHER = re.compile(
    r"(?:Relu6?|Elu|Selu|LeakyRelu|Softplus|Softsign|Tanh|Sigmoid|Erfc?|Softmax|LogSoftmax|BiasAdd)(?:Grad)?$"
    r"|(?:Max|Avg)Pool|CrossEntropy|CTCLoss|Random(?:Uniform|Normal)|TruncatedNormal"
)
"""Operations besides products that model and loss have in every precision.

Others vary: Keras clips and casts more in float16, and a loss scale adds operations of its own.
"""

MOVES = re.compile(
    r"(?:Placeholder|Identity|IdentityN|Const|Reshape|ReadVariableOp|ExpandDims|Squeeze|Pack|Unpack|Split|SplitV"
    r"|ConcatV2|Slice|StridedSlice|Transpose|Tile|GatherV2|GatherNd|ResourceGather|PreventGradient|StopGradient)$"
)
"""Operations that only move numbers. These may be float16 data on the way to a float32 layer."""

_FLOAT8_TYPES = (tf.dtypes.experimental.float8_e4m3fn, tf.dtypes.experimental.float8_e5m2)
_REWRITES = ("auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16", "auto_mixed_precision_mkl")
_FPMATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE")
_XLA = ("XLA_FLAGS", "TF_XLA_FLAGS")
_PRECISION_FLAG = re.compile(r"precision|fast_math|fast_min_max|tf32|b?f16|f8|denormal|algorithm|auto_jit|determinis")
_AT_START = {name: users_variable(name) for name in _XLA}
"""At the start of the process: this module is imported before the user's."""


class Precision:
    """The precision of a train step.

    Args:
        model: a built model.
        graph: the traced graph of the train step; nested functions count.
    """

    def __init__(self, model: keras.Model, graph: Any) -> None:
        self._layers = [
            layer
            for layer in model._flatten_layers(include_self=True)
            if not isinstance(layer, keras.layers.InputLayer)
            and (_own_rank(layer) >= 0 or not list(layer._flatten_layers(include_self=False)))
        ]
        definition = graph.as_graph_def()
        float8 = [op for op in graph.get_operations() if PRODUCT.search(op.type) and _multiplies_float8(op)]
        in_float8, unused = {op.name for op in float8}, _unused(float8, {output.op for output in graph.outputs})
        # Names are unique outside of functions.
        own = [node for node in definition.node if node.name not in unused]
        nodes = [*own, *all_nodes(definition)[len(definition.node) :]]
        self._products = [
            (node, FLOAT8 if place < len(own) and node.name in in_float8 else _dtype(node))
            for place, node in enumerate(nodes)
            if PRODUCT.search(node.op)
        ]
        self._others = Counter(node.op for node in nodes if _OTHER.match(node.op.removeprefix("Stateless")))
        self._dtypes = [(node.name, _dtype(node)) for node in nodes if not MOVES.match(node.op)]
        self.layers = Counter(_layer_dtype(layer) for layer in self._layers)
        """Number of layers by compute dtype, without containers."""
        self.products = Counter(dtype for _, dtype in self._products)
        """Number of products, gradients included, by the dtype of their factors; float8 ones may be fused by XLA."""

    def columns(self) -> Findings:
        """The columns of a record about the precision."""
        operations = self._others + Counter(node.op for node, _ in self._products)
        found = Findings()
        for column, numbers, missing in (
            ("layers", Counter(type(layer).__name__ for layer in self._layers), "the model has no layers"),
            ("layer_dtypes", self.layers, "the model has no layers"),
            ("product_dtypes", self.products, "the train step multiplies no matrices"),
            ("step_operations", operations, "the train step has none of the operations that are counted"),
        ):
            if numbers:
                found.values[column] = _counted(numbers)
            else:
                found.miss([column], Reason(Code.NOT_IN_WORKLOAD, missing))
        return found

    def objection(self, mode: Mode) -> str | None:
        """What was found, what ``mode`` promises and what to do; None if they agree."""
        objected = self.objected(mode)
        return None if objected is None else "; ".join(objected)

    def misfits(self, mode: Mode) -> dict[str, str]:
        """{name: dtype} of the layers that compute in what ``mode`` does not promise."""
        allowed = {"float32", LOW.get(mode.policy)} | ({FLOAT8} if mode.float8 else set())
        dtypes = {layer.name: _layer_dtype(layer) for layer in self._layers}
        return {name: dtype for name, dtype in dtypes.items() if dtype in set(_FLOATS) - allowed}

    def objected(self, mode: Mode) -> tuple[str, str] | None:
        """What was found and ``mode`` promises, and what to do; None if they agree."""
        low = LOW.get(mode.policy)
        allowed = {"float32", low} | ({FLOAT8} if mode.float8 else set())
        wrong = [
            f"{number} {'product' if what is self.products else 'layer'}{'s' * (number > 1)} in {dtype}"
            for what in (self.products, self.layers)
            for dtype, number in sorted(what.items())
            if dtype in _FLOATS and dtype not in allowed
        ]
        if not wrong:
            # Products and layers are as promised, but an operation between them may cast to another precision.
            halves = [(name, dtype) for name, dtype in self._dtypes if dtype in LOW.values() and dtype != low]
            wrong = [f"{name.removeprefix('gradient_tape/')} in {dtype}" for name, dtype in halves[:1]]
        if wrong:
            promise = f"only {low} and float32" if low else "float32 throughout"
            if mode.float8:
                promise = f"only {FLOAT8}, {low} and float32"
            if mode.graph_rewrite:
                promise = "a float32 model, which TensorFlow rewrites"
            names = list(self.misfits(mode))
            named = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
            return (
                f"the train step computes {' and '.join(wrong)}{named}, but {mode.name} promises {promise}",
                "remove set_dtype_policy, casts and dtypes other than float32 from the workload, since the mode sets "
                "the policy",
            )
        if mode.float8 and not self.products[FLOAT8]:
            return (
                f"{mode.name} promises products in {FLOAT8}, but the train step has none: its products are "
                f"{_counted(self.products) or 'none'}, its layers are {_counted(self.layers)}",
                f"a layer computes in {FLOAT8} only if the model calls it, so leave out this mode or call the layers",
            )
        if low and not mode.float8 and not self._computes_in(low):
            found = f"its products are {_counted(self.products)}" if self.products else "it multiplies no matrices"
            return (
                f"{mode.name} promises to compute in {low}, but the train step does not: {found}, its layers are "
                f"{_counted(self.layers)}",
                "remove dtype='float32' and set_dtype_policy from the workload, except for dtype='float32' in the last "
                "layer",
            )
        return None

    def _computes_in(self, low: str) -> bool:
        """Whether products are in ``low``, or, in a model without them, its layers.

        A layer that looks up a table always counts. In a model with products, others in ``low`` do not count, such as a
        normalisation, and layers with products are judged by these, not by their policy.
        """
        if self.products[low]:
            return True
        layers = [layer for layer in self._layers if layer.compute_dtype == low]
        if any(dtype in _FLOATS for dtype in self.products):
            return any(self._looks_up(layer) for layer in layers)
        weighted = [layer for layer in self._layers if _own_rank(layer) >= 0]
        return any(layer in layers for layer in weighted or self._layers)

    def _looks_up(self, layer: keras.layers.Layer) -> bool:
        """Whether a layer looks up a table: Keras' Embedding, or the user's own layer with a matrix and no product."""
        if isinstance(layer, keras.layers.Embedding):
            return True
        if type(layer).__module__.startswith("keras.") or _own_rank(layer) < 2:
            return False
        # TensorFlow numbers the scopes of a layer that is called more than once.
        scope = re.compile(rf"{re.escape(layer.name)}(_\d+)*")
        return not any(scope.fullmatch(part) for node, _ in self._products for part in node.name.split("/"))


class Arithmetic:
    """Sets the global settings that decide precision to the mode's, and checks them for later changes.

    A workload's module and data function run before the model is built, so their changes are simply overwritten. Later
    changes cannot be undone, since part of the model may have been made under them. ``jit``: whether XLA compiles train
    steps.
    """

    def __init__(self, mode: Mode, device: Device, jit: bool) -> None:
        self._mode, self._device, self._jit = mode, device, jit
        self.objection: str | None = None
        """What was found, what the mode promises and what to do; None if they agree."""
        self.policy_before: str | None = None
        """Keras' dtype policy before :meth:`settle`, as the import of the workload or its data function left it."""

    def settle(self) -> None:
        """Set everything to the mode's values. Call this just before the model is built."""
        # Checked first, since setting it now is too late: the user's module may have made objects under it.
        self.look("the import of the workload or its data function", ("floatx",))
        self.policy_before = self.policy_before or keras.config.dtype_policy().name
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(self._mode.policy)
        set_arithmetic(self._mode)
        options = tf.config.optimizer.get_experimental_options()
        unwanted = {name for name in (*_REWRITES, "disable_meta_optimizer") if options.get(name)}
        if self._mode.graph_rewrite:
            unwanted.discard("auto_mixed_precision")
        if unwanted:
            tf.config.optimizer.set_experimental_options(dict.fromkeys(unwanted, False))
        if tf.config.optimizer.get_jit():
            tf.config.optimizer.set_jit(False)
        if tf.config.functions_run_eagerly():
            tf.config.run_functions_eagerly(False)

    def look(self, after: str, names: tuple[str, ...] | None = None) -> None:
        """Note the first settings that differ from the mode's, out of ``names`` or out of all.

        ``after`` names what ran last, for the message.
        """
        if self.objection is not None:
            return
        wrong = [
            f"{name} is {found}, not {wanted}"
            for name, (found, wanted) in self._settings().items()
            if found != wanted and (names is None or name in names)
        ]
        if wrong:
            self.objection = (
                f"after {after}, {'; '.join(wrong)}; {self._mode.name} sets this for the whole process, so remove what "
                "changes it from the workload or the environment"
            )

    def column(self) -> str:
        """The column process_settings: other settings that affect a figure, which have to be the same in every mode."""
        parts = ["deterministic operations"] if is_op_determinism_enabled() else []
        parts += [f"{name}={users_variable(name)}" for name in _XLA if users_variable(name)]
        return "; ".join(parts) or "none"

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        """{setting: (its value, the mode's value)}."""
        options = tf.config.optimizer.get_experimental_options()
        tf32 = tf.config.experimental.tensor_float_32_execution_enabled
        settings: dict[str, tuple[Any, Any]] = {
            "Keras' dtype policy": (keras.config.dtype_policy().name, self._mode.policy),
            "floatx": (keras.config.floatx(), "float32"),
            "TF32": (_on(tf32()), _on(self._mode.tf32)),
            "tf.config.run_functions_eagerly": (_on(tf.config.functions_run_eagerly()), "off"),
        }
        for name in _REWRITES:
            wanted = self._mode.graph_rewrite and name == "auto_mixed_precision"
            settings[f"the graph optimizer's {name}"] = (_on(options.get(name, False)), _on(wanted))
        if self._mode.graph_rewrite:
            settings["the graph optimizer's disable_meta_optimizer"] = (_on(options["disable_meta_optimizer"]), "off")
        if not self._jit:
            settings["tf.config.optimizer.set_jit"] = (tf.config.optimizer.get_jit() or "off", "off")
        for name in _FPMATH:
            settings[name] = (os.environ.get(name, "").upper() or "STRICT", "STRICT")
        override = os.environ.get("NVIDIA_TF32_OVERRIDE")
        if self._device.has_tf32 and override in ("0", "1") and self._mode.name in ("fp32", "tf32"):
            settings["NVIDIA_TF32_OVERRIDE"] = (override, str(int(self._mode.tf32)))
        for name in _XLA:
            settings[name] = tuple(map(_precision_flags, (users_variable(name), _AT_START[name])))  # type: ignore[assignment]
        return settings


def computes_below_float32(nodes: Iterable[Any]) -> bool:
    """Whether one of ``nodes`` of a graph computes in float16 or bfloat16, or rounds to one of them."""
    return any(_dtype(node) in LOW.values() for node in nodes if not MOVES.match(node.op))


def _counted(numbers: Counter[str]) -> str:
    """Such as ``"float16 12, float32 2"``, the most frequent first."""
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {number}" for name, number in ordered)


def _own_rank(layer: keras.layers.Layer) -> int:
    """The largest rank of a layer's own weights, -1 if it has none."""
    below = {id(v) for inner in layer._flatten_layers(include_self=False) for v in inner.weights}
    return max((len(v.shape) for v in layer.weights if id(v) not in below), default=-1)


def _layer_dtype(layer: keras.layers.Layer) -> str:
    return FLOAT8 if layer.quantization_mode == "float8" else str(layer.compute_dtype)


def _multiplies_float8(product: tf.Operation) -> bool:
    """Whether both factors of a product are values that were rounded to float8, scaled back and only moved since."""
    return all(_was_float8(factor) for factor in product.inputs)


def _unused(products: Iterable[tf.Operation], results: Container[tf.Operation]) -> set[str]:
    """The names of those whose result nothing needs; TensorFlow leaves them out of the program.

    A float8 layer asks for the gradient of its inputs even if these are the examples.
    """

    def needed(op: tf.Operation) -> bool:
        users = [user for output in op.outputs for user in output.consumers()]
        return any(not MOVES.match(user.type) or needed(user) for user in users) or op in results

    return {op.name for op in products if not needed(op)}


def _was_float8(value: tf.Tensor) -> bool:
    while MOVES.match(value.op.type) and value.op.inputs:
        value = value.op.inputs[value.value_index if value.op.type == "IdentityN" else 0]
    if value.op.type not in ("Mul", "RealDiv"):
        return False
    return any(each.op.type == "Cast" and each.op.inputs[0].dtype in _FLOAT8_TYPES for each in value.op.inputs)


def _dtype(node: Any) -> str:
    """The narrowest dtype with which a node computes."""
    types = [tf.as_dtype(node.attr[name].type) for name in _ELEMENT_TYPES if name in node.attr and node.attr[name].type]
    return str(min(types, key=lambda dtype: int(dtype.size)).name) if types else "unknown"


def _on(value: Any) -> str:
    return "on" if value else "off"


def _precision_flags(flags: str) -> str:
    """XLA's flags that decide precision, or what is compiled."""
    return " ".join(sorted(flag for flag in flags.split() if _PRECISION_FLAG.search(flag))) or "without such flags"
