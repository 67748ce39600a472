"""Float8 training as Keras does it: a layer rounds both factors of its products, with a scale for each tensor.

A quantized layer has six more variables, a scale and a history of largest magnitudes (amax) for each of its inputs, its
kernel and the gradient of its outputs. Their "gradient" is their next value, and the optimizer assigns it as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.record import Findings

TENSORS = ("inputs", "kernel", "outputs_grad")
"""What a layer has a scale for, as Keras names its variables."""

_KINDS = (keras.layers.Dense, keras.layers.EinsumDense)


class Float8:
    """The layers of a model that compute in float8.

    Args:
        model: a built model, whose layers are quantized if they can be: Dense and EinsumDense layers that are trained
            and do not compute in float32. They may be parts of other layers, such as MultiHeadAttention.
    """

    def __init__(self, model: keras.Model) -> None:
        trained = {id(variable) for variable in model.trainable_variables}
        layers = list(model._flatten_layers(include_self=False))
        bypassed = {id(layer.layer) for layer in layers if isinstance(layer, keras.layers.TimeDistributed)}
        # A layer that is not trained would keep the scale that it starts with. A user's own method call is not what a
        # quantized layer computes, and TimeDistributed uses only this method.
        self.layers = [
            layer
            for layer in layers
            if isinstance(layer, _KINDS)
            and type(layer).call in [kind.call for kind in _KINDS]
            and layer.compute_dtype != "float32"
            and layer.quantization_mode is None
            and id(layer.kernel) in trained
            and id(layer) not in bypassed
        ]
        self._weighted = Counter(
            f"{type(layer).__name__} in {layer.compute_dtype}"
            for layer in layers
            if layer.weights and not list(layer._flatten_layers(include_self=False))
        )
        self._calls: dict[int, list[tuple[Any, bool]]] = {id(layer): [] for layer in self.layers}
        for layer in self.layers:
            # Keras' own check of the type refuses every subclass.
            layer.quantize("float8", type_check=False)
            self._note_calls(layer)

    def _note_calls(self, layer: keras.layers.Layer) -> None:
        """Note for each call the graph that it is traced in, and whether scales are updated."""
        call, calls = layer._float8_call, self._calls[id(layer)]

        def noted(inputs: Any, training: bool | None = None) -> Any:
            calls.append((tf.compat.v1.get_default_graph(), bool(training)))
            return call(inputs, training=training)

        layer._float8_call = noted

    def forget_calls(self) -> None:
        """Forget the calls noted so far: the step is traced anew."""
        for calls in self._calls.values():
            calls.clear()

    def unsupported_reason(self, optimizer: keras.optimizers.Optimizer) -> str | None:
        """Why Keras cannot train the model in float8 with this optimizer; None if it can."""
        if self.layers and not optimizer.use_ema:
            return None
        if self.layers:
            return (
                "Keras' optimizers keep no moving averages of float8 scales and fail when they replace weights by "
                "averages; use an optimizer without use_ema, or leave out this mode"
            )
        has = ", ".join(f"{number} {name}" for name, number in sorted(self._weighted.items()))
        return (
            "Keras can only train Dense and EinsumDense layers in float8, and this model has none that is trained, not "
            "pinned to float32, without a method call of its own and outside of TimeDistributed; its layers with "
            f"weights are {has or 'of its own making'}"
        )

    def misused(self, graph: Any) -> str | None:
        """Why scales would be wrong in the train step, and what to do; None if they are right.

        Call this once the step has been traced for the first time.

        Args:
            graph: the traced graph of the train step.
        """
        for layer in self.layers:
            calls = self._calls[id(layer)]
            if not calls:
                wrong = "not called in the train step, or only its method call is, which does not compute in float8"
            elif len(calls) > 1:
                wrong = f"called {len(calls)} times in a step, and TensorFlow adds up the new scales of the calls"
            elif any(where is not graph for where, _ in calls):
                wrong = "called in a loop, a branch or a function of its own, where its new scales may be added up"
            elif not all(training for _, training in calls):
                wrong = "called with training=False in the train step, so its scales never change"
            else:
                continue
            return (
                f"{layer.path} is {wrong}; Keras' float8 needs exactly one call of each layer per step. Pin the layer "
                "to dtype='float32', or leave out this mode"
            )
        return None

    def columns(self) -> Findings:
        """The column float8_tensors: amax and scale of each tensor at this moment."""
        found: dict[str, Any] = {}
        for layer in self.layers:
            # Layers of a user's own model may share a path.
            name, number = layer.path, 1
            while name in found:
                number += 1
                name = f"{layer.path} ({number})"
            found[name] = _tensors(layer)
        return Findings({"float8_tensors": json.dumps(found)})


def _tensors(layer: keras.layers.Layer) -> dict[str, dict[str, float | str]]:
    found = {}
    for tensor in TENSORS:
        amax = np.max(getattr(layer, f"{tensor}_amax_history").numpy())
        found[tensor] = {"amax": _plain(amax), "scale": _plain(getattr(layer, f"{tensor}_scale").numpy())}
    return found


def _plain(value: Any) -> float | str:
    """A number with six digits; JSON has none for infinity and NaN."""
    return float(f"{value:.6g}") if np.isfinite(value) else str(value)
