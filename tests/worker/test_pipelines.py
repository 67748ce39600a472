"""Workloads whose data is a pipeline: what is trained, what is refused, and what is recorded."""

import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import blobs, dense, train, workload

import mpscale
from mpscale.harness.same_start import SameStart

X, Y = blobs()


def dataset(start=0, stop=160, batch=24):
    return tf.data.Dataset.from_tensor_slices((X[start:stop], Y[start:stop])).batch(batch)


def shuffled():
    return tf.data.Dataset.from_tensor_slices((X[:160], Y[:160])).shuffle(160).batch(24)


def held_out():
    return dataset(160, 240)


MODEL = dense()


def fed(training=shuffled, test=held_out, model=MODEL, **options):
    """A workload of a pipeline; ``options`` are those of Pipeline."""
    return workload(model, lambda: mpscale.Pipeline(training, test, **options), train_steps=20)


def compiled():
    def build():
        net = MODEL()
        net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        return net

    return build


class Batches(keras.utils.PyDataset):
    def __init__(self, **options):
        super().__init__(**options)

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return X[number * 20 : (number + 1) * 20], Y[number * 20 : (number + 1) * 20]


class Losses(keras.callbacks.Callback):
    """The loss of each step; fit reports the mean over the examples since the epoch began."""

    def __init__(self):
        super().__init__()
        self.each = []

    def on_epoch_begin(self, epoch, logs=None):
        self._total = self._examples = 0.0

    def on_train_batch_end(self, batch, logs=None):
        before, examples = self._total, 24 if batch < 6 else 16
        self._examples += examples
        self._total = logs["loss"] * self._examples
        self.each.append((self._total - before) / examples)


def in_one_order():
    """Seven batches, the last one incomplete, in the same order in every epoch."""
    examples = tf.data.Dataset.from_tensor_slices((X[:160], Y[:160]))
    return examples.shuffle(160, seed=5, reshuffle_each_iteration=False).batch(24)


@pytest.mark.parametrize(
    ("class_weight", "as_arrays"), [(None, False), ({0: 3.0, 1: 0.5, 2: 1.0}, True)], ids=["", "class_weight"]
)
def test_a_compiled_model_trains_as_by_fit(class_weight, as_arrays):
    validation = (X[160:], Y[160:]) if as_arrays else held_out
    options = {"train": in_one_order, "validation": validation, "train_steps": 14, "class_weight": class_weight}
    found = train(mpscale.Workload.from_compiled(compiled(), **options))
    keras.utils.set_random_seed(0)
    net, losses = compiled()(), Losses()
    net.fit(in_one_order(), epochs=2, class_weight=class_weight, verbose=0, callbacks=[losses])
    expected = net.evaluate(held_out(), verbose=0, return_dict=True)["accuracy"]
    assert found.status == "ok"
    assert found.row["train_loss_first"] == pytest.approx(losses.each[0], rel=1e-5)
    assert found.row["train_loss_final"] == pytest.approx(np.mean(losses.each), rel=1e-4)
    assert (found.row["metric_name"], found.row["test_examples"]) == ("accuracy", 80)
    assert found.row["metric_value"] == pytest.approx(expected)


def with_two_inputs():
    given = {name: keras.Input((2,), name=name) for name in "ab"}
    hidden = keras.layers.Dense(8)(keras.layers.Concatenate()(list(given.values())))
    outputs = {
        name: keras.layers.Dense(size, dtype="float32", name=name)(hidden) for name, size in {"c": 3, "r": 1}.items()
    }
    return keras.Model(given, outputs), {"c": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "r": "mse"}


def of_text():
    words = keras.layers.TextVectorization(output_sequence_length=4, vocabulary=["a", "b", "c"])
    embedded = keras.layers.Embedding(8, 4), keras.layers.GlobalAveragePooling1D()
    outputs = keras.layers.Dense(3), keras.layers.Activation("linear", dtype="float32")
    model = keras.Sequential([keras.Input((), dtype="string"), words, *embedded, *outputs])
    return model, keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Autoencoder(keras.Model):
    def __init__(self):
        super().__init__()
        self.coder = keras.layers.Dense(2)

    def call(self, x):
        self.add_loss(tf.reduce_mean((tf.cast(self.coder(x), tf.float32) - tf.cast(x, tf.float32)) ** 2))
        return self.coder(x)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (with_two_inputs, ({"a": X, "b": X}, {"c": Y, "r": X[:, :1]})),
        (of_text, (np.array(["a b", "b c", "c a"])[Y], Y)),
        (lambda: (Autoencoder(), None), (X,)),
        (lambda: (MODEL(), "sparse_categorical_crossentropy"), (X.astype(np.float64), Y, X[:, 0] ** 2)),
    ],
    ids=["two inputs and outputs", "text", "x alone", "float64 and weights"],
)
def test_a_compiled_model_takes_batches_of_any_structure(make, parts):
    def build():
        model, loss = make()
        model.compile("sgd", loss)
        return model

    def batches():
        return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).shuffle(9).batch(24)

    options = {"name": "any", "train": batches, "validation": batches, "train_steps": 6}
    found = train(mpscale.Workload.from_compiled(build, **options), "mixed-dynamic")
    assert (found.status, found.row["metric_name"], found.row["test_examples"]) == ("ok", "val_loss", 240)
    assert np.isfinite(found.row["metric_value"])


