"""Workloads: their data, their fields, and how they are found."""

import subprocess
import sys
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
from support.suite_workloads import fine

import mpscale
from mpscale.workloads import accuracy, builtin, registry


@pytest.fixture(scope="module")
def mnist1d():
    return builtin.load_mnist1d()


def test_mnist1d_test_set_is_large_and_has_new_examples_of_the_same_kind(mnist1d):
    assert (mnist1d.train_x.shape, mnist1d.published_x.shape, mnist1d.test_x.shape) == (
        (4000, 40),
        (1000, 40),
        (10_000, 40),
    )
    assert np.bincount(mnist1d.test_y).tolist() == [1000] * 10
    seen = {row.tobytes() for row in np.concatenate([mnist1d.train_x, mnist1d.published_x])}
    assert not any(row.tobytes() in seen for row in mnist1d.test_x)
    assert mnist1d.test_x.mean() == pytest.approx(0.0, abs=0.02)
    assert mnist1d.test_x.std() == pytest.approx(1.0, abs=0.02)


def test_article_digits_are_those_of_the_rows_at_28_by_28():
    data, rows = builtin.load_digits28(), builtin.load_digit_rows()
    assert data.train_x.shape == (1297, 784)
    assert data.test_x.shape == (500, 784)
    assert np.bincount(data.test_y).tolist() == [50, 51, 49, 51, 50, 51, 50, 50, 48, 50]
    small, large = rows.test_x[:, :8], data.test_x.reshape(-1, 28, 28)
    assert (small.min(), small.max(), large.min(), large.max()) == (0.0, 1.0, 0.0, 1.0)
    # The corners are the only points of both grids.
    np.testing.assert_array_equal(large[:, ::27, ::27], small[:, ::7, ::7])
    np.testing.assert_array_equal(data.test_y, rows.test_y)


# What was trained for results/reference, and what mnist1d and scikit-learn give (selfcheck/workload_data.py).
_DIGESTS = {
    builtin.load_mnist1d: "183d348b4bd27449",
    builtin.load_digits28: "4803ff114760e282",
    builtin.load_digit_rows: "783751173fcba3f3",
    builtin.load_beam: "a049537dd36e3e09",
    builtin.load_diabetes: "e1828dba66eba38a",
}


@pytest.mark.parametrize("load", _DIGESTS, ids=lambda load: load.__name__)
def test_the_data_is_the_same_to_the_last_bit_as_ever(load):
    assert load().digest() == _DIGESTS[load]
    assert {workload.data for workload in builtin.WORKLOADS} == _DIGESTS.keys()


@pytest.mark.parametrize("load", [builtin.load_digits28, builtin.load_beam])
def test_other_data_is_refused(load, monkeypatch):
    """A figure on other data would look right."""
    monkeypatch.setattr(
        builtin, "_stored", lambda name, stored=builtin._stored: {**stored(name), "test_y": np.zeros(500)}
    )
    monkeypatch.setattr(builtin, "_MOST_LOAD_N", 10_001.0)
    with pytest.raises(builtin.OtherData, match=rf"not {_DIGESTS[load]}, .*install mpscale again"):
        load()


@pytest.mark.parametrize(
    ("labels", "outputs", "threshold", "share"),
    [
        ([1, 0], [[0.0, 1.0], [1.0, 0.0]], None, 1.0),
        ([1, 0], [[np.nan, 1.0], [1.0, np.nan]], None, 0.0),
        ([1, 0], [[np.nan, np.nan], [np.nan, np.nan]], None, 0.0),
        ([[0], [1]], [[2.0, 1.0], [2.0, 1.0]], None, 0.5),
        ([[1, 0], [0, 1]], [[2.0, 1.0], [2.0, 1.0]], None, 0.5),
        ([0, 1], [[0.4], [0.4]], 0.0, 0.5),
        ([[0.0], [1.0]], [[0.4], [0.6]], 0.5, 1.0),
        ([0, 1], [0.4, np.nan], 0.5, 0.5),
        ([[0, 1], [1, 1]], [[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 1.0]]], None, 0.75),
        ([[[0], [1]]], [[[2.0, 1.0], [0.0, 1.0]]], None, 1.0),
    ],
)
def test_accuracy_takes_labels_of_every_shape_that_keras_takes_and_never_credits_a_nan(
    labels, outputs, threshold, share
):
    assert accuracy(np.array(labels), np.array(outputs), threshold) == share


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist1d-cn", "did you mean mnist1d-cnn"),
        ("zzz", "the workloads are mnist1d-mlp"),
        ("no_such_module:w", "No module named"),
        ("mpscale.workloads.builtin:NOPE", "has no attribute"),
        ("mpscale.workloads.builtin:load_beam", "is a function, not an mpscale.Workload"),
    ],
)
def test_unknown_names_say_what_there_is(name, message):
    with pytest.raises(registry.UnknownWorkload, match=message):
        registry.get(name)


