"""Loss, metric, model and optimizer of a user are tried before training: valid ones pass, and trials leave no trace."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import blobs, by_fit, dense, split, train, workload

from mpscale.workloads import Data

X, Y = blobs()
TARGET = (0.5 * X[:, 0] - 0.25 * X[:, 1] + 2.0).astype(np.float32)
COLUMN = TARGET[:, None]
LESS = {"metric_name": "error", "metric_higher_is_better": False}
SHORT = {"train_steps": 20, "evaluate_every": 10}
LINE = dense(1)


@functools.cache
def predicted():
    """Outputs of a line on the test set, trained by Keras' own fit."""
    data = split(X, TARGET)
    return by_fit(LINE, data, "mse", keras.optimizers.SGD(0.1), steps=20).predict(data.test_x, verbose=0)


def evaluated(data, outputs, loss, metric, optimizer=None):
    """Return loss and metric on the test set after a training by Keras' own fit."""
    net = by_fit(dense(outputs), data, loss, optimizer or keras.optimizers.SGD(0.1), steps=20, metrics=[metric])
    return net.evaluate(data.test_x, data.test_y, verbose=0)


@pytest.mark.parametrize(
    ("metric", "shape"),
    [
        (lambda y, out: np.sqrt(np.mean((y - out[:, 0]) ** 2)), -1),
        (lambda y, out: np.median(np.abs(y - out.squeeze())), -1),
        (lambda y, out: 1 - ((y - out[:, 0]) ** 2).sum() / ((y - y.mean()) ** 2).sum(), -1),
        (lambda y, out: np.corrcoef(y, out[:, 0])[0, 1], -1),
        (lambda y, out: np.quantile(np.abs(y - out.ravel()), 0.9), -1),
        (lambda y, out: np.sqrt(np.mean((y - out) ** 2)), (-1, 1)),
    ],
    ids=["a root of a mean", "a median", "R squared", "a correlation", "a quantile", "a root that would broadcast"],
)
def test_metric_that_is_not_a_mean_over_examples_gets_labels_of_the_shape_it_takes(metric, shape):
    """It takes outputs (n, 1) with labels (n,) or (n, 1), though it is not the mean of its values for each example."""
    data = split(X, TARGET)
    outcome = train(workload(LINE, lambda: data, loss="mse", metric=metric, **LESS, **SHORT))
    right = metric(data.test_y.reshape(shape), predicted())
    assert (outcome.status, outcome.row["metric_value"]) == ("ok", pytest.approx(right, rel=1e-4))


def softmax():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="softmax", dtype="float32")])


class MeanError(keras.metrics.Metric):
    """A user's metric for labels in the shape that Keras passes: that of the data."""

    def __init__(self, column=False, **options):
        super().__init__(**options)
        self.column = column
        self.total = self.add_weight(name="total", initializer="zeros")
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, labels, outputs, sample_weight=None):
        errors = keras.ops.abs(labels[:, 0] - outputs[:, 0] if self.column else labels - outputs[:, 0])
        self.total.assign_add(keras.ops.sum(errors))
        self.count.assign_add(float(len(labels)))

    def result(self):
        return self.total / self.count


@pytest.mark.parametrize("column", [False, True], ids=["labels (n,)", "labels (n, 1)"])
def test_metric_class_gets_the_labels_that_keras_passes(column):
    data = split(X, COLUMN if column else TARGET)
    metric = MeanError(column, name="error")
    outcome = train(workload(dense(1), lambda: data, loss="mse", metric=metric, metric_higher_is_better=False, **SHORT))
    right = np.mean(np.abs(COLUMN[160:] - predicted()))
    assert outcome.row["metric_value"] == pytest.approx(right, rel=1e-4)


def test_function_wrapped_in_a_keras_metric_may_take_classes():
    metric = keras.metrics.MeanMetricWrapper(keras.metrics.sparse_categorical_accuracy, name="hits")
    outcome = train(workload(dense(), lambda: split(X, Y), metric=metric, metric_higher_is_better=True, **SHORT))
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert outcome.row["metric_value"] == pytest.approx(evaluated(split(X, Y), 3, sparse, "accuracy")[1])


def squares(labels, outputs):
    return tf.reduce_mean((labels - outputs) ** 2)


def hinge_of_0_and_1(labels, outputs):
    return keras.ops.mean(keras.ops.relu(1 - keras.ops.multiply(2 * labels - 1, outputs)))