def test_arrays_with_a_pipeline_for_validation():
    given = mpscale.Workload.from_compiled(compiled(), train=(X[:160], Y[:160]), validation=held_out, train_steps=10)
    row = train(given).row
    assert (row["input_kind"], row["test_examples"]) == ("arrays", 80)


def test_modes_see_the_same_batches_and_an_own_loss_and_metric_work():
    rows = [train(fed(), mode) for mode in ("fp32", "mixed-dynamic")]
    assert [row.status for row in rows] == ["ok", "ok"]
    digests = [[row.row[f"{what}_digest"] for what in ("data", "first_batches", "data_order")] for row in rows]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3
    row = rows[0].row
    assert (row["input_kind"], row["input_passes"], row["input_shapes"]) == ("tf.data", "same", 2)
    # Seven batches an epoch, the last of which has 16 examples and is trained as in fit.
    assert row["input_batches"] == "float32 (24, 2), int64 (24,) x18; float32 (16, 2), int64 (16,) x2"
    assert (row["batch_size"], row["test_examples"], row["attempted_steps"]) == (24, 80, 20)
    assert row["metric_value"] > 0.8
    other = train(fed(), seed=1).row
    assert other["data_order_digest"] != row["data_order_digest"]
    assert other["workload_digest"] == row["workload_digest"]


def test_arrays_and_a_pipeline_of_the_same_batches_train_the_same():
    data = mpscale.Data(X[:160], Y[:160], X[160:], Y[160:])
    by_arrays = train(workload(dense(), lambda: data, train_steps=20)).row
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(160) for _ in range(3)])

    def same_order():
        return tf.data.Dataset.from_tensor_slices((X[order], Y[order])).batch(20)

    found = train(fed(same_order)).row
    for name in ("train_loss_first", "train_loss_final", "metric_value"):
        assert found[name] == pytest.approx(by_arrays[name], rel=1e-5), name
    assert by_arrays["input_kind"] == "arrays"


def noise_layer():
    noise = keras.layers.GaussianNoise(0.1)
    return dataset().map(lambda x, y: (noise(x, training=True), y))


@pytest.mark.parametrize(
    "make",
    [
        lambda: dataset().shuffle(50, seed=3),
        lambda: dataset().shuffle(50).repeat(),
        lambda: dataset().map(lambda x, y: (x + tf.random.normal(tf.shape(x)), y)),
        noise_layer,
        Batches,
        lambda: Batches(workers=2),
    ],
    ids=["seeded", "endless", "stateful noise", "layer", "PyDataset", "workers"],
)
def test_what_is_made_under_the_seed_repeats_itself(make):
    rows = [train(fed(make), mode).row for mode in ("fp32", "mixed-bf16")]
    assert {row["input_passes"] for row in rows} == {"same"}
    assert len({row["data_order_digest"] for row in rows}) == 1


def noisy():
    def examples():
        random = np.random.default_rng()
        for start in range(0, 160, 20):
            yield X[start : start + 20] + random.normal(size=(20, 2)).astype(np.float32), Y[start : start + 20]

    spec = tf.TensorSpec((None, 2), tf.float32), tf.TensorSpec((None,), tf.int64)
    return tf.data.Dataset.from_generator(examples, output_signature=spec)


class Unseeded(Batches):
    def __getitem__(self, number):
        x, y = super().__getitem__(number)
        return x[np.random.default_rng().permutation(20)], y


@pytest.mark.parametrize("make", [noisy, Unseeded, lambda: dataset().shuffle(8, seed=time.time_ns())])
def test_a_pipeline_that_differs_from_pass_to_pass_is_refused_or_allowed(make):
    with pytest.raises(ValueError, match=r"gives other batches when it is made again.*deterministic=False"):
        train(fed(make))
    rows = [train(fed(make, deterministic=False), mode) for mode in ("fp32", "mixed-bf16")]
    assert [row.row["input_passes"] for row in rows] == ["differ", "differ"]
    assert rows[0].row["data_order_digest"] != rows[1].row["data_order_digest"]
    same = SameStart()
    assert [same.difference(row.case, row.record) for row in rows] == [None, None]


