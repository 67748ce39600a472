"""`mpscale lint`: small workloads that have a fault, and what is found in them; the sound ones have none of all."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import Outcome, split, train, workload

from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.lint import Check, Severity, of_cell
from mpscale.worker import linting
from mpscale.worker.lint.data import Arrays, of_host
from mpscale.workloads import Data, Workload, registry

L = keras.layers
CPU = Device("cpu", "CPU")
PROBLEM, CAUTION, NOTE = Severity


@pytest.fixture(autouse=True)
def restored_settings(monkeypatch):
    # No test depends on a timing.
    monkeypatch.setattr(linting, "warm_up", lambda step: 1e-3)
    monkeypatch.setattr(linting, "time_empty_call", lambda step: 1e-4)
    yield
    keras.config.set_dtype_policy("float32")
    tf.config.experimental.enable_tensor_float_32_execution(True)


def lint(monkeypatch, work, mode="mixed-dynamic", jit=False, expected="ok"):
    """The findings of a worker that looks at a workload; how it ended is checked."""
    keras.config.set_dtype_policy("float32")
    monkeypatch.setattr(registry, "get", lambda name, *_: work)
    settings = Settings(jit=jit, train_steps=3, timing_s=0.0, energy_s=0.0, lint=True)
    case = Case("situation:workload", mode, 0, 1, 0, settings)
    outcome = Outcome(case)
    status, reason = linting.lint(case, CPU, outcome)
    assert (status, reason) == (expected, None)
    return of_cell(outcome.row["lint"])


def told(findings):
    return {(finding.check, finding.severity, finding.layers) for finding in findings}


def features(width=8, classes=8, examples=96):
    random = np.random.default_rng(0)
    return random.normal(size=(examples, width)).astype(np.float32), np.arange(examples) % classes


def data(x=None, y=None):
    standard = features()
    return lambda: split(standard[0] if x is None else x, standard[1] if y is None else y)


def net(*layers, shape=(8,), last=lambda: L.Dense(8, dtype="float32", name="last"), dtype=None):
    """A model whose products are nearly all in the hidden layers, which are wide enough for that."""
    hidden = layers or (lambda: L.Dense(128, activation="relu", name="wide"), lambda: L.Dense(128, name="wider"))
    return lambda: keras.Sequential([keras.Input(shape, dtype=dtype), *(make() for make in (*hidden, last))])


def sound(model=None, data=data(), optimizer="sgd", batch_size=24, **options):  # noqa: B008
    return workload(model or net(), data, optimizer, batch_size=batch_size, **options)


def dense(name, units=128, **options):
    return lambda: L.Dense(units, name=name, **options)


def float32(activation):
    return lambda: L.Activation(activation, dtype="float32", name="last")


def convolutions(filters):
    return net(
        lambda: L.Conv1D(filters, 3, name="convolution"),
        lambda: L.Conv1DTranspose(64, 3, name="transposed"),
        lambda: L.BatchNormalization(name="normal"),
        lambda: L.Flatten(),
        *WIDE,
        shape=(8, 8),
    )


WIDE = dense("wide"), dense("wider")
SOUND = {
    "a perceptron": sound(),
    "softmax within the model, and in float32 after a product in float16": sound(
        net(WIDE[0], lambda: L.Softmax(name="within"), WIDE[1], dense("out", 8), last=float32("softmax")),
        loss="sparse_categorical_crossentropy",
    ),
    "convolutions of 8 channels, and normalization of batches without accumulation": sound(
        convolutions(64), data(np.ones((96, 8, 8), np.float32))
    ),
    "categories as integers, and accumulation without normalization of batches": sound(
        net(lambda: L.Embedding(5000, 8, name="table"), lambda: L.Flatten(), *WIDE, dtype="int64"),
        data(np.full((96, 8), 4999)),
        optimizer=lambda: keras.optimizers.SGD(gradient_accumulation_steps=2),
    ),
    "large inputs that are scaled in float32, and a small epsilon for weights in float32": sound(
        net(lambda: L.Rescaling(1e-6, dtype="float32", name="scaling"), *WIDE),
        data(features()[0] * 1e6),
        optimizer=lambda: keras.optimizers.Adam(epsilon=1e-8),
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_found_in_a_sound_workload(name, monkeypatch):
    assert lint(monkeypatch, SOUND[name]) == []


def test_nothing_is_found_in_other_modes_either(monkeypatch):
    for mode in ("fp32", "mixed-bf16", "graph-rewrite"):
        assert lint(monkeypatch, SOUND["a perceptron"], mode) == []


def attending(heads=2, key=9):
    inputs = keras.Input((12, 8))
    x = L.MultiHeadAttention(heads, key, name="attention")(inputs, inputs)
    x = L.Dense(256, name="wide")(L.Flatten()(x))
    return keras.Model(inputs, L.Dense(8, dtype="float32", name="last")(L.Dense(128, name="wider")(x)))


class Wide(L.Layer):
    def call(self, x):
        return tf.cast(tf.sqrt(tf.cast(x, tf.float64) ** 2 + 1), self.compute_dtype)


class FromText(L.Layer):
    """XLA has no kernels for text."""

    def call(self, x):
        return tf.cast(tf.strings.to_number(tf.strings.as_string(tf.cast(x, tf.float32))), x.dtype)


class Twice(L.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.inner = L.Dense(20, name="inner")

    def call(self, x):
        return self.inner(x)


def under(policy, make):
    def model():
        keras.config.set_dtype_policy(policy)
        return make()

    return model


def with_value(value, place=5):
    x = features()[0].copy()
    x[place, 1] = value
    return data(x)


NAN_LABEL = np.where(np.arange(96) == 3, np.nan, 1.0).astype(np.float32)
BEYOND = np.arange(96) % 9
FAULTY = {
    "sizes, the batch, and logits in float16": (
        sound(net(dense("wide", 100), lambda: Twice(name="outer"), last=dense("last", 8)), batch_size=20),
        "mixed-dynamic",
        {
            (Check.DIMENSION, CAUTION, ("wide", "outer/inner", "last")),
            (Check.BATCH_SIZE, CAUTION, ()),
            (Check.HALF_OUTPUT, CAUTION, ("last",)),
        },
    ),
    "features and classes of the data, and logits in bfloat16": (
        sound(net(*WIDE, dense("widest"), shape=(10,), last=dense("last", 7)), data(*features(10, 7))),
        "mixed-bf16",
        {(Check.DIMENSION, NOTE, ("wide", "last")), (Check.HALF_OUTPUT, CAUTION, ("last",))},
    ),
    "units of a recurrent layer": (
        sound(
            net(lambda: L.Bidirectional(L.LSTM(20, name="memory"), name="both"), *WIDE, shape=(6, 8)),
            data(np.ones((96, 6, 8), np.float32)),
        ),
        "mixed-dynamic",
        {(Check.DIMENSION, CAUTION, ("both/forward_memory/lstm_cell", "both/backward_memory/lstm_cell"))},
    ),
    "a model whose only product is in the last layer": (
        sound(net(lambda: L.ReLU(name="first"))),
        "mixed-dynamic",
        {(Check.LAYER_DTYPE, PROBLEM, ("last",)), (Check.MOSTLY_FLOAT32, CAUTION, ("last",))},
    ),
    "a vocabulary": (
        sound(net(dense("wide"), last=dense("last", 1001))),
        "mixed-dynamic",
        {(Check.DIMENSION, CAUTION, ("last",)), (Check.HALF_OUTPUT, CAUTION, ("last",))},
    ),
    "filters and channels": (
        sound(convolutions(30), data(np.ones((96, 8, 8), np.float32))),
        "mixed-dynamic",
        {(Check.DIMENSION, CAUTION, ("convolution", "transposed"))},
    ),
    "softmax in float16, and float64 examples": (
        sound(
            net(*WIDE, last=dense("last", 8, activation="softmax")),
            data(features()[0].astype(float)),
            loss="sparse_categorical_crossentropy",
        ),
        "mixed-dynamic",
        {(Check.HALF_OUTPUT, PROBLEM, ("last",)), (Check.FLOAT64_DATA, CAUTION, ())},
    ),
    "softmax in float16 and then a cast, and pixels as integers": (
        sound(
            net(*WIDE, dense("out", 8, activation="softmax"), last=float32("linear")),
            data(np.ones((96, 8), np.uint8)),
            loss="sparse_categorical_crossentropy",
        ),
        "mixed-dynamic",
        {(Check.HALF_OUTPUT, PROBLEM, ("out",)), (Check.INTEGER_INPUTS, NOTE, ("wide",))},
    ),
    "a large product in float32, and whole numbers that float16 does not have": (
        sound(net(*WIDE, dense("big", 512, dtype="float32")), data(np.full((96, 8), 4999))),
        "mixed-dynamic",
        {
            (Check.MOSTLY_FLOAT32, CAUTION, ("big", "last")),
            (Check.INTEGER_INPUTS, NOTE, ("wide",)),
            (Check.INPUTS_ROUNDED, CAUTION, ("wide",)),
        },
    ),
    "a layer that computes in float64, and normalization of batches under accumulation": (
        sound(
            net(WIDE[0], lambda: L.BatchNormalization(name="normal"), WIDE[1], lambda: Wide(name="precise")),
            optimizer=lambda: keras.optimizers.SGD(gradient_accumulation_steps=2),
        ),
        "mixed-dynamic",
        {(Check.FLOAT64_LAYER, CAUTION, ("precise",)), (Check.BATCH_NORM_ACCUMULATION, CAUTION, ("normal",))},
    ),
    "a layer of dtype float64": (
        sound(net(*WIDE, dense("precise", 16, dtype="float64"))),
        "fp32",
        {(Check.FLOAT64_LAYER, PROBLEM, ("precise",))},
    ),
    "weights and epsilon in float16": (
        sound(net(*WIDE, dense("thin", 16, dtype="float16")), optimizer=lambda: keras.optimizers.Adam(epsilon=1e-8)),
        "mixed-dynamic",
        {(Check.HALF_WEIGHTS, PROBLEM, ("thin",)), (Check.EPSILON, PROBLEM, ("thin",))},
    ),
    "examples that are not finite": (
        sound(net(*WIDE), data=with_value(np.nan, slice(None))),
        "fp32",
        {(Check.INPUTS_NOT_FINITE, PROBLEM, ()), (Check.FIRST_LOSS, PROBLEM, ("wide",))},
    ),
    "an example that float16 cannot hold, and one of the test set that is infinite": (
        sound(data=with_value([1e6, np.inf], [5, -1])),
        "mixed-dynamic",
        {(Check.INPUTS_TOO_LARGE, PROBLEM, ("wide",)), (Check.INPUTS_NOT_FINITE, PROBLEM, ())},
    ),
    "examples that vanish in float16, and labels of the test set beyond the classes": (
        sound(data=data(features()[0] * 1e-9, np.where(np.arange(96) == 95, 8, features()[1]))),
        "mixed-dynamic",
        {(Check.INPUTS_TOO_SMALL, PROBLEM, ("wide",)), (Check.LABELS_OUT_OF_RANGE, PROBLEM, ())},
    ),
    "examples that lose bits in float16": (
        sound(data=data(features()[0] * 1e-6)),
        "mixed-dynamic",
        {(Check.INPUTS_TOO_SMALL, CAUTION, ("wide",))},
    ),
    "labels beyond the classes, and an optimizer with a factor": (
        sound(optimizer=lambda: keras.optimizers.SGD(loss_scale_factor=8.0), data=data(y=BEYOND - 1)),
        "mixed-dynamic",
        {(Check.OPTIMIZER_SCALES, PROBLEM, ()), (Check.LABELS_OUT_OF_RANGE, PROBLEM, ())},
    ),
    "labels that are not finite, and an optimizer that is wrapped": (
        sound(
            optimizer=lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
            data=data(y=NAN_LABEL),
            loss="mse",
            metric="mae",
        ),
        "fp32",
        {(Check.LABELS_NOT_FINITE, PROBLEM, ()), (Check.OPTIMIZER_SCALES, PROBLEM, ())},
    ),
    "labels of another shape": (
        sound(data=data(y=np.ones((96, 3), np.float32)), loss="mse", metric="mae"),
        "fp32",
        {(Check.LABELS_MISFIT, PROBLEM, ())},
    ),
    "labels that are text": (
        sound(data=data(y=np.array(["a", "b"] * 48))),
        "fp32",
        {(Check.LABELS_MISFIT, PROBLEM, ())},
    ),
    "softmax before a loss of logits": (
        sound(net(*WIDE, last=dense("last", 8, activation="softmax", dtype="float32"))),
        "fp32",
        {(Check.SOFTMAX_TWICE, PROBLEM, ())},
    ),
    "two outputs": (
        sound(lambda: keras.Model(x := keras.Input((8,)), [L.Dense(2)(x), L.Dense(2)(x)])),
        "fp32",
        {(Check.OUTPUTS, PROBLEM, ())},
    ),
    "a loss that is not finite": (
        sound(loss=lambda labels, outputs: tf.math.log(-tf.reduce_sum(outputs**2))),
        "fp32",
        {(Check.FIRST_LOSS, PROBLEM, ())},
    ),
    "outputs beyond float16": (
        sound(net(WIDE[0], dense("huge", kernel_initializer=keras.initializers.Constant(3e4)), WIDE[1])),
        "mixed-unscaled",
        {(Check.FIRST_LOSS, PROBLEM, ("huge",))},
    ),
    "a layer with a policy of its own, and a data function that sets the policy": (
        sound(net(WIDE[0], dense("own", dtype="mixed_float16")), data=under("mixed_bfloat16", data())),
        "fp32",
        {(Check.LAYER_DTYPE, PROBLEM, ("own",)), (Check.PROCESS_SETTINGS, CAUTION, ())},
    ),
    "a model function that sets the policy": (
        sound(under("mixed_bfloat16", net())),
        "fp32",
        {(Check.PROCESS_SETTINGS, PROBLEM, ()), (Check.LAYER_DTYPE, PROBLEM, ("wide", "wider"))},
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_found_with_its_layers_and_nothing_else(name, monkeypatch):
    work, mode, expected = FAULTY[name]
    findings = lint(monkeypatch, work, mode)
    assert told(findings) == expected
    assert all(finding.text and finding.cure for finding in findings)


def test_sizes_of_attention_are_found_in_its_layers(monkeypatch):
    (found,) = lint(monkeypatch, sound(attending, data(np.ones((96, 12, 8), np.float32))))
    assert (found.check, found.severity) == (Check.DIMENSION, CAUTION)
    assert {layer.partition("/")[0] for layer in found.layers} == {"attention"}
    assert "9" in found.text


def test_what_xla_refuses_is_named_and_the_rest_is_looked_at(monkeypatch):
    work = sound(net(lambda: FromText(name="texts"), *WIDE), batch_size=20)
    assert told(lint(monkeypatch, work, jit=True)) == {
        (Check.XLA, PROBLEM, ("texts",)),
        (Check.BATCH_SIZE, CAUTION, ()),
    }
    assert told(lint(monkeypatch, work)) == {(Check.BATCH_SIZE, CAUTION, ())}
    (found,) = lint(monkeypatch, compiled(WithText), jit=True)
    assert (found.check, found.severity, found.layers) == (Check.XLA, PROBLEM, ("outer/texts",))
    assert "AsString in layer 'texts' (FromText)" in found.text


def test_an_error_that_xla_is_not_to_blame_for_is_no_finding(monkeypatch):
    class Failing(L.Layer):
        def call(self, x):
            with tf.control_dependencies([tf.debugging.assert_less(x, tf.constant(-1e9, x.dtype))]):
                return tf.identity(x)

    with pytest.raises(tf.errors.OpError):
        lint(monkeypatch, sound(net(*WIDE, lambda: Failing(name="failing"))), "fp32")


@pytest.mark.parametrize(("empty_s", "checks"), [(0.9e-3, [Check.DISPATCH_BOUND]), (0.4e-3, [])])
def test_steps_that_are_mostly_dispatch_are_a_caution(empty_s, checks, monkeypatch):
    monkeypatch.setattr(linting, "time_empty_call", lambda step: empty_s)
    assert [finding.check for finding in lint(monkeypatch, sound())] == checks


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "found"), [("int32", True, 1), ("int32", False, 0), ("int64", True, 0), ("U3", True, 1)]
)
def test_arrays_that_a_gpu_would_read_from_the_host(dtype, on_gpu, found):
    x = np.ones((4, 2)).astype(dtype)
    findings = list(of_host(Arrays(Data(train_x=x, train_y=np.zeros(4))), on_gpu))
    assert [finding.check for finding in findings] == [Check.DATA_ON_HOST] * found


def test_the_first_training_of_a_run_finds_what_needs_no_step(monkeypatch):
    work = sound(net(*WIDE, last=dense("last", 8)), batch_size=20, train_steps=3)
    expected = {(Check.HALF_OUTPUT, CAUTION, ("last",)), (Check.BATCH_SIZE, CAUTION, ())}
    assert told(of_cell(train(work, "mixed-dynamic").row["lint"])) == expected
    assert train(work, "fp32").row["lint"] == "[]"
    assert "lint" not in train(work, "fp32", seed=1).row


def test_a_model_that_cannot_be_looked_at_is_trained_all_the_same(monkeypatch):
    monkeypatch.setattr("mpscale.worker.lint.look.of_outputs", lambda *_: 1 / 0)
    outcome = train(sound(train_steps=3), "fp32")
    assert (outcome.status, "lint" in outcome.row) == ("ok", False)


def test_a_run_looks_at_the_beginning_of_large_data_only(monkeypatch):
    monkeypatch.setattr("mpscale.worker.lint.look.MOST_BYTES", 10 * 8 * 4)
    for place, checks in ((9, [Check.INPUTS_NOT_FINITE]), (10, [])):
        found = of_cell(train(sound(data=with_value(np.nan, place), train_steps=3), "fp32").row["lint"])
        assert [finding.check for finding in found] == checks


def two_inputs(last="softmax"):
    a, b = keras.Input((10,), name="a"), keras.Input((8,), name="b")
    x = L.Concatenate()([L.Dense(100, name="of_a")(a), L.Dense(64, name="of_b")(b)])
    first = L.Dense(8, last, name="first")(x)
    second = L.Dense(1, dtype="float32", name="second")(L.Dense(64, name="wide")(x))
    model = keras.Model({"a": a, "b": b}, {"first": first, "second": second})
    model.compile("sgd", loss={"first": "sparse_categorical_crossentropy", "second": "mse"})
    return model


@pytest.mark.parametrize("piped", [False, True])
def test_a_compiled_model_is_looked_at_with_each_of_its_inputs_and_outputs(piped, monkeypatch):
    a, (b, y) = features(10)[0], features()
    a[3, 2] = np.inf
    examples = {"a": a, "b": np.round(b * 1e4).astype(np.int64)}, {"first": y, "second": np.ones((96, 1))}
    fed = (lambda: tf.data.Dataset.from_tensor_slices(examples).batch(24).repeat()) if piped else examples
    size = {} if piped else {"batch_size": 24}
    work = Workload.from_compiled(two_inputs, name="two", train=fed, train_steps=3, **size)
    findings = [each for each in lint(monkeypatch, work) if each.check is not Check.FIRST_LOSS]
    # Keras' fit, too, makes float32 of arrays once, but not of batches.
    of_batches = {(Check.FLOAT64_DATA, CAUTION, ()), (Check.FIRST_BATCHES, NOTE, ())}
    assert told(findings) == {
        (Check.HALF_OUTPUT, PROBLEM, ("first",)),
        (Check.INPUTS_NOT_FINITE, PROBLEM, ()),
        (Check.INTEGER_INPUTS, NOTE, ("of_b",)),
        (Check.INPUTS_ROUNDED, CAUTION, ("of_b",)),
        (Check.DIMENSION, CAUTION, ("of_a", "wide", "first")),
        *(of_batches if piped else ()),
    }
    if piped:
        keras.config.set_dtype_policy("float32")
        assert told(of_cell(train(work, "mixed-dynamic").row["lint"])) == told(findings)
    looked = "1 of the first 72 examples of train_x['a'] is" if piped else "1 of 96 examples in train_x['a'] is"
    assert looked in next(each.text for each in findings if each.check is Check.INPUTS_NOT_FINITE)


class Own(keras.Model):
    """Its layers are called in ``call`` alone, so it has no list of outputs."""

    def __init__(self, units=8, **options):
        super().__init__(name="own")
        self.first, self.second = WIDE[0](), WIDE[1]()
        self.last = L.Dense(units, name="last", **{"dtype": "float32", **options})

    def call(self, inputs):
        return self.last(self.second(self.first(inputs)))


class WithText(Own):
    def __init__(self):
        super().__init__()
        self.outer = keras.Sequential([FromText(name="texts")], name="outer")

    def call(self, inputs):
        return super().call(self.outer(inputs))


class Steps(Own):
    """Its own train_step, with a loss of its own; ``scaled`` and ``clipped`` say what it does with gradients."""

    scaled, clipped = True, False

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            chosen = tf.one_hot(tf.cast(y, tf.int32), 8)
            loss = -tf.reduce_mean(tf.reduce_sum(chosen * tf.nn.log_softmax(tf.cast(self(x), tf.float32)), -1))
            loss = self.optimizer.scale_loss(loss) if self.scaled else loss
        weights = self.trainable_variables
        gradients = tape.gradient(loss, weights)
        gradients = tf.clip_by_global_norm(gradients, 1.0)[0] if self.clipped else gradients
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"loss": loss}


class TwoInOne(Own):
    """Takes class and quantity from one array of labels, and the class in another shape."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = sparse()(y[:, 0], outputs) + keras.losses.MeanSquaredError()(y[:, 1:], outputs[:, :1])
            loss = self.optimizer.scale_loss(loss)
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