ZERO_ONE = (COLUMN > 2).astype(np.float32)


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (COLUMN.astype(np.float64), squares),
        (COLUMN.astype(np.float16), squares),
        (ZERO_ONE.astype(np.uint8), hinge_of_0_and_1),
        (ZERO_ONE.astype(np.uint16), lambda y, out: tf.reduce_mean((tf.cast(0 - y, tf.float32) - out) ** 2)),
        (ZERO_ONE.astype(bool), squares),
    ],
    ids=["float64", "float16", "uint8, where 0 - 1 is 255", "uint16, negated", "bool"],
)
def test_loss_function_gets_the_labels_that_keras_passes(labels, loss):
    data = split(X, labels)
    outcome = train(workload(dense(1), lambda: data, loss=loss, metric="mae", **SHORT))
    assert outcome.row["metric_value"] == pytest.approx(evaluated(data, 1, loss, "mae")[1], rel=1e-3)


class Annealed:
    """A loss that grows with every step."""

    def __init__(self):
        self.steps = tf.Variable(0.0)

    def __call__(self, labels, outputs):
        self.steps.assign_add(1.0)
        return 0.01 * self.steps * tf.reduce_mean((tf.cast(labels, tf.float32) - outputs) ** 2)


@pytest.mark.parametrize(
    "labels", [COLUMN, TARGET, np.round(COLUMN).astype(int)], ids=["(n, 1)", "(n,)", "whole numbers"]
)
def test_loss_that_counts_its_steps_counts_only_those_of_the_training(labels):
    loss = Annealed()
    train(workload(dense(1), lambda: split(X, labels), loss=loss, metric="mae", **SHORT))
    assert loss.steps.numpy() == 20


def ranked(labels, outputs):
    """Compare pairs in a batch, so a single example does not suffice."""
    first, second = tf.unstack(tf.reshape(outputs, (-1, 2)), axis=1)
    larger, smaller = tf.unstack(tf.reshape(labels, (-1, 2)), axis=1)
    return tf.reduce_mean(tf.nn.softplus(-(first - second) * tf.sign(larger - smaller)))


def of_20(labels, outputs):
    """Take only batches of 20, with integer labels."""
    same = tf.matmul(tf.one_hot(labels, 3), tf.one_hot(labels, 3), transpose_b=True)
    return tf.reduce_mean((tf.matmul(outputs, outputs, transpose_b=True) * (1 - tf.eye(20)) - same) ** 2)


def asserting(labels, outputs):
    """Check that outputs are probabilities."""
    tf.debugging.assert_near(tf.reduce_sum(outputs, axis=-1), tf.ones(len(outputs)), atol=1e-3)
    return tf.reduce_mean(-tf.math.log(tf.gather(outputs, labels, batch_dims=1)))


def noisy(labels, outputs):
    noise = tf.random.normal(tf.shape(outputs))
    return keras.losses.sparse_categorical_crossentropy(labels, outputs + noise, from_logits=True)


def without_missing(labels, outputs):
    known = tf.math.is_finite(labels)
    return tf.reduce_mean(tf.where(known, tf.where(known, labels, 0.0) - outputs, 0.0) ** 2)


MISSING = np.where(np.arange(len(X))[:, None] % 5 == 0, np.nan, COLUMN).astype(np.float32)
LATER = Data(X[:160], MISSING[:160], X[160:], COLUMN[160:])


@pytest.mark.parametrize(
    ("data", "outputs", "options"),
    [
        (split(X, COLUMN), 1, {"loss": ranked, "metric": "mae"}),
        (split(X, Y), 3, {"loss": of_20}),
        (split(X, Y), 3, {"loss": asserting}),
        (split(X, Y[:, None]), 3, {"loss": noisy}),
        (LATER, 1, {"loss": without_missing, "metric": "mae"}),
        (split(X, np.stack([Y, Y], 1)), 1, {"loss": lambda y, out: (tf.cast(y[:, :1], tf.float32) - out) ** 2,
                                           "metric": lambda y, out: float(np.mean(out)), **LESS}),
        (split(X, Y), 3, {"loss": lambda y, out: 0.0}),
    ],
    ids=["pairs in a batch", "only batches of 20", "assertions", "random numbers", "missing labels",
         "integers in two columns", "nothing: the model adds its loss"],
)  # fmt: skip
def test_loss_that_a_probe_cannot_run_is_trained(data, outputs, options):
    model = softmax if options["loss"] is asserting else dense(outputs, activity_regularizer="l2")
    outcome = train(workload(model, lambda: data, **options, **SHORT))
    assert (outcome.status, outcome.reason) == ("ok", None)


