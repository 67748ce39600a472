"""Workloads that several workers train together."""

import json
import os

import keras
from support.one_case import blobs, dense, split, workload
from support.replica_cases import TEST, OwnStep, TwoOptimizers, arrays, compiled, regularized

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


def other_data():
    x, y = blobs()
    return split(x + json.loads(os.environ["TF_CONFIG"])["task"]["index"], y)


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


def of_compiled(build, poisoned=False, **options):
    x, y = arrays(poisoned)
    given = {"train": (x[:160], y[:160]), "validation": (x[160 : 160 + TEST], y[160 : 160 + TEST])}
    return mpscale.Workload.from_compiled(build, batch_size=BATCH, train_steps=STEPS, **given, **options)


fitted = of_compiled(
    compiled(regularized), callbacks=lambda: [RateOfTheLoss()]
)
own_step = of_compiled(compiled(OwnStep), poisoned=True)
two_optimizers = of_compiled(compiled(TwoOptimizers))
