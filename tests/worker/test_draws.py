"""Whether two precisions draw the same random numbers: what the digest says, and what layers do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.core.reason import Code
from mpscale.worker.draws import draws_of

ONES = tf.ones((64, 4, 32))
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


def drawn(policy, jit, make):
    """The digest of a function with a layer, and whether each of its outputs is above their middle."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(7)
        layer = make()
        function = tf.function(lambda x: layer(x, training=True), jit_compile=jit)
        graph = function.get_concrete_function(ONES).graph
        outputs = np.asarray(tf.cast(function(ONES), tf.float32))
        return draws_of(graph, jit), outputs > 1.0
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("jit", [False, True], ids=["", "XLA"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Dropout(0.3),
        lambda: keras.layers.SpatialDropout1D(0.5),
        lambda: keras.layers.GaussianNoise(1.0),
        lambda: keras.layers.AlphaDropout(0.5),
    ],
    ids=["Dropout", "SpatialDropout1D", "GaussianNoise", "AlphaDropout"],
)
def test_digests_are_equal_where_layers_draw_the_same(make, jit):
    found = [drawn(policy, jit, make) for policy in POLICIES]
    for digest, above in found[1:]:
        same = np.mean(above == found[0][1]) > 0.99
        assert (digest == found[0][0]) == same
    assert found[0][0].startswith("sha256:")


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (lambda: tf.ones(3), Code.NOT_IN_WORKLOAD),
        (lambda: tf.random.uniform([3]), Code.NOT_COMPARABLE),
        (
            lambda: tf.while_loop(lambda n: n < 2, lambda n: n + tf.random.normal([])[None][0], [0.0]),
            Code.NOT_COMPARABLE,
        ),
    ],
)
def test_what_has_no_digest_says_why(function, code):
    assert draws_of(tf.function(function).get_concrete_function().graph, jit=False).code is code


def test_another_number_of_draws_is_another_digest():
    def draws(count):
        def call():
            return [tf.random.stateless_uniform([3], [1, 2]) for _ in range(count)]

        return draws_of(tf.function(call).get_concrete_function().graph, jit=False)

    assert draws(1) != draws(2)
