"""Labels, losses and metrics as people have them give the right value, or a message before the training."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import Outcome, blobs, by_fit, dense, split, train, workload

from mpscale.workloads import Data, accuracy

X, Y = blobs()
ONE_HOT = np.eye(3, dtype=np.float32)[Y]
BINARY_X, BINARY_Y = blobs(classes=2)
TARGET = (0.5 * X[:, 0] - 0.25 * X[:, 1] + 2.0).astype(np.float32)


def ending_in(activation, outputs):
    layer = functools.partial(keras.layers.Dense, outputs, activation=activation, dtype="float32")
    return lambda: keras.Sequential([keras.Input((2,)), layer()])


sigmoid_model, softmax_model = ending_in("sigmoid", 1), ending_in("softmax", 3)
DENSE = dense()
FITTED = {}


def fitted(data, model, loss):
    """A training by Keras' own fit, done once for the same labels in whatever shape."""
    key = (model, loss, float(data.train_y.sum()))
    if key not in FITTED:
        FITTED[key] = by_fit(model, data, loss, keras.optimizers.SGD(0.1))
    return FITTED[key]


def accuracy_by_hand(data, model, loss, kind):
    net = fitted(data, model, loss)
    outputs, labels = net.predict(data.test_x, verbose=0), data.test_y.reshape(len(data.test_y), -1)
    if kind != "classes":
        return float(np.mean((outputs > {"one logit": 0.0, "one probability": 0.5}[kind]) == labels))
    classes = labels.argmax(-1) if labels.shape[1] > 1 else labels[:, 0]
    return float(np.mean(outputs.argmax(-1) == classes))


SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Weighted:
    """A loss that is an instance with state."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, labels, outputs):
        return self.weight * tf.nn.sparse_softmax_cross_entropy_with_logits(labels, outputs)


def logistic(labels, outputs):
    """Written by hand, for labels of any shape."""
    return tf.reduce_mean(
        tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(tf.reshape(labels, (-1, 1)), tf.float32), outputs)
    )


@pytest.mark.parametrize(
    ("x", "y", "model", "options", "keras_loss", "kind"),
    [
        pytest.param(X, Y, DENSE, {}, SPARSE, "classes", id="labels (n,)"),
        pytest.param(X, Y[:, None], DENSE, {}, SPARSE, "classes", id="labels (n, 1), as keras.datasets gives them"),
        pytest.param(X, Y[:, None].astype(np.uint8), DENSE, {}, SPARSE, "classes", id="labels (n, 1) of uint8"),
        pytest.param(X, Y.astype(np.float32), DENSE, {}, SPARSE, "classes", id="labels that are whole floats"),
        pytest.param(
            X, ONE_HOT, DENSE, {"loss": keras.losses.CategoricalCrossentropy(from_logits=True)},
            keras.losses.CategoricalCrossentropy(from_logits=True), "classes", id="one-hot labels and a loss object",
        ),
        pytest.param(
            X, ONE_HOT, softmax_model, {"loss": "categorical_crossentropy"}, "categorical_crossentropy", "classes",
            id="one-hot labels, a softmax and a loss by name",
        ),
        pytest.param(
            X, Y, softmax_model, {"loss": "sparse_categorical_crossentropy"}, "sparse_categorical_crossentropy",
            "classes", id="a softmax and a loss by name",
        ),
        pytest.param(
            X, Y, DENSE, {"loss": lambda y, out: keras.losses.sparse_categorical_crossentropy(y, out, True)}, SPARSE,
            "classes", id="a loss of each example",
        ),
        pytest.param(
            X, Y, DENSE,
            {"loss": functools.partial(keras.losses.sparse_categorical_crossentropy, from_logits=True)}, SPARSE,
            "classes", id="a partial of a loss of Keras",
        ),
        pytest.param(X, Y, DENSE, {"loss": Weighted(1.0)}, SPARSE, "classes", id="an instance that can be called"),
        pytest.param(
            X, Y, DENSE, {"loss": keras.losses.SparseCategoricalCrossentropy},
            "sparse_categorical_crossentropy", "classes", id="a class of Keras, as it is without arguments",
        ),
        pytest.param(
            BINARY_X, BINARY_Y, dense(1), {"loss": keras.losses.BinaryCrossentropy(from_logits=True)},
            keras.losses.BinaryCrossentropy(from_logits=True), "one logit", id="one logit, labels (n,)",
        ),
        pytest.param(
            BINARY_X, BINARY_Y[:, None].astype(np.float32), dense(1), {"loss": logistic},
            keras.losses.BinaryCrossentropy(from_logits=True), "one logit", id="one logit, a loss by hand",
        ),
        pytest.param(
            BINARY_X, BINARY_Y == 1, sigmoid_model, {"loss": "binary_crossentropy"}, "binary_crossentropy",
            "one probability", id="a sigmoid and binary cross-entropy, labels of bool",
        ),
        pytest.param(
            BINARY_X, BINARY_Y, sigmoid_model, {"loss": "mse"}, "mse", "one probability",
            id="a sigmoid and a squared error",
        ),
        pytest.param(
            BINARY_X, BINARY_Y, dense(1), {"loss": "hinge"}, "hinge", "one logit", id="a hinge loss, labels 0 and 1",
        ),
    ],
)  # fmt: skip
def test_accuracy_is_that_of_keras_own_fit(x, y, model, options, keras_loss, kind):
    data = split(x, y)
    outcome = train(workload(model, lambda: data, **options))
    assert (outcome.status, outcome.reason) == ("ok", None)
    expected = accuracy_by_hand(data, model, keras_loss, kind)
    assert expected > 0.6
    assert outcome.row["final_accuracy"] == pytest.approx(expected, abs=0.013)  # one example of 80


COLUMN = TARGET[:, None]


def mean_absolute_error(labels, outputs):
    return np.mean(np.abs(labels - outputs))


def root_mean_squared_error(labels, outputs):
    return np.sqrt(np.mean((labels - outputs) ** 2))


MAE, RMSE = mean_absolute_error, root_mean_squared_error
LINE = dense(1)


@pytest.mark.parametrize(
    ("labels", "loss", "metric", "expected"),
    [
        pytest.param(TARGET, "mse", "mae", MAE, id="names"),
        pytest.param(COLUMN, "mse", keras.metrics.MeanAbsoluteError(), MAE, id="labels (n, 1) and a metric object"),
        pytest.param(TARGET, lambda y, out: tf.square(y - out), "mae", MAE, id="a loss that would broadcast"),
        pytest.param(
            TARGET, lambda y, out: tf.reduce_mean(tf.square(y - out[:, 0])), "mae", MAE,
            id="a loss that minds the shapes itself",
        ),
        pytest.param(
            COLUMN, lambda y, out: (y[:, 0] - out[:, 0]) ** 2, "mae", MAE, id="a loss that takes columns of both"
        ),
        pytest.param(TARGET, "mse", keras.metrics.RootMeanSquaredError, RMSE, id="a metric class"),
        pytest.param(
            TARGET, keras.losses.MeanSquaredError(), lambda y, out: np.mean(np.abs(y - out)), MAE,
            id="a metric that would broadcast",
        ),
        pytest.param(
            TARGET, "mse", lambda y, out: np.mean(np.abs(y - out[:, 0])), MAE, id="a metric that minds the shapes"
        ),
        pytest.param(TARGET, "mse", lambda y, out: np.abs(y - out[:, 0]), MAE, id="a metric of each example"),
        pytest.param(TARGET, "mse", keras.losses.mean_absolute_error, MAE, id="a metric that is a function of Keras"),
        pytest.param(
            np.round(2 * TARGET).astype(int), lambda y, out: tf.square(y - out), "mae", MAE,
            id="whole labels, which Keras hands to a loss as floats",
        ),
    ],
)  # fmt: skip
def test_error_of_a_regression_is_that_of_keras_own_fit(labels, loss, metric, expected):
    """Whatever the shapes: (n,) and (n, 1) would broadcast to a matrix of every label against every output."""
    data = split(X, labels)
    options = {"metric_name": "error", "metric_higher_is_better": False}
    outcome = train(workload(LINE, lambda: data, loss=loss, metric=metric, **options))
    assert (outcome.status, outcome.reason) == ("ok", None)
    net = fitted(data, LINE, "mse")
    right = expected(data.test_y.reshape(-1, 1), net.predict(data.test_x, verbose=0))
    assert right < 0.5 * np.std(data.test_y)
    assert outcome.row["metric_value"] == pytest.approx(right, rel=1e-3)
    assert "final_accuracy" not in outcome.row


LOGITS = keras.losses.BinaryCrossentropy(from_logits=True)
CATEGORICAL = keras.losses.CategoricalCrossentropy(from_logits=True)
TWO_LABELS = (ONE_HOT + ONE_HOT[:, ::-1] > 0).astype(np.float32)
OWN = {"metric_name": "m", "metric_higher_is_better": True}
REFUSED = {
    "one-hot labels under the default loss": (ONE_HOT, dense(), {}, "takes class numbers"),
    "classes from 1": (Y + 1, dense(), {}, "range from 1 to 3, but a model with 3 outputs has classes 0 to 2"),
    "a class of -1": (Y - 1, dense(), {}, "range from -1 to 1"),
    "classes that are fractions": (Y / 4, dense(), {}, "range from 0 to 0.5"),
    "a regression under the default loss": (TARGET, dense(1), {}, "if this is not such a classification"),
    "a regression under the default metric": (TARGET, dense(1), {"loss": "mse"}, "needs labels 0 and 1"),
    "one logit under the default loss": (BINARY_Y, dense(1), {}, "BinaryCrossentropy"),
    "a softmax under a loss that takes logits": (Y, softmax_model, {}, "ends in a softmax"),
    "a sigmoid under a loss that takes logits": (
        BINARY_Y, sigmoid_model, {"loss": LOGITS}, "ends in a sigmoid",
    ),
    "a softmax under a loss of one-hot labels that takes logits": (
        ONE_HOT, softmax_model, {"loss": CATEGORICAL}, "such as loss='categorical_crossentropy'",
    ),
    "a sigmoid under logits by hand": (BINARY_Y, sigmoid_model, {"loss": logistic}, "threshold"),
    "classes for a loss of one-hot labels": (
        Y, dense(), {"loss": "categorical_crossentropy"}, "use its 'sparse' relative",
    ),
    "labels that are text": (Y.astype(str), dense(), {}, "labels are text"),
    "labels with a NaN": (np.where(Y == 0, np.nan, Y), dense(), {}, "not finite"),
    "two targets and one output": (np.stack([Y, Y], 1), dense(1), {"loss": "mse"}, "do not fit outputs"),
    "several labels an example": (TWO_LABELS, dense(), {"loss": LOGITS}, "BinaryAccuracy"),
    "a loss that is no float": (Y, dense(), {"loss": lambda y, out: tf.argmax(out, -1)}, "int64"),
    "a loss that Keras does not know": (Y, dense(), {"loss": "mean_square_error"}, "Keras knows no loss called"),
    "a loss without reduction": (
        ONE_HOT, dense(), {"loss": keras.losses.CategoricalCrossentropy(reduction=None)}, "reduction=None",
    ),
    "a metric that Keras does not know": (Y, dense(), {"metric": "maee", **OWN}, "Keras knows no metric called"),
    "a metric that is an array": (Y, dense(), {"metric": lambda y, out: out[:2], **OWN}, "one number"),
    "a metric without a return": (Y, dense(), {"metric": lambda y, out: None, **OWN}, "returned None; it must return"),
    "a metric with a gap": (Y, dense(), {"metric": lambda y, out: [None] * len(y), **OWN}, "returned list; it must"),
    "a metric that is a text": (Y, dense(), {"metric": lambda y, out: "nan", **OWN}, "returned str; it must return"),
    "a metric of complex numbers": (
        Y, dense(), {"metric": lambda y, out: np.full(len(y), 1j), **OWN}, "returned ndarray; it must return",
    ),
    "an accuracy in percent": (
        Y, dense(), {"metric": lambda y, out: 99.8, "metric_name": "accuracy"}, "returned 99.8; return a share",
    ),
    "a sparse metric on one-hot labels": (
        ONE_HOT, dense(), {"loss": CATEGORICAL, "metric": keras.metrics.SparseCategoricalAccuracy()},
        "takes class numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("labels", "model", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_the_training(labels, model, options, message):
    with pytest.raises(ValueError, match=message):
        train(workload(model, lambda: split(X, labels), **options))


@pytest.mark.parametrize(
    "metric",
    [
        keras.metrics.SparseCategoricalAccuracy(),
        keras.metrics.SparseCategoricalAccuracy(name="hits"),
        "sparse_categorical_accuracy",
        "accuracy",
        keras.metrics.sparse_categorical_accuracy,
        lambda y, out: float(np.mean(out.argmax(-1) == y)),
    ],
    ids=["an object", "an object with a name", "a name", "accuracy", "a function of Keras", "a function by hand"],
)
def test_metric_does_not_remember_earlier_evaluations(metric):
    """With a target the metric is computed on the way too; the final one is of the final weights only."""
    data = split(X, Y[:, None])
    options = {} if not callable(metric) or isinstance(metric, keras.metrics.Metric) else {"metric_name": "accuracy"}
    outcome = train(workload(DENSE, lambda: data, metric=metric, target=1.0, evaluate_every=5, **options))
    right = accuracy(data.test_y, fitted(data, DENSE, SPARSE).predict(data.test_x, verbose=0))
    assert outcome.row["metric_value"] == outcome.row["final_accuracy"] == pytest.approx(right, abs=0.013)


def test_metric_is_reported_before_the_published_set_is_evaluated(monkeypatch):
    """A case that dies later keeps it."""
    events = []
    monkeypatch.setattr(Outcome, "values", lambda self, values: events.extend(values))
    data = Data(X[:160], Y[:160], X[160:], Y[160:], X[:7], Y[:7])
    train(workload(dense(), lambda: data, metric=lambda y, out: events.append(len(y)) or 0.5, **OWN))
    assert events.index("metric_value") < max(place for place, event in enumerate(events) if event == 7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e130])
def test_metric_that_is_not_finite_is_a_diverged_training(value):
    outcome = train(workload(dense(), lambda: split(X, Y), metric=lambda y, out: value, **OWN))
    assert outcome.status == "diverged"
    assert f"the m on the test set was {value}" in outcome.reason
