"""The finite check: whether all gradients are finite, which of them are not, and how large the largest is."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

_INFINITY_BITS = 0x7F800000
"""Of float32."""

_SMALL = 2**13
"""Elements below which copying a tensor costs less than starting further kernels for it."""

_IN_ROWS = 2**14
"""Elements from which a tensor is reduced in two stages. XLA spreads a reduction over a CPU's cores by its outputs:
one that has a single output runs on a single core."""


def all_finite(tensors: Sequence[Any]) -> tf.Tensor:
    """Whether every element of every tensor is finite.

    Under XLA, tensors of one shape are checked together: their flags are combined element by element, which fuses into
    one loop; a tensor whose shape is known only at run time is checked by itself. The results for all shapes are laid
    end to end and reduced once more, to one scalar. A network of many small layers would otherwise pay for one kernel
    per variable, and XLA would copy the conjunction of all flags into every loop that depends on it, as it does with
    anything cheap.

    Args:
        tensors: dense tensors or ``tf.IndexedSlices``; None stands for a variable that the loss does not reach.

    Returns:
        A boolean scalar, True for no tensors.
    """
    values = _values(tensors)
    if not values:
        return tf.constant(True)
    if not under_xla():
        return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in _small_joined(values)]))
    flags = []
    for group in _by_shape(values):
        finite = functools.reduce(tf.logical_and, [tf.math.is_finite(value) for value in group])
        flags.append(_reduced(tf.reduce_all, finite))
    # A minimum over integers second, because XLA makes one reduction of two that are alike.
    return tf.reduce_min(tf.cast(_joined(flags), tf.int32)) > 0


def finite_and_largest(tensors: Sequence[Any]) -> tuple[tf.Tensor, tf.Tensor]:
    """:func:`all_finite` and the largest absolute value, from one look at the tensors.

    Args:
        tensors: as for :func:`all_finite`.

    Returns:
        A boolean scalar, and a float32 scalar: 0 for no tensors, without meaning where one is not finite. A float64
        value beyond float32 counts as not finite.
    """
    magnitudes = [tf.abs(tf.cast(value, tf.float32)) for value in _values(tensors)]
    if not magnitudes:
        return tf.constant(True), tf.constant(0.0)
    # Bits are ordered as the magnitudes are, with infinity and then NaN on top; and unlike that of floating-point
    # numbers, a maximum of integers is one that XLA vectorises on a CPU.
    bits = [tf.bitcast(magnitude, tf.int32) for magnitude in magnitudes]
    if under_xla():
        largest = []
        for group in _by_shape(bits):
            together = functools.reduce(tf.maximum, group)
            largest.append(_reduced(tf.reduce_max, together))
        # As above: a maximum by way of a minimum.
        top = -tf.reduce_min(-_joined(largest))
    else:
        top = tf.reduce_max(tf.stack([tf.reduce_max(each) for each in _small_joined(bits)]))
    # Nothing has the smallest integer for a maximum.
    top = tf.maximum(top, 0)
    return top < _INFINITY_BITS, tf.bitcast(top, tf.float32)


def nonfinite_flags(tensors: Sequence[Any]) -> tf.Tensor:
    """1 for every tensor with an element that is not finite, int64 (tensors,); 0 for None."""
    zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
    return tf.stack(
        [zero if tensor is None else tf.where(all_finite([tensor]), zero, one) for tensor in tensors]
        or [tf.zeros((0,), tf.int64)]
    )


def under_xla() -> bool:
    """Whether what is being traced will be compiled by XLA as a whole, as by ``tf.function(jit_compile=True)``."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def _reduced(reduce: Callable[..., tf.Tensor], values: tf.Tensor) -> tf.Tensor:
    """``values``, or a reduction of them to fewer: what is worth doing before they are laid end to end."""
    elements = values.shape.num_elements()
    if elements is None:
        # Down to one, since nothing says that they are few. A maximum of no elements is the smallest integer, which
        # has no negative; bits of a magnitude are never below 0.
        reduced = reduce(values)
        return reduced if reduced.dtype == tf.bool else tf.maximum(reduced, 0)
    return reduce(values, axis=-1) if values.shape.rank >= 2 and elements >= _IN_ROWS else values


def _small_joined(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """``values``, small ones of a dtype laid end to end: without XLA every operation is a kernel to be started."""
    small: dict[tf.DType, list[tf.Tensor]] = defaultdict(list)
    large: list[tf.Tensor] = []
    for value in values:
        elements = value.shape.num_elements()
        (large if elements is None or elements >= _SMALL else small[value.dtype]).append(value)
    return large + [_joined(group) if len(group) > 1 else group[0] for group in small.values()]


def _joined(values: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.concat([tf.reshape(value, (-1,)) for value in values], 0)


def _values(tensors: Sequence[Any]) -> list[tf.Tensor]:
    return [
        tensor.values if isinstance(tensor, tf.IndexedSlices) else tf.convert_to_tensor(tensor)
        for tensor in tensors
        if tensor is not None
    ]


def _by_shape(values: Sequence[tf.Tensor]) -> list[list[tf.Tensor]]:
    """Groups of tensors that surely have one shape: two of shape (None, 8) may differ in length."""
    groups: dict[Any, list[tf.Tensor]] = defaultdict(list)
    for place, value in enumerate(values):
        groups[tuple(value.shape) if value.shape.is_fully_defined() else place].append(value)
    return list(groups.values())
