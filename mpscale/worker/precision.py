"""The precision that a model really computes in, read from its layers and from the traced train step.

A mode only asks for a precision: a model function may pin layers to another one, or change Keras' policy behind the
mode's back. What is read here is what is trained, and :func:`objection` holds it against what the mode promises.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework.config import is_op_determinism_enabled

from mpscale.core.device import Device
from mpscale.core.mode import Mode
from mpscale.scaling.skip import all_nodes
from mpscale.worker import device as accelerator

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


# Global settings that decide what is computed: made as the mode has them, and looked at for changes behind its back.
# A workload's module and its data function run before the model is built, so what they set is simply set anew. After
# that a change can no longer be undone: part of the model may have been made under it.

_REWRITES = ("auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16", "auto_mixed_precision_mkl")
_FPMATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "TF_SET_ONEDNN_FPMATH_MODE")
_XLA = ("XLA_FLAGS", "TF_XLA_FLAGS")
_PRECISION_FLAG = re.compile(r"precision|fast_math|fast_min_max|tf32|b?f16|f8|denormal|algorithm|auto_jit|determinis")
_AT_START = {name: os.environ.get(name, "") for name in _XLA}
"""As the process was started: this is imported before the user's module is."""


class Arithmetic:
    """The settings of one case.

    Args:
        mode: what they should be.
        device: where it trains.
        jit: whether train steps are compiled by XLA.
    """

    def __init__(self, mode: Mode, device: Device, jit: bool) -> None:
        self._mode, self._device, self._jit = mode, device, jit
        self._objection: str | None = None

    def settle(self) -> None:
        """Sets everything as the mode has it; call it last before the model is built."""
        # Asked first, since it cannot be put right: objects of the user's module may have been made under it.
        self.look("the import of the workload or its data function", ("floatx",))
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(self._mode.policy)
        accelerator.set_arithmetic(self._mode)
        options = tf.config.optimizer.get_experimental_options()
        unwanted = [name for name in (*_REWRITES, "disable_meta_optimizer") if options.get(name)]
        if self._mode.graph_rewrite:
            unwanted = [name for name in unwanted if name != "auto_mixed_precision"]
        if unwanted:
            tf.config.optimizer.set_experimental_options(dict.fromkeys(unwanted, False))
        if tf.config.optimizer.get_jit():
            tf.config.optimizer.set_jit(False)
        if tf.config.functions_run_eagerly():
            tf.config.run_functions_eagerly(False)

    def look(self, after: str, names: tuple[str, ...] | None = None) -> None:
        """Notes the first settings that are not as the mode has them.

        Args:
            after: what ran last, in words.
            names: the settings to look at; None looks at all.
        """
        if self._objection is not None:
            return
        wrong = [
            f"{name} is {found}, not {wanted}"
            for name, (found, wanted) in self._settings().items()
            if found != wanted and (names is None or name in names)
        ]
        if wrong:
            self._objection = (
                f"after {after}, {'; '.join(wrong)}: a setting of the whole process that decides the precision of "
                f"{self._mode.name}; take what changes it out of the workload or the environment"
            )

    @property
    def objection(self) -> str | None:
        """What was found, what the mode promises and what to do; None where all is as it should be."""
        return self._objection

    def column(self) -> str:
        """Settings beyond the mode's that move a figure: they have to be the same in every mode."""
        parts = ["deterministic operations"] if is_op_determinism_enabled() else []
        parts += [f"{name}={os.environ[name]}" for name in _XLA if os.environ.get(name)]
        return "; ".join(parts) or "none"

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        """{setting: (as it is, as the mode has it)}."""
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
            settings[name] = tuple(map(_precision_flags, (os.environ.get(name, ""), _AT_START[name])))  # type: ignore[assignment]
        return settings


def _on(value: Any) -> str:
    return "on" if value else "off"


def _precision_flags(flags: str) -> str:
    """Those of XLA's flags that decide precision, or what is compiled."""
    return " ".join(sorted(flag for flag in flags.split() if _PRECISION_FLAG.search(flag))) or "without such flags"
