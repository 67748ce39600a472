"""Training in float8: the same start as every other mode, the same steps as Keras' own fit, and what is refused."""

import dataclasses
import json
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.one_case import blobs, by_fit, dense, split, train, workload

from mpscale.core.mode import MODES
from mpscale.harness.empty_columns import explain
from mpscale.harness.same_start import SameStart
from mpscale.worker import built as worker_built
from mpscale.worker import case as worker_case
from mpscale.worker import described as worker_described
from mpscale.workloads.workload import sparse_cross_entropy

L = keras.layers
DATA = split(*blobs())
SCALED = "mixed-fp8 on float16"
TENSORS = {"inputs", "kernel", "outputs_grad"}


@pytest.fixture(autouse=True, scope="module")
def float8_on_float16():
    """Float8 layers of a mixed_float16 model with a dynamic loss scale, and without one: no mode does this."""
    float8 = dataclasses.replace(MODES["mixed-fp8"], policy="mixed_float16")
    scaled = dataclasses.replace(float8, scaling=MODES["mixed-dynamic"].scaling, name=SCALED)
    with pytest.MonkeyPatch.context() as patch:
        for module in (worker_case, worker_built, worker_described):
            patch.setattr(module, "MODES", {**MODES, SCALED: scaled, "unscaled": float8})
        yield


def head():
    return L.Dense(3, dtype="float32")


def stacked(*layers):
    return keras.Sequential([keras.Input((2,)), *layers, head()])


def attention():
    """Dense, and the EinsumDense of MultiHeadAttention; attention scores are no layer of their own."""
    given = keras.Input((2,))
    tokens = L.Reshape((4, 8))(L.Dense(32)(given))
    tokens = tokens + L.MultiHeadAttention(2, 4)(L.LayerNormalization()(tokens), tokens)
    return keras.Model(given, head()(L.GlobalAveragePooling1D()(tokens)))


def tensors(outcome):
    """{layer: {tensor: {"amax", "scale"}}}, without the names that Keras numbers."""
    return list(json.loads(outcome.row["float8_tensors"]).values())


def amax(outcome):
    return [layer[tensor]["amax"] for layer in tensors(outcome) for tensor in sorted(TENSORS)]


@pytest.fixture(scope="module")
def rows():
    found = {}
    for mode in ("fp32", "mixed-bf16", "mixed-fp8", SCALED):
        keras.utils.clear_session()  # layer names start anew, as in a process of its own
        found[mode] = train(workload(attention, lambda: DATA, train_steps=60), mode, jit=mode == "mixed-fp8")
    return found


def test_every_mode_starts_alike_and_trains_well(rows):
    same = SameStart()
    for mode in ("fp32", "mixed-bf16", "mixed-fp8"):
        outcome = rows[mode]
        assert same.difference(outcome.case, outcome.record) is None
        assert outcome.row["parameters"] == rows["fp32"].row["parameters"]
        assert outcome.row["workload_digest"] == rows["fp32"].row["workload_digest"]
    assert [outcome.status for outcome in rows.values()] == ["ok"] * 4
    assert min(outcome.row["final_accuracy"] for outcome in rows.values()) > 0.9


@pytest.mark.parametrize(
    ("mode", "layers", "products"),
    # Five layers with three products each, without the gradient of the examples; and the two products of the attention.
    [
        ("mixed-fp8", "bfloat16 5, float8 5, float32 1", "float8 14, bfloat16 6, float32 3"),
        (SCALED, "float16 5, float8 5, float32 1", "float8 14, float16 6, float32 3"),
    ],
)
def test_row_tells_which_layers_and_products_are_in_float8(rows, mode, layers, products):
    assert (rows[mode].row["layer_dtypes"], rows[mode].row["product_dtypes"]) == (layers, products)


@pytest.mark.parametrize(("mode", "most"), [("mixed-fp8", 1.0), (SCALED, 65504.0)])
def test_row_has_amax_and_scale_of_each_tensor(rows, mode, most):
    found = tensors(rows[mode])
    assert len(found) == 5
    for layer in found:
        assert layer.keys() == TENSORS
        for tensor, largest in (("inputs", 448.0), ("kernel", 448.0), ("outputs_grad", 57344.0)):
            # The largest magnitude came at least two steps ago, or grows slowly.
            assert layer[tensor]["scale"] == pytest.approx(layer[tensor]["amax"] / largest, rel=0.1)
        assert 0 < layer["outputs_grad"]["amax"] < most


def test_other_modes_say_why_they_have_no_scales(rows):
    record = rows["mixed-bf16"].record
    explain(record, rows["mixed-bf16"].case)
    assert str(record.why_empty("float8_tensors")) == "mixed-bf16 does not compute in float8"


class Derived(L.Dense):
    """Keras quantizes only its own class, unless told otherwise."""


class OwnCall(L.Dense):
    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training=training)


class Calling(keras.Model):
    """A model that calls a layer in its own way."""

    def __init__(self, how, more=False):
        super().__init__()
        self.hidden, self.head, self.how = L.Dense(2, name="it"), head(), how
        self.hidden.build((None, 2))
        self.more = L.Dense(2, name="it") if more else L.Identity()

    def call(self, x):
        return self.head(self.more(self.how(self.hidden, x)))


def looped(layer, x):
    return tf.while_loop(lambda n, _: n < 2, lambda n, y: (n + 1, layer(y)), (0, tf.cast(x, tf.bfloat16)))[1]


