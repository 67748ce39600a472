"""Runs loss scales through thousands of steps in one compiled loop, which would take minutes eagerly."""

import functools

import numpy as np
import tensorflow as tf

from mpscale.core.loss_scale import state_dtype


def scales_of(loss_scale, finites, largests=None):
    """Return the scale after each step, a float32 array, starting from the initial state.

    Args:
        loss_scale: a LossScale.
        finites: whether the gradients of each step are finite.
        largests: the largest gradient of each step, if the loss scale needs it.
    """
    finites = np.asarray(finites, bool)
    largests = np.zeros(finites.shape) if largests is None else np.asarray(largests)
    return _compiled(loss_scale)(tf.constant(finites), tf.constant(largests, tf.float32)).numpy()


@functools.cache
def _compiled(loss_scale):
    def trajectory(finites, largests):
        initial = {name: tf.constant(value, state_dtype(value)) for name, value in loss_scale.initial_state().items()}
        states = tf.scan(lambda state, step: loss_scale.next_state(state, *step), (finites, largests), initial)
        return states["scale"]

    return tf.function(trajectory, jit_compile=True)
