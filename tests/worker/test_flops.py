"""FLOPs of train steps: against numbers worked out by hand, TensorFlow's own statistics and the literature."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from mpscale.core.case import Settings
from mpscale.core.mode import MODES
from mpscale.core.reason import Code
from mpscale.worker.batches import Batches
from mpscale.worker.float8 import Float8
from mpscale.worker.flops import flops_of
from mpscale.worker.scaler import StepScaler, scaler_for
from mpscale.worker.step import TrainStep
from mpscale.worker.update import Update

BATCH = 2


def mean_square(labels, outputs):
    return tf.reduce_mean(tf.square(tf.cast(outputs, tf.float32)))


def step_graph(model, x, scaler=None):
    batches = Batches((x, np.zeros(len(x), np.float32)), np.arange(len(x))[None])
    update = Update(model, scaler or StepScaler(keras.optimizers.SGD(0.1)), mean_square)
    return TrainStep(update, batches, jit=False).graph


def counted(stack, shape, dtype=np.float32):
    model = keras.Sequential([keras.Input(shape, dtype=np.dtype(dtype).name), *stack])
    return flops_of(step_graph(model, np.zeros((BATCH, *shape), dtype)))


# Multiply-adds per example: forward, and for each gradient (of the weights, of the inputs) as many again. Nothing needs
# the gradient of the first layer's inputs, so what comes first counts 2, and what comes later 3.
BY_HAND = {
    "dense": (lambda: [layers.Dense(5), layers.Dense(3)], (4,), 2 * 4 * 5 + 3 * 5 * 3),
    "dense over time": (lambda: [layers.Dense(5)], (7, 4), 2 * 7 * 4 * 5),
    "convolution of 9 in steps of 2, padded": (
        lambda: [layers.Conv1D(8, 3, strides=2, padding="same")],
        (9, 4),
        2 * 5 * 8 * (3 * 4),
    ),
    "convolution without padding": (
        lambda: [layers.Conv2D(6, (3, 2), strides=(2, 1))],
        (9, 8, 4),
        2 * (4 * 7) * 6 * (3 * 2 * 4),
    ),
    "two convolutions": (
        lambda: [layers.Conv2D(4, 1), layers.Conv2D(5, 3, strides=2, padding="same")],
        (8, 8, 3),
        2 * (8 * 8) * 4 * 3 + 3 * (4 * 4) * 5 * (3 * 3 * 4),
    ),
    "channels first": (
        lambda: [layers.Conv2D(6, 3, data_format="channels_first")],
        (4, 9, 8),
        2 * (7 * 6) * 6 * (3 * 3 * 4),
    ),
    "dilated": (lambda: [layers.Conv2D(5, 3, dilation_rate=2)], (9, 9, 4), 2 * (5 * 5) * 5 * (3 * 3 * 4)),
    "in groups": (lambda: [layers.Conv2D(8, 3, groups=2)], (9, 9, 4), 2 * (7 * 7) * 8 * (3 * 3 * 2)),
    "in groups, second": (
        lambda: [layers.Conv2D(4, 1), layers.Conv2D(8, 3, groups=2)],
        (9, 9, 4),
        2 * (9 * 9) * 4 * 4 + 3 * (7 * 7) * 8 * (3 * 3 * 2),
    ),
    "depthwise": (lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2)], (9, 9, 4), 2 * (7 * 7) * 8 * (3 * 3)),
    "separable": (
        lambda: [layers.Conv2D(4, 1), layers.SeparableConv2D(6, 3, depth_multiplier=2)],
        (9, 9, 3),
        2 * (9 * 9) * 4 * 3 + 3 * (7 * 7) * (8 * 3 * 3 + 6 * 8),
    ),
    # Every input is spread over a window of the outputs.
    "transposed": (lambda: [layers.Conv2DTranspose(5, 3, strides=2)], (4, 6, 2), 2 * (4 * 6) * 2 * (3 * 3 * 5)),
    "three dimensions": (lambda: [layers.Conv3D(4, 2)], (5, 5, 5, 3), 2 * (4 * 4 * 4) * 4 * (2 * 2 * 2 * 3)),
    "einsum": (lambda: [layers.EinsumDense("abc,cde->abde", (None, 5, 2))], (7, 4), 2 * 7 * 4 * (5 * 2)),
    # Queries, keys and values; scores and sums of two heads; the output.
    "attention": (
        lambda: [layers.Dense(4), SelfAttention()],
        (7, 3),
        2 * 7 * 3 * 4 + 3 * (3 * 7 * 4 * (2 * 3) + 2 * 2 * (7 * 7 * 3) + 7 * (2 * 3) * 4),
    ),
    "no products in these": (
        lambda: [layers.Dense(4), layers.LayerNormalization(), layers.BatchNormalization(), layers.Softmax()],
        (3,),
        2 * 3 * 4,
    ),
    # For each of 7 points in time: inputs and state, to 1, 3 or 4 gates.
    "simple recurrent": (lambda: [layers.SimpleRNN(6)], (7, 4), 7 * 6 * (2 * 4 + 3 * 6)),
    "GRU": (lambda: [layers.GRU(6)], (7, 4), 7 * 3 * 6 * (2 * 4 + 3 * 6)),
    "GRU, unrolled": (lambda: [layers.GRU(6, unroll=True)], (7, 4), 3 * 6 * (7 * 2 * 4 + 7 * 2 * 6 + 6 * 6)),
    "GRU with a mask": (lambda: [layers.Masking(), layers.GRU(6)], (7, 4), 7 * 3 * 6 * (2 * 4 + 3 * 6)),
    "two LSTMs": (
        lambda: [layers.LSTM(6, return_sequences=True), layers.LSTM(5)],
        (7, 4),
        7 * 4 * 6 * (2 * 4 + 3 * 6) + 7 * 4 * 5 * (3 * 6 + 3 * 5),
    ),
    "both directions": (lambda: [layers.Bidirectional(layers.LSTM(6))], (7, 4), 2 * 7 * 4 * 6 * (2 * 4 + 3 * 6)),
}


class SelfAttention(layers.Layer):
    """Two heads of width 3."""

    def build(self, shape):
        self.attention = layers.MultiHeadAttention(2, 3)
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


@pytest.mark.parametrize("name", BY_HAND)
def test_flops_are_those_worked_out_by_hand(name):
    stack, shape, multiply_adds = BY_HAND[name]
    assert counted(stack(), shape) == 2 * BATCH * multiply_adds


def test_a_table_that_is_looked_up_multiplies_nothing():
    found = counted([layers.Embedding(11, 4), layers.Dense(3)], (7,), np.int32)
    assert found == 2 * BATCH * 3 * 7 * 4 * 3


class Calls(layers.Layer):
    """Calls a function of its inputs and of a weight (4, 4)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def build(self, shape):
        self.weight = self.add_weight(shape=(4, 4))

    def call(self, x):
        return self.function(x, tf.convert_to_tensor(self.weight))


