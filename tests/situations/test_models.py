"""What a Keras model defines besides ``call`` works as in Keras' own ``fit``, or is refused."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import blobs, by_fit, dense, split, train, workload

from mpscale import LossScaleOptimizer
from mpscale.worker.training import batches
from mpscale.workloads import Data
from mpscale.workloads.workload import sparse_cross_entropy

X, Y = blobs()
DATA = split(X, Y)
SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class AddsLoss(keras.layers.Layer):
    """Adds a loss for large activations of every example."""

    def call(self, inputs):
        self.add_loss(20.0 * keras.ops.mean(keras.ops.square(inputs), axis=-1))
        return inputs


class Counts(keras.layers.Layer):
    """Counts its training batches in a variable that is not trained, and scales its output by the count."""

    def build(self, shape):
        self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

    def call(self, inputs, training=False):
        if training:
            self.seen.assign_add(1.0)
        return inputs * keras.ops.cast(1.0 + 0.01 * self.seen, inputs.dtype)


class Subclassed(keras.Model):
    """A model without a config, with a regularizer, that creates its weights when it first sees data."""

    def __init__(self, factor=0.5):
        super().__init__()
        self.hidden = keras.layers.Dense(8, activation="tanh", kernel_regularizer=keras.regularizers.L2(factor))
        self.out = keras.layers.Dense(3, dtype="float32")

    def call(self, inputs):
        return self.out(self.hidden(inputs))


def sequential(*layers):
    return lambda: keras.Sequential([keras.Input((2,)), *(layer() for layer in layers)])


def logits():
    return keras.layers.Dense(3, dtype="float32")


def hidden(**options):
    return lambda: keras.layers.Dense(8, activation="tanh", **options)


MODELS = {
    "a kernel regularizer": sequential(hidden(kernel_regularizer=keras.regularizers.L2(0.5)), logits),
    "an activity regularizer": sequential(hidden(activity_regularizer=keras.regularizers.L1(0.05)), logits),
    "a bias regularizer and one for both": sequential(
        hidden(bias_regularizer="l1", kernel_regularizer=keras.regularizers.L1L2(0.01, 0.1)), logits
    ),
    "add_loss of every example": sequential(hidden(), AddsLoss, logits),
    "a constraint": sequential(hidden(kernel_constraint=keras.constraints.MaxNorm(0.3)), logits),
    "a constraint that all weights are positive": sequential(hidden(kernel_constraint="non_neg"), logits),
    "dropout": sequential(hidden(), lambda: keras.layers.Dropout(0.5), logits),
    "noise": sequential(lambda: keras.layers.GaussianNoise(0.3), hidden(), logits),
    "batch normalization": sequential(hidden(), lambda: keras.layers.BatchNormalization(momentum=0.5), logits),
    "a variable that the forward pass assigns": sequential(hidden(), Counts, logits),
    "a frozen layer": sequential(hidden(trainable=False), logits),
    "a subclass with a regularizer": Subclassed,
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_training_is_that_of_keras_own_fit(model):
    """Compared by the loss on the test set after the training."""
    outcome = train(workload(model, lambda: DATA, metric=loss_of_outputs, **NAMED))
    net = by_fit(model, DATA, SPARSE, keras.optimizers.SGD(0.1))
    assert outcome.status == "ok"
    expected = loss_of_outputs(DATA.test_y, net.predict(DATA.test_x, verbose=0))
    assert outcome.row["metric_value"] == pytest.approx(expected, rel=1e-4)


NAMED = {"metric_name": "cross_entropy", "metric_higher_is_better": False}


def loss_of_outputs(labels, outputs):
    return float(keras.ops.mean(keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)))


@pytest.mark.parametrize(
    ("loss", "series", "named"),
    [(SPARSE, None, "SparseCategoricalCrossentropy"),
     (functools.partial(sparse_cross_entropy), "s", "sparse_cross_entropy")],
)  # fmt: skip
def test_a_row_says_in_words_what_its_model_is(loss, series, named):
    outcome = train(workload(MODELS["dropout"], lambda: DATA, loss=loss, series=series), "mixed-bf16", train_steps=1)
    record = outcome.record
    assert (record["layers"], record["loss_name"], record["series"]) == ("Dense 2, Dropout 1", named, series)
    assert (series is None) == (outcome.missed.get("series") is not None)
    # The key has the digest all the same.
    assert record["workload_digest"].removeprefix("sha256:") in record["series_key"]


def test_logged_loss_includes_losses_that_the_model_adds():
    """Here the regularizer is most of the loss."""
    outcome = train(workload(MODELS["a kernel regularizer"], lambda: DATA), train_steps=1)
    keras.utils.set_random_seed(0)
    net = MODELS["a kernel regularizer"]()
    added = 0.5 * float(np.sum(np.square(net.layers[0].kernel)))
    assert added > 0.3
    assert outcome.row["train_loss_first"] == pytest.approx(added + np.log(3), abs=0.6)
    bare = train(workload(dense(), lambda: DATA), train_steps=1)
    assert outcome.row["train_loss_first"] - bare.row["train_loss_first"] == pytest.approx(added, rel=1e-3)


SLOW = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("mixed-static", "mixed-bf16")]


@pytest.mark.parametrize("mode", ["mixed-dynamic", "mixed-keras", *SLOW])
def test_losses_that_the_model_adds_are_scaled_too(mode):
    """Unscaled it would have a 32768th of its weight and would not keep the weights small."""

    @functools.cache
    def largest(mode, model):
        def norm(labels, outputs):
            return float(np.abs(outputs).max())

        options = {"metric": norm, "metric_name": "largest", "metric_higher_is_better": False}
        return train(workload(model, lambda: DATA, **options), mode, jit=True).row["metric_value"]

    held = sequential(lambda: keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5)), float_output)
    assert largest(mode, held) == pytest.approx(largest("fp32", held), rel=0.03)
    assert largest("fp32", held) < 0.6 * largest("fp32", sequential(lambda: keras.layers.Dense(3), float_output))


def float_output():
    return keras.layers.Activation("linear", dtype="float32")


def test_digest_differs_between_models_with_other_regularizers_or_constraints():
    def digest(model):
        return train(workload(model, lambda: DATA), train_steps=1).row["workload_digest"]

    assert digest(lambda: Subclassed(0.5)) == digest(lambda: Subclassed(0.5))
    different = [
        lambda: Subclassed(0.5),
        lambda: Subclassed(0.25),
        dense(),
        *(MODELS[name] for name in ("a kernel regularizer", "a constraint", "an activity regularizer")),
    ]
    assert len({digest(model) for model in different}) == 6


def own(method):
    """A class of models that defines a method of Keras' itself."""
    return type("Own", (keras.Sequential,), {method: lambda self, *arguments, **options: None})


