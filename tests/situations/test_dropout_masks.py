"""Which modes share dropout masks, as docs/method.md says."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def mask(policy, jit, layer):
    """Return which entries dropout keeps with a fixed seed."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(7)
        dropout = layer(0.5)
        drop = tf.function(lambda x: dropout(x, training=True), jit_compile=jit)
        return np.asarray(tf.cast(drop(tf.ones((64, 4, 32))), tf.float32)) != 0
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("layer", [keras.layers.Dropout, keras.layers.SpatialDropout1D])
def test_masks_are_those_of_the_compute_dtype(layer):
    masks = {(policy, jit): mask(policy, jit, layer) for policy in POLICIES for jit in (True, False)}
    same = [{which for which, other in masks.items() if (other == one).all()} for one in masks.values()]
    float16 = {("mixed_float16", True), ("mixed_float16", False)}
    compiled = {("float32", True), ("mixed_bfloat16", True)}
    assert [each for number, each in enumerate(same) if each not in same[:number]] == [
        compiled,
        {("float32", False)},
        float16,
        {("mixed_bfloat16", False)},
    ]
    # By chance alone, half of the entries agree.
    assert 0.4 < (masks["float32", True] == masks["mixed_float16", True]).mean() < 0.6
    assert (mask("float32", True, layer) == masks["float32", True]).all()
