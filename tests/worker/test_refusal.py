"""What XLA refuses on a CPU: the operation and its layer are named, wherever in the case it is."""

import keras
import pytest
import tensorflow as tf
from support.one_case import blobs, split, train, workload

from mpscale.core.cause import Cause
from mpscale.worker.errors import XlaRefused, cause

DATA = split(*blobs())
KEYS = tf.constant([0, 1], tf.int64)


class Doing(keras.layers.Layer):
    """Calls a function of its inputs."""

    def __init__(self, act, **options):
        super().__init__(**options)
        self.act = act

    def call(self, inputs, training=False):
        return self.act(inputs, training)


def in_python(x, training):
    return tf.ensure_shape(tf.py_function(lambda each: each, [x], x.dtype), x.shape)


def as_text(x, training):
    return x * tf.cast(tf.strings.length(tf.strings.as_string(tf.cast(x[0, 0], tf.float32))) > 0, x.dtype)


def looked_up(x, training):
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(KEYS, KEYS), -1)
    return x + tf.cast(table.lookup(tf.zeros([1], tf.int64)), x.dtype)


def in_a_branch(x, training):
    return tf.cond(tf.reduce_sum(x) > 1e9, lambda: x, lambda: as_text(x, training))


def only_when_evaluated(x, training):
    return x if training else as_text(x, training)


def only_in_float16(x, training):
    return as_text(x, training) if x.dtype == tf.float16 else x


def refusal(layers, mode="fp32", **options):
    """Train with these layers in front of a product; return what is reported of the exception."""

    def model():
        return keras.Sequential([keras.Input((2,)), *layers(), keras.layers.Dense(3, dtype="float32")])

    made = workload(model, lambda: DATA, train_steps=4, evaluate_every=4)
    with pytest.raises(XlaRefused) as caught:
        train(made, mode, jit=True, **options)
    return cause(caught.value)


def doing(act):
    return lambda: [keras.layers.Dense(2), Doing(act, name="odd_one")]


REFUSED = {
    "Python": (doing(in_python), "fp32", "EagerPyFunc in layer 'odd_one' (Doing)"),
    "strings": (doing(as_text), "mixed-dynamic", "AsString in layer 'odd_one' (Doing)"),
    "a look-up table": (doing(looked_up), "fp32", "LookupTableFindV2 in layer 'odd_one' (Doing)"),
    "in a branch": (doing(in_a_branch), "fp32", "AsString in layer 'odd_one' (Doing)"),
    "in the evaluation alone": (doing(only_when_evaluated), "fp32", "AsString in layer 'odd_one' (Doing)"),
    "in float16 alone": (doing(only_in_float16), "mixed-unscaled", "AsString in layer 'odd_one' (Doing)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_operation_and_its_layer_are_named(what):
    layers, mode, named = REFUSED[what]
    event = refusal(layers, mode)
    assert event.cause is Cause.XLA_REFUSED
    assert event.message.startswith(f"XLA cannot compile {named}: ")
