"""Cases on two logical CPU devices, and the same on one device with the double batch; printed as a line of JSON.

This is a program because logical devices have to be configured before TensorFlow starts. A case on one device uses the
first of them.
"""

import gzip
import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from support.one_case import Outcome, blobs, dense, split, train, workload

import mpscale
from mpscale.worker.training import batches

BATCH, STEPS = 20, 24
ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mean_of_a_function(labels, outputs):
    return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True))


def share_of_a_replica(labels, outputs):
    losses = keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)
    return tf.nn.compute_average_loss(losses)


def regularized():
    regularizer = keras.regularizers.L2(0.01)
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, kernel_regularizer=regularizer)])


def with_statistics():
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    return keras.Sequential([keras.Input((2,)), *layers, keras.layers.Dense(3, dtype="float32")])


def data(poisoned=False):
    x, y = blobs()
    if poisoned:
        # Of the first epoch in the third step: once in the part of replica 1, in other epochs elsewhere.
        x[batches(160, 2 * BATCH, STEPS, 0)[2, BATCH + 3]] = 1e30
    return split(x, y)


def told(outcome: Outcome, path: Path):
    names = ["initial_weights_digest", "data_order_digest", "metric_value", "batch_size", "replica_batch_size", "jit"]
    names += ["flops_per_step", "loss_probe", "examples_per_s", "step_time_ms_median", "timed_blocks"]
    found = {name: outcome.row.get(name) for name in names}
    found |= {"status": outcome.status, "reason": outcome.reason, "remarks": [str(one) for one in outcome.sent]}
    if path.exists():
        lines = gzip.decompress(path.read_bytes()).decode().split()[1:]
        columns = zip(*[line.split(",") for line in lines], strict=True)
        found |= dict(zip(("step", "loss", "scale", "overflow"), map(list, columns), strict=True))
        path.unlink()
    return found


def both(folder, mode="fp32", model=None, loss=ENTROPY, optimizer=None, poisoned=False, **options):
    """The case on two replicas, and on one device with the double batch."""
    found = []
    for settings in ({"strategy": "mirrored", "replicas": 2}, {}):
        batch = BATCH if settings else 2 * BATCH
        make = optimizer or (lambda: keras.optimizers.SGD(0.1, momentum=0.9))
        shown = {"loss": loss, "metric": "accuracy", "batch_size": batch, "train_steps": STEPS, "evaluate_every": 12}
        own = workload(model or dense(), lambda: data(poisoned), make, **shown)
        path = folder / "steps" / "case.csv.gz"
        found.append(told(train(own, mode, steps_path=path, **settings, **options), path))
    return found


def refused(make):
    try:
        outcome = make()
        return f"{outcome.status}: {outcome.reason}"
    except ValueError as error:
        return str(error)


def compiled():
    model = dense()()
    model.compile("sgd", ENTROPY)
    return model


def main(folder):
    (folder / "steps").mkdir()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    two = {"strategy": "mirrored", "replicas": 2}
    x, y = blobs()
    pipeline = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    answers = {
        "a loss of Keras": both(folder),
        "a loss of the user": both(folder, loss=mean_of_a_function),
        "regularizers": both(folder, model=regularized),
        "several steps per call": both(folder, steps_per_call=4, timing_s=0.1, timing_blocks=3),
        "an overflow": both(folder, "mixed-dynamic", poisoned=True),
        "the article's scale": both(folder, "article"),
        "statistics": both(folder, model=with_statistics, optimizer=lambda: keras.optimizers.Adam(0.01, clipnorm=9.0)),
        "Keras' scaling": both(folder, "mixed-keras"),
        "an overflow that Keras does not see": both(folder, "mixed-keras", poisoned=True),
        "a sum": refused(lambda: train(workload(dense(), data, loss=mean_of_sums()), **two)),
        "a share": refused(lambda: train(workload(dense(), data, loss=share_of_a_replica), **two)),
        "a batch too large": refused(lambda: train(workload(dense(), data, loss=ENTROPY, batch_size=90), **two)),
        "a pipeline": refused(lambda: train(workload(dense(), lambda: mpscale.Pipeline(pipeline, pipeline)), **two)),
        "a compiled model": refused(
            lambda: train(mpscale.Workload.from_compiled(compiled, train=(x, y), batch_size=BATCH), **two)
        ),
    }
    print(json.dumps(answers))


def mean_of_sums():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(Path(sys.argv[1]))
