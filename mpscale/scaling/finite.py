"""The finite check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def all_finite(tensors: Sequence[Any]) -> tf.Tensor:
    """Whether every element of every tensor is finite.

    Args:
        tensors: dense tensors or ``tf.IndexedSlices``; None stands for a variable that the loss does not reach.

    Returns:
        A boolean scalar, True for no tensors.
    """
    values = [t.values if isinstance(t, tf.IndexedSlices) else t for t in tensors if t is not None]
    checks = [tf.reduce_all(tf.math.is_finite(value)) for value in values]
    return tf.reduce_all(tf.stack(checks)) if checks else tf.constant(True)