def test_module_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("def w(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(registry.UnknownWorkload, match=r"SyntaxError.*broken_module\.py"):
        registry.get("broken_module:w")


def test_workload_is_found_by_module_and_attribute():
    assert registry.get("support.suite_workloads:fine") is fine


def nothing():
    """Stands for a function that is never called."""


def test_decorator_makes_a_workload():
    @mpscale.workload("mine", data=nothing, optimizer=nothing, batch_size=7)
    def mine():
        """What mine is.

        And more of it.
        """

    assert (mine.name, mine.summary, mine.batch_size) == ("mine", "What mine is.", 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a--b"}, "single dashes"),
        ({"name": "a/b"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"train_steps": 0}, "train_steps must be at least 1"),
        ({"growth_interval": 0}, "growth_interval must be at least 1"),
        ({"train_steps": 10.0}, "train_steps must be a whole number, not 10.0"),
        ({"batch_size": True}, "batch_size must be a whole number, not True"),
        ({"evaluate_every": "10"}, "evaluate_every must be a whole number, not '10'"),
        ({"target": True}, "target must be a number or None, not True"),
        ({"target": "0.9"}, "target must be a number"),
        ({"target": float("nan")}, "target must be a number"),
        ({"target": 63.0}, "target of an accuracy must be a share from 0 to 1, not 63"),
        ({"margin": "0.01"}, "margin must be a number"),
        ({"margin": -0.01}, "margin must be at least 0"),
        ({"margin": 2}, "margin of an accuracy must be a share from 0 to 1, not 2"),
        ({"metric_name": 5}, "metric_name must be text, not 5"),
        ({"metric_higher_is_better": 0}, "metric_higher_is_better must be True or False, not 0"),
        ({"metric_higher_is_better": False}, "but a higher accuracy is better"),
        ({"metric": "mae", "metric_higher_is_better": True}, "but a lower mae is better"),
        ({"metric": nothing}, "needs a name and a direction"),
        ({"metric": nothing, "metric_name": "f1"}, "does not know if a higher f1 is better"),
        ({"metric": "perplexity"}, "does not know if a higher perplexity is better"),
        ({"metric": "mae", "metric_name": "accuracy"}, "mae is not an accuracy"),
        ({"metric": 0.5}, "metric must be the name of one that Keras knows, a Keras Metric, or a function, not 0.5"),
        ({"loss": None}, "loss must be the name of one"),
        ({"loss": {"a": "mse", "b": "mae"}}, "has one loss, not a dict of them.*from_compiled"),
        ({"metric": ["mae", "mse"]}, "has one metric, not a list of them"),
        ({"optimizer": 1e-3}, "optimizer must be the name of one"),
        ({"model": None}, "model must be a function"),
        ({"data": np.zeros(3)}, "data must be a function"),
        ({"summary": None}, "name and summary must be text"),
    ],
)
def test_workload_with_a_wrong_field_is_refused(options, message):
    fields = {"name": "x", "summary": "", "model": nothing, "data": nothing, "optimizer": nothing, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        mpscale.Workload(**fields)


@pytest.mark.parametrize(
    ("options", "name", "higher", "margin"),
    [
        ({}, "accuracy", True, 0.01),
        ({"metric": "acc", "margin": np.float32(0.25)}, "accuracy", True, 0.25),
        ({"metric": "mae"}, "mae", False, None),
        ({"metric": "AUC", "margin": 0.02}, "AUC", True, 0.02),
        ({"metric": nothing, "metric_name": "f1", "metric_higher_is_better": True}, "f1", True, None),
        ({"metric": nothing, "metric_name": "accuracy"}, "accuracy", True, 0.01),
        ({"metric": "perplexity", "metric_higher_is_better": False}, "perplexity", False, None),
    ],
)
def test_metric_has_the_name_and_the_direction_that_are_known_or_given(options, name, higher, margin):
    workload = mpscale.Workload("x", "", nothing, nothing, nothing, **options)
    assert (workload.metric_name, workload.metric_higher_is_better, workload.margin) == (name, higher, margin)


def test_numbers_of_numpy_become_plain_ones():
    workload = mpscale.Workload("x", "", nothing, nothing, nothing, train_steps=np.int64(7), target=np.float32(0.5))
    assert (type(workload.train_steps), type(workload.target)) == (int, float)


@pytest.mark.parametrize(("higher", "beyond"), [(True, 0.91), (False, 0.89)])
def test_target_is_reached_in_the_metrics_own_direction(higher, beyond):
    options = {"metric": nothing, "metric_name": "m", "metric_higher_is_better": higher}
    workload = mpscale.Workload("x", "", nothing, nothing, nothing, target=0.9, **options)
    assert [workload.reached(value) for value in (beyond, 0.9, 1.8 - beyond)] == [True, True, False]


@pytest.mark.parametrize(
    "arrays",
    [
        {"train_y": np.zeros(3)},
        {"test_y": np.zeros(0)},
        {"published_x": np.zeros((2, 1))},
        {"train_x": np.zeros((0, 1)), "train_y": np.zeros(0)},
    ],
)
def test_data_that_does_not_fit_is_refused(arrays):
    fields = {"train_x": np.zeros((2, 1)), "train_y": np.zeros(2), "test_x": np.zeros((2, 1)), "test_y": np.zeros(2)}
    with pytest.raises(ValueError, match="both need the same number"):
        mpscale.Data(**{**fields, **arrays})


class Dataset:
    """Stands for tf.data.Dataset, whose class lives in a module of TensorFlow's."""

    __module__ = "tensorflow.python.data.ops"


Ragged = type("RaggedTensor", (), {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0.0], [1.0]], "must be a NumPy array, not a list; pass np.asarray"),
        ({"a": [0.0, 1.0]}, r"train_x\['a'\] must be a NumPy array, not a list"),
        ({"a": np.zeros((2, 1)), "b": None}, r"train_x\['b'\] must be a NumPy array, not a NoneType"),
        ({}, "train_x is an empty dict"),
        ((np.zeros((2, 1)), pd.Series([0.0, 1.0])), r"train_x\[1\] must be a NumPy array, not a Series"),
        (np.array([[1], [1, 2]], object), "examples of different length; pad them"),
        (Ragged(), "not a RaggedTensor; pad it to one length"),
        (pd.DataFrame({"a": [0.0, 1.0]}), r"not a DataFrame; pass frame.to_numpy\(dtype='float32'\)"),
        (pd.Series([0.0, 1.0]), "not a Series; pass series.to_numpy"),
        (Dataset(), "not a Dataset; read the data set into arrays"),
        (None, "not a NoneType"),
        (np.float32(1.0), "not a float32"),
        (np.array(1.0), "a single value"),
        (np.array([1, "a"], object), "Python objects \\(int, str\\)"),
        (np.array([None, "a"], object), "Python objects \\(NoneType, str\\)"),
        (np.array([1.5, 2.5], object), "Python objects \\(float\\); pass only numbers, for example train_x.astype"),
        (np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"), "dtype datetime64"),
        (np.zeros(2, complex), "dtype complex128"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "masked array"),
    ],
)
def test_data_that_is_not_an_array_of_numbers_says_what_is_accepted(given, message):
    fields = {"train_y": np.zeros(2), "test_x": np.zeros((2, 1)), "test_y": np.zeros(2)}
    with pytest.raises(TypeError, match=message):
        mpscale.Data(train_x=given, **fields)


