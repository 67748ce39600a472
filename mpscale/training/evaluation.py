"""The metric of a model on a set of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

_BATCH = 1000


class Evaluator:
    """Runs the model over whole sets in batches of one shape, so that it is compiled once.

    Args:
        model: a built Keras model; it runs under the dtype policy it was built with.
        metric: ``(labels, outputs) -> float`` on NumPy arrays.
        jit: compile with XLA.
    """

    def __init__(
        self, model: keras.Model, metric: Callable[[npt.NDArray[Any], npt.NDArray[Any]], float], jit: bool
    ) -> None:
        self._metric = metric
        self._forward = tf.function(lambda x: tf.cast(model(x, training=False), tf.float32), jit_compile=jit)

    def __call__(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
        """The metric over all of ``x`` (examples, ...) and ``y`` (examples, ...)."""
        outputs = []
        for start in range(0, len(x), _BATCH):
            part = x[start : start + _BATCH]
            # The last batch is filled up with its own examples, whose outputs are cut off again.
            filled = np.resize(part, (min(_BATCH, len(x)), *part.shape[1:]))
            outputs.append(self._forward(tf.constant(filled)).numpy()[: len(part)])
        return float(self._metric(y, np.concatenate(outputs)))