def test_diverged_training_is_not_an_error_of_a_metric_that_refuses_non_finite_outputs():
    def strict(labels, outputs):  # as in scikit-learn
        if not np.isfinite(outputs).all():
            raise ValueError("Input contains NaN.")
        return np.mean((labels - outputs) ** 2)

    steep = {"optimizer": lambda: keras.optimizers.SGD(1e20), "target": 0.01}
    outcome = train(workload(dense(1), lambda: split(X, COLUMN), loss="mse", metric=strict, **LESS, **SHORT, **steep))
    assert outcome.status == "diverged"
    assert "weights were not finite" in outcome.reason


@pytest.mark.parametrize(
    ("labels", "metric", "message"),
    [
        (np.where(np.arange(240)[:, None] == 200, np.nan, COLUMN), "mae", "1 of the test labels are not finite"),
        (COLUMN, keras.metrics.Mean(name="m"), "averages values and ignores labels"),
        (COLUMN, keras.metrics.Accuracy(name="m"), "to the last bit"),
    ],
    ids=["a missing test label", "a mean of values", "equality of floats"],
)
def test_meaningless_metric_is_refused_before_training(labels, metric, message):
    own = {} if metric == "mae" else {"metric_name": "m", "metric_higher_is_better": True}
    with pytest.raises(ValueError, match=message):
        train(workload(dense(1), lambda: split(X, labels), loss="mse", metric=metric, **own, **SHORT))


def test_score_of_rounded_labels_is_accepted():
    own = {"metric": keras.metrics.F1Score(name="m"), "metric_name": "m", "metric_higher_is_better": True}
    assert train(workload(dense(1), lambda: split(X, np.round(COLUMN)), loss="mse", **own, **SHORT)).status == "ok"


def noisy_model():
    """Return a model that draws random numbers in evaluation too."""

    class Noise(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.generator = keras.random.SeedGenerator(3)

        def call(self, x):
            return x + 0.5 * keras.random.normal(keras.ops.shape(x), dtype=x.dtype, seed=self.generator)

    return keras.Sequential([keras.Input((2,)), Noise(), keras.layers.Dense(1, dtype="float32")])


def stateful_model():
    """Return a model that keeps a state from batch to batch."""
    return keras.Sequential(
        [
            keras.Input(batch_shape=(20, 2)),
            keras.layers.Reshape((2, 1)),
            keras.layers.LSTM(4, stateful=True),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )


@pytest.mark.parametrize("model", [noisy_model, stateful_model])
def test_evaluation_does_not_change_the_training(model):
    data = split(X, COLUMN)
    case = workload(model, lambda: data, loss="mse", metric="mae", target=1e-9, train_steps=20, evaluate_every=5)
    outcome = train(case)
    keras.utils.set_random_seed(0)
    net = by_fit(model, data, "mse", keras.optimizers.SGD(0.1), steps=20, metrics=["mae"])
    assert outcome.row["metric_value"] == pytest.approx(net.evaluate(data.test_x, data.test_y, 20, verbose=0)[1], 1e-4)


class Boosted(keras.optimizers.SGD):
    """An optimizer with a setting that is missing in its config."""

    def __init__(self, learning_rate, boost=1.0, **options):
        super().__init__(learning_rate, **options)
        self.boost = boost

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.boost, variable, learning_rate)


def without_decay():
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=5.0)
    optimizer.exclude_from_weight_decay(var_names=["kernel", "bias"])
    return optimizer


def set_later():
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.clipnorm = 0.01
    return optimizer


@pytest.mark.parametrize("make", [lambda: Boosted(0.05, boost=4.0), without_decay, set_later])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_copy_of_an_optimizer_keeps_settings_missing_in_its_config(make, used):
    optimizer = make()
    if used:
        optimizer.build([keras.Variable(np.zeros(3, np.float32))])
    data = split(X, COLUMN)
    outcome = train(workload(dense(1), lambda: data, optimizer, loss="mse", metric="mae", **SHORT))
    assert outcome.row["metric_value"] == pytest.approx(evaluated(data, 1, "mse", "mae", make())[1], rel=1e-4)


def test_matrix_of_labels_is_a_column():
    """Slices of a np.matrix keep two axes, and would broadcast in the accuracy."""
    plain, matrix = (train(workload(dense(), lambda y=y: split(X, y))) for y in (Y, np.matrix(Y[:, None])))
    assert matrix.row["final_accuracy"] == plain.row["final_accuracy"] > 0.9


