"""Workloads that do not train in the mode's precision, or not the same in every mode, are invalid; others are not.

Each case runs as in a worker, but in this process.
"""

from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import run_case

from mpscale import Data, Workload
from mpscale.harness.same_start import SameStart
from mpscale.workloads.workload import sparse_cross_entropy

L = keras.layers
X = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
SLOW = pytest.mark.slow
"""For what another row of the same table finds by the same comparison."""
DATA = Data(X, np.arange(24) % 3, X, np.arange(24) % 3)


@pytest.fixture(autouse=True)
def restored_settings():
    yield
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")
    tf.config.experimental.enable_tensor_float_32_execution(True)
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": False})
    tf.config.optimizer.set_jit(False)
    tf.config.run_functions_eagerly(False)


def trained(mode, same=None, **parts):
    """The record of a case, held against those of the same seed if there are any."""
    defaults = {"model": mlp, "data": lambda: DATA, "optimizer": adam, "batch_size": 6, "train_steps": 2}
    keras.utils.clear_session()  # layer names start anew, as in a process of its own
    outcome = run_case(Workload("it", "", **{**defaults, "evaluate_every": 2, **parts}), mode)
    record = outcome.record
    difference = same.difference(outcome.case, record) if same is not None else None
    if difference is not None:
        record.update({"status": "invalid", "status_reason": difference})
    return record


def sequential(*layers, last=None):
    return keras.Sequential([keras.Input((6,)), *layers, last or L.Dense(3, dtype="float32")])


def mlp(hidden=None, **options):
    return sequential(L.Dense(5, activation="relu", dtype=hidden, **options))


def adam():
    return keras.optimizers.Adam(1e-3)


def under(policy, make=mlp, back=None):
    """A model function that sets the policy itself, as a training script does, and may restore it."""

    def model():
        keras.config.set_dtype_policy(policy)
        made = make()
        if back is not None:
            keras.config.set_dtype_policy(back)
        return made

    return model


def after(act, make):
    """A function of a workload that also does something else."""
    return lambda *given: (act(), make(*given))[1]


@keras.saving.register_keras_serializable()
class CastingDense(L.Layer):
    """A layer under the mode's policy that multiplies in float32 nevertheless."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), initializer="glorot_uniform")

    def call(self, x):
        return tf.matmul(tf.cast(x, tf.float32), tf.cast(self.kernel, tf.float32))


def casting():
    return sequential(CastingDense(), last=L.Activation("linear", dtype="float32"))


def pinned_but_normalised():
    return sequential(L.Dense(5, dtype="float32"), L.LayerNormalization())


class Table(L.Layer):
    """A user's own embedding."""

    def __init__(self, rows, columns):
        super().__init__()
        self.table = self.add_weight(shape=(rows, columns), initializer="uniform")

    def call(self, x):
        return tf.gather(tf.cast(self.table, self.compute_dtype), tf.cast(x, tf.int64) % 9)


def looked_up(table=L.Embedding, **options):
    return sequential(table(9, 4, **options), L.GlobalAveragePooling1D())


def loss_with_a_product(dtype):
    def loss(labels, outputs):
        low = tf.cast(outputs, dtype)
        return sparse_cross_entropy(labels, outputs) + 0.0 * tf.reduce_mean(
            tf.cast(tf.matmul(low, low, transpose_b=True), tf.float32)
        )

    return loss


def halfway(dtype):
    """Between two float32 layers there is one that computes in ``dtype``, without a product."""
    between = L.Lambda(lambda x: tf.cast(tf.nn.gelu(tf.cast(x, dtype)), x.dtype), name="between")
    return sequential(L.Dense(8), between)


rewrite = partial(tf.config.optimizer.set_experimental_options, {"auto_mixed_precision": True})
tf32_on, tf32_off = (partial(tf.config.experimental.enable_tensor_float_32_execution, on) for on in (True, False))
low_policy = partial(keras.config.set_dtype_policy, "mixed_float16")


