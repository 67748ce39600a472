"""Workloads that several workers train together."""

import functools
import json
import os

import keras
import numpy as np
import tensorflow as tf
from support.one_case import blobs, dense, split, workload
from support.replica_cases import TEST, OwnStep, arrays, compiled, mean_of_a_function, regularized

import mpscale
from mpscale.worker.training import batches

BATCH, STEPS = 20, 24
SHOWN = {
    "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metric": "accuracy", "batch_size": BATCH,
    "train_steps": STEPS, "evaluate_every": 12,
}  # fmt: skip


def momentum():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def data():
    return split(*blobs())


def poisoned():
    x, y = blobs()
    # Of the first epoch in the third step: once in the part of the second replica, in other epochs elsewhere.
    x[batches(160, 2 * BATCH, STEPS, 0)[2, BATCH + 3]] = 1e30
    return split(x, y)


def place():
    return json.loads(os.environ.get("TF_CONFIG", '{"task": {"index": 0}}'))["task"]["index"]


def other_data():
    x, y = blobs()
    return split(x + place(), y)


def with_statistics():
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    return keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(3, dtype="float32")])


plain = workload(dense(), data, momentum, **SHOWN)
overflowing = workload(dense(), poisoned, momentum, **SHOWN)
statistics = workload(with_statistics, data, momentum, **SHOWN, target=0.5)
differing = workload(dense(), other_data, momentum, **SHOWN)


class RateOfTheLoss(keras.callbacks.Callback):
    """Sets the learning rate by the losses of a step and of the validation."""

    def on_train_batch_end(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.01 / (1 + logs["loss"])

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.01 * logs["val_loss"]


class RateOfTheWorker(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.model.optimizer.learning_rate = 0.01 * (1 + place())


def lengths():
    """Texts with a label for each place. Only those of the second replica change their length, from the first step."""
    random = np.random.default_rng(3)
    for number in range(4 * STEPS):
        length = 5 + number % 2 * (2 - number // 4 % 3)
        yield random.normal(size=(BATCH, length, 2)).astype(np.float32), random.integers(0, 3, (BATCH, length))


def of_lengths(shown=lengths):
    return tf.data.Dataset.from_generator(
        shown, output_signature=(tf.TensorSpec((None, None, 2)), tf.TensorSpec((None, None), tf.int64))
    )


def differing_late():
    """Batches that differ between workers after those that are looked at before the training."""
    for number, (x, y) in enumerate(lengths()):
        yield x + (place() if number > 20 else 0), y


class OwnStepOfPlaces(OwnStep):
    def __init__(self):
        super().__init__()
        self.out = keras.layers.Dense(3, dtype="float32")


x, y = arrays()
of_compiled = functools.partial(
    mpscale.Workload.from_compiled, train_steps=STEPS, validation=(x[160 : 160 + TEST], y[160 : 160 + TEST])
)
of_arrays = functools.partial(of_compiled, train=(x[:160], y[:160]), batch_size=BATCH)
fitted = of_arrays(compiled(regularized), callbacks=lambda: [RateOfTheLoss()])
own_step = of_compiled(compiled(OwnStep), train=tuple(part[:160] for part in arrays(poisoned=True)), batch_size=BATCH)
other_rates = of_arrays(compiled(), callbacks=lambda: [RateOfTheWorker()])
texts = of_compiled(compiled(OwnStepOfPlaces, loss=mean_of_a_function), train=of_lengths, validation=of_lengths)
other_texts = of_compiled(compiled(OwnStepOfPlaces), train=lambda: of_lengths(differing_late), validation=None)
unordered = of_compiled(compiled(), train=mpscale.Pipeline(of_lengths, deterministic=False), validation=None)