def test_one_object_that_reshuffles_is_found_by_its_digest():
    """A second pass of a dataset is its second epoch, so only processes can show whether it repeats itself."""
    one = shuffled()
    rows = [train(fed(one), mode) for mode in ("fp32", "mixed-bf16")]
    assert rows[0].row["input_passes"] == "reshuffled"
    same = SameStart()
    first, second = (same.difference(row.case, row.record) for row in rows)
    assert first is None
    assert "first batches of the pipeline" in second
    assert "Pipeline(train=function)" in second


MODULE = """
import keras
import mpscale
import tensorflow as tf
from test_pipelines import MODEL, compiled, held_out, shuffled

train = shuffled()
workload = mpscale.Workload.from_compiled(compiled(), train=train, validation=held_out, train_steps=16)
"""


def test_an_object_that_a_module_makes_repeats_itself_in_every_process(tmp_path, monkeypatch):
    """The module is imported anew in each process, under a seed."""
    (tmp_path / "made_at_import.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    rows = []
    for mode in ("fp32", "mixed-bf16"):
        monkeypatch.delitem(sys.modules, "made_at_import", raising=False)
        rows.append(train("made_at_import:workload", mode))
    assert [row.row["input_passes"] for row in rows] == ["reshuffled", "reshuffled"]
    same = SameStart()
    assert [same.difference(row.case, row.record) for row in rows] == [None, None]


def ragged():
    rows = tf.ragged.constant([[1.0], [1.0, 2.0]])
    return tf.data.Dataset.from_tensors((rows, tf.constant([0, 1])))


def sparse():
    return tf.data.Dataset.from_tensors((tf.sparse.from_dense([[1.0, 2.0]]), tf.constant([0])))


def used_up():
    examples = iter([(X[:20], Y[:20])] * 8)
    spec = tf.TensorSpec((None, 2), tf.float32), tf.TensorSpec((None,), tf.int64)
    return tf.data.Dataset.from_generator(lambda: examples, output_signature=spec)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: dataset().unbatch(), {}, r"not batched.*add \.batch"),
        (lambda: tf.data.Dataset.from_tensor_slices((X, X[:, :1])), {}, r"not batched.*\(2,\) and \(1,\)"),
        (ragged, {}, "ragged tensors.*padded_batch"),
        (sparse, {}, "sparse tensors.*to_dense"),
        (lambda: dataset().take(0), {}, "the train pipeline is empty"),
        (used_up, {}, "train pipeline"),
        (lambda: (X, Y), {}, "must return a tf.data.Dataset.*not a tuple.*mpscale.Data"),
        (shuffled, {"test": lambda: held_out().repeat()}, "test pipeline is endless.*test_steps"),
        (shuffled, {"test": lambda: held_out().take(0)}, "the test pipeline is empty"),
        (lambda: dataset().map(lambda x, y: (x, y, tf.ones(tf.shape(y)))), {}, "compile"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_training(make, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(fed(make, **options))


@pytest.mark.parametrize("given", [X, (X, Y), range(3), iter([1]), None, 3])
def test_a_part_must_be_a_pipeline(given):
    with pytest.raises(TypeError, match=r"must be a tf\.data\.Dataset or a keras.utils.PyDataset"):
        mpscale.Pipeline(given)


@pytest.mark.parametrize(
    "settings", [{"batch_size": 8}, {"steps_per_call": 4}, {"batch_size": 500, "repeat_data": True}]
)
def test_options_that_need_arrays_are_refused(settings):
    with pytest.raises(ValueError, match="has a pipeline, which batches its data itself"):
        train(fed(), **settings)


def test_a_part_of_an_endless_held_out():
    assert train(fed(test=lambda: held_out().repeat(), test_steps=2)).row["test_examples"] == 48


@pytest.mark.parametrize("as_object", [False, True], ids=["function", "object"])
def test_how_often_a_mode_was_evaluated_does_not_count(as_object):
    """A mode that reaches its target early goes through a shuffled test set less often."""

    def shuffled_test():
        return tf.data.Dataset.from_tensor_slices((X[160:], Y[160:])).shuffle(80, seed=1).batch(24)

    digests = set()
    for target in (0.0, 1.0):
        test = shuffled_test() if as_object else shuffled_test
        options = {"train_steps": 20, "evaluate_every": 5, "target": target}
        row = train(workload(MODEL, lambda test=test: mpscale.Pipeline(shuffled, test), **options)).row
        digests.add(row["data_order_digest"])
    assert len(digests) == 1


def test_another_test_set_is_noticed():
    rows = [train(fed(test=lambda start=start: dataset(start, 240))).row for start in (160, 170)]
    assert rows[0]["data_order_digest"] != rows[1]["data_order_digest"]


def test_batches_of_several_lengths_are_counted():
    """Each length is compiled by itself, and FLOPs differ from step to step."""

    def lengths():
        parts = [X[:24].repeat(length, axis=0).reshape(24, length, 2) for length in (1, 2, 3)]
        sets = [tf.data.Dataset.from_tensors((part, Y[:24])) for part in parts]
        return sets[0].concatenate(sets[1]).concatenate(sets[2])

    def model():
        pooled = keras.layers.GlobalAveragePooling1D()
        return keras.Sequential([keras.Input((None, 2)), keras.layers.Dense(8), pooled, keras.layers.Dense(3)])

    found = train(fed(lengths, lengths, model), timing_s=0.05, timing_blocks=2)
    assert found.row["input_shapes"] == 3
    assert found.row["test_examples"] == 72
    assert "several shapes" in found.missed["flops_per_step"].text
    # Whole rounds over the eight batches that are held.
    assert found.row["timed_steps"] % 8 == 0


def test_a_slow_pipeline_shows_in_the_step_time_with_input_alone():
    def slow():
        def wait(x, y):
            time.sleep(0.05)
            return x, y

        def waiting(x, y):
            x_, y_ = tf.numpy_function(wait, [x, y], [tf.float32, tf.int64])
            return tf.ensure_shape(x_, (24, 2)), tf.ensure_shape(y_, (24,))

        return dataset(stop=144).map(waiting)

    found = train(fed(slow), timing_s=0.05, timing_blocks=2).row
    # A sleep is never shorter, so this holds on a busy machine, too.
    assert found["step_time_ms_with_input"] > 40
    shares = 1 - found["step_time_ms_median"] / found["step_time_ms_with_input"]
    assert found["input_wait_share"] == pytest.approx(max(shares, 0))
    assert found["examples_per_s"] == pytest.approx(24e3 / found["step_time_ms_median"])


def test_a_pipeline_that_fails_after_the_training_loses_nothing_else():
    def once():
        # Enough for the training, and made anew for each pass before it; it cannot begin again.
        examples = iter([(X[:20], Y[:20])] * 20)
        spec = tf.TensorSpec((None, 2), tf.float32), tf.TensorSpec((None,), tf.int64)
        return tf.data.Dataset.from_generator(lambda: examples, output_signature=spec)

    found = train(fed(once), timing_s=0.05, timing_blocks=2)
    assert found.status == "ok"
    assert found.row["step_time_ms_median"] > 0
    assert "used up" in found.missed["step_time_ms_with_input"].text


def test_a_training_that_ends_early_has_no_digest_of_all_batches():
    def explodes():
        return dataset().map(lambda x, y: (x * 1e30, y))

    options = {"loss": "mse", "metric": None, "evaluate_every": 10}
    found = train(workload(dense(1), lambda: mpscale.Pipeline(explodes), lambda: keras.optimizers.SGD(1e3), **options))
    assert found.status == "diverged"
    assert "ended after" in found.missed["data_order_digest"].text
    assert found.row["first_batches_digest"].startswith("sha256:")


def test_augmentation_in_the_pipeline_is_the_same_in_every_mode():
    """It is made before the mode sets its dtype policy, which would make images of a layer float16."""
    images = np.random.default_rng(0).uniform(size=(48, 8, 8, 3)).astype(np.float32)

    def augmented():
        augment = keras.Sequential([keras.layers.RandomFlip(), keras.layers.RandomContrast(0.2)])
        sets = tf.data.Dataset.from_tensor_slices((images, Y[:48])).batch(16)
        return sets.map(lambda x, y: (augment(x, training=True), y))

    def model():
        dense = keras.layers.Dense(3), keras.layers.Activation("linear", dtype="float32")
        return keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), *dense])

    rows = [train(fed(augmented, augmented, model), mode) for mode in ("fp32", "mixed-dynamic")]
    assert [row.status for row in rows] == ["ok", "ok"]
    assert len({row.row["data_order_digest"] for row in rows}) == 1


def test_a_probe_takes_its_batches_from_the_pipeline():
    assert train(fed(), looks=2).status == "ok"
