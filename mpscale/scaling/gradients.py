"""From gradients of the scaled loss to true ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf


def unscaled(grads: Sequence[Any], scale: tf.Tensor) -> list[Any]:
    """``grads / scale`` in float32 or wider, so that a small gradient survives the division.

    As a product, which is quicker. The reciprocal of a power of two is exact, that of another scale rounded.

    Args:
        grads: dense tensors or ``tf.IndexedSlices``; None is passed through.
        scale: float32 scalar, at most 2**126.
    """
    reciprocal = 1.0 / scale

    def times(grad: tf.Tensor) -> tf.Tensor:
        if grad.dtype in (tf.float16, tf.bfloat16):
            grad = tf.cast(grad, tf.float32)
        return grad * tf.cast(reciprocal, grad.dtype)

    return [_each(times, grad) for grad in grads]


def as_tensors(grads: Iterable[Any]) -> list[Any]:
    """``grads``, arrays made tensors; None is passed through."""
    return [grad if grad is None or tf.is_tensor(grad) else tf.convert_to_tensor(grad) for grad in grads]


def kept_from_rewrite(grads: Sequence[Any]) -> list[Any]:
    """``grads``, out of reach of TensorFlow's own rewrite of graphs to float16 where that is switched on.

    The rewrite takes a product along that follows one which it has taken to float16, and the finite check with it:
    a small gradient, unscaled there, is zero again. What the rewrite has on none of its lists it leaves in float32,
    with all that follows; Bitcast is such an operation, and moves no data.
    """
    if not tf.config.optimizer.get_experimental_options().get("auto_mixed_precision"):
        return list(grads)

    def out_of_reach(grad: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(tf.bitcast(grad, tf.int32), tf.float32) if grad.dtype == tf.float32 else grad

    return [_each(out_of_reach, grad) for grad in grads]


def fitted(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """``grads`` with the shapes of their variables, in so far as only the variables know them.

    Keras' optimizers cannot add up gradients of unknown rank, nor slices that do not say of how many rows.

    Args:
        grads: dense tensors or ``tf.IndexedSlices``; None is passed through.
        variables: of Keras or TensorFlow, one for each gradient.
    """

    def fit(grad: Any, variable: Any) -> Any:
        if grad is None:
            return None
        if isinstance(grad, tf.IndexedSlices):
            if grad.dense_shape is not None:
                return grad
            rows = tf.shape(variable.value if isinstance(variable, keras.Variable) else variable, grad.indices.dtype)
            return tf.IndexedSlices(grad.values, grad.indices, rows)
        grad = tf.convert_to_tensor(grad)
        return grad if grad.shape.is_fully_defined() else tf.ensure_shape(grad, variable.shape)

    return [fit(grad, variable) for grad, variable in zip(grads, variables, strict=True)]


def _each(function: Callable[[tf.Tensor], tf.Tensor], grad: Any) -> Any:
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(function(grad.values), grad.indices, grad.dense_shape)
    return function(tf.convert_to_tensor(grad))
