"""Gradients of shapes that are known only at run time: of an Embedding under XLA, ragged input, any batch length."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.scaling import DynamicLossScale, LogMaxLossScale, LossScaleOptimizer, NoLossScale, StaticLossScale
from mpscale.scaling.gradients import all_finite, finite_and_largest, nonfinite_flags, unscaled

WORDS = 20
TOKENS = np.random.default_rng(0).integers(0, WORDS, (22, 5))  # Fewer than a batch of 32, so the length is not fixed.
LABELS = (TOKENS.sum(1) % 2).astype("float32")


def reader():
    """Two Embeddings of one shape, the first used twice."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input((5,), dtype="int64")
    one, other = keras.layers.Embedding(WORDS, 4), keras.layers.Embedding(WORDS, 4)
    mean = keras.layers.GlobalAveragePooling1D()(one(tokens) * other(tokens) + one(tokens[:, ::-1]))
    return keras.Model(tokens, keras.layers.Dense(1, dtype="float32")(mean))


INNER = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "Adam with clipnorm": lambda: keras.optimizers.Adam(0.01, clipnorm=0.01),
    "SGD with momentum and global_clipnorm": lambda: keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.01),
    "gradient accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
}


def fitted(optimizer):
    model = reader()
    model.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=True), jit_compile=True)
    model.fit(TOKENS, LABELS, batch_size=32, epochs=4, shuffle=False, verbose=0)
    return [variable.numpy() for variable in model.trainable_variables]


@functools.cache
def fitted_by_keras(inner):
    return fitted(keras.optimizers.LossScaleOptimizer(INNER[inner](), initial_scale=2.0**14))


SLOW = [
    ("Adam with clipnorm", LogMaxLossScale(minimum=2.0**14), {"blame": True}),
    ("SGD with momentum and global_clipnorm", StaticLossScale(2.0**14, skip_nonfinite=False), {}),
    ("gradient accumulation", DynamicLossScale(2.0**14), {"skip": "gate", "blame": True}),
]


@pytest.mark.parametrize(
    ("inner", "loss_scale", "options"),
    [("Adam", DynamicLossScale(2.0**14), {}), *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
    ids=str,
)
def test_embeddings_train_as_with_keras_own(mixed_float16, inner, loss_scale, options):
    ours = fitted(LossScaleOptimizer(INNER[inner](), loss_scale, **options))
    for a, b in zip(ours, fitted_by_keras(inner), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_ragged_tokens_train_as_with_keras_own():
    """Without XLA, which does not support ragged tensors."""
    tokens = tf.RaggedTensor.from_row_lengths(TOKENS[:2].reshape(-1), np.array([3, 1, 6]))

    def trained(optimizer):
        table = keras.Variable(np.ones((WORDS, 2), np.float32))
        optimizer.build([table])

        @tf.function(input_signature=[tf.RaggedTensorSpec((None, None), tf.int64, ragged_rank=1)])
        def step(tokens):
            with tf.GradientTape() as tape:
                found = tf.nn.embedding_lookup(table.value, tokens)
                scaled = optimizer.scale_loss(tf.reduce_mean(tf.reduce_sum(found, axis=1) ** 2))
            optimizer.apply([tape.gradient(scaled, table.value)], [table])

        for _ in range(3):
            step(tokens)
        return table.numpy()

    by_keras = trained(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)))
    assert (by_keras != 1).any()
    np.testing.assert_allclose(trained(LossScaleOptimizer(keras.optimizers.Adam(0.1))), by_keras, rtol=1e-6)


SHAPES = {
    "unknown length": ((None, 8), (None, 8)),
    "unknown rank": (None, None),
    "one known, one not": ((3, 8), (None, None)),
    "fixed, for comparison": ((3, 8), (5, 8)),
}


