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
from support.compiled_models import Losses
from support.one_case import Outcome, blobs, dense, split, train, workload

import mpscale
from mpscale.core.case import Settings
from mpscale.worker.replicas import strategy_of
from mpscale.worker.training import batches

BATCH, STEPS = 20, 24
TWO = {"strategy": "mirrored", "replicas": 2}
TEST = 77  # no multiple of any batch
PERCEPTRON = dense()
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


def arrays(poisoned=False):
    x, y = blobs()
    if poisoned:
        # Of the first epoch in the third step: once in the part of replica 1, in other epochs elsewhere.
        x[batches(160, 2 * BATCH, STEPS, 0)[2, BATCH + 3]] = 1e30
    return x, y


def data(poisoned=False):
    return split(*arrays(poisoned))


def compiled(model=PERCEPTRON, loss=ENTROPY, optimizer="adam", **options):
    def build():
        net = model()
        net.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False, **options)
        return net

    return build


class OwnStep(keras.Model):
    """Its own train_step, which makes variables when it is first traced, and an evaluation that adds up."""

    def __init__(self):
        super().__init__()
        self.out = dense()()

    def call(self, x, training=False):
        return self.out(x)

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x, y, outputs)
            scaled = self.optimizer.scale_loss(loss)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(scaled, weights), weights, strict=True))
        return self.compute_metrics(x, y, outputs)


class TwoOptimizers(OwnStep):
    """An optimizer for the kernels and one for the biases, and gradients that nothing divides."""

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape(persistent=True) as tape:
            loss = mean_of_a_function(y, self(x, training=True))
            scaled = [self.optimizer.scale_loss(loss), self.other.scale_loss(loss)]
        for optimizer, target, rank in ((self.optimizer, scaled[0], 2), (self.other, scaled[1], 1)):
            weights = [each for each in self.trainable_variables if len(each.shape) == rank]
            optimizer.apply_gradients(zip(tape.gradient(target, weights), weights, strict=True))
        return {"loss": loss}

    def compile(self, optimizer, *arguments, **options):
        super().compile(optimizer, *arguments, **options)
        self.other = keras.optimizers.SGD(0.01)


class Pairs(keras.utils.PyDataset):
    """Batches of an epoch that are one step of two replicas, whatever their order."""

    def __init__(self, batch, **options):
        super().__init__(**options)
        self.batch = batch

    def __len__(self):
        return 160 // self.batch

    def __getitem__(self, number):
        return tuple(part[number * self.batch : (number + 1) * self.batch] for part in arrays())


def shuffled(batch, examples=160):
    return tf.data.Dataset.from_tensor_slices(tuple(part[:examples] for part in arrays())).shuffle(160, 5).batch(batch)


def held_out(batch=16):
    return tf.data.Dataset.from_tensor_slices(tuple(part[160 : 160 + TEST] for part in arrays())).batch(batch)


def told(outcome: Outcome, path: Path):
    names = ["initial_weights_digest", "data_order_digest", "metric_value", "batch_size", "replica_batch_size", "jit"]
    names += ["flops_per_step", "loss_probe", "examples_per_s", "step_time_ms_median", "timed_blocks"]
    names += ["input_batches", "step_time_ms_with_input", "test_examples", "overflow_steps", "lint"]
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
    for settings in (TWO, {}):
        batch = BATCH if settings else 2 * BATCH
        make = optimizer or (lambda: keras.optimizers.SGD(0.1, momentum=0.9))
        shown = {"loss": loss, "metric": "accuracy", "batch_size": batch, "train_steps": STEPS, "evaluate_every": 12}
        own = workload(model or dense(), lambda: data(poisoned), make, **shown)
        path = folder / "steps" / "case.csv.gz"
        found.append(told(train(own, mode, steps_path=path, **settings, **options), path))
    return found


def both_given(folder, make, mode="fp32", **options):
    """The same of a workload that ``make`` returns for the batch of a replica."""
    found, path = [], folder / "steps" / "case.csv.gz"
    for settings in (TWO, {}):
        own = make(BATCH if settings else 2 * BATCH)
        found.append(told(train(own, mode, steps_path=path, **settings, **options), path))
    return found


