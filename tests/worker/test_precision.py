"""The precision of a train step, and the settings of the process that decide it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.core.device import Device
from mpscale.core.mode import MODES
from mpscale.core.reason import Code
from mpscale.worker.model import described_object, digest, model_description, without_precision
from mpscale.worker.objective import NotedLoss
from mpscale.worker.precision import Arithmetic, Precision
from mpscale.workloads.workload import sparse_cross_entropy

L = keras.layers
CPU, GPU = Device("cpu", "a CPU"), Device("gpu", "a GPU", compute_capability=(8, 0))


@pytest.fixture(autouse=True)
def restored_settings():
    yield
    keras.config.set_dtype_policy("float32")
    tf.config.experimental.enable_tensor_float_32_execution(True)


def gradients(layers, shape, policy):
    """The precision of a model whose loss is the sum of its outputs."""
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential([keras.Input(shape), *layers()])

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(model(x, training=True), tf.float32))
        return tape.gradient(loss, model.trainable_variables)

    return Precision(model, step.get_concrete_function(tf.TensorSpec((2, *shape))).graph)


@pytest.mark.parametrize(
    ("layers", "shape", "products", "of_them"),
    # One product forward and two backward each, except for the gradient of the examples.
    [
        (lambda: [L.Dense(2), L.Dense(2)], (3,), 5, 2),
        (lambda: [L.Conv1D(2, 3), L.SeparableConv1D(2, 2)], (8, 2), 9, 2),
        (lambda: [L.Conv2D(2, 3), L.DepthwiseConv2D(2), L.Conv2DTranspose(2, 2)], (8, 8, 1), 9, 3),
        (lambda: [L.Conv3D(2, 2)], (3, 3, 3, 1), 3, 1),
        (lambda: [L.EinsumDense("ab,bc->ac", output_shape=2)], (3,), 2, 1),
        (lambda: [L.SimpleRNN(2, unroll=True), L.BatchNormalization(), L.Dropout(0.5)], (2, 3), None, 3),
    ],
)
def test_products_are_counted_forward_and_backward_by_dtype(layers, shape, products, of_them):
    kinds = set()
    for policy, dtype in (("float32", "float32"), ("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16")):
        precision = gradients(layers, shape, policy)
        assert list(precision.products) == list(precision.layers) == [dtype]
        assert precision.layers[dtype] == of_them
        assert products is None or precision.products[dtype] == products
        found = precision.columns()
        assert not found.unavailable
        kinds.add(found.values["step_operations"])
    assert len(kinds) == 1


def test_products_in_nested_functions_and_branches_count():
    class Nested(L.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(3, 3))

        @tf.function
        def inner(self, x):
            return tf.cond(tf.reduce_sum(x) > 0, lambda: x @ tf.cast(self.kernel, tf.float16), lambda: x)

        def call(self, x):
            return self.inner(tf.cast(x, tf.float16))

    precision = gradients(lambda: [Nested()], (3,), "float32")
    assert set(precision.products) == {"float16"}
    assert "products in float16" in precision.objection(MODES["fp32"])


def test_model_without_products_has_a_reason_and_no_number():
    found = gradients(lambda: [L.PReLU()], (3,), "float32").columns()
    assert "product_dtypes" not in found.values
    assert found.unavailable["product_dtypes"].code is Code.NOT_IN_WORKLOAD


@pytest.mark.parametrize(
    ("variable", "value", "mode", "device", "found"),
    [
        ("NVIDIA_TF32_OVERRIDE", "1", "fp32", GPU, "NVIDIA_TF32_OVERRIDE is 1, not 0"),
        ("NVIDIA_TF32_OVERRIDE", "0", "tf32", GPU, "NVIDIA_TF32_OVERRIDE is 0, not 1"),
        ("NVIDIA_TF32_OVERRIDE", "0", "fp32", GPU, None),
        ("NVIDIA_TF32_OVERRIDE", "0", "mixed-bf16", GPU, None),
        ("NVIDIA_TF32_OVERRIDE", "1", "fp32", CPU, None),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "bf16", "fp32", CPU, "ONEDNN_DEFAULT_FPMATH_MODE is BF16"),
        ("TF_SET_ONEDNN_FPMATH_MODE", "BF16", "fp32", CPU, "TF_SET_ONEDNN_FPMATH_MODE is BF16"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT", "fp32", CPU, None),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "mixed-bf16", CPU, "--xla_cpu_enable_fast_math=true"),
        ("XLA_FLAGS", "--xla_gpu_cuda_data_dir=/usr/local/cuda", "fp32", GPU, None),
        ("TF_XLA_FLAGS", "--tf_xla_auto_jit=2", "fp32", CPU, "--tf_xla_auto_jit=2"),
    ],
)
def test_variables_of_the_environment_that_decide_the_precision(monkeypatch, variable, value, mode, device, found):
    monkeypatch.setenv(variable, value)
    arithmetic = Arithmetic(MODES[mode], device, jit=True)
    arithmetic.settle()
    arithmetic.look("the import of the workload")
    assert arithmetic.objection is None if found is None else found in arithmetic.objection
    assert (f"{variable}={value}" in arithmetic.column()) == ("XLA" in variable)


def test_first_change_is_reported():
    arithmetic = Arithmetic(MODES["fp32"], CPU, jit=True)
    arithmetic.settle()
    keras.config.set_dtype_policy("mixed_float16")
    arithmetic.look("the model function")
    keras.config.set_dtype_policy("float32")
    arithmetic.look("the optimizer function")
    assert "after the model function" in arithmetic.objection


def noted(loss, outputs):
    loss = NotedLoss(loss)
    tf.function(loss).get_concrete_function(tf.constant([0, 1, 2]), tf.TensorSpec((3, 4), outputs))
    return loss.columns(np.array([0, 1, 2]))


def test_probe_of_a_loss_is_its_value_on_outputs_that_are_exact_in_every_precision():
    found = noted(sparse_cross_entropy, tf.float32)
    outputs = np.random.default_rng(17).integers(1, 64, (3, 4)) / 64.0
    assert found.values["loss_probe"] == pytest.approx(
        np.mean(np.log(np.exp(outputs).sum(axis=1)) - outputs[range(3), range(3)]), rel=1e-5
    )
    assert not found.unavailable
    for dtype in (tf.float16, tf.bfloat16):
        assert noted(sparse_cross_entropy, dtype) == found


LOSSES = {
    "float16": (lambda y, o: tf.reduce_mean(tf.cast(tf.cast(o, tf.float16) ** 2, tf.float32)), Code.NOT_COMPARABLE),
    "random": (lambda y, o: tf.reduce_mean(o + tf.random.normal((3, 4))), Code.NOT_COMPARABLE),
    "not finite": (lambda y, o: tf.reduce_mean(tf.math.log(o - 1.0)), Code.NOT_FINITE),
    "Python": (lambda y, o: tf.py_function(float, [1.0], tf.float32), Code.NOT_COMPARABLE),
}


@pytest.mark.parametrize(("loss", "code"), LOSSES.values(), ids=LOSSES)
def test_loss_that_cannot_be_compared_has_a_reason(loss, code):
    found = noted(loss, tf.float32)
    assert "loss_probe" not in found.values
    assert found.unavailable["loss_probe"].code is code


def test_description_contains_no_name_address_or_dtype():
    def make(policy):
        keras.config.set_dtype_policy(policy)
        given = keras.Input((4,))
        hidden = L.BatchNormalization()(L.Dense(4, activation=lambda x: x)(given)) + L.Lambda(lambda x: 2 * x)(given)
        return digest(model_description(keras.Model(given, hidden)))

    assert len({make(policy) for policy in ("float32", "mixed_float16", "mixed_bfloat16")}) == 1
    assert described_object(object()) == described_object(object())


def test_lambdas_that_differ_have_different_digests():
    first, same, other = (
        digest(without_precision(L.Lambda(function).get_config()))
        for function in (lambda x: 2 * x, lambda x: 2 * x, lambda x: 3 * x)
    )
    assert first == same != other