@pytest.mark.parametrize(
    ("model", "products"),
    [
        (lambda: stacked(Derived(4)), "float32 3, float8 2"),
        (lambda: stacked(Derived(4), OwnCall(4)), "bfloat16 3, float32 3, float8 2"),
        # Two layers of one name.
        (partial(Calling, lambda layer, x: layer(x), more=True), "float8 5, float32 3"),
        # Without training, a scale would stay what it is in the beginning.
        (lambda: stacked(L.Dense(4, trainable=False), L.Dense(4)), "float32 3, float8 3, bfloat16 2"),
    ],
)
def test_layers_that_float8_cannot_train_stay_in_bfloat16(model, products):
    outcome = train(workload(model, lambda: DATA, train_steps=2), "mixed-fp8")
    assert (outcome.status, outcome.row["product_dtypes"]) == ("ok", products), outcome.reason
    assert len(tensors(outcome)) == outcome.row["layer_dtypes"].count("float8 2") + 1


@pytest.mark.parametrize("mode", ["fp32", "mixed-bf16"])
def test_float8_of_the_workloads_own_is_refused_in_modes_that_promise_another_precision(mode):
    def quantized():
        model = dense()()
        model.layers[0].quantize("float8")
        return model

    outcome = train(workload(quantized, lambda: DATA, train_steps=2), mode)
    assert outcome.status == "invalid"
    assert "2 products in float8 and 1 layer in float8" in outcome.reason


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: stacked(L.Reshape((2, 1)), L.Conv1D(4, 2), L.Flatten()), "1 Conv1D in bfloat16, 1 Dense in float32"),
        (lambda: stacked(L.Dense(4, dtype="float32")), "with weights are 2 Dense in float32"),
        (lambda: stacked(OwnCall(4)), "without a method call of its own"),
        (lambda: stacked(L.Reshape((2, 1)), L.TimeDistributed(L.Dense(4)), L.Flatten()), "outside of TimeDistributed"),
        (lambda: Calling(lambda layer, x: layer(layer(x))), "is called 2 times in a step"),
        (lambda: Calling(lambda layer, x: layer(x, training=False)), "is called with training=False"),
        (lambda: Calling(lambda layer, x: layer.call(x)), "is not called in the train step, or only its method call"),
        (lambda: Calling(looped), "called in a loop, a branch or a function of its own"),
    ],
)
def test_model_that_float8_cannot_train_is_unsupported_and_says_why(model, reason):
    outcome = train(workload(model, lambda: DATA, train_steps=2), "mixed-fp8")
    assert outcome.status == "unsupported"
    assert reason in outcome.reason
    assert "trained" not in outcome.phases


OPTIMIZERS = {
    "clips": lambda: keras.optimizers.Adam(0.01, clipnorm=0.01),
    "decays and accumulates": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, global_clipnorm=0.01, gradient_accumulation_steps=2
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_is_that_of_keras_fit(optimizer):
    ours = train(workload(dense(), lambda: DATA, optimizer, train_steps=20), "mixed-fp8")

    def quantized():
        model = dense()()
        model.layers[0].quantize("float8")
        return model

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        layer = by_fit(quantized, DATA, loss, optimizer(), steps=20).layers[0]
    finally:
        keras.config.set_dtype_policy("float32")
    wanted = [float(np.max(getattr(layer, f"{tensor}_amax_history"))) for tensor in sorted(TENSORS)]
    assert amax(ours) == pytest.approx(wanted, rel=1e-5)


def test_moving_averages_of_weights_are_refused_since_keras_fails_on_them():
    """Keras' own fit ends with an exception."""
    ema = partial(keras.optimizers.SGD, 0.1, use_ema=True)
    outcome = train(workload(dense(), lambda: DATA, ema, train_steps=2), "mixed-fp8")
    assert outcome.status == "unsupported"
    assert "without use_ema" in outcome.reason


def test_neither_evaluation_nor_steps_per_call_changes_scales():
    def found(**options):
        own = {"evaluate_every": options.pop("evaluate_every", 20)}
        return tensors(train(workload(dense(), lambda: DATA, train_steps=20, **own), "mixed-fp8", **options))

    assert found() == found(evaluate_every=2) == found(steps_per_call=5)


def test_skipped_steps_leave_scales_as_they_were():
    models = []

    def kept():
        models.append(dense()())
        return models[0]

    outcome = train(workload(kept, lambda: DATA, train_steps=20), SCALED, dynamic_scale={"initial": 2.0**24})
    assert 0 < outcome.row["overflow_steps"] < 20
    for tensor in TENSORS:
        history = getattr(models[0].layers[0], f"{tensor}_amax_history").numpy()
        assert np.isfinite(history).all()
        assert np.count_nonzero(history) == outcome.row["applied_steps"]


def test_without_a_loss_scale_float16_cannot_hold_the_scales_themselves():
    """Why the mode is based on bfloat16: Keras casts a scale to the policy's precision before it divides by it."""

    def faint(labels, outputs):
        return 1e-4 * sparse_cross_entropy(labels, outputs)

    ended = {
        mode: train(workload(dense(), lambda: DATA, lambda: keras.optimizers.Adam(0.01), loss=faint), mode).status
        for mode in ("mixed-fp8", SCALED, "unscaled")
    }
    assert ended == {"mixed-fp8": "ok", SCALED: "ok", "unscaled": "diverged"}


def test_infinite_input_is_saturated_and_does_not_count_as_an_infinite_weight():
    x, y = blobs()
    x[0] = 3.4e38  # finite in float32, infinite in bfloat16
    data = split(x, y)
    outcome = train(workload(dense(), lambda: data), "mixed-fp8")
    assert outcome.status == "ok", outcome.reason
    assert tensors(outcome)[0]["inputs"]["amax"] == "inf"