def times(x, weight):
    return x @ weight


def until_large(x, weight):
    return tf.while_loop(lambda y: tf.reduce_sum(y) < 9.0, lambda y: y @ weight, [x])[0]


def three_times(x, weight):
    return tf.while_loop(lambda i, y: i <= 4, lambda i, y: (i + 2, y @ weight), [0, x])[1]


def if_large(then, otherwise):
    return lambda x, w: tf.cond(tf.reduce_sum(x) > 1.0, lambda: then(x, w), lambda: otherwise(x, w))


def beside(x, weight):
    tf.linalg.matmul(x, x, transpose_a=True)  # nobody uses it
    return x @ weight


def beside_in_a_function(x, weight):
    return tf.function(lambda y, w, unused: (y @ w, 2 * unused))(x, weight, tf.stop_gradient(x @ weight))[0]


ONE = 2 * BATCH * 4 * 4
"""A product with the weight."""


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (times, 2),
        (beside, 2),
        (beside_in_a_function, 2),
        (three_times, 3 + 2 * 3),
        (lambda x, w: tf.function(times)(x, w), 2),
        (if_large(times, lambda x, w: (2 * x) @ w), 2),
        (lambda x, w: tf.einsum("...i,...i->...i", x, x) @ w, 2),
    ],
    ids=[
        "product",
        "an unused one beside it",
        "an unused argument",
        "a loop",
        "a function",
        "alike in both branches",
        "product of elements",
    ],
)
def test_what_a_step_needs_is_counted_as_often_as_it_runs(function, products):
    assert counted([Calls(function)], (4,)) == products * ONE


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (until_large, "While"),
        (if_large(times, lambda x, w: x), "If"),
        (lambda x, w: tf.linalg.inv(w) + tf.reduce_sum(x), "MatrixInverse"),
        (lambda x, w: tf.math.real(tf.signal.fft(tf.cast(x @ w, tf.complex64))), "FFT"),
        (lambda x, w: tf.math.real(tf.cast(x, tf.complex64) @ tf.cast(w, tf.complex64)), "MatMul"),
        (lambda x, w: tf.sparse.sparse_dense_matmul(tf.sparse.from_dense(x), w), "SparseTensorDenseMatMul"),
        (lambda x, w: x @ w + tf.ensure_shape(tf.numpy_function(np.copy, [x], tf.float32), (BATCH, 4)), "PyFunc"),
        (tf.function(times, input_signature=[tf.TensorSpec((None, 4)), tf.TensorSpec((4, 4))]), "MatMul"),
        (lambda x, w: tf.boolean_mask(x, x[:, 0] > 1.0) @ w, "MatMul"),
        (lambda x, w: tf.map_fn(lambda row: tf.linalg.matvec(w, row), x[: tf.argmax(x[0])]), "While"),
    ],
)
def test_what_does_not_follow_from_the_graph_is_refused_by_name(function, named):
    found = counted([Calls(function)], (4,))
    assert found.code is Code.NOT_COUNTED
    assert named in found.text


