"""class_weight says what Keras' ``fit`` would do silently, or refuses what fit fails at, in words and as early."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.compiled_models import CLASSES, NAMED, WEIGHT, X, classifier, two_by_two, workload
from support.one_case import train

from mpscale.core.processes.events import Remarked
from mpscale.workloads.as_in_fit import class_weight_remarks

ONE_HOT, ALL = np.eye(3, dtype=np.float32)[CLASSES], {0: 1.0, 1: 2.0, 2: 3.0}


@pytest.mark.parametrize(
    ("labels", "weights", "piped", "told"),
    [
        (CLASSES, None, False, []),
        (CLASSES, ALL, False, []),
        (CLASSES[:, None], ALL, True, []),
        (ONE_HOT, ALL, False, []),
        (0.9 * ONE_HOT + 0.1 / 3, ALL, False, []),
        (CLASSES > 0, {0: 1.0, 1: 2.0}, False, []),
        (CLASSES, {1: 2.0}, False, ["leaves out classes 0, 2 in the training data: their examples count as 1"]),
        (CLASSES, {0: 2.0, 1: 1.0}, True, ["leaves out class 2 in the first batches"]),
        (CLASSES, ALL | {7: 1.0}, False, ["has class 7, of which the training data has no example"]),
        (CLASSES, ALL | {7: 1.0}, True, []),
        (np.arange(120), {0: 2.0}, False, ["leaves out classes 1, 2, 3, 4, 5, ..."]),
        (ONE_HOT + np.roll(ONE_HOT, 1, 1), ALL, True, ["are not one-hot: as in fit, the largest entry"]),
        (CLASSES + 0.25, ALL, False, ["are not whole numbers: as in fit, they are rounded"]),
    ],
)
def test_what_fit_does_silently_is_told(labels, weights, piped, told):
    found = class_weight_remarks(labels, weights, piped)
    assert len(found) == len(told)
    assert all(text in remark for text, remark in zip(told, found, strict=True))


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        (CLASSES, {}, "is empty; leave it out"),
        (CLASSES, {0: 0.0, 1: 0}, "0 for every class"),
        (CLASSES, {0: -1.0}, "at least 0, not -1.0"),
        (CLASSES, {0: np.inf}, "at least 0, not inf"),
        (CLASSES, {-1: 1.0}, "has class -1, but the training data has classes 0, 1, 2"),
        (CLASSES, {"cat": 1.0}, "the number of a class, not 'cat'"),
        (CLASSES, {0.0: 1.0}, "the number of a class, not 0.0"),
        (CLASSES, np.ones(3), r"pass dict\(enumerate"),
        (CLASSES, {5: 1.0, 6: 2.0}, "has classes 5, 6, but the training data has classes 0, 1, 2"),
        (ONE_HOT[:, None], ALL, "one class number, or one-hot labels, per example"),
        (CLASSES.astype(str), ALL, "one class number, or one-hot labels, per example"),
        (None, ALL, "one array of labels"),
    ],
)
def test_what_cannot_be_meant_is_refused(labels, weights, message):
    with pytest.raises((TypeError, ValueError), match=message):
        workload(classifier, (X, labels) if labels is not None else X, class_weight=weights).data()


def test_classes_may_be_negative_as_for_a_hinge_loss():
    data = workload(classifier, (X, CLASSES - 1), class_weight={-1: 2.0, 1: 3.0}).data()
    assert {label: set(data.train_weight[label == CLASSES - 1]) for label in (-1, 0, 1)} == {-1: {2}, 0: {1}, 1: {3}}
    unknown = np.where(CLASSES == 0, np.nan, CLASSES - 1)
    assert set(workload(classifier, (X, unknown), class_weight={-1: 2.0, 1: 3.0}).data().train_weight) == {1, 3}


def slices(*parts):
    return lambda: tf.data.Dataset.from_tensor_slices(parts).batch(10)


class Batches(keras.utils.PyDataset):
    def __init__(self, *parts):
        super().__init__()
        self.parts = parts

    def __len__(self):
        return 6

    def __getitem__(self, number):
        return tuple(part[20 * number : 20 * number + 20] for part in self.parts)


LATE = np.where(np.arange(120) < 110, np.minimum(CLASSES, 1), 2)
NAMES = np.array(["cat", "cow", "dog"])[CLASSES]


@pytest.mark.parametrize(
    ("build", "data", "weights", "message"),
    [
        (classifier, slices(X, CLASSES), {0: 1.0, 1: 2.0}, "is 2, and class_weight ends at class 1"),
        (classifier, slices(X, LATE), {0: 1.0, 1: 2.0}, "is 2, and class_weight ends at class 1"),
        (classifier, slices(X, CLASSES - 1), ALL, "is -1, and class_weight ends at class 2"),
        (classifier, slices(X, CLASSES.astype(np.uint8)), ALL, "labels are uint8, .*tf.cast"),
        (classifier, slices(X, CLASSES > 0), ALL, "labels are bool, .*tf.cast"),
        (classifier, slices(X, NAMES), ALL, "are text.*StringLookup"),
        (classifier, slices(X, CLASSES), {-1: 2.0, 1: 1.0}, "keys of class_weight must be class numbers from 0"),
        (classifier, slices(X, CLASSES, WEIGHT), ALL, "multiply them"),
        (two_by_two, slices(*NAMED), ALL, "one array of labels"),
        (classifier, lambda: Batches(X, CLASSES, WEIGHT), ALL, "multiply them"),
        (classifier, lambda: Batches(X, NAMES), None, "train_y of the PyDataset is an array of text"),
        (classifier, lambda: Batches(X.astype(object), CLASSES), None, "train_x of the PyDataset is an array of obj"),
    ],
)
def test_what_fit_fails_at_in_a_pipeline_is_put_into_words(build, data, weights, message):
    with pytest.raises(ValueError, match=message):
        train(workload(build, data, class_weight=weights))


def test_a_pipeline_that_fails_otherwise_says_so_itself():
    def broken():
        return slices(X, CLASSES)().map(lambda x, y: (x, tf.gather([0, 1], y)))

    with pytest.raises(tf.errors.InvalidArgumentError, match="indices"):
        train(workload(classifier, broken, class_weight=ALL))


def test_a_pipeline_of_arrays_is_trained_with_what_it_says_and_a_note():
    outcome = train(workload(classifier, lambda: Batches(X, CLASSES), class_weight={1: 2.0}, train_steps=2))
    assert outcome.status == "ok"
    assert ["leaves out classes 0, 2" in event.text for event in outcome.sent if isinstance(event, Remarked)] == [True]