def both_compiled(folder, build, mode="fp32", poisoned=False, **options):
    """The same of a compiled model."""
    x, y = arrays(poisoned)
    given = {"train": (x[:160], y[:160]), "validation": (x[160 : 160 + TEST], y[160 : 160 + TEST])}
    shown = {"name": "compiled", "train_steps": STEPS, **given}
    own = {name: options.pop(name) for name in ("callbacks", "class_weight") if name in options}
    return both_given(
        folder, lambda b: mpscale.Workload.from_compiled(build, batch_size=b, **shown, **own), mode, **options
    )


def fed(build, feed, **options):
    """A workload of a compiled model and a pipeline, by the batch of a replica."""
    options = {"name": "fed", "train_steps": STEPS, "validation": held_out, **options}
    return lambda b: mpscale.Workload.from_compiled(build, train=lambda: feed(b), **options)


def by_fit(build):
    """The losses of Keras' own fit under the strategy, on the same batches in the same order."""
    order = batches(160, 2 * BATCH, STEPS, 0).ravel()
    x, y = (part[order] for part in arrays())
    keras.utils.set_random_seed(0)
    with strategy_of(Settings(**TWO)).scope():
        model, seen = build(), Losses()
    model.fit(x, y, batch_size=2 * BATCH, shuffle=False, verbose=0, callbacks=[seen])
    return seen.losses.tolist()


def refused(make):
    try:
        outcome = make()
        return f"{outcome.status}: {outcome.reason}"
    except ValueError as error:
        return str(error)


def main(folder):
    (folder / "steps").mkdir()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    made_outside = keras.optimizers.SGD(0.1)
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.05 / (epoch + 1))
    one_number, own_step = compiled(loss=mean_of_a_function), compiled(OwnStep)
    added_up = compiled(loss=mean_of_sums(), optimizer="sgd")
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
        "a sum": refused(lambda: train(workload(dense(), data, loss=mean_of_sums()), **TWO)),
        "a share": refused(lambda: train(workload(dense(), data, loss=share_of_a_replica), **TWO)),
        "a batch too large": refused(lambda: train(workload(dense(), data, loss=ENTROPY, batch_size=90), **TWO)),
        "compiled": both_compiled(folder, compiled(regularized), callbacks=lambda: [rate]),
        "compiled, several steps per call": both_compiled(
            folder, compiled(steps_per_execution=4), class_weight={0: 2.0, 1: 1.0, 2: 0.5}
        ),
        "its own train_step": both_compiled(folder, own_step),
        "its own train_step, an overflow": both_compiled(folder, own_step, "mixed-dynamic", poisoned=True),
        "a loss that adds up": both_compiled(folder, added_up),
        "a loss of one number": both_compiled(folder, one_number),
        "two optimizers": both_compiled(folder, compiled(TwoOptimizers), "mixed-dynamic"),
        "a pipeline": both_given(
            folder,
            lambda b: workload(
                dense(), lambda: mpscale.Pipeline(lambda: shuffled(b), held_out), loss=ENTROPY, train_steps=STEPS
            ),
        ),
        "compiled, a pipeline": both_given(folder, fed(compiled(), shuffled), timing_s=0.1, timing_blocks=3),
        "compiled, a PyDataset": both_given(folder, fed(compiled(), lambda b: Pairs(4 * b))),
        "a pipeline with a rest": [
            str(one) for one in train(fed(compiled(), lambda b: shuffled(b, 155))(BATCH), **TWO).sent
        ],
        "by fit": {
            "its own train_step": by_fit(compiled()),
            "a loss that adds up": by_fit(added_up),
            "a loss of one number": by_fit(one_number),
        },
        "batches of several sizes": refused(
            lambda: train(fed(compiled(), lambda b: shuffled(b).take(1).concatenate(shuffled(b + 1).take(1)))(9), **TWO)
        ),
        "accumulated gradients": refused(
            lambda: train(accumulating(lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)), **TWO)
        ),
        "an optimizer made outside": refused(lambda: train(accumulating(lambda: made_outside), **TWO)),
    }
    print(json.dumps(answers))


def accumulating(optimizer):
    def build():
        return compiled(optimizer=optimizer())()

    return mpscale.Workload.from_compiled(build, train=arrays(), batch_size=BATCH)


def mean_of_sums():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(Path(sys.argv[1]))