def test_a_step_without_products_has_no_flops():
    found = counted([Calls(lambda x, w: x * w[0])], (4,))
    assert found.code is Code.NEVER_HAPPENED


def test_cudnn_counts_what_a_loop_counts():
    # TensorFlow has the gradient of the first version without a GPU. Layers with one direction: 7 times, 4 to 6 to 6.
    @tf.function
    def step(x, params):
        with tf.GradientTape() as tape:
            tape.watch(params)
            state = tf.zeros((2, BATCH, 6))
            y = tf.raw_ops.CudnnRNN(input=x, input_h=state, input_c=state, params=params, rnn_mode="lstm")
            loss = tf.reduce_sum(y.output)
        return tape.gradient(loss, params)

    graph = step.get_concrete_function(tf.TensorSpec((7, BATCH, 4)), tf.TensorSpec((624,))).graph
    assert flops_of(graph) == 2 * BATCH * (7 * 4 * 6 * (2 * 4 + 3 * 6) + 7 * 4 * 6 * (3 * 6 + 3 * 6))


def test_formulas_agree_with_those_that_tensorflow_has():
    def forward(image, kernel, deep, matrix):
        y = tf.nn.depthwise_conv2d(tf.nn.conv2d(image, kernel, 2, "SAME"), deep, (1, 1, 1, 1), "VALID")
        return tf.reshape(y, (BATCH, -1, 8)) @ tf.matmul(matrix, matrix, transpose_b=True)

    shapes = (BATCH, 9, 9, 3), (3, 3, 3, 4), (2, 2, 4, 2), (8, 8)
    graph = tf.function(forward).get_concrete_function(*map(tf.TensorSpec, shapes)).graph
    kinds = ["Conv2D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2"]
    options = tf.compat.v1.profiler.ProfileOptionBuilder(tf.compat.v1.profiler.ProfileOptionBuilder.float_operation())
    wanted = options.with_accounted_types(kinds).with_empty_output().build()
    assert flops_of(graph) == tf.compat.v1.profiler.profile(graph, cmd="scope", options=wanted).total_float_ops > 0


@pytest.fixture
def default_policy():
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("modes", "stack", "shape", "multiply_adds"),
    [
        (
            MODES,
            lambda: [layers.Conv1D(4, 3), layers.Dropout(0.1), layers.Dense(5), layers.Dense(3, dtype="float32")],
            (9, 4),
            2 * 7 * 4 * (3 * 4) + 3 * 7 * 4 * 5 + 3 * 7 * 5 * 3,
        ),
        (("mixed-static", "mixed-bf16"), BY_HAND["GRU"][0], BY_HAND["GRU"][1], BY_HAND["GRU"][2]),
    ],
    ids=["convolution", "GRU"],
)
def test_every_mode_has_the_same_flops(modes, stack, shape, multiply_adds, default_policy):
    def flops_in(mode):
        keras.config.set_dtype_policy(mode.policy)
        model = keras.Sequential([keras.Input(shape), *stack()])
        if mode.float8:
            Float8(model)
        scaler = scaler_for(mode, keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=1.0), Settings())
        return flops_of(step_graph(model, np.zeros((BATCH, *shape), np.float32), scaler))

    assert {name: flops_in(MODES[name]) for name in modes} == dict.fromkeys(modes, 2 * BATCH * multiply_adds)


def test_resnet50_has_the_flops_of_the_literature():
    # He et al., "Deep residual learning for image recognition", table 1: 3.8e9 multiply-adds forward, 3.86e9 to three
    # digits. Backward is twice that, without the gradient of the image.
    model = keras.applications.ResNet50(weights=None)
    first = 112 * 112 * 64 * (7 * 7 * 3)
    found = flops_of(step_graph(model, np.zeros((1, 224, 224, 3), np.float32)))
    assert found == pytest.approx(2 * (3 * 3.86e9 - first), rel=0.01)


def test_a_bert_base_encoder_has_the_flops_of_the_literature():
    # Narayanan et al., "Efficient large-scale language model training on GPU clusters using Megatron-LM", appendix,
    # without recomputation and without the vocabulary: 72 B s l h^2 (1 + s / 6h).
    depth, width, length = 12, 768, 128
    tokens = keras.Input((length,), dtype="int32")
    x = layers.LayerNormalization()(layers.Embedding(30522, width)(tokens))
    for _ in range(depth):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(12, width // 12)(x, x))
        y = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(x))
        x = layers.LayerNormalization()(x + y)
    found = flops_of(step_graph(keras.Model(tokens, x), np.zeros((BATCH, length), np.int32)))
    expected = 72 * BATCH * length * depth * width**2 * (1 + length / (6 * width))
    assert found == pytest.approx(expected, rel=0.01)