def made(kind=keras.Sequential, change=lambda model: None):
    """A function that makes a model of this class and changes it."""

    def make():
        model = kind([keras.Input((2,)), keras.layers.Dense(3, dtype="float32")])
        change(model)
        return model

    return make


def several(wrap):
    x = keras.Input((2,))
    outputs = [keras.layers.Dense(3, dtype="float32", name=name)(x) for name in ("a", "b")]
    return lambda: keras.Model(x, wrap(outputs))


def two_inputs():
    inputs = [keras.Input((2,)), keras.Input((2,))]
    return keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(keras.layers.Add()(inputs)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (made(own("train_step")), "Own defines its own train_step"),
        (made(own("compute_loss")), "Own defines its own compute_loss"),
        (made(own("make_train_function")), "Own defines its own make_train_function"),
        (made(own("test_step")), "Own defines its own test_step"),
        (made(type("Inherited", (own("train_step"),), {})), "Inherited defines its own train_step"),
        (made(change=lambda model: setattr(model, "train_step", print)), "defines its own train_step"),
        (made(change=lambda model: model.compile("adam", loss="mse")), "leave out model.compile"),
        (several(lambda outputs: outputs), "a list of 2 outputs"),
        (several(lambda outputs: tuple(outputs)), "of 2 outputs"),
        (several(lambda outputs: dict(zip("ab", outputs, strict=True))), "a dict of 2 outputs"),
        (two_inputs, "has 2 inputs, but this workload takes one; call model.compile.*mpscale.Workload.from_"),
        (lambda: keras.Sequential([keras.Input((2,)), keras.layers.Activation("tanh")]), "no trainable variables"),
        (lambda: keras.layers.Dense(3), "model function must return a keras.Model, not"),
        (lambda: None, "must return a keras.Model, not builtins.NoneType"),
        (sequential(lambda: keras.layers.Dense(3), lambda: keras.layers.Lambda(lambda x: tf.argmax(x, -1))), "int64"),
    ],
)  # fmt: skip
def test_model_that_would_not_be_trained_as_it_asks_is_refused(model, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(workload(model, lambda: DATA))


def masked():
    """Sequences padded with 0, with an output at every place."""
    return keras.Sequential([keras.Input((5,), dtype="int64"), keras.layers.Embedding(4, 6, mask_zero=True), logits()])


def tagged():
    """Data for ``masked``: padded places have labels too, which must not count."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 4, (240, 5))
    return split(tokens, np.where(tokens > 0, tokens - 1, random.integers(0, 3, tokens.shape)))


@pytest.fixture(scope="module")
def masked_by_keras():
    """The first loss and the accuracy of Keras' own fit, and the accuracy over padded places too."""
    data = tagged()
    keras.utils.set_random_seed(0)
    untrained = masked()
    untrained.compile("sgd", loss=SPARSE)
    batch = batches(160, 20, 1, 0)[0]
    loss = untrained.evaluate(data.train_x[batch], data.train_y[batch], batch_size=20, verbose=0)
    net = by_fit(masked, data, SPARSE, keras.optimizers.SGD(0.1), steps=30, metrics=["accuracy"])
    everywhere = np.mean(net.predict(data.test_x, verbose=0).argmax(-1) == data.test_y)
    return float(loss), net.evaluate(data.test_x, data.test_y, verbose=0)[1], everywhere


@pytest.mark.parametrize(
    ("loss", "metric"),
    [
        (SPARSE, "accuracy"),
        (sparse_cross_entropy, keras.metrics.SparseCategoricalAccuracy()),
        (lambda y, out: keras.losses.sparse_categorical_crossentropy(y, out, True), "accuracy"),
    ],
    ids=["a loss object", "the default loss and a metric of Keras", "a loss of each place"],
)
def test_masked_places_count_neither_in_the_loss_nor_in_the_metric(masked_by_keras, loss, metric):
    first, right, everywhere = masked_by_keras
    outcome = train(workload(masked, tagged, loss=loss, metric=metric), train_steps=30)
    assert outcome.row["train_loss_first"] == pytest.approx(first, rel=1e-4)
    assert outcome.row["final_accuracy"] == pytest.approx(right, abs=0.003)
    assert abs(right - everywhere) > 0.03


@pytest.mark.parametrize("examples", [1, 19, 20, 41])
def test_model_of_fixed_batch_size_is_evaluated_on_test_sets_of_any_size(examples):
    def fixed():
        return keras.Sequential([keras.Input(batch_shape=(20, 2)), keras.layers.Dense(3, dtype="float32")])

    outcome = train(workload(fixed, lambda: Data(X[:160], Y[:160], X[160:][:examples], Y[160:][:examples])))
    assert outcome.status == "ok"
    assert (outcome.row["final_accuracy"] * examples) % 1 == pytest.approx(0, abs=1e-6)


def test_evaluation_never_takes_more_examples_at_once_than_training():
    sizes = set()

    class Watches(keras.layers.Layer):
        def call(self, inputs):
            sizes.add(inputs.shape[0])
            return inputs

    published = Data(X[:160], Y[:160], X[160:], Y[160:], X[160:201], Y[160:201])
    outcome = train(workload(sequential(Watches, logits), lambda: published, batch_size=8, target=0.9))
    assert outcome.row["published_metric_value"] > 0
    assert sizes - {None} == {8}


@pytest.mark.parametrize("mode", ["fp32", "mixed-dynamic", "mixed-keras"])
def test_moving_average_replaces_the_weights_as_in_fit(mode):
    def adam():
        return keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.9)

    outcome = train(workload(dense(), lambda: DATA, optimizer=adam, metric=loss_of_outputs, **NAMED), mode, jit=True)
    net = by_fit(dense(), DATA, SPARSE, adam())
    expected = loss_of_outputs(DATA.test_y, net.predict(DATA.test_x, verbose=0))
    assert outcome.row["metric_value"] == pytest.approx(expected, rel=1e-3 if mode == "fp32" else 0.03)