def test_test_set_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="as many axes in both"):
        mpscale.Data(np.zeros((2, 3)), np.zeros(2), np.zeros((2, 3, 1)), np.zeros(2))


ONES = np.ones((2, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_x": {"a": ONES, "c": ONES}}, r"test_x has \['a'\], \['c'\], but train_x has \['a'\], \['b'\]"),
        ({"test_x": ONES}, "test_x has one array, but train_x has"),
        ({"test_x": {"a": ONES, "b": ONES[:1]}}, r"test_x\['a'\] has 2 examples and test_x\['b'\] has 1"),
        ({"train_weight": np.ones(3)}, r"train_x\['a'\] has 2 examples and train_weight has 3"),
        ({"test_y": None}, r"test_x\['a'\] has 2 examples and test_y has no"),
        ({"train_y": None}, "test_y has"),
    ],
)
def test_parts_of_a_structure_that_do_not_fit_are_named(fields, message):
    both = {"a": ONES, "b": ONES}
    fields = {"train_x": both, "train_y": (ONES, ONES), "test_x": both, "test_y": (ONES, ONES), **fields}
    with pytest.raises(ValueError, match=message):
        mpscale.Data(**fields)


def test_a_structure_has_a_digest_of_its_arrays_and_their_places():
    point = namedtuple("point", "a b")
    structures = [
        {"a": ONES, "b": 2 * ONES},
        {"a": 2 * ONES, "b": ONES},
        (ONES, 2 * ONES),
        {"a": (ONES,), "b": [2 * ONES]},
        ONES,
    ]
    digests = [mpscale.Data(structure, ONES).digest() for structure in structures]
    assert len(set(digests)) == len(digests)
    assert digests[0] == mpscale.Data({"b": 2 * ONES, "a": ONES}, ONES).digest()
    data = mpscale.Data(point(ONES, 2 * ONES), None)
    assert (type(data.train_x), data.examples, data.more_than_plain) == (point, 2, ["train_x is a point of [0], [1]"])


