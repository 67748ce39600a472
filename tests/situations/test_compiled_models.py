"""Compiled models train as Keras' own ``fit`` trains them: the same losses step by step, whatever they consist of."""

import json
import sys
import types
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD
from support.one_case import Outcome, train

from mpscale import Workload
from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.wire import Looked, Remarked
from mpscale.worker.built import build as build_case
from mpscale.worker.built import described
from mpscale.worker.fit_update import FitUpdate
from mpscale.worker.precision import Arithmetic
from mpscale.worker.scaler import scaler_for
from mpscale.worker.training import batches

RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(120, 6)).astype(np.float32)
Z = RANDOM.normal(size=(120, 3)).astype(np.float32)
CLASSES = ((X[:, 0] + Z[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0)).astype(np.int64)
SUM = X.sum(1, keepdims=True)
BATCH, STEPS = 20, 12
CPU = Device("cpu", "CPU")


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


def masked():
    """Places that an Embedding masks count neither in the loss nor in the metric."""
    layers = [keras.layers.Embedding(9, 4, mask_zero=True), keras.layers.LSTM(4, return_sequences=True)]
    model = keras.Sequential([*layers, dense(3, dtype="float32")])
    model.compile(keras.optimizers.SGD(0.1), loss=logits(), metrics=["accuracy"], jit_compile=False)
    return model


NAMED = ({"left": X, "right": Z}, {"kind": CLASSES, "size": SUM})
WORDS = RANDOM.integers(0, 9, (120, 5))
WEIGHT = RANDOM.random(120).astype(np.float32)
CASES = {
    "two inputs and two outputs with loss weights": (two_by_two, NAMED, {}),
    "two outputs with one sample weight": (two_by_two, (*NAMED, WEIGHT), {}),
    "its own train_step": (own_step, (X, CLASSES), {}),
    "add_loss": (vae, (X,), {}),
    "class weights": (classifier, (X, CLASSES), {"class_weight": {0: 0.2, 2: 3.0}}),
    "sample weights": (classifier, (X, CLASSES, WEIGHT), {}),
    "float64": (classifier, (X.astype(np.float64), CLASSES), {}),
    "masks": (masked, (WORDS, WORDS % 3), {}),
}


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


@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_that_of_keras_own_fit(name, tmp_path):
    build, data, options = CASES[name]
    _, expected = by_fit(build, data, **options)
    _, steps = logged(tmp_path, workload(build, data, **options))
    np.testing.assert_allclose(steps["loss"], expected, rtol=2e-4)


def test_every_loss_and_scale_is_that_of_keras_own_fit_in_float16(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        _, expected = by_fit(two_by_two, NAMED)
    finally:
        keras.config.set_dtype_policy("float32")
    outcome, steps = logged(tmp_path, workload(two_by_two, NAMED), "mixed-keras")
    np.testing.assert_allclose(steps["loss"], expected, rtol=2e-3)
    assert set(steps["loss_scale"]) == {2.0**15}
    assert outcome.row["product_dtypes"].startswith("float32 6, float16 2")


def test_a_float32_step_has_no_operation_that_fit_has_not():
    """As the graph that Keras would compile; only the results of metrics that fit returns are not computed."""
    model = two_by_two()
    batch = tf.nest.map_structure(lambda array: array[:BATCH], NAMED)
    scaler = scaler_for(MODES["fp32"], model.optimizer, Settings())
    update = FitUpdate(model, {"optimizer": scaler}, batch)
    specs = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), batch)
    counts = []
    for step in (model.train_step, update):
        graph = tf.function(lambda data, step=step: step(data), autograph=False).get_concrete_function(specs).graph
        counts.append(Counter(op.type for op in graph.get_operations()))
    theirs, ours = counts
    assert not ours - theirs
    assert set(theirs - ours) == {"Identity"}