class Holds(keras.optimizers.SGD):
    """An optimizer that holds one that scales the loss."""

    def __init__(self):
        super().__init__()
        self.base = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())


class Scales(keras.optimizers.SGD):
    def scale_loss(self, loss):
        return 128 * loss


SCALING = {
    "Keras'": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
    "mpscale's": lambda: LossScaleOptimizer(keras.optimizers.SGD()),
    "one inside another": Holds,
    "a class of one's own": Scales,
    "loss_scale_factor": lambda: keras.optimizers.SGD(loss_scale_factor=128.0),
}


@pytest.mark.parametrize("mode", ["fp32", "mixed-dynamic", "mixed-keras"])
@pytest.mark.parametrize("optimizer", SCALING.values(), ids=SCALING)
def test_optimizer_that_scales_the_loss_is_refused_in_every_mode(optimizer, mode):
    with pytest.raises(ValueError, match=r"scales the loss itself .* mpscale adds the loss scaling of each mode"):
        train(workload(dense(), lambda: DATA, optimizer), mode)


class OwnSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Keras cannot copy an optimizer with this schedule, since the class is not registered."""

    def __call__(self, step):
        return 0.1


USED = keras.optimizers.SGD(0.1)
USED.iterations.assign(1000)


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        keras.optimizers.SGD,
        keras.optimizers.SGD(0.01),
        USED,  # has counted steps, and is copied as it was created
        lambda: keras.optimizers.SGD(0.01),
        keras.optimizers.SGD(OwnSchedule()),
    ],
    ids=["a name", "a class", "an instance", "an instance that was used", "a function", "a schedule of one's own"],
)
def test_optimizer_may_have_every_form_that_keras_takes(optimizer):
    def loss():
        return train(workload(dense(), lambda: DATA, optimizer), train_steps=20).row["train_loss_final"]

    first = loss()
    if isinstance(optimizer, keras.optimizers.Optimizer) and optimizer.built:
        # It cannot be copied, so it serves once, which is enough for the process of a case.
        with pytest.raises(ValueError, match="has been used already and cannot be copied"):
            loss()
    else:
        assert loss() == first


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [("adamm", "knows no optimizer called"), (lambda: None, "not builtins.NoneType"), (dict, "not builtins.dict")],
)
def test_what_is_not_an_optimizer_is_refused(optimizer, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(workload(dense(), lambda: DATA, optimizer))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data({"a": X}, Y, {"a": X}, Y), r"takes an array.*train_x is a dict of \['a'\].*from_compiled"),
        (Data(X, (Y, Y), X, (Y, Y)), r"train_y is a tuple of \[0\], \[1\] and test_y is"),
        (Data(X, Y, X, Y, train_weight=np.ones(len(X))), "there is a train_weight; call model.compile"),
        (Data(X, None, X), "has no train_y"),
    ],
)
def test_data_of_another_structure_than_the_loss_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        train(workload(dense(), lambda: data))


@pytest.mark.parametrize("given", [None, (X, Y), {"x": X}, tf.data.Dataset.from_tensors((X, Y))], ids=type)
def test_data_function_that_returns_something_else_says_what_it_should(given):
    with pytest.raises(TypeError, match=r"must return an mpscale\.Data of NumPy arrays or an mpscale\.Pipeline, not a"):
        train(workload(dense(), lambda: given))