def build_it():
    """A small model."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"build": 3}, "build must be a function"),
        ({"build": lambda: None}, "give the workload one: name="),
        ({"train": None}, "train must be data as in Keras' fit"),
        ({"class_weight": [1.0]}, "class_weight must be a dictionary"),
        ({"class_weight": {"cat": 1.0}}, "must be the number of a class, not 'cat'"),
        ({"class_weight": {0: -1.0}}, "class_weight of class 0 must be a number of at least 0"),
        ({"callbacks": []}, "callbacks must be a function that makes them"),
        ({"metric": len, "validation": ONES}, "metric must be the name of a metric that the model is compiled with"),
        ({"metric": "mae"}, "metric is about the result on validation data"),
        ({"target": 0.9}, "target is about the result on validation data"),
        ({"synthetic": True, "validation": ONES}, "nothing can be learned from synthetic inputs"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 1"),
        ({"margin": -1, "validation": ONES}, "margin must be at least 0"),
        ({"metric_higher_is_better": 1, "validation": ONES}, "must be True or False, not 1"),
    ],
)
def test_a_compiled_workload_with_a_wrong_argument_is_refused(options, message):
    options = {"build": build_it, "train": (ONES, ONES), **options}
    with pytest.raises((TypeError, ValueError), match=message):
        mpscale.Workload.from_compiled(options.pop("build"), **options)


def test_a_compiled_workload_is_named_after_its_function_and_takes_what_fit_takes():
    """Data, or a function that returns it; class weights by number, or by the largest entry of one-hot labels."""
    workload = mpscale.Workload.from_compiled(build_it, train=lambda: (ONES, np.array([0, 1])), class_weight={1: 3})
    assert (workload.name, workload.summary, workload.batch_size, workload.train_steps) == (
        *("build-it", "A small model."),
        *(32, 2000),
    )
    assert workload.data().train_weight.tolist() == [1.0, 3.0]
    for labels in (np.array([[0], [1]]), np.eye(2)):
        found = mpscale.Workload.from_compiled(build_it, train=(ONES, labels), class_weight={1: 3}).data()
        assert found.train_weight.tolist() == [1.0, 3.0]
    alone = mpscale.Workload.from_compiled(build_it, train={"a": ONES}, validation={"a": ONES}).data()
    assert (alone.train_y, alone.test_y, list(alone.test_x)) == (None, None, ["a"])


@pytest.mark.parametrize("kind", [str, bytes])
def test_equal_text_has_an_equal_digest_whatever_objects_hold_it(kind):
    """As pandas returns it: each value is a Python object, at a different address in every process."""

    def digest(text):
        words = np.array([kind(f"{text} {n}", "utf-8") if kind is bytes else f"{text} {n}" for n in range(3)], object)
        return mpscale.Data(words, np.arange(3), words, np.arange(3)).digest()

    assert digest("word") == digest("word")
    assert digest("word") != digest("word ")


def test_names_are_listed_without_tensorflow():
    code = "import sys; from mpscale.workloads import registry; registry.offered(); print('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
