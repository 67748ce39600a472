"""Workloads for the system tests: small ones, and ones that die in every way a training can.

Keras is imported in functions, so that pytest, which only needs the names, starts without TensorFlow.
"""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import mpscale
from mpscale.core.cluster import Cluster
from mpscale.workloads import registry


def blobs():
    """Two classes that a line separates."""
    random = np.random.default_rng(7)
    labels = np.arange(600) % 2
    x = (random.normal(size=(600, 4)) + 2.0 * labels[:, None]).astype(np.float32)
    return mpscale.Data(x[:400], labels[:400], x[400:], labels[400:])


def sgd(rate=0.3):
    import keras

    return keras.optimizers.SGD(rate)


def sequential(inputs, *layers):
    """A Keras model of layers that are given as functions of ``keras.layers``."""
    import keras

    return keras.Sequential([keras.Input((inputs,)), *(layer(keras.layers) for layer in layers)])


def float_output(layers):
    """After a layer whose product is computed in the mode's precision: the logits are float32."""
    return layers.Activation("linear", dtype="float32")


def line():
    return sequential(4, lambda layers: layers.Dense(2), float_output)


def make(name, **options):
    options = {"data": blobs, "optimizer": sgd, "batch_size": 20, "train_steps": 30, "evaluate_every": 10, **options}
    return mpscale.workload(name, target=0.8, **options)(line)


def interrupted(name, act):
    """A workload that calls ``act`` in the middle of a training, when progress is first evaluated."""

    def metric(labels, outputs):
        act()
        return 0.0

    return make(name, metric_name="accuracy", metric=metric)


def fail(error):
    raise error


def leave_children():
    """Start a child, one in a session of its own, and a daemon, which has forked twice."""
    for leave in (lambda: None, os.setsid, lambda: os.setsid() or (os.fork() and os._exit(0))):
        if os.fork() == 0:
            leave()
            time.sleep(600)


def leave_children_and_die():
    leave_children()
    os.kill(os.getpid(), signal.SIGKILL)


def leave_children_and_hang():
    leave_children()
    time.sleep(600)


def only_once(act):
    """Call ``act`` in the first attempt."""
    mark = Path(f"{act.__name__}.done")
    if not mark.exists():
        mark.touch()
        act()


def kill_the_parent():
    """As the kernel may when memory runs out: the process that has forked this one holds TensorFlow."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def remove_temporary_files():
    """As a cleaner of old files does."""
    assert "SUITE_TIDY" in os.environ  # the folder must be the suite's own
    for folder in Path(tempfile.gettempdir()).glob("mpscale-*"):
        shutil.rmtree(folder)


def in_second(act):
    """Call ``act`` in the second of several workers."""
    if Cluster.of(os.environ).place == 1:
        act()


def wait_in_second():
    """The second worker waits the first time that it gets here, and says so."""
    mark = Path(os.environ["SUITE_WAITS"])
    if not mark.exists():
        mark.touch()
        time.sleep(600)


def print_progress():
    print("50%\r100%", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


fine = make("fine", growth_interval=20)
killed = interrupted("killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
segfault = interrupted("segfault", lambda: os.kill(os.getpid(), signal.SIGSEGV))
exception = interrupted("exception", lambda: fail(ValueError("the metric could not be computed")))
hang = interrupted("hang", leave_children_and_hang)
leaves = interrupted("leaves", lambda: os._exit(3))
memory = interrupted("memory", lambda: fail(MemoryError("no memory left for the metric")))
orphans = interrupted("orphans", leave_children_and_die)
parentless = interrupted("parentless", lambda: only_once(kill_the_parent))
tidied = interrupted("tidied", lambda: only_once(remove_temporary_files))
progress_bar = interrupted("progress-bar", print_progress)
cancelled = interrupted("cancelled", lambda: fail(asyncio.CancelledError("the data were cancelled")))
second_killed = interrupted("second-killed", lambda: in_second(lambda: os.kill(os.getpid(), signal.SIGKILL)))
second_fails = interrupted("second-fails", lambda: in_second(lambda: fail(ValueError("no metric in the second"))))
second_waits = interrupted("second-waits", lambda: in_second(wait_in_second))
exits = interrupted("exits", lambda: sys.exit("no more"))


def compiled_line():
    import keras

    model = line()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def batches_of_twenty():
    import tensorflow as tf

    data = blobs()
    return tf.data.Dataset.from_tensor_slices((data.train_x, data.train_y)).batch(20)


def test_set():
    data = blobs()
    return data.test_x[:37], data.test_y[:37]


def perceptron():
    return sequential(
        40,
        lambda layers: layers.Dense(100, activation="relu"),
        lambda layers: layers.Dense(10, dtype="float32"),
    )


def mnist1d():
    return registry.get("mnist1d-mlp").data()


# It learns so slowly that different rounding by two compilers cannot grow into another trajectory.
slow = mpscale.workload("slow", data=mnist1d, optimizer=lambda: sgd(1e-4), train_steps=160)(perceptron)


def unseeded_model():
    weights = np.random.default_rng().normal(size=(4, 2))

    def kernel(shape, dtype=None):
        return weights.astype(dtype)

    return sequential(4, lambda layers: layers.Dense(2, kernel_initializer=kernel), float_output)


def scripted_model():
    """Set the policy where the model is made, as training scripts do."""
    import keras

    keras.config.set_dtype_policy("mixed_float16")
    return line()


fed = mpscale.Workload.from_compiled(compiled_line, train=batches_of_twenty, validation=test_set, train_steps=12)
unseeded = mpscale.workload("unseeded", data=blobs, optimizer=sgd, batch_size=20, train_steps=30)(unseeded_model)
scripted = mpscale.workload("scripted", data=blobs, optimizer=sgd, batch_size=20, train_steps=30)(scripted_model)


def squared_error(labels, outputs):
    return float(np.mean((outputs[:, 0] - labels) ** 2))


def squared_loss(labels, outputs):
    import keras

    return keras.ops.mean((outputs[:, 0] - keras.ops.cast(labels, "float32")) ** 2)


regression = make(
    "regression",
    optimizer=lambda: sgd(0.02),
    loss=squared_loss,
    metric=squared_error,
    metric_name="squared_error",
    metric_higher_is_better=False,
)
explodes = make("explodes", optimizer=lambda: sgd(1e3), loss=squared_loss)


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
    seconds = 0.02 if begun <= int(os.environ["SUITE_SLOW_CASES"]) else 0.0025
    tf.py_function(lambda: time.sleep(seconds), [], [])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, tf.cast(outputs, tf.float32)))


laboured = make("laboured", data=laboured_data, loss=laboured_loss, train_steps=10)