def test_overflow_is_logged_and_skips_the_step(tmp_path):
    outcome, steps = logged(
        tmp_path, workload(own_step, (X, CLASSES)), "mixed-dynamic", dynamic_scale={"initial": 2.0**24}
    )
    skipped = int(steps["overflow"].sum())
    assert 0 < skipped < STEPS
    assert steps["loss_scale"][skipped] == 2.0 ** (24 - skipped)
    assert np.all(np.diff(steps["loss"][: skipped + 1]) != 0) or skipped == 1
    assert outcome.row["overflow_steps"] == skipped


class Bare(OwnStep):
    """A train_step that does not scale its loss, as most tutorials have it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = logits()(y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def bare():
    model = Bare()
    model.compile(keras.optimizers.Adam(0.01), jit_compile=False)
    return model


@pytest.mark.parametrize("mode", ["fp32", "mixed-bf16", "mixed-dynamic", "mixed-keras", "article"])
def test_a_train_step_that_does_not_scale_its_loss_runs_in_modes_that_need_no_scale(mode):
    outcome = train(workload(bare, (X, CLASSES)), mode)
    if MODES[mode].scaling is None:
        assert outcome.status == "ok"
        assert outcome.row["train_loss_first"] == pytest.approx(1.05, abs=0.3)
    else:
        assert outcome.status == "unsupported"
        assert "loss = self.optimizer.scale_loss(loss)" in outcome.reason


class Gan(keras.Model):
    """Two optimizers, no call, and a train_step that begins with noise."""

    def __init__(self, discriminator_steps=1):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((4,)), dense(8, activation="relu"), dense(6, dtype="float32")])
        self.judge = keras.Sequential([keras.Input((6,)), dense(8, activation="relu"), dense(1, dtype="float32")])
        self.discriminator_steps = discriminator_steps

    def compile(self, judge_optimizer, generator_optimizer, **options):
        super().compile(jit_compile=False, **options)
        self.judge_optimizer, self.generator_optimizer = judge_optimizer, generator_optimizer
        self.loss_function = keras.losses.BinaryCrossentropy(from_logits=True)

    def train_step(self, real):
        def step(part, optimizer, loss_of):
            with tf.GradientTape() as tape:
                loss = loss_of()
                scaled = optimizer.scale_loss(loss)
            weights = part.trainable_weights
            optimizer.apply(tape.gradient(scaled, weights), weights)
            return loss

        noise = tf.ones((BATCH, 4))
        real_or_not = tf.concat([tf.ones((BATCH, 1)), tf.zeros((BATCH, 1))], 0)

        def judged():
            return self.loss_function(real_or_not, self.judge(tf.concat([real, self.generator(noise)], 0)))

        def fooled():
            return self.loss_function(tf.ones((BATCH, 1)), self.judge(self.generator(noise)))

        losses = [step(self.judge, self.judge_optimizer, judged) for _ in range(self.discriminator_steps)]
        return {"d": losses[-1], "g": step(self.generator, self.generator_optimizer, fooled), "all": sum(losses)}


def gan(discriminator_steps=1):
    def build():
        model = Gan(discriminator_steps)
        model.compile(keras.optimizers.SGD(0.1), keras.optimizers.Adam(0.01))
        return model

    return build


@pytest.mark.parametrize("discriminator_steps", [1, 2])
def test_several_optimizers_each_have_a_loss_scale(discriminator_steps, tmp_path):
    build = gan(discriminator_steps)
    keras.utils.set_random_seed(0)
    model = build()
    order = batches(len(X), BATCH, STEPS, 0)
    step = tf.function(model.train_step)
    expected = [float(found["all"] + found["g"]) for found in (step(tf.constant(X[batch])) for batch in order)]
    outcome, steps = logged(tmp_path, workload(build, X, name="gan"))
    np.testing.assert_allclose(steps["loss"], expected, rtol=2e-4)
    assert outcome.row["optimizer"] == "SGD"
    assert set(json.loads(outcome.row["optimizer_config"])) == {"judge_optimizer", "generator_optimizer"}
    settings = {"dynamic_scale": {"initial": 2.0**20}, "timing_s": 0.02, "timing_blocks": 2}
    outcome, steps = logged(tmp_path, workload(build, X, name="gan"), "mixed-dynamic", **settings)
    assert steps["overflow"][0] == 1.0
    assert steps["loss_scale"][0] == 2.0 ** (21 - discriminator_steps)
    assert 0 < outcome.row["overflow_steps"] == steps["overflow"].sum() < STEPS
    assert steps["loss_scale"][-1] < 2.0**20
    assert outcome.row["timed_overflow_steps"] == 0


def clipping():
    class Clips(OwnStep):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                scaled = self.optimizer.scale_loss(logits()(y, self(x, training=True)))
            gradients, _ = tf.clip_by_global_norm(tape.gradient(scaled, self.trainable_variables), 1.0)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {}

    model = Clips()
    model.compile("adam", jit_compile=False)
    return model


@pytest.mark.parametrize("mode", ["fp32", "mixed-dynamic"])
def test_gradients_that_are_clipped_while_they_are_scaled_are_remarked_upon(mode):
    outcome = train(workload(clipping, (X, CLASSES)), mode)
    assert outcome.status == "ok"
    said = [event.text for event in outcome.sent if isinstance(event, Remarked)]
    assert [("global_clipnorm" in text) for text in said] == [True] * (mode != "fp32")


def outside():
    """An optimizer that the model does not hold."""
    optimizer = keras.optimizers.SGD(0.1)

    class Outside(OwnStep):
        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = logits()(data[1], self(data[0], training=True))
            optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {}

    model = Outside()
    model.compile("adam", jit_compile=False)
    return model


def branching():
    class Branches(OwnStep):
        def train_step(self, data):
            def update():
                with tf.GradientTape() as tape:
                    loss = logits()(data[1], self(data[0], training=True))
                self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
                return loss

            return {"loss": tf.cond(tf.reduce_sum(data[0]) > 0, update, lambda: 0.0)}

    model = Branches()
    model.compile("adam", jit_compile=False)
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


def uncompiled():
    return keras.Sequential([keras.Input((6,)), dense(3)])


def own_fit():
    kind = type("OwnFit", (keras.Sequential,), {"fit": lambda self: None})
    model = kind([keras.Input((6,)), dense(3)])
    model.compile("adam", loss=logits())
    return model


BOTH = {"data": (X, CLASSES), "validation": (X, CLASSES)}
ONE_HOT = dict.fromkeys(BOTH, (X, np.eye(3)[CLASSES]))


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (uncompiled, {}, "not compiled; call model.compile"),
        (lambda: "a model", {"name": "x"}, "compiled keras.Model, not builtins.str"),
        (own_fit, {}, "OwnFit defines its own fit, which mpscale does not call"),
        (changed(run_eagerly=True), {}, "run_eagerly=True"),
        (outside, {}, "applied no gradients with an optimizer that the model holds"),
        (branching, {}, "inside of a loop or a branch"),
        (classifier, {"data": X, "validation": None}, r"no labels to compare with: give \(x, y\)"),
        (classifier, {"data": X}, "test_y has one array, but train_y has nothing"),
        (classifier, {"data": (X, CLASSES[:5])}, "train_x has 120 examples and train_y has 5"),
        (classifier, {"data": (X, CLASSES, CLASSES, 1)}, "train is a tuple of 4"),
        (classifier, {"data": lambda: 3}, "train_x must be a NumPy array, not a int"),
        (classifier, {"metric": "val_mae"}, "no metric called 'mae'; it has loss, accuracy"),
        (changed(loss="mse", metrics=[keras.metrics.F1Score()]), ONE_HOT, r"array of shape \(3,\).*average='macro'"),
        (changed(metrics=[lambda y, p: tf.reduce_mean(p)]), {}, "mpscale does not know if a higher"),
        (vae, {"data": X, "validation": X, "metric_higher_is_better": True}, "a lower val_loss is better"),
        (classifier, {"class_weight": {0: 2.0}, "data": (X, CLASSES, WEIGHT)}, "leave out class_weight"),
        (two_by_two, {"class_weight": {0: 2.0}, "data": NAMED, "validation": None}, "one array of labels"),
        (classifier, {"batch_size": 500}, "choose a batch_size from 1 to 120"),
        (classifier, {"callbacks": lambda: [3]}, "must return Keras callbacks, not builtins.int"),
        (classifier, {"callbacks": lambda: keras.callbacks.EarlyStopping()}, "say target=... in the workload"),
        (classifier, {"callbacks": lambda: [keras.callbacks.TensorBoard("x")]}, "the folder of the run has loss"),
        (classifier, {"callbacks": lambda: [keras.callbacks.ReduceLROnPlateau("mae")]}, "monitors 'mae', which"),
        (classifier, {"callbacks": lambda: [Stops()]}, "set model.stop_training"),
        (classifier, {"callbacks": list, "evaluate_every": 1}, "raise evaluate_every"),
        (classifier, dict.fromkeys(BOTH, (X, CLASSES.astype(str))), "labels in train_y are text.*number the classes"),
        (classifier, {"data": (X, CLASSES - 1)}, "labels in train_y range from -1 to 1.*classes 0 to 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_as_it_asks_is_refused(build, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(workload(build, **{**BOTH, **given}))


class Stops(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


@pytest.mark.parametrize(
    ("build", "options", "named", "share"),
    [
        (classifier, {}, ("accuracy", True, 0.01), True),
        (classifier, {"metric": "val_loss", "margin": 0.1}, ("val_loss", False, 0.1), False),
        (two_by_two, {}, ("kind_accuracy", True, 0.01), False),
        (two_by_two, {"metric": "size_mae"}, ("size_mae", False, None), False),
        (two_by_two, {"metric": "size_loss"}, ("size_loss", False, None), False),
        (own_step, {}, ("val_loss", False, None), False),
    ],
)
def test_the_judged_metric_is_that_of_keras_own_evaluate(build, options, named, share):
    """Over all validation data, the smaller last batch included, with its weights."""
    data = NAMED if build is two_by_two else (X, CLASSES)
    validation = tf.nest.map_structure(lambda array: array[:47], (*data, *([WEIGHT] if build is classifier else [])))
    row = train(workload(build, data, validation, **options)).row
    assert (row["metric_name"], row["metric_higher_is_better"], row.get("metric_margin")) == named
    assert row["test_examples"] == 47
    model, _ = by_fit(build, data)
    x, y, weight = (*validation, None)[:3]
    # In losses of single outputs, Keras counts a smaller last batch as a single example.
    batch = 47 if named[0] == "size_loss" else BATCH
    expected = model.evaluate(x, y, sample_weight=weight, batch_size=batch, verbose=0, return_dict=True)
    assert row["metric_value"] == pytest.approx(expected[named[0].removeprefix("val_")], rel=1e-4)
    assert row.get("final_accuracy") == (row["metric_value"] if share else None)


@pytest.mark.parametrize(
    ("changes", "settings", "column", "remark"),
    [
        ({"jit_compile": False}, {"jit": True}, {"jit": False}, "jit_compile=False"),
        ({"jit_compile": True}, {"jit": False}, {"jit": False}, "although the model"),
        ({"jit_compile": "auto"}, {"jit": False}, {"jit": False}, None),
        ({"steps_per_execution": 3}, {}, {"steps_per_call": 3}, None),
        ({"steps_per_execution": 3}, {"steps_per_call": 2}, {"steps_per_call": 2}, "goes before the 3"),
        ({"optimizer": keras.optimizers.LossScaleOptimizer(SGD(0.1))}, {}, {"optimizer": "SGD"}, "taken off"),
        ({"optimizer": SGD(0.1, loss_scale_factor=8.0)}, {}, {"optimizer": "SGD"}, "loss_scale_factor"),
    ],
    ids=str,
)  # fmt: skip
def test_what_compile_says_is_done_or_remarked_upon(changes, settings, column, remark):
    outcome = train(workload(changed(**changes), (X, CLASSES), train_steps=3), **settings)
    assert outcome.status == "ok"
    assert {name: outcome.row[name] for name in column} == column
    said = " ".join(event.text for event in outcome.sent if isinstance(event, Remarked))
    assert (remark in said) if remark else said == ""


def schedule():
    """Both change the learning rate; a rise of the loss by less than 10 is a plateau."""
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.1, patience=1, min_delta=10.0)
    return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5 if epoch else 0.3), plateau]


@pytest.mark.parametrize("mode", ["fp32", "mixed-keras"])
def test_callbacks_change_the_training_as_in_keras_own_fit(mode, tmp_path):
    order = batches(len(X), BATCH, 3 * STEPS, 0).ravel()
    keras.utils.set_random_seed(0)
    model, seen = classifier(), []
    noted = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append((epoch, logs)))
    given = tf.data.Dataset.from_tensor_slices((X[order], CLASSES[order])).batch(BATCH)
    options = {"epochs": 6, "steps_per_epoch": len(X) // BATCH, "verbose": 0, "validation_data": (X, CLASSES)}
    model.fit(given, **options, validation_batch_size=BATCH, callbacks=[*schedule(), noted])
    ours = []
    noted = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ours.append((epoch, logs)))
    options = {"train_steps": 3 * STEPS, "callbacks": lambda: [*schedule(), noted]}
    train(workload(classifier, (X, CLASSES), (X, CLASSES), **options), mode)
    assert [epoch for epoch, _ in ours] == list(range(6))
    for (_, expected), (_, found) in zip(seen, ours, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-4 if mode == "fp32" else 0.05), name
    assert ours[-1][1]["learning_rate"] < ours[0][1]["learning_rate"] / 100


def test_callbacks_of_steps_see_each_step_once(tmp_path):
    seen, begun = [], []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda step, logs: begun.append(step),
        on_train_batch_end=lambda step, logs: seen.append((step, logs["loss"])),
    )
    _, steps = logged(tmp_path, workload(classifier, (X, CLASSES), callbacks=lambda: [callback]))
    assert begun == [step for step, _ in seen] == [*range(6)] * 2
    assert [loss for _, loss in seen] == pytest.approx(list(steps["loss"]))


def digests(build, data=(X, CLASSES), mode="fp32", **options):
    """The columns that say what is trained, before it is."""
    keras.utils.clear_session(free_memory=False)
    sys.modules["situation"] = module = types.ModuleType("situation")
    module.workload = workload(build, data, **options)
    case = Case("situation:workload", mode, 0, 0, 0, Settings(jit=False))
    try:
        values = described(build_case(case, Arithmetic(MODES[mode], CPU, jit=False), Outcome(case))).values
    finally:
        keras.config.set_dtype_policy("float32")
    return {name: values[name] for name in SAME}


SAME = ("workload_digest", "model_digest", "optimizer_config", "initial_weights_digest", "data_digest")


def test_digests_are_those_of_what_is_trained():
    assert digests(two_by_two, NAMED) == digests(two_by_two, NAMED, "mixed-dynamic")
    assert digests(own_step) == digests(own_step, mode="mixed-static")
    different = [
        digests(changed()),
        digests(changed(loss="sparse_categorical_crossentropy")),
        digests(changed(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2))),
        digests(changed(loss_weights=0.5)),
        digests(changed(metrics=["sparse_categorical_crossentropy"])),
        digests(changed(), class_weight={0: 0.5}),
        digests(changed(), callbacks=lambda: [keras.callbacks.LearningRateScheduler(lambda epoch: 0.01)]),
        digests(changed(), callbacks=lambda: [keras.callbacks.LearningRateScheduler(lambda epoch: 0.02)]),
        digests(own_step),
        digests(bare),
    ]
    assert len({found["workload_digest"] for found in different}) == len(different)


def test_gradients_of_a_compiled_model_can_be_looked_at():
    """Those of its own train_step, too; not those of several losses."""
    for build, data in ((classifier, (X, CLASSES)), (own_step, (X, CLASSES))):
        looks = [event for event in train(workload(build, data), looks=2).sent if isinstance(event, Looked)]
        assert [look.step for look in looks] == [1, STEPS]
        assert {(row["layer"].partition("_")[0], row["of"]) for row in looks[0].gradients} == {
            ("dense", "weights"),
            ("dense", "activations"),
        }
    with pytest.raises(ValueError, match="applies gradients 2 times"):
        train(workload(gan(), X, name="gan"), looks=1)
