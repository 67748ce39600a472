"""Workloads for the system tests: small ones, and ones that die in every way a training can.

Keras is imported in functions, so that pytest, which only needs the names, starts without TensorFlow.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import mpscale
from mpscale.workloads import registry


def blobs():
    """Two classes that a line separates."""
    random = np.random.default_rng(7)
    labels = np.arange(600) % 2
    x = (random.normal(size=(600, 4)) + 2.0 * labels[:, None]).astype(np.float32)
    return mpscale.Data(x[:400], labels[:400], x[400:], labels[400:])


def sgd():
    import keras

    return keras.optimizers.SGD(0.3)


def line():
    import keras

    # The product is computed in the mode's precision, the logits are float32.
    return keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(2), keras.layers.Activation("linear", dtype="float32")]
    )


def make(name, **options):
    options = {"data": blobs, "optimizer": sgd, "batch_size": 20, "train_steps": 30, "evaluate_every": 10, **options}
    return mpscale.workload(name, target=0.8, **options)(line)


def once_trained(act):
    """A metric that calls ``act`` in the middle of a training, when progress is first evaluated."""

    def metric(labels, outputs):
        act()
        return 0.0

    return metric


def cancel():
    raise asyncio.CancelledError("the data were cancelled")


def raise_error():
    raise ValueError("the metric could not be computed")


def eat_memory():
    raise MemoryError("no memory left for the metric")


def perceptron():
    import keras

    return keras.Sequential(
        [
            keras.Input((40,)),
            keras.layers.Dense(100, activation="relu"),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def crawl():
    import keras

    return keras.optimizers.SGD(1e-4)


def mnist1d():
    return registry.get("mnist1d-mlp").data()


# It learns so slowly that different rounding by two compilers cannot grow into another trajectory.
slow = mpscale.workload("slow", data=mnist1d, optimizer=crawl, train_steps=160)(perceptron)

fine = make("fine")
exception = make("exception", metric_name="accuracy", metric=once_trained(raise_error))
hang = make("hang", metric_name="accuracy", metric=once_trained(lambda: time.sleep(600)))
leaves = make("leaves", metric_name="accuracy", metric=once_trained(lambda: os._exit(3)))
memory = make("memory", metric_name="accuracy", metric=once_trained(eat_memory))


def leave_a_child():
    if os.fork() == 0:
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)


def print_progress():
    print("50%\r100%", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def explode():
    import keras

    return keras.optimizers.SGD(1e3)


def careful():
    import keras

    return keras.optimizers.SGD(0.02)


orphans = make("orphans", metric_name="accuracy", metric=once_trained(leave_a_child))
progress_bar = make("progress-bar", metric_name="accuracy", metric=once_trained(print_progress))
cancelled = make("cancelled", metric_name="accuracy", metric=once_trained(cancel))
exits = make("exits", metric_name="accuracy", metric=once_trained(lambda: sys.exit("no more")))


def squared_error(labels, outputs):
    return float(np.mean((outputs[:, 0] - labels) ** 2))


def squared_loss(labels, outputs):
    import keras

    return keras.ops.mean((outputs[:, 0] - keras.ops.cast(labels, "float32")) ** 2)


regression = make(
    "regression",
    optimizer=careful,
    loss=squared_loss,
    metric=squared_error,
    metric_name="squared_error",
    metric_higher_is_better=False,
)
explodes = make("explodes", optimizer=explode, loss=squared_loss)


def laboured_data():
    """Log that a case has begun."""
    with Path(os.environ["SUITE_LOG"]).open("a") as log:
        log.write("case\n")
    return blobs()


def laboured_loss(labels, outputs):
    """A loss that takes eight times as long in the first SUITE_SLOW_CASES cases, with the same result.

    It sleeps, which takes the same time on busy and idle cores. XLA cannot compile it.
    """
    import tensorflow as tf

    begun = len(Path(os.environ["SUITE_LOG"]).read_text().splitlines())
    seconds = 0.04 if begun <= int(os.environ["SUITE_SLOW_CASES"]) else 0.005
    tf.py_function(lambda: time.sleep(seconds), [], [])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, tf.cast(outputs, tf.float32)))


laboured = make("laboured", data=laboured_data, loss=laboured_loss, train_steps=10)
