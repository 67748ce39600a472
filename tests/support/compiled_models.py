"""Small compiled models, and their training by Keras' own ``fit``."""

import keras
import numpy as np
import tensorflow as tf
from support.one_case import train

from mpscale import Workload
from mpscale.worker.training import batches

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(120, 6)).astype(np.float32)
Z = RANDOM.normal(size=(120, 3)).astype(np.float32)
CLASSES = ((X[:, 0] + Z[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0)).astype(np.int64)
SUM = X.sum(1, keepdims=True)
BATCH, STEPS = 20, 12


def dense(units, **options):
    return keras.layers.Dense(units, **options)


def logits():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def two_by_two():
    """Two inputs and two outputs, with losses and weights by name."""
    left, right = keras.Input((6,), name="left"), keras.Input((3,), name="right")
    joined = dense(8, activation="tanh")(keras.layers.Concatenate()([left, right]))
    kind = dense(3, name="kind", dtype="float32")(joined)
    size = dense(1, name="size", dtype="float32", kernel_regularizer=keras.regularizers.L2(0.01))(joined)
    model = keras.Model({"left": left, "right": right}, {"kind": kind, "size": size})
    model.compile(
        keras.optimizers.SGD(0.05),
        loss={"kind": logits(), "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
        jit_compile=False,
    )
    return model


class OwnStep(keras.Model):
    """Its own train_step, and weights that exist when it has seen data."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = dense(8, activation="tanh"), dense(3, dtype="float32")
        self.seen = keras.metrics.Mean(name="loss")

    def call(self, inputs, training=False):
        return self.out(self.hidden(inputs))

    @property
    def metrics(self):
        return [self.seen]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = 0.5 * logits()(y, self(x, training=True))
            scaled = self.optimizer.scale_loss(loss)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(scaled, weights), weights, strict=True))
        self.seen.update_state(loss)
        return {"loss": self.seen.result()}

    def test_step(self, data):
        x, y = data
        self.seen.update_state(logits()(y, self(x, training=False)))
        return {"loss": self.seen.result()}


def own_step():
    model = OwnStep()
    model.compile(keras.optimizers.Adam(0.01), jit_compile=False)
    return model


class Vae(keras.Model):
    """Losses by add_loss alone, so that it needs no labels."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = dense(4), dense(6, dtype="float32")
        self.noise = keras.random.SeedGenerator(3)

    def call(self, inputs):
        mean, spread = keras.ops.split(self.encoder(inputs), 2, axis=-1)
        drawn = keras.random.normal(keras.ops.shape(mean), seed=self.noise)
        found = self.decoder(mean + keras.ops.exp(0.5 * spread) * keras.ops.cast(drawn, mean.dtype))
        error = keras.ops.mean(keras.ops.square(keras.ops.cast(inputs, "float32") - found))
        mean, spread = (keras.ops.cast(each, "float32") for each in (mean, spread))
        self.add_loss(error - 0.05 * keras.ops.mean(1 + spread - mean**2 - keras.ops.exp(spread)))
        return found


def vae():
    model = Vae()
    model.compile(keras.optimizers.Adam(0.01), jit_compile=False)
    return model


def classifier():
    model = keras.Sequential([keras.Input((6,)), dense(8, activation="tanh"), dense(3, dtype="float32")])
    model.compile(
        "adam", loss=logits(), metrics=["accuracy"], weighted_metrics=["accuracy", "mse"][:1], jit_compile=False
    )
    return model


def changed(**changes):
    """The classifier, compiled in another way."""

    def model():
        model = classifier()
        model.compile(
            **{"optimizer": "adam", "loss": logits(), "metrics": ["accuracy"], "jit_compile": False, **changes}
        )
        return model

    return model


NAMED = ({"left": X, "right": Z}, {"kind": CLASSES, "size": SUM})
WEIGHT = RANDOM.random(120).astype(np.float32)


def workload(build, data, validation=None, **options):
    options = {"batch_size": BATCH, "train_steps": STEPS, **options}
    return Workload.from_compiled(build, train=data, validation=validation, **options)


class Losses(keras.callbacks.Callback):
    """The loss of each step of a fit, whose logs have the mean since the beginning of the epoch."""

    def __init__(self):
        super().__init__()
        self.means = []

    def on_train_batch_end(self, batch, logs=None):
        self.means.append(float(logs["loss"]))

    @property
    def losses(self):
        sums = np.array(self.means) * np.arange(1, len(self.means) + 1)
        return np.diff(sums, prepend=0.0)


def by_fit(build, data, seed=0, **options):
    """The same training by Keras' own fit, on the same batches in the same order: its model and its losses."""
    order = batches(len(X), BATCH, STEPS, seed).ravel()
    keras.utils.set_random_seed(seed)
    model, seen = build(), Losses()
    x, y, weight = (*tf.nest.map_structure(lambda array: array[order], tuple(data)), None, None)[:3]
    model.fit(x, y, sample_weight=weight, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[seen], **options)
    return model, seen.losses


def logged(tmp_path, *arguments, **options):
    path = tmp_path / "cases" / "x" / "steps.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    outcome = train(*arguments, steps_path=path, **options)
    assert outcome.status == "ok", outcome.reason
    return outcome, np.genfromtxt(path, delimiter=",", names=True)
