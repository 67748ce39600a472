"""From gradients of the scaled loss to true gradients: unscale, check for non-finite values, set new values apart."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpscale.scaling.ledger import path_of

_INFINITY_BITS = 0x7F800000
"""Bits of an infinite float32."""

_SMALL = 2**13
"""Elements below which copying a tensor costs less than starting more kernels for it."""

_IN_ROWS = 2**14
"""Elements from which a tensor is reduced in two stages: XLA spreads a reduction over a CPU's cores by its outputs, so
a reduction to one output runs on one core."""


def unscaled(grads: Sequence[Any], scale: tf.Tensor) -> list[Any]:
    """Return ``grads / scale`` in float32 or wider, so that a small gradient survives the division.

    It multiplies by the reciprocal, which is faster; that of a power of two is exact, others are rounded.

    Args:
        grads: dense tensors or ``tf.IndexedSlices``; None stays None.
        scale: float32 scalar, at most 2**126.
    """
    reciprocal = 1.0 / scale

    def unscale(grad: tf.Tensor) -> tf.Tensor:
        if grad.dtype in (tf.float16, tf.bfloat16):
            grad = tf.cast(grad, tf.float32)
        return grad * tf.cast(reciprocal, grad.dtype)

    return [_each(unscale, grad) for grad in grads]


def hidden_from_rewrite(grads: Sequence[Any]) -> list[Any]:
    """Return ``grads`` out of reach of TensorFlow's ``auto_mixed_precision`` graph rewrite, if that is switched on.

    The rewrite takes a product to float16 if the operation before it was, and the finite check too: a small gradient
    that is unscaled in float16 becomes zero again. An operation that is on none of the rewrite's lists stays in float32
    with all that follows; Bitcast is one, and moves no data.
    """
    if not tf.config.optimizer.get_experimental_options().get("auto_mixed_precision"):
        return list(grads)

    def hide(grad: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(tf.bitcast(grad, tf.int32), tf.float32) if grad.dtype == tf.float32 else grad

    return [_each(hide, grad) for grad in grads]


def fitted(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Return ``grads`` with the shapes of their variables if their own are not fully known.

    Keras' optimizers cannot add gradients of unknown rank, or slices without a dense shape. None stays None.
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


def all_finite(tensors: Sequence[Any]) -> tf.Tensor:
    """Return whether every element of every tensor is finite.

    Under XLA, tensors of the same shape are checked together: their flags are combined element by element, which fuses
    into one loop. A tensor whose shape is known only at run time is checked by itself. The results for all shapes are
    concatenated and reduced to one scalar. Otherwise a network of many small layers would pay for one kernel per
    variable, and XLA would copy the conjunction of all flags into every loop that depends on it, as it does with
    anything cheap.

    Args:
        tensors: dense tensors or ``tf.IndexedSlices``; None for a variable that the loss does not depend on.

    Returns:
        A boolean scalar, True if there are no tensors.
    """
    values = _values(tensors)
    if not values:
        return tf.constant(True)
    if not under_xla():
        return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in _small_joined(values)]))
    groups = _by_shape(values)
    together = [functools.reduce(tf.logical_and, [tf.math.is_finite(value) for value in group]) for group in groups]
    flags = [_reduced(tf.reduce_all, finite) for finite in together]
    # The second reduction is a minimum of integers, because XLA merges two reductions of the same kind into one.
    return tf.reduce_min(tf.cast(_joined(flags), tf.int32)) > 0


def finite_and_largest(tensors: Sequence[Any]) -> tuple[tf.Tensor, tf.Tensor]:
    """Return :func:`all_finite` and the largest absolute value, from one pass over the tensors.

    Args:
        tensors: as for :func:`all_finite`.

    Returns:
        A boolean scalar, and a float32 scalar: 0 if there are no tensors, meaningless if a tensor is not finite. A
        float64 value beyond float32 counts as non-finite.
    """
    magnitudes = [tf.abs(tf.cast(value, tf.float32)) for value in _values(tensors)]
    if not magnitudes:
        return tf.constant(True), tf.constant(0.0)
    # The bits of magnitudes have the same order, with infinity and then NaN on top; and XLA vectorises a maximum of
    # integers on a CPU, but not one of floating-point numbers.
    bits = [tf.bitcast(magnitude, tf.int32) for magnitude in magnitudes]
    if under_xla():
        largest = [_reduced(tf.reduce_max, functools.reduce(tf.maximum, group)) for group in _by_shape(bits)]
        # A maximum by way of a minimum, for the same reason as in all_finite.
        top = -tf.reduce_min(-_joined(largest))
    else:
        top = tf.reduce_max(tf.stack([tf.reduce_max(each) for each in _small_joined(bits)]))
    # The maximum of nothing is the smallest integer.
    top = tf.maximum(top, 0)
    return top < _INFINITY_BITS, tf.bitcast(top, tf.float32)


def nonfinite_flags(tensors: Sequence[Any]) -> tf.Tensor:
    """Return 1 for every tensor with a non-finite element, 0 for the others and for None, int64 (tensors,)."""
    zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
    return tf.stack(
        [zero if tensor is None else tf.where(all_finite([tensor]), zero, one) for tensor in tensors]
        or [tf.zeros((0,), tf.int64)]
    )


def under_xla() -> bool:
    """Return whether XLA will compile what is being traced as a whole, as in ``tf.function(jit_compile=True)``."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def is_overwritten(variable: Any) -> bool:
    """Return whether the "gradient" of ``variable`` is its new value.

    Keras marks such variables ``overwrite_with_gradient``. Float8 layers keep their scales and the largest values they
    met (``amax_history``) in them, and their backward pass returns the next values, which Keras assigns without
    learning rate, clipping or decay. A new value is therefore not divided by the loss scale, and says nothing about
    whether gradients are finite.
    """
    return bool(getattr(variable, "overwrite_with_gradient", False))


