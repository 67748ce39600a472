"""Gradients are divided by the loss scale exactly once: a second division is refused, and doubtful loops warn."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import HOW, Loop, clipped, compiled

from mpscale.scaling import (
    DynamicLossScale,
    LogMaxLossScale,
    LossScaleOptimizer,
    NoLossScale,
    StaticLossScale,
    UnscaledLossWarning,
    all_finite,
)

pytestmark = pytest.mark.filterwarnings("error::mpscale.scaling.UnscaledLossWarning")


def added_up_in_variables(loop, true):
    for total, grad in zip(loop.sums, true, strict=True):
        total.assign_add(grad)
    loop.apply([total / 2.0 for total in loop.sums])


def after_reading_the_scale(loop, true):
    _ = loop.optimizer.loss_scale_value
    loop.apply(clipped(true))


TWICE = {
    "as they are": lambda loop, true: loop.apply(true),
    "each clipped": lambda loop, true: loop.apply([tf.clip_by_norm(g, 1.0) for g in true]),
    "all clipped": lambda loop, true: loop.apply(clipped(true)),
    "clipped in a function": lambda loop, true: loop.apply(tf.function(clipped)(true)),
    "clipped by Keras": lambda loop, true: loop.apply([keras.ops.clip(g, -1.0, 1.0) for g in true]),
    "only one of them": lambda loop, true: loop.apply([true[0] * 0.5, *loop.constants()[1:]]),
    "added up in variables": added_up_in_variables,
    "after reading the scale": after_reading_the_scale,
    "unscaled again": lambda loop, true: loop.optimizer.unscale(true),
    "changed and unscaled again": lambda loop, true: loop.optimizer.unscale([g * 2.0 for g in true]),
}


@pytest.mark.parametrize("how", ["eager", "graph", "in a branch"])
@pytest.mark.parametrize("use", TWICE.values(), ids=TWICE)
def test_gradients_are_not_divided_twice(use, how):
    loop = Loop()
    loop.optimizer.build(loop.variables)
    loop.sums = [tf.Variable(tf.zeros(2)) for _ in loop.variables]

    def step(yes):
        true, _ = loop.optimizer.unscale(loop.gradients())
        if how == "in a branch":
            tf.cond(yes, lambda: use(loop, true), lambda: None)
        else:
            use(loop, true)

    for _ in range(2):  # Refused once is refused the next time, too.
        with pytest.raises(ValueError, match="would be divided by the loss scale twice"):
            (step if how == "eager" else tf.function(step, autograph=False))(tf.constant(True))
    assert loop.fall() == 0.0


def loop_of_two(loop, body):
    """Add up what ``body`` returns, in a loop of the graph."""
    _, *sums = tf.while_loop(
        lambda i, *_: i < 2,
        lambda i, *sums: (i + 1, *(a + b for a, b in zip(sums, body(), strict=True))),
        [0, *(tf.zeros(2) for _ in loop.variables)],
    )
    return sums


def branch(loop, body):
    return tf.cond(tf.reduce_sum(loop.variables[0].value) < 1.0, body, lambda: [tf.zeros(2) for _ in loop.variables])


def one_of_several(loop, body):
    zeros = lambda: [tf.zeros(2) for _ in loop.variables]  # noqa: E731
    return tf.switch_case(tf.constant(1) + tf.cast(loop.variables[0].value[0], tf.int32), [zeros, body, zeros])


def function_called(loop, body):
    return tf.function(body)()


def branch_in_a_loop(loop, body):
    return loop_of_two(loop, lambda: branch(loop, body))


INSIDE = [loop_of_two, branch, one_of_several, function_called, branch_in_a_loop]


@pytest.mark.parametrize("inside", INSIDE)
def test_gradients_unscaled_inside_are_not_divided_again_outside(inside):
    loop = Loop()
    loop.optimizer.build(loop.variables)

    @tf.function
    def step():
        true = inside(loop, lambda: loop.optimizer.unscale(loop.gradients())[0])
        loop.apply(clipped(true))

    with pytest.raises(ValueError, match="would be divided by the loss scale twice"):
        step()


@pytest.mark.parametrize("inside", INSIDE)
def test_scaled_gradients_from_inside_are_divided_outside(inside):
    loop = Loop()
    loop.optimizer.build(loop.variables)

    def body():
        grads = loop.gradients()
        loop.optimizer.unscale(grads)  # only to look at the true ones
        return grads

    tf.function(lambda: loop.apply(inside(loop, body)))()
    assert loop.fall() == (2.0 if inside in (loop_of_two, branch_in_a_loop) else 1.0)


def clipped_and_finite(loop):
    true, finite = loop.optimizer.unscale(loop.gradients())
    loop.apply(clipped(true), finite)


def true_ones_only_looked_at(loop):
    grads = loop.gradients()
    tf.linalg.global_norm(loop.optimizer.unscale(grads)[0])
    loop.apply(grads)


def clipped_by_the_norm_of_the_true_ones(loop):
    """The factor comes from unscale, but what it multiplies is scaled."""
    grads = loop.gradients(3.0)
    true, _ = loop.optimizer.unscale(grads)
    factor = 1.0 / tf.reduce_max(tf.stack(true))
    loop.apply([grad * factor for grad in grads])


def micro_batches_unscaled(loop):
    parts = [loop.optimizer.unscale(loop.gradients(0.5)) for _ in range(2)]
    loop.apply([a + b for a, b in zip(parts[0][0], parts[1][0], strict=True)], parts[0][1] & parts[1][1])


def micro_batches_scaled(loop):
    loop.apply([a + b for a, b in zip(loop.gradients(0.25), loop.gradients(0.75), strict=True)])


def scaled_by_hand(loop):
    grads = loop.gradients(scaled=False)
    loop.apply([g * loop.optimizer.loss_scale_value for g in grads])


def unscaled_by_hand(loop):
    grads = [g / loop.optimizer.loss_scale_value for g in loop.gradients()]
    loop.apply(grads, all_finite(grads))


@pytest.mark.parametrize("how", ["eager", "gradients in a function", "graph"])
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda loop: loop.apply(loop.gradients()), id="plain"),
        pytest.param(lambda loop: loop.apply(clipped(loop.gradients())), id="scaled gradients clipped"),
        pytest.param(lambda loop: loop.apply(loop.constants()), id="gradients from elsewhere"),
        clipped_and_finite,
        true_ones_only_looked_at,
        clipped_by_the_norm_of_the_true_ones,
        micro_batches_unscaled,
        micro_batches_scaled,
        scaled_by_hand,
        unscaled_by_hand,
    ],
)
def test_right_loops_divide_once_and_go_on_after_a_dropped_batch(use, how):
    loop = Loop()
    loop.optimizer.build(loop.variables)
    loop.gradients()
    if how == "gradients in a function":
        loop.gradients = tf.function(loop.gradients, reduce_retracing=True)

    def step():
        loop.optimizer.unscale(loop.gradients(1e9))  # looked at and dropped
        use(loop)

    step = tf.function(step, autograph=False) if how == "graph" else step
    step()
    step()
    assert loop.fall() == 2.0


def test_gradients_may_be_arrays():
    loop = Loop()
    true, finite = loop.optimizer.unscale([grad.numpy() for grad in loop.gradients()])
    loop.apply([np.clip(grad.numpy(), -0.5, 0.5) for grad in true], bool(finite))
    loop.apply([grad.numpy() for grad in loop.gradients()])
    assert loop.fall() == 1.5


def test_scaled_gradients_that_come_with_finite_are_refused():
    loop = Loop()
    grads = loop.gradients()
    _, finite = loop.optimizer.unscale(grads)
    with pytest.raises(ValueError, match="these are the scaled gradients"):
        loop.apply(grads, finite)


def test_eager_operations_are_watched_from_unscale_to_the_end_of_its_step_only():
    from tensorflow.python.eager import context

    def watchers():
        return len(context.context().op_callbacks)

    gc.collect()
    before = watchers()
    loop = Loop()
    clipped_and_finite(loop)
    assert watchers() == before
    loop.optimizer.unscale(loop.gradients())
    assert watchers() == before + 1
    loop.gradients()
    assert watchers() == before
    loop.optimizer.unscale(loop.gradients())
    del loop
    gc.collect()
    assert watchers() == before


def never_scaled(loop):
    loop.apply(loop.gradients(scaled=False))


def never_scaled_but_clipped(loop):
    grads, finite = loop.optimizer.unscale(loop.gradients(scaled=False))
    loop.apply(clipped(grads), finite)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("use", [never_scaled, never_scaled_but_clipped])
@pytest.mark.parametrize("rule", [StaticLossScale(16.0), DynamicLossScale(16.0), LogMaxLossScale()], ids=repr)
def test_a_loop_that_never_scales_its_loss_warns_once(use, how, rule):
    loop = Loop(rule)
    step = compiled(lambda: use(loop), how)
    with pytest.warns(UnscaledLossWarning, match=r"Differentiate optimizer\.scale_loss\(loss\)") as warned:
        step()
    assert len(warned) == 1
    for _ in range(2):
        step()


def test_reading_the_scale_afterwards_for_a_log_does_not_suppress_the_warning():
    loop = Loop()
    with pytest.warns(UnscaledLossWarning):
        never_scaled(loop)
    float(loop.optimizer.loss_scale_value)


def test_a_train_step_that_forgets_to_scale_warns_once():
    class Forgetful(keras.Sequential):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x))
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            return {"loss": loss}

    model = Forgetful([keras.layers.Dense(1)])
    model.compile(LossScaleOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
    with pytest.warns(UnscaledLossWarning) as warned:
        model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, verbose=0)
    assert len(warned) == 1


def test_a_loop_that_never_unscales_warns():
    loop = Loop()
    grads = loop.gradients()
    with pytest.warns(UnscaledLossWarning, match="unscale was never called"):
        loop.apply(grads, all_finite(grads))


def by_fit(loop):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loop.optimizer, "mse", jit_compile=False)
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


def update_in_another_function(loop):
    grads, update = tf.function(loop.gradients), tf.function(loop.apply)
    for _ in range(3):
        update(grads())


def by_a_restored_optimizer(loop):
    again = Loop()
    again.optimizer.build(again.variables)
    loop.optimizer.build(loop.variables)
    again.optimizer.set_weights([v.numpy() for v in loop.optimizer.variables])
    again.apply(again.gradients())


@pytest.mark.parametrize("use", [by_fit, update_in_another_function, by_a_restored_optimizer])
def test_right_loops_do_not_warn(use):
    use(Loop())


@pytest.mark.parametrize("rule", [NoLossScale(), StaticLossScale(1.0)], ids=repr)
def test_without_a_scale_there_is_nothing_to_warn_about(rule):
    never_scaled(Loop(rule))


def test_without_scaling_gradients_may_go_through_unscale_twice():
    loop = Loop(NoLossScale())
    loop.apply(loop.optimizer.unscale(loop.gradients())[0])
    assert loop.fall() == 1.0
