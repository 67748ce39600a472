"""Compiled models train as Keras' own ``fit`` trains them: the same losses step by step, whatever they consist of."""

import sys
import types
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD
from support.compiled_models import (
    BATCH,
    CLASSES,
    NAMED,
    STEPS,
    SUM,
    WEIGHT,
    OwnStep,
    X,
    by_fit,
    changed,
    classifier,
    dense,
    logged,
    logits,
    own_step,
    two_by_two,
    vae,
    workload,
)
from support.one_case import Outcome, train

from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.processes.events import Remarked
from mpscale.worker.built import build as build_case
from mpscale.worker.compiled.update import FitUpdate
from mpscale.worker.described import described
from mpscale.worker.model import described_code
from mpscale.worker.precision import Arithmetic
from mpscale.worker.scaler import scaler_for
from mpscale.worker.training import batches

CPU = Device("cpu", "CPU")


def masked():
    """Places that an Embedding masks count neither in the loss nor in the metric."""
    layers = [keras.layers.Embedding(9, 4, mask_zero=True), keras.layers.LSTM(4, return_sequences=True)]
    model = keras.Sequential([*layers, dense(3, dtype="float32")])
    model.compile(keras.optimizers.SGD(0.1), loss=logits(), metrics=["accuracy"], jit_compile=False)
    return model


WORDS = np.random.default_rng(6).integers(0, 9, (120, 5))
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


def probed(seed, loss, labels, *shape):
    """A loss of the first batch, and of outputs that every precision has exactly."""
    return float(loss(labels[batches(120, BATCH, STEPS, 0)[0]], drawn(seed, *shape)))


def drawn(seed, *shape):
    return np.random.default_rng(seed).integers(1, 64, (BATCH, *shape)) / 64.0


@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_that_of_keras_own_fit(name, tmp_path):
    """Its value for labels and outputs that every mode has, too: loss by loss, without weights."""
    build, data, options = CASES[name]
    _, expected = by_fit(build, data, **options)
    outcome, steps = logged(tmp_path, workload(build, data, **options))
    np.testing.assert_allclose(steps["loss"], expected, rtol=2e-4)
    if name == "add_loss":
        assert "without a keras.losses.Loss" in outcome.missed["loss_probe"].text
    elif build is two_by_two:
        both = probed(17, logits(), CLASSES, 3), probed(18, keras.losses.MeanSquaredError(), SUM, 1)
        assert outcome.row["loss_probe"] == pytest.approx(sum(both), rel=1e-5)
    else:
        labels, shape = (data[1], (5, 3)) if build is masked else (CLASSES, (3,))
        assert outcome.row["loss_probe"] == pytest.approx(probed(17, logits(), labels, *shape), rel=1e-5)


