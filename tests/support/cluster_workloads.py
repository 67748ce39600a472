"""Workloads that several workers train together."""

import keras
import numpy as np
from support.one_case import blobs, dense, split, workload

from mpscale.worker.training import batches

BATCH, STEPS = 20, 24
SHOWN = {
    "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "metric": "accuracy", "batch_size": BATCH,
    "train_steps": STEPS, "evaluate_every": 12,
}  # fmt: skip


def momentum():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def data(poisoned=False):
    x, y = blobs()
    if poisoned:
        # Of the first epoch in the third step: once in the part of the second replica, in other epochs elsewhere.
        x[batches(160, 2 * BATCH, STEPS, 0)[2, BATCH + 3]] = 1e30
    return split(x, y)


def with_statistics():
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    return keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(3, dtype="float32")])


plain = workload(dense(), data, momentum, **SHOWN)
overflowing = workload(dense(), lambda: data(True), momentum, **SHOWN)
statistics = workload(with_statistics, data, momentum, **SHOWN)


def other_data():
    x, y = blobs()
    return split(x + number_of_worker(), y)


def other_model():
    return dense(3)() if number_of_worker() == 0 else keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])


def other_model2():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(5+number_of_worker()), keras.layers.Dense(3)])


def failing(labels, outputs):
    if number_of_worker() == 1:
        raise ZeroDivisionError("of worker 1")
    return 0.5


def number_of_worker():
    import json, os
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


differing_data = workload(dense(), other_data, momentum, **SHOWN)
differing_model = workload(other_model, data, momentum, **SHOWN)
differing_model2 = workload(other_model2, data, momentum, **SHOWN)
failing_metric = workload(dense(), data, momentum, **{**SHOWN, "metric": failing, "metric_name": "m", "metric_higher_is_better": True})
