"""A window of micro-batches: gradients that are accumulated and applied together, or thrown away together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from mpscale.scaling import replicas
from mpscale.scaling.inner import window
from mpscale.scaling.new_values import is_overwritten


def accumulate(
    inner: Any,
    window_finite: Any,
    decide: Callable[[tf.Tensor], None],
    grads: list[Any],
    variables: list[Any],
    finite: tf.Tensor,
) -> None:
    """Takes one micro-batch of a window of ``gradient_accumulation_steps``.

    The inner optimizer sees only the last one of a good window, and its own accumulators hold the sum till then:
    it adds them up, divides, applies and clears. A bad window is thrown away as a whole.

    Args:
        inner: the Keras optimizer that accumulates.
        window_finite: int64 variable, 1 if all gradients of the window so far were finite.
        decide: moves the scale and counts the step; called once a window with whether it was finite.
        grads: of the micro-batch, unscaled; None where the loss does not reach a variable.
        variables: those they belong to.
        finite: boolean scalar, whether all of ``grads`` are finite.
    """
    steps = window(inner)
    whole = tf.logical_and(finite, window_finite.value > 0)
    ends = tf.equal((inner._iterations.value + 1) % steps, 0)

    def add(grads: list[Any], variables: list[Any], whole: tf.Tensor) -> None:
        for grad, variable in zip(grads, variables, strict=True):
            if grad is None:
                continue
            accumulator = inner._accumulated_gradients[inner._get_variable_index(variable)]
            if is_overwritten(variable):
                # Keras takes the largest new value of a window. That of its first micro-batch may be below 0.
                begins = tf.equal(inner._iterations.value % steps, 0)
                accumulator.assign(tf.where(begins, grad, tf.maximum(accumulator.value, grad)))
            else:
                accumulator.assign_add(grad)
        inner._iterations.assign_add(1)
        window_finite.assign(tf.cast(whole, tf.int64))

    def apply(grads: list[Any], variables: list[Any], whole: tf.Tensor) -> None:
        inner.apply(grads, variables)
        decide(tf.constant(True))

    def discard(grads: list[Any], variables: list[Any], whole: tf.Tensor) -> None:
        # Zeros are assigned, since subtracting would leave a NaN what it is.
        for accumulator in inner._accumulated_gradients:
            accumulator.assign(tf.zeros_like(accumulator.value))
        inner._iterations.assign_sub(steps - 1)
        window_finite.assign(1)
        decide(tf.constant(False))

    index = tf.where(ends, tf.where(whole, 1, 2), 0)
    replicas.switch(index, [add, apply, discard], grads, variables, whole)