@pytest.mark.parametrize("jit", [True, False], ids=["XLA", "graph"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_finite_check_of_two_lengths(shapes, jit):
    """They cannot be combined elementwise: one has three rows and the other five, with the NaN in the last."""

    @tf.function(jit_compile=jit, input_signature=[tf.TensorSpec(shape) for shape in shapes])
    def look(short, long):
        slices = tf.IndexedSlices(long, tf.range(tf.shape(long)[0]))
        halves = unscaled([short, None, slices], tf.constant(2.0))
        return (
            all_finite([short, None, slices]),
            *finite_and_largest([short, None, slices]),
            nonfinite_flags([short, None, slices]),
            halves[0],
            halves[2].values,
        )

    short = np.arange(24, dtype=np.float32).reshape(3, 8)
    for bad in (-100.0, np.nan, np.inf):
        long = np.ones((5, 8), np.float32)
        long[4, 7] = bad
        finite, also_finite, largest, flags, half, other_half = look(short, long)
        assert finite == also_finite == np.isfinite(bad)
        assert not finite or largest == 100.0
        assert flags.numpy().tolist() == [0, 0, int(not np.isfinite(bad))]
        np.testing.assert_array_equal(half, short / 2)
        np.testing.assert_array_equal(other_half, long / 2)


@pytest.mark.parametrize("jit", [True, False], ids=["XLA", "graph"])
@pytest.mark.parametrize("empty", [(0, 8), (3, 0), (0,)], ids=str)
def test_tensors_that_turn_out_to_be_empty_count_as_finite(empty, jit):
    @tf.function(jit_compile=jit, input_signature=[tf.TensorSpec([None] * len(empty)), tf.TensorSpec((None, None))])
    def look(nothing, something):
        return (*finite_and_largest([nothing, something]), *finite_and_largest([nothing]), all_finite([nothing]))

    answers = look(np.zeros(empty, np.float32), np.full((2, 2), -3.0, np.float32))
    assert [float(answer) for answer in answers] == [1.0, 3.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("hidden", [True, False], ids=["the infinity is left out", "the infinity is kept"])
def test_rows_selected_by_a_mask_under_xla(hidden):
    """Not even XLA knows their number when it compiles."""

    @tf.function(jit_compile=True)
    def look(rows, mask):
        kept = tf.boolean_mask(rows, mask)
        return all_finite([kept, rows[:1]]), finite_and_largest([kept, rows[:1]])[1]

    rows = np.ones((5, 3), np.float32)
    rows[2, 1] = np.inf
    finite, largest = look(rows, np.array([True, True, not hidden, True, True]))
    assert finite == hidden
    assert not hidden or largest == 1.0


TABLE, ROWS, INDICES = np.ones((6, 3)), np.array([[1.0, 2, 3], [4, 5, 6], [1, 1, 1]]), np.array([0, 4, 0])
DENSE = ROWS[0]


def by_hand(momentum, window):
    """Table and vector after six micro-batches, the third with an infinity, computed in float64."""
    table, vector = TABLE.copy(), np.ones(3)
    gradients = np.zeros((6, 3))
    np.add.at(gradients, INDICES, ROWS)
    speed = [np.zeros((6, 3)), np.zeros(3)]
    for start in range(0, 6, window):
        if start <= 2 < start + window:
            continue
        for place, (variable, gradient) in enumerate(((table, gradients), (vector, DENSE))):
            speed[place] = momentum * speed[place] - 0.1 * gradient
            variable += speed[place]
    return table, vector


@pytest.mark.parametrize("jit", [True, False], ids=["XLA", "graph"])
@pytest.mark.parametrize("skip", ["branch", "gate"])
@pytest.mark.parametrize(("momentum", "window"), [(0.0, 1), (0.9, 1), (0.9, 2)], ids=["SGD", "momentum", "window of 2"])
def test_slices_without_dense_shape_and_gradients_of_unknown_rank(jit, skip, momentum, window):
    """Keras' own optimizer raises an error for slices that do not say how many rows there are."""
    variables = [keras.Variable(TABLE.astype(np.float32)), tf.Variable(np.ones(3, np.float32))]
    inner = keras.optimizers.SGD(0.1, momentum=momentum, gradient_accumulation_steps=window if window > 1 else None)
    optimizer = LossScaleOptimizer(inner, DynamicLossScale(8.0), skip=skip, blame=True)
    optimizer.build(variables)
    signature = [tf.TensorSpec((None, 3)), tf.TensorSpec((None,), tf.int64), tf.TensorSpec(None)]

    @tf.function(jit_compile=jit, input_signature=signature)
    def step(values, indices, dense):
        scale = optimizer.loss_scale_value
        optimizer.apply([tf.IndexedSlices(values * scale, indices), dense * scale], variables)

    for i in range(6):
        step((ROWS * (np.inf if i == 2 else 1)).astype(np.float32), INDICES, DENSE.astype(np.float32))
    for variable, expected in zip(variables, by_hand(momentum, window), strict=True):
        np.testing.assert_allclose(np.asarray(variable), expected, rtol=1e-6, atol=1e-6)
    assert list(optimizer.counters()["by_variable"].values()) == [1]


@pytest.mark.parametrize("skip", ["auto", "branch", "gate"])
@pytest.mark.parametrize("shape", [None, (None,), (None, 3)], ids=str)
@pytest.mark.parametrize("loss_scale", [StaticLossScale(8.0), LogMaxLossScale(), NoLossScale()], ids=str)
def test_variables_of_unknown_shape(shape, skip, loss_scale):
    start = np.ones((4, 3) if shape != (None,) else 4, np.float32)
    variable = tf.Variable(start, shape=tf.TensorShape(shape))
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.25), loss_scale, skip=skip)
    optimizer.build([variable])

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(tf.reduce_sum(variable**2))
        optimizer.apply([tape.gradient(scaled, variable)], [variable])

    step()
    np.testing.assert_array_equal(variable, start / 2)