def test_model_that_is_built_by_its_first_examples_may_take_text():
    def model():
        layer = keras.layers.TextVectorization(output_mode="multi_hot", vocabulary=["a", "b", "c"])
        return keras.Sequential([layer, keras.layers.Dense(3, dtype="float32")])

    outcome = train(workload(model, lambda: split(np.array(["a b", "c", "b c"])[Y], Y)))
    assert (outcome.status, outcome.row["final_accuracy"]) == ("ok", 1.0)


def test_generalized_cross_entropy_takes_classes_as_in_fit():
    loss = keras.losses.CategoricalGeneralizedCrossEntropy()
    outcome = train(workload(softmax, lambda: split(X, Y), loss=loss))
    data = split(X, Y)
    net = by_fit(softmax, data, loss, keras.optimizers.SGD(0.1))
    right = np.mean(net.predict(data.test_x, verbose=0).argmax(-1) == data.test_y)
    assert outcome.row["final_accuracy"] == pytest.approx(right)


def test_dtype_that_tensorflow_does_not_support_is_refused():
    with pytest.raises(TypeError, match=r"train_x has dtype .*, which TensorFlow does not support"):
        split(X.astype(np.longdouble), Y)


def test_model_with_one_output_per_example_and_no_axis_for_it():
    def model():
        inputs = keras.Input((2,))
        outputs = keras.layers.Dense(1, dtype="float32")(inputs)
        return keras.Model(inputs, keras.layers.Lambda(lambda t: t[:, 0], dtype="float32")(outputs))

    x, y = blobs(classes=2)
    with pytest.raises(ValueError, match="one output per class"):
        train(workload(model, lambda: split(x, y)))
    outcome = train(workload(model, lambda: split(x, y), loss=keras.losses.BinaryCrossentropy(from_logits=True)))
    assert outcome.row["final_accuracy"] > 0.9
    assert train(workload(model, lambda: split(x, y), loss="crossentropy", metric="mae")).status == "ok"


def worst(labels, outputs):
    return tf.reduce_max(tf.abs(labels - outputs))


def by_if(labels, outputs, limit=1.0):
    """The absolute error while an example is far off, then the squared one."""
    if worst(labels, outputs) > limit:
        return tf.reduce_mean(tf.abs(labels - outputs))
    return tf.reduce_mean((labels - outputs) ** 2)


def by_while(labels, outputs):
    scale = tf.constant(1.0)
    while scale < tf.stop_gradient(worst(labels, outputs)):
        scale *= 2.0
    return tf.reduce_mean(tf.abs(labels - outputs)) * scale


class Deciding:
    def __call__(self, labels, outputs):
        return by_if(labels, outputs, limit=0.5)

    def method(self, labels, outputs):
        return by_if(labels, outputs, limit=0.5)


class Calling(keras.losses.Loss):
    """Keras' own ``__call__`` does not convert ``call``; this one replaces it."""

    def __call__(self, labels, outputs, sample_weight=None):
        return by_if(labels, outputs)


def chosen(labels, outputs, limit=1.0):
    far = tf.reduce_mean(tf.abs(labels - outputs))
    return tf.where(worst(labels, outputs) > limit, far, tf.reduce_mean((labels - outputs) ** 2))


def doubled(labels, outputs):
    off = tf.stop_gradient(worst(labels, outputs))
    return tf.reduce_mean(tf.abs(labels - outputs)) * 2.0 ** tf.maximum(
        tf.math.ceil(tf.math.log(off) / np.log(2.0)), 0.0
    )


@pytest.mark.parametrize(
    ("written", "same"),
    [
        (by_if, chosen),
        (functools.partial(by_if, limit=2.0), functools.partial(chosen, limit=2.0)),
        (Deciding(), functools.partial(chosen, limit=0.5)),
        (Deciding().method, functools.partial(chosen, limit=0.5)),
        (Calling(), chosen),
        (by_while, doubled),
    ],
    ids=["if", "partial", "object", "method", "Keras loss", "while"],
)
def test_loss_may_decide_by_tensors_in_python(written, same):
    """AutoGraph converts it, as in a ``tf.function`` of the user's own."""
    data = split(X, COLUMN)
    outcomes = [
        train(workload(LINE, lambda: data, loss=loss, metric="mse", **LESS, **SHORT)) for loss in (written, same)
    ]
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    values = [outcome.row["train_loss_final"] for outcome in outcomes]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
