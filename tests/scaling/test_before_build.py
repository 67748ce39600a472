"""A scale that is read before the optimizer is built is the current one, not the initial one."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.scaling import DynamicLossScale, LogMaxLossScale, LossScaleOptimizer, StaticLossScale

INITIAL = 2.0**15


class Line:
    """One weight w and the loss factor * w, so that every applied step of SGD(1) subtracts ``factor``."""

    def __init__(self, loss_scale=None, **options):
        self.w = keras.Variable([0.0], name="w")
        loss_scale = loss_scale or DynamicLossScale(INITIAL, growth_interval=100)
        self.optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale, **options)

    def gradients(self, factor):
        with tf.GradientTape() as tape:
            scaled = self.optimizer.scale_loss(tf.reduce_sum(self.w.value * factor))
        return tape.gradient(scaled, [self.w.value])

    def update(self, grads):
        self.optimizer.apply(grads, [self.w])

    def clipped_update(self, grads):
        grads, finite = self.optimizer.unscale(grads)
        self.optimizer.apply([tf.clip_by_value(g, -100.0, 100.0) for g in grads], [self.w], finite=finite)

    def scaled_by_hand(self, factor):
        with tf.GradientTape() as tape:
            scaled = tf.reduce_sum(self.w.value * factor) * self.optimizer.loss_scale_value
        return tape.gradient(scaled, [self.w.value])


def separate(gradients, update, compiled):
    """Return a loop of two methods of Line, of which those in ``compiled`` are a tf.function each."""

    def loop(line, jit):
        first, second = (
            tf.function(getattr(line, name), jit_compile=jit) if name in compiled else getattr(line, name)
            for name in (gradients, update)
        )
        return lambda factor: second(first(factor))

    return loop


two_functions = separate("gradients", "update", {"gradients", "update"})


def traced_before_anything_else(line, jit):
    grads = tf.function(line.gradients, jit_compile=jit).get_concrete_function(tf.TensorSpec((), tf.float32))
    update = tf.function(line.update, jit_compile=jit)
    return lambda factor: update(grads(factor))


def traced_for_every_shape(line, jit):
    grads = tf.function(lambda factor: line.gradients(tf.reduce_sum(factor)), jit_compile=jit)
    update = tf.function(line.update, jit_compile=jit)
    shapes = iter([(), (1,), (1, 1), (), (1,), (1, 1)])
    return lambda factor: update(grads(tf.reshape(factor, next(shapes))))


LOOPS = {
    "two functions": two_functions,
    "gradients in a function": separate("gradients", "update", {"gradients"}),
    "update in a function": separate("gradients", "update", {"update"}),
    "clipped": separate("gradients", "clipped_update", {"gradients", "clipped_update"}),
    "scaled by hand": separate("scaled_by_hand", "update", {"scaled_by_hand"}),
    "traced before anything else": traced_before_anything_else,
    "traced for every shape": traced_for_every_shape,
}


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_steps_after_an_overflow_have_the_right_size(loop, jit):
    line = Line()
    step = loop(line, jit)
    for factor in (1.0, np.inf, 1.0, np.inf, 1.0):
        step(tf.constant(factor))
    assert line.w.numpy()[0] == -3.0
    assert line.optimizer.counters()["skipped"] == 2
    assert float(line.optimizer.loss_scale_value) == INITIAL / 4


def test_a_scale_that_has_to_fall_far_does():
    """Gradients of 3e34 overflow float32 at any scale above 2**13."""
    line = Line()
    step = two_functions(line, False)
    for _ in range(10):
        step(tf.constant(3e34))
    assert line.optimizer.counters()["skipped"] == 2
    assert line.w.numpy()[0] == pytest.approx(-8 * 3e34, rel=1e-6)


@pytest.mark.parametrize(
    "rule", [DynamicLossScale(8.0), LogMaxLossScale(), StaticLossScale(8.0)], ids=lambda r: type(r).__name__
)
def test_unscale_needs_no_build(rule):
    line = Line(rule)
    for _ in range(3):
        line.clipped_update(line.gradients(1.0))
    assert line.w.numpy()[0] == -3.0


def test_unscale_names_the_missing_call_of_build_if_it_needs_one():
    line = Line(LogMaxLossScale(), blame=True)
    with pytest.raises(
        ValueError, match=r"call optimizer\.build\(model\.trainable_variables\) before the first unscale"
    ):
        line.clipped_update(line.gradients(1.0))
    line.optimizer.build([line.w])
    line.clipped_update(line.gradients(1.0))
    assert line.w.numpy()[0] == -1.0


def after_eleven_overflows(folder, **options):
    line = Line(**options)
    line.update(line.gradients(1.0))
    for _ in range(11):
        line.update(line.gradients(np.inf))
    assert float(line.optimizer.loss_scale_value) == 16.0
    return tf.train.Checkpoint(w=line.w, optimizer=line.optimizer).save(folder / "checkpoint")


FIRST_STEPS = {
    "eager": lambda line: lambda: line.update(line.gradients(1.0)),
    "eager and clipped": lambda line: lambda: line.clipped_update(line.gradients(1.0)),
    "one function": lambda line: tf.function(lambda: line.update(line.gradients(1.0))),
    "two functions": lambda line: functools.partial(two_functions(line, None), tf.constant(1.0)),
}


@pytest.mark.parametrize("build", [False, True], ids=["unbuilt", "built"])
@pytest.mark.parametrize("loop", FIRST_STEPS.values(), ids=FIRST_STEPS)
@pytest.mark.parametrize("options", [{}, {"blame": True}], ids=["plain", "blame"])
def test_the_first_step_after_a_checkpoint_has_the_right_size(loop, build, options, tmp_path):
    path = after_eleven_overflows(tmp_path, **options)
    line = Line(**options)
    step = loop(line)
    if build:
        line.optimizer.build([line.w])
    status = tf.train.Checkpoint(w=line.w, optimizer=line.optimizer).restore(path)
    assert float(line.optimizer.loss_scale_value) == 16.0
    assert line.optimizer.counters()["overflow"] == 11
    for _ in range(2):
        step()
    status.assert_existing_objects_matched()
    assert line.w.numpy()[0] == -3.0
    assert line.optimizer.counters()["attempted"] == 14
    if options:
        assert line.optimizer.counters()["by_variable"] == {line.w.path: 11}


def test_a_checkpoint_restored_between_tracing_and_the_first_call_counts(tmp_path):
    path = after_eleven_overflows(tmp_path)
    line = Line()
    grads = tf.function(line.gradients)
    grads.get_concrete_function(tf.TensorSpec((), tf.float32))
    tf.train.Checkpoint(w=line.w, optimizer=line.optimizer).restore(path)
    line.update(grads(tf.constant(1.0)))
    assert line.w.numpy()[0] == -2.0