def test_every_loss_and_scale_is_that_of_keras_own_fit_in_float16(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        _, expected = by_fit(two_by_two, NAMED)
    finally:
        keras.config.set_dtype_policy("float32")
    outcome, steps = logged(tmp_path, workload(two_by_two, NAMED), "mixed-keras")
    np.testing.assert_allclose(steps["loss"], expected, rtol=2e-3)
    assert set(steps["loss_scale"]) == {2.0**15}
    both = probed(17, logits(), CLASSES, 3), probed(18, keras.losses.MeanSquaredError(), SUM, 1)
    assert outcome.row["loss_probe"] == pytest.approx(sum(both), rel=1e-5)
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


def uncompiled():
    return keras.Sequential([keras.Input((6,)), dense(3)])


def own_fit():
    kind = type("OwnFit", (keras.Sequential,), {"fit": lambda self: None})
    model = kind([keras.Input((6,)), dense(3)])
    model.compile("adam", loss=logits())
    return model


BOTH = {"data": (X, CLASSES), "validation": (X, CLASSES)}
MISSING = np.where(np.arange(120) == 3, np.nan, CLASSES).astype(np.float32)


def spoiled(y, outputs):
    """A loss without a name that Keras knows."""
    return tf.square(outputs[:, 0] - tf.reshape(y, (-1,)))


def ignoring(y, outputs):
    """The same, but examples without a label count nothing."""
    known = tf.math.is_finite(tf.reshape(y, (-1,)))
    return tf.where(known, spoiled(tf.where(known, tf.reshape(y, (-1,)), 0.0), outputs), 0.0)


def filtering():
    """It leaves out what a loss of Keras' makes of examples without a label."""

    class Filters(OwnStep):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                known = tf.math.is_finite(y)
                losses = keras.losses.MeanSquaredError(reduction=None)(
                    tf.expand_dims(y, -1), self(x, training=True)[:, :1]
                )
                of_known = keras.losses.MeanSquaredError()(tf.where(known, y, 0.0)[:, None], self(x)[:, :1])
                loss = self.optimizer.scale_loss(
                    of_known + 0.0 * tf.reduce_sum(tf.where(known, tf.stop_gradient(losses), 0.0))
                )
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {}

    model = Filters()
    model.compile("sgd", jit_compile=False)
    return model


@pytest.mark.parametrize("build", [changed(loss=ignoring, metrics=[]), filtering], ids=["a loss", "a train_step"])
def test_labels_that_are_missing_are_trained_on_if_the_model_leaves_them_out(build):
    assert train(workload(build, (X, MISSING), train_steps=3)).status == "ok"


ONE_HOT = dict.fromkeys(BOTH, (X, np.eye(3)[CLASSES]))


@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (uncompiled, {}, "not compiled; call model.compile"),
        (lambda: "a model", {"name": "x"}, "compiled keras.Model, not builtins.str"),
        (own_fit, {}, "OwnFit defines its own fit, which mpscale does not call"),
        (changed(run_eagerly=True), {}, "run_eagerly=True"),
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
        (classifier, dict.fromkeys(BOTH, (X, CLASSES.astype(str))), r"in train_y and test_y are text.*number"),
        (classifier, {"validation": (X, CLASSES.astype(str))}, "the labels in test_y are text.*number the classes"),
        (own_step, dict.fromkeys(BOTH, (X, CLASSES.astype(str))), "labels in train_y are text.*StringLookup"),
        (classifier, {"data": (X.astype(str), CLASSES), "validation": None}, "train_x: examples are text.*TextVector"),
        (changed(loss=spoiled, metrics=[]), {"data": (X, MISSING)}, "1 of the labels in train_y are not finite"),
        (classifier, {"data": (X, MISSING)}, "1 of the labels in train_y are not finite"),
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
        (classifier, {"target": 0.0}, ("accuracy", True, 0.01), True),
        (classifier, {"metric": "val_loss", "margin": 0.1}, ("val_loss", False, 0.1), False),
        (two_by_two, {}, ("kind_accuracy", True, 0.01), False),
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
    assert (row["test_examples"], row.get("steps_to_target")) == (47, 6 if "target" in options else None)
    model, _ = by_fit(build, data)
    x, y, weight = (*validation, None)[:3]
    # In losses of single outputs, Keras counts a smaller last batch as a single example.
    batch = 47 if named[0] == "size_loss" else BATCH
    expected = model.evaluate(x, y, sample_weight=weight, batch_size=batch, verbose=0, return_dict=True)
    assert row["metric_value"] == pytest.approx(expected[named[0].removeprefix("val_")], rel=1e-4)
    assert row.get("final_accuracy") == (row["metric_value"] if share else None)


def test_a_training_goes_on_as_if_nothing_had_been_evaluated(tmp_path):
    """An evaluation draws noise, and resets metrics."""
    _, alone = logged(tmp_path, workload(vae, X))
    outcome, evaluated = logged(tmp_path, workload(vae, X, X, target=-1.0, evaluate_every=3))
    assert outcome.row["metric_name"] == "val_loss"
    np.testing.assert_array_equal(evaluated["loss"], alone["loss"])


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
    ids=["jit off", "jit on", "jit auto", "steps", "other steps", "wrapped optimizer", "scaling optimizer"],
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


def made(look, build, data=(X, CLASSES), mode="fp32", **options):
    """The columns that ``look`` finds of what is trained, before it is."""
    keras.utils.clear_session(free_memory=False)
    sys.modules["situation"] = module = types.ModuleType("situation")
    module.workload = workload(build, data, **options)
    case = Case("situation:workload", mode, 0, 0, 0, Settings(jit=False))
    try:
        return look(build_case(case, Arithmetic(MODES[mode], CPU, jit=False), Outcome(case)))
    finally:
        keras.config.set_dtype_policy("float32")


def digests(*arguments, **options):
    """The columns that say what is trained."""
    values = made(described, *arguments, **options).values
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
        digests(vae, X),
    ]
    assert len({found["workload_digest"] for found in different}) == len(different)


def of_policy(y, outputs):
    """Another loss in one mode, which no digest shows."""
    return keras.ops.abs(y - outputs) ** (1 if keras.config.dtype_policy().name == "float32" else 2)


class Halves(OwnStep):
    """It compares labels that it has cast to the precision of the mode, or, with ``mixed``, with each other."""

    def __init__(self, mixed=False):
        super().__init__()
        self.mixed = mixed

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            labels = tf.cast(y + y[::-1] if self.mixed else tf.reshape(y, (-1, 1)), self.compute_dtype)
            loss = self.optimizer.scale_loss(keras.losses.MeanSquaredError()(labels, self(x, training=True)))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {}


def halves(**options):
    def build():
        model = Halves(**options)
        model.compile("sgd", jit_compile=False)
        return model

    return build


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (changed(loss=of_policy, metrics=[]), "another in each mode"),
        (changed(loss=lambda y, outputs: outputs[:, 0] * keras.random.uniform(()), metrics=[]), "random numbers"),
        (halves(), "the same in each mode"),
        (halves(mixed=True), "mean_squared_error compares with other things than the data"),
    ],
)
def test_a_loss_that_differs_between_modes_is_told_from_one_that_cannot_be_compared(build, found):
    def look(built):
        built.step.trace()
        return built.loss_columns()

    modes = [made(look, build, (X, SUM), mode) for mode in ("fp32", "mixed-bf16")]
    probes = [each.values.get("loss_probe") for each in modes]
    if probes[0] is None:
        assert [found in each.unavailable["loss_probe"].text for each in modes] == [True, True]
    else:
        assert (probes[0] != pytest.approx(probes[1], rel=1e-6)) == (found == "another in each mode")


def test_a_set_of_text_in_a_function_is_described_in_one_order():
    """Its own order differs between processes."""

    def known(name):
        return name in {"left", "right", "both"}

    assert ["'both'", "'left'", "'right'"] in described_code(known.__code__)[1]


def test_float8_layers_are_called_once_per_step_although_a_step_is_traced_twice():
    outcome = train(workload(classifier, (X, CLASSES), (X, CLASSES), train_steps=3), "mixed-fp8")
    assert outcome.status == "ok", outcome.reason
    assert "float8" in outcome.row["product_dtypes"]