def split_new_values(grads: Sequence[Any], variables: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return ``grads`` with None for every new value, and the new values with None for every gradient.

    Raises:
        ValueError: there are new values, but not as many gradients as variables, so it is unknown which is which.
    """
    overwritten = [is_overwritten(variable) for variable in variables]
    if True not in overwritten:
        return list(grads), [None] * len(grads)
    if len(grads) != len(variables):
        raise ValueError(
            f"{len(grads)} gradients came for {len(variables)} variables, {overwritten.count(True)} of which are "
            "overwritten with a new value instead of a gradient (float8 scales); which of the gradients are new values "
            "is unknown. Pass the variables too: unscale(grads, variables) and apply(grads, variables)"
        )
    return (
        [None if new else grad for grad, new in zip(grads, overwritten, strict=True)],
        [grad if new else None for grad, new in zip(grads, overwritten, strict=True)],
    )


def join_new_values(grads: Sequence[Any], new_values: Sequence[Any]) -> list[Any]:
    """Undo :func:`split_new_values`."""
    return [grad if new is None else new for grad, new in zip(grads, new_values, strict=True)]


class NewValueMarks:
    """Marks the new values that ``unscale`` returns, so that ``apply`` recognises them.

    Gradients may be clipped between the two. A new value that was clipped as well is wrong, and so are the gradients
    if it was part of their norm; neither shows in any result.
    """

    def __init__(self) -> None:
        self._any = False

    def join(self, grads: Sequence[Any], new_values: Sequence[Any]) -> list[Any]:
        """Join as :func:`join_new_values` does, with the new values marked."""
        self._any = True
        # Copies, because what was passed to unscale must not carry a mark.
        marked = [None if new is None else tf.nest.map_structure(tf.identity, new) for new in new_values]
        for new in marked:
            if new is not None:
                new._mpscale_new_value = True
        return join_new_values(grads, marked)

    def check(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Check what was passed to ``apply`` with the ``finite`` of an earlier ``unscale``.

        Raises:
            ValueError: an overwritten variable got something that ``unscale`` did not return for it, or another
                variable got a new value.
        """
        if not self._any:
            return
        for grad, variable in zip(grads, variables, strict=True):
            if grad is not None and is_overwritten(variable) != hasattr(grad, "_mpscale_new_value"):
                raise ValueError(
                    f"the gradient of {path_of(variable)} is not what unscale returned for it. Variables with "
                    "overwrite_with_gradient (float8 scales) get their new value instead of a gradient; it must not be "
                    "clipped, added up or counted in a norm. Let the inner optimizer clip (clipnorm, global_clipnorm "
                    "and clipvalue leave it out), or change only the gradients of the other variables; call "
                    "unscale(grads, variables) with the variables of apply, and both in the same tf.function"
                )


def _each(function: Callable[[tf.Tensor], tf.Tensor], grad: Any) -> Any:
    if grad is None:
        return None
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(function(grad.values), grad.indices, grad.dense_shape)
    return function(tf.convert_to_tensor(grad))


def _values(tensors: Sequence[Any]) -> list[tf.Tensor]:
    return [
        tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)
        for tensor in tensors
        if tensor is not None
    ]


def _by_shape(values: Sequence[tf.Tensor]) -> list[list[tf.Tensor]]:
    """Group tensors that certainly have the same shape; two of shape (None, 8) may differ in length."""
    groups: dict[Any, list[tf.Tensor]] = defaultdict(list)
    for place, value in enumerate(values):
        groups[tuple(value.shape) if value.shape.is_fully_defined() else place].append(value)
    return list(groups.values())


def _reduced(reduce: Callable[..., tf.Tensor], values: tf.Tensor) -> tf.Tensor:
    """Reduce ``values`` as far as it pays before they are concatenated; small ones stay as they are."""
    elements = values.shape.num_elements()
    if elements is None:
        # To one value, because there may be many. The maximum of no elements is the smallest integer, which cannot be
        # negated; bits of a magnitude are never below 0.
        reduced = reduce(values)
        return reduced if reduced.dtype == tf.bool else tf.maximum(reduced, 0)
    return reduce(values, axis=-1) if values.shape.rank >= 2 and elements >= _IN_ROWS else values


def _small_joined(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Concatenate the small tensors of each dtype: without XLA, every operation is a kernel that has to be started."""
    small: dict[tf.DType, list[tf.Tensor]] = defaultdict(list)
    large: list[tf.Tensor] = []
    for value in values:
        elements = value.shape.num_elements()
        (large if elements is None or elements >= _SMALL else small[value.dtype]).append(value)
    return large + [_joined(group) if len(group) > 1 else group[0] for group in small.values()]


def _joined(values: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(value, (-1,)) for value in values], 0)