class Flattened(Own):
    """Compares places of sequences one by one."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return sparse()(tf.reshape(y, [-1]), tf.reshape(y_pred, [-1, 8]))


class Parts(keras.Model):
    """Nothing calls it as a whole, as a GAN."""

    def __init__(self):
        super().__init__()
        self.make = L.Dense(64, name="make", kernel_initializer=keras.initializers.Constant(3e4))

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.optimizer.scale_loss(tf.reduce_mean(tf.cast(self.make(data[0]), tf.float32) ** 2))
        self.optimizer.apply_gradients([(tape.gradient(loss, self.make.kernel), self.make.kernel)])
        return {"loss": loss}


class Scaling(keras.optimizers.SGD):
    def scale_loss(self, loss):
        return loss * 8


def sparse(**options):
    return keras.losses.SparseCategoricalCrossentropy(**{"from_logits": True, **options})


def compiled(model=Own, x=None, y=None, weight=(), test=None, loss=None, optimizer="sgd", **attributes):
    def build():
        made = model()
        made.compile(optimizer() if callable(optimizer) else optimizer, loss=loss or sparse())
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    standard = features()
    train = (standard[0] if x is None else x, standard[1] if y is None else y, *weight)
    return Workload.from_compiled(build, name="own", train=train, validation=test, batch_size=24, train_steps=3)


def heads(classes=7):
    """A class and a share for each of 12 places, from a nested structure of examples."""
    images, (count,) = keras.Input((12, 8), name="images"), [keras.Input((8,), name="count")]
    x = L.Concatenate()([L.Flatten()(images), count])
    hidden = L.Dense(128, name="hidden")(L.Dense(256, name="wide")(x))
    of_class = L.Dense(classes, name="of_class")(hidden)
    share = L.Dense(1, "sigmoid", name="share", dtype="float32")(L.Dense(64, name="towards")(hidden))
    return keras.Model({"images": images, "rest": (count,)}, {"kind": of_class, "share": share})


HEADS = {"images": np.ones((96, 12, 8), np.float32), "rest": (np.ones((96, 8), np.float32),)}
OF_HEADS = {"kind": features(classes=7)[1], "share": np.linspace(0, 1.5, 96)}
BOTH = {"kind": "sparse_categorical_crossentropy", "share": "binary_crossentropy"}
COMPILED = {
    "nothing": (compiled(), set()),
    "nothing in a train_step of its own": (compiled(Steps), set()),
    "nothing in an array of labels of which the classes are a column": (
        compiled(TwoInOne, y=np.stack([features()[1], np.full(96, 99)], 1)),
        set(),
    ),
    "class numbers beyond in places of sequences": (
        compiled(Flattened, np.ones((96, 5, 8), np.float32), np.repeat(BEYOND[:, None], 5, 1)),
        {(Check.LABELS_OUT_OF_RANGE, PROBLEM, ())},
    ),
    "softmax in float16 of a class of its own, and labels beyond the classes": (
        compiled(lambda: Own(dtype=None, activation="softmax"), y=BEYOND, loss="sparse_categorical_crossentropy"),
        {(Check.HALF_OUTPUT, PROBLEM, ("last",)), (Check.LABELS_OUT_OF_RANGE, PROBLEM, ())},
    ),
    "labels that are beyond the classes where they are not to be ignored": (
        compiled(y=np.where(BEYOND == 8, -1, BEYOND), loss=sparse(ignore_class=-1)),
        set(),
    ),
    "softmax twice, an optimizer that is wrapped, labels of the test set beyond the classes": (
        compiled(
            lambda: Own(activation="softmax"),
            test=(features()[0], BEYOND),
            optimizer=lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
        ),
        {
            (Check.SOFTMAX_TWICE, PROBLEM, ()),
            (Check.OPTIMIZER_SCALES, NOTE, ()),
            (Check.LABELS_OUT_OF_RANGE, PROBLEM, ()),
        },
    ),
    "an optimizer that scales, and labels that are text": (
        compiled(y=np.array(["a", "b"] * 48), optimizer=Scaling),
        {(Check.OPTIMIZER_SCALES, PROBLEM, ()), (Check.LABELS_MISFIT, PROBLEM, ())},
    ),
    "labels of another shape, and a weight that is not finite": (
        compiled(lambda: Own(1), y=np.ones((96, 8), np.float32), weight=[NAN_LABEL], loss="mse"),
        {
            (Check.LABELS_MISFIT, PROBLEM, ()),
            (Check.LABELS_NOT_FINITE, PROBLEM, ()),
        },
    ),
    "labels that are not finite, for a function": (
        compiled(lambda: Own(1), y=NAN_LABEL, loss=lambda y, outputs: tf.abs(tf.reshape(y, (-1,)) - outputs[:, 0])),
        {(Check.LABELS_NOT_FINITE, PROBLEM, ())},
    ),
    "labels that are text, for a train_step": (
        compiled(Steps, y=np.array(["a", "b"] * 48)),
        {(Check.LABELS_MISFIT, PROBLEM, ())},
    ),
    "a loss that is not scaled": (compiled(Steps, scaled=False), {(Check.TRAIN_STEP, PROBLEM, ())}),
    "gradients that are clipped while scaled": (compiled(Steps, clipped=True), {(Check.TRAIN_STEP, CAUTION, ())}),
    "outputs beyond float16 in a part of a model": (compiled(Parts), {(Check.FIRST_LOSS, PROBLEM, ())}),
    "structures, with labels of one output that are no shares, and classes in another in float16": (
        compiled(heads, HEADS, OF_HEADS, loss=BOTH),
        {
            (Check.LABELS_OUT_OF_RANGE, PROBLEM, ()),
            (Check.HALF_OUTPUT, CAUTION, ("of_class",)),
            (Check.DIMENSION, NOTE, ("of_class",)),
        },
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_fault_of_a_compiled_model_is_found_and_nothing_else(name, monkeypatch):
    work, expected = COMPILED[name]
    findings = lint(monkeypatch, work)
    assert {each for each in told(findings) if each[0] is not Check.FIRST_LOSS or each in expected} == expected
    assert all(finding.text and finding.cure for finding in findings)