@pytest.mark.parametrize(
    ("mode", "parts", "found"),
    [
        ("fp32", {"model": under("mixed_float16")}, "float16"),
        pytest.param("graph-rewrite", {"model": under("mixed_float16")}, "float16", marks=SLOW),
        ("fp32", {"model": under("mixed_float16", back="float32")}, "products in float16"),
        ("mixed-dynamic", {"model": under("float32")}, "float32"),
        pytest.param("mixed-static", {"model": under("float32", back="mixed_float16")}, "float32 5", marks=SLOW),
        ("mixed-static", {"model": under("mixed_bfloat16", back="mixed_float16")}, "products in bfloat16"),
        ("mixed-bf16", {"model": lambda: mlp("float32")}, "promises to compute in bfloat16"),
        pytest.param("mixed-keras", {"model": pinned_but_normalised}, "promises to compute in float16", marks=SLOW),
        ("mixed-unscaled", {"model": casting}, "promises to compute in float16"),
        pytest.param("fp32", {"model": lambda: mlp("float16")}, "products in float16", marks=SLOW),
        ("fp32", {"model": lambda: looked_up(dtype="mixed_float16")}, "1 layer in float16 (embedding"),
        ("fp32", {"model": lambda: halfway("float16")}, "/Cast in float16"),
        pytest.param("mixed-bf16", {"model": lambda: halfway("float16")}, "/Cast in float16", marks=SLOW),
        ("fp32", {"model": lambda: mlp("float64")}, "products in float64"),
        ("fp32", {"loss": loss_with_a_product(tf.bfloat16)}, "products in bfloat16"),
        ("fp32", {"optimizer": after(low_policy, adam)}, "dtype policy"),
        ("fp32", {"model": after(lambda: keras.config.set_floatx("float64"), mlp)}, "floatx is float64"),
        ("fp32", {"data": after(lambda: keras.config.set_floatx("float16"), lambda: DATA)}, "floatx is float16"),
        pytest.param("fp32", {"model": after(tf32_on, mlp)}, "TF32 is on, not off", marks=SLOW),
        ("tf32", {"optimizer": after(tf32_off, adam)}, "TF32 is off, not on"),
        ("fp32", {"loss": after(tf32_on, sparse_cross_entropy)}, "TF32 is on, not off"),
        ("fp32", {"model": after(rewrite, mlp)}, "auto_mixed_precision is on, not off"),
        ("fp32", {"model": after(lambda: tf.config.optimizer.set_jit(True), mlp)}, "autoclustering, not off"),
        ("fp32", {"optimizer": after(lambda: tf.config.run_functions_eagerly(True), adam)}, "eagerly is on"),
        (
            "fp32",
            {"metric": after(tf32_on, lambda labels, outputs: 0.5), "metric_name": "accuracy"},
            "after training and timing, TF32 is on",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_row_of_another_precision_than_the_modes_is_invalid(mode, parts, found):
    record = trained(mode, **parts)
    assert record["status"] == "invalid"
    assert found in record["status_reason"]
    assert mode in record["status_reason"]
    if "metric" not in parts:
        assert record["metric_value"] is None


def one_hot():
    """Keras creates its weights only from data, since the output shape of the first layer is unknown before."""
    coded = L.Lambda(lambda x: tf.one_hot(tf.cast(x > 0, tf.int32), 2))
    return sequential(coded, L.Flatten(), L.Dense(4))


def change_settings():
    keras.config.set_dtype_policy("mixed_float16")
    tf32_on()
    rewrite()


def elementwise():
    return sequential(L.PReLU(), last=L.Rescaling(2.0))


@pytest.mark.parametrize(
    ("mode", "parts", "products"),
    [
        ("fp32", {}, "float32 5"),
        ("mixed-static", {}, "float32 3, float16 2"),
        ("mixed-bf16", {"model": lambda: mlp("mixed_bfloat16")}, "float32 3, bfloat16 2"),
        ("mixed-dynamic", {"model": looked_up}, "float32 3"),
        ("mixed-dynamic", {"model": lambda: looked_up(table=Table)}, "float32 3"),
        ("mixed-bf16", {"model": elementwise}, None),
        ("fp32", {"model": elementwise}, None),
        ("fp32", {"data": after(change_settings, lambda: DATA)}, "float32 5"),
        ("mixed-bf16", {"data": lambda: Data(*[a.astype(np.float64) for a in (X, X[:, 0] > 0)] * 2)}, None),
        ("fp32", {"data": lambda: Data(*[a.astype(np.float16) for a in (X, X[:, 0] > 0)] * 2)}, None),
        ("mixed-static", {"model": lambda: halfway("float16")}, "float32 3, float16 2"),
        ("mixed-static", {"model": one_hot}, "float32 3, float16 2"),
        ("graph-rewrite", {}, "float32 5"),
    ],
)
def test_row_of_the_modes_precision_is_valid(mode, parts, products):
    record = trained(mode, **parts)
    assert record["status"] == "ok", record["status_reason"]
    assert record["product_dtypes"] == products or "data" in parts
    assert not tf.config.optimizer.get_experimental_options().get("auto_mixed_precision") or mode == "graph-rewrite"
    assert tf.config.experimental.tensor_float_32_execution_enabled() == (mode != "fp32")


def mixed():
    return keras.config.dtype_policy().name != "float32"


class Bare(keras.Model):
    """A subclassed model without a config: only its code says what it does."""

    def __init__(self, activation=tf.nn.relu, rate=0.1):
        super().__init__()
        self.hidden, self.head, self.drop = L.Dense(5), L.Dense(3, dtype="float32"), L.Dropout(rate)
        self.activation = activation
        self.build((None, 6))

    def build(self, shape):
        self.hidden.build((None, 6))
        self.head.build((None, 5))
        self.built = True

    def call(self, x, training=False):
        return self.head(self.drop(self.activation(self.hidden(x)), training=training))


class Rate(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule without a config."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return tf.cast(self.rate, tf.float32) / (1.0 + tf.cast(step, tf.float32))


def smoothed(labels, outputs):
    hot = tf.one_hot(labels, 3)
    return keras.ops.mean(keras.losses.categorical_crossentropy(hot, outputs, True, 0.1 if mixed() else 0.0))


def with_another_term(labels, outputs):
    return sparse_cross_entropy(labels, outputs) + (1e-3 * tf.reduce_sum(outputs**2) if mixed() else 0.0)


def logits_of_the_mode():
    return sequential(L.Dense(5, activation="relu"), last=L.Dense(3))


def custom_adam(**attributes):
    """An optimizer whose config lacks its settings."""

    class Mine(keras.optimizers.SGD):
        def __init__(self):
            super().__init__(0.1)
            vars(self).update(attributes)

    return Mine()


@pytest.mark.parametrize(
    ("parts", "part"),
    [
        ({"optimizer": lambda: keras.optimizers.Adam(1e-2 if mixed() else 1e-3)}, "learning_rate 0.01, fp32 had 0.001"),
        ({"optimizer": lambda: keras.optimizers.SGD(Rate(0.2 if mixed() else 0.1))}, "learning_rate"),
        ({"optimizer": lambda: keras.optimizers.SGD(lambda: 0.2 if mixed() else 0.1)}, "learning_rate 0.2"),
        pytest.param(
            {"optimizer": lambda: keras.optimizers.Adam(1e-3, clipnorm=1.0 if mixed() else None)},
            "clipnorm 1.0",
            marks=SLOW,
        ),
        ({"optimizer": lambda: (keras.optimizers.SGD if mixed() else keras.optimizers.Adam)(0.1)}, "class"),
        ({"optimizer": lambda: custom_adam(rho=0.2 if mixed() else 0.1)}, "rho 0.2, fp32 had 0.1"),
        ({"model": lambda: mlp(bias_initializer="zeros" if mixed() else keras.initializers.Constant(0.0))}, "model"),
        ({"model": lambda: Bare(tf.nn.tanh if mixed() else tf.nn.relu)}, "Tanh 1, fp32 had none"),
        ({"model": lambda: Bare(rate=0.5 if mixed() else 0.1)}, "model"),
        ({"loss": with_another_term}, "loss ("),
        pytest.param({"loss": smoothed}, "loss (", marks=SLOW),
    ],
)
def test_workload_that_depends_on_the_mode_is_invalid_in_the_second_one(parts, part):
    same = SameStart()
    assert trained("fp32", same, **parts)["status"] == "ok"
    record = trained("mixed-bf16", same, **parts)
    assert record["status"] == "invalid"
    assert part in record["status_reason"]
    assert "not the same training as fp32" in record["status_reason"]


def branched():
    given = keras.Input((6,))
    hidden = L.Dense(6, activation="gelu")(given)
    hidden = L.Lambda(lambda x: x * 0.5)(hidden + given)
    return keras.Model(given, L.Dense(3, dtype="float32")(L.Dropout(0.2)(L.BatchNormalization()(hidden))))


def recurrent_and_attentive():
    given = keras.Input((6,))
    hidden = L.GRU(4, return_sequences=True, dropout=0.1)(L.Reshape((3, 2))(given))
    hidden = L.LayerNormalization()(L.MultiHeadAttention(2, 3, dropout=0.1)(hidden, hidden) + hidden)
    hidden = L.Flatten()(L.SeparableConv1D(4, 2)(hidden))
    return keras.Model(given, L.Dense(3, dtype="float32")(hidden))


def of_keras(labels, outputs):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, outputs)


def drawing_loss(labels, outputs):
    return sparse_cross_entropy(labels, outputs + tf.random.normal(tf.shape(outputs), dtype=outputs.dtype) * 0.01)


@pytest.mark.parametrize(
    "parts",
    [
        {"model": branched},
        {"model": recurrent_and_attentive},
        {"model": Bare, "optimizer": lambda: keras.optimizers.SGD(Rate(0.1))},
        pytest.param({"model": logits_of_the_mode}, marks=pytest.mark.slow),
        {"model": logits_of_the_mode, "loss": of_keras},
        {
            "loss": drawing_loss,
            "optimizer": lambda: keras.optimizers.AdamW(lambda: 1e-3, use_ema=True, clipnorm=1.0),
        },
    ],
)
def test_workload_that_is_the_same_in_every_mode_is_valid(parts):
    same = SameStart()
    for mode in ("fp32", "mixed-dynamic"):
        record = trained(mode, same, **parts)
        assert record["status"] == "ok", record["status_reason"]
