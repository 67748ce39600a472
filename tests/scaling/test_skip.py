"""Skipping by masked writes under XLA, and the search for writes that were not masked."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import same, small_model, state_of, step_function

from mpscale.scaling import DynamicLossScale, LossScaleOptimizer
from mpscale.scaling.skip import all_nodes, apply_masked


class Restless(keras.optimizers.SGD):
    """Writes to a variable that it does not list; with ``secretly``, not through the methods of the variable."""

    def __init__(self, *args, secretly=False, **kwargs):
        super().__init__(*args, **kwargs)
        self._secretly = secretly

    def build(self, variables):
        super().build(variables)
        with tf.init_scope():
            self._hidden = [tf.Variable(0.0)]

    def update_step(self, gradient, variable, learning_rate):
        if self._secretly:
            tf.raw_ops.AssignAddVariableOp(resource=self._hidden[0].handle, value=1.0)
        else:
            self._hidden[0].assign_add(1.0)
        super().update_step(gradient, variable, learning_rate)


def branches(model, optimizer):
    """Return whether a compiled step has a branch."""
    x = tf.ones((5, 4))

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            scaled = optimizer.scale_loss(tf.reduce_mean(model(x) ** 2))
        optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)

    optimizer.build(model.trainable_variables)
    graph = step.get_concrete_function().graph.as_graph_def()
    return any(node.op in ("If", "StatelessIf") for node in all_nodes(graph))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Nadam", "SGD"])
@pytest.mark.parametrize(("skip", "expected"), [("gate", False), ("branch", True)])
def test_a_masked_step_has_no_branch(name, skip, expected):
    inner = getattr(keras.optimizers, name)(0.01, clipnorm=1.0, use_ema=True)
    assert branches(small_model(), LossScaleOptimizer(inner, skip=skip)) == expected


@pytest.mark.parametrize(("units", "expected"), [(4, True), (4096, False)])
def test_many_small_variables_are_skipped_by_a_branch_and_large_ones_are_masked(units, expected):
    """10 elements per variable on average, and 10,240: (4 * 4096 + 4096) / 2."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)])
    assert branches(model, LossScaleOptimizer(keras.optimizers.SGD(0.1))) == expected


@pytest.mark.parametrize("secretly", [False, True], ids=["hidden variable", "past the variable's methods"])
def test_hidden_writes_are_skipped_too(secretly):
    """A hidden variable is found in the trace. A write past its methods cannot be masked, so there is a branch."""
    model = small_model()
    inner = Restless(0.1, secretly=secretly)
    optimizer = LossScaleOptimizer(inner, DynamicLossScale(8.0), skip="gate")
    step = step_function(model, optimizer, "xla")
    step()
    before, hidden = state_of(model, optimizer), inner._hidden[0].numpy()
    step(np.inf)
    assert same(before, state_of(model, optimizer))
    assert inner._hidden[0].numpy() == hidden > 0
    assert branches(model, optimizer) == secretly


@pytest.mark.parametrize("jit", [True, False])
def test_masked_sparse_writes_keep_every_bit(jit):
    """Adding zero would change negative zeros and subnormals; duplicate indices test the update."""
    start = np.float32([-0.0, 0.0, np.nan, -np.inf, 1e-40, -0.0])
    rows = tf.IndexedSlices(tf.constant([1.0, np.nan, 2.0]), tf.constant([0, 4, 0]), tf.constant([6]))

    @tf.function(jit_compile=jit)
    def update(finite, *variables):
        def write():
            for variable, method in zip(variables, ("scatter_add", "scatter_sub", "scatter_update"), strict=True):
                getattr(variable, method)(rows)

        assert apply_masked(write, variables, finite)

    variables = [tf.Variable(start) for _ in range(3)]
    function = tf.function(lambda finite: update(finite, *variables), jit_compile=jit)
    function(tf.constant(False))
    for variable in variables:
        assert variable.numpy().tobytes() == start.tobytes()
    function(tf.constant(True))
    for variable, expected in zip(variables, [3.0, -3.0, None], strict=True):
        assert np.isnan(variable.numpy()[4])
        assert expected is None or variable.numpy()[0] == expected


def test_writes_are_unmasked_after_the_trace():
    model = small_model()
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(0.1), skip="gate")
    step_function(model, optimizer, "xla")()
    model.trainable_variables[0].assign(np.full((4, 3), 7.0))
    assert (model.trainable_variables[0].numpy() == 7.0).all()
    assert "assign" not in vars(model.trainable_variables[0].value)
