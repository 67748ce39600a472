"""Loops of one's own: who is blamed, what is refused because it would divide twice, and what is only said."""

import gc
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpscale.scaling import (
    DynamicLossScale,
    LogMaxLossScale,
    LossScaleOptimizer,
    NoLossScale,
    StaticLossScale,
    UnscaledLossWarning,
    all_finite,
)

SCALE = 16.0


@pytest.fixture(autouse=True)
def nothing_is_said_unasked():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnscaledLossWarning)
        yield


class Loop:
    """Three weights of two elements; the gradient of each is ``factor``."""

    def __init__(self, loss_scale=None, **options):
        self.variables = [keras.Variable([0.0, 0.0], name=name) for name in "abc"]
        self.optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), loss_scale or StaticLossScale(SCALE), **options)

    def gradients(self, factor=1.0, variables=None):
        sources = [v.value for v in variables or self.variables]
        with tf.GradientTape() as tape:
            scaled = self.optimizer.scale_loss(sum(tf.reduce_sum(v) for v in sources) * factor)
        return tape.gradient(scaled, sources)

    def fall(self):
        """How far the weights went, which is the same for all."""
        values = np.stack([v.numpy() for v in self.variables])
        assert np.unique(values).size == 1
        return -float(values[0, 0])


def clipped(grads):
    return tf.clip_by_global_norm(grads, 1e3)[0]


# Who is blamed


def pairs(optimizer, grads, variables):
    optimizer.apply_gradients(zip(grads, variables, strict=True))


def unscale_then_apply(optimizer, grads, variables):
    grads, finite = optimizer.unscale(grads)
    optimizer.apply(clipped(grads), variables, finite=finite)


def unscale_with_variables(optimizer, grads, variables):
    grads, finite = optimizer.unscale(grads, variables)
    optimizer.apply(clipped(grads), variables, finite=finite)


def unscale_and_sum(optimizer, grads, variables):
    first, finite = optimizer.unscale(grads)
    second, finite_too = optimizer.unscale([tf.ones_like(g) for g in grads])
    total = [a + b for a, b in zip(first, second, strict=True)]
    optimizer.apply(total, variables, finite=tf.logical_and(finite, finite_too))


def apply_in_a_branch(optimizer, grads, variables):
    grads, finite = optimizer.unscale(grads)
    small = tf.linalg.global_norm(grads) > -1.0
    tf.cond(small | ~finite, lambda: optimizer.apply(grads, variables, finite=finite), lambda: None)


ORDERS = {
    "abc": "in the order of build",
    "cab": "in another order",
    "bc": "with a frozen first layer",
    "cb": "with some of them, in another order",
    "b": "with only one",
}
USES = (pairs, unscale_then_apply, unscale_with_variables, unscale_and_sum, apply_in_a_branch)


@pytest.mark.parametrize(
    ("order", "use", "how"),
    [
        pytest.param(order, use, how, id=f"{ORDERS[order]}, {use.__name__}, {how}")
        for order in ORDERS
        for use in USES
        for how in ("eager", "graph", "xla")
        # Who is blamed is decided in Python: all of it is tried once, and compiled what is furthest from build.
        if how == "eager" or order in ("cab", "cb")
    ],
)
def test_the_variable_is_blamed_whose_gradient_it_is(order, use, how):
    loop = Loop(blame=True)
    loop.optimizer.build(loop.variables)
    by_name = dict(zip("abc", loop.variables, strict=True))
    variables = [by_name[name] for name in order]

    def step(bad):
        grads = loop.gradients(variables=variables)
        grads = [g * tf.where(tf.equal(bad, "abc".index(n)), np.inf, 1.0) for n, g in zip(order, grads, strict=True)]
        use(loop.optimizer, grads, variables)

    step = step if how == "eager" else tf.function(step, jit_compile=how == "xla")
    for name in ("b", order[0], "none"):
        step(tf.constant("abc".find(name)))
    expected = {"b": 2} if order[0] == "b" else {"b": 1, order[0]: 1}
    assert loop.optimizer.counters()["by_variable"] == {by_name[n].path: count for n, count in expected.items()}
    assert loop.optimizer.counters()["overflow"] == 2


def test_two_variables_of_one_path_are_counted_apart():
    with keras.name_scope("layer"):
        one, other = keras.Variable([0.0], name="w"), keras.Variable([0.0], name="w")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), blame=True)
    optimizer.scale_loss(0.0)
    optimizer.apply([tf.ones(1), tf.constant([np.nan])], [one, other])
    assert optimizer.counters()["by_variable"] == {"layer/w (2)": 1}


def test_unscale_and_apply_in_functions_of_their_own_need_the_variables():
    loop = Loop(blame=True)
    look = tf.function(lambda grads: loop.optimizer.unscale(grads))
    update = tf.function(lambda grads, finite: loop.optimizer.apply(grads, loop.variables, finite=finite))
    with pytest.raises(ValueError, match=r"optimizer\.unscale\(grads, variables\)"):
        update(*look(loop.gradients()))
    look = tf.function(lambda grads: loop.optimizer.unscale(grads, loop.variables))
    update = tf.function(lambda grads, finite: loop.optimizer.apply(grads, loop.variables, finite=finite))
    update(*look(loop.gradients(np.inf)))
    assert loop.optimizer.counters()["by_variable"] == {v.path: 1 for v in loop.variables}


def test_a_variable_that_the_optimizer_does_not_know_is_named():
    loop = Loop(blame=True)
    loop.optimizer.build(loop.variables[:2])
    with pytest.raises(ValueError, match="was not built with c; give build all variables"):
        loop.optimizer.apply(loop.gradients(), loop.variables)


@pytest.mark.parametrize("options", [{}, {"blame": True}], ids=["plain", "blame"])
def test_gradients_without_a_variable_are_refused(options):
    loop = Loop(**options)
    with pytest.raises(ValueError, match="3 gradients were given for 2 variables"):
        loop.optimizer.apply(loop.gradients(), loop.variables[:2])


# What is left out


def left_out(loop):
    """A batch whose gradients were looked at, found too large and not applied."""
    loop.optimizer.unscale(loop.gradients(1e9))


def plain_step(loop):
    loop.optimizer.apply(loop.gradients(), loop.variables)


def made_up_step(loop):
    loop.optimizer.apply([tf.fill(v.shape, SCALE) for v in loop.variables], loop.variables)


def clipped_scaled_step(loop):
    loop.optimizer.apply(clipped(loop.gradients()), loop.variables)


def step_with_finite(loop):
    grads, finite = loop.optimizer.unscale(loop.gradients())
    loop.optimizer.apply(clipped(grads), loop.variables, finite=finite)


def step_after_a_look(loop):
    grads = loop.gradients()
    loop.optimizer.unscale(grads)
    loop.optimizer.apply(grads, loop.variables)


@pytest.mark.parametrize("how", ["eager", "gradients in a function", "one function"])
@pytest.mark.parametrize("step", [plain_step, made_up_step, clipped_scaled_step, step_with_finite, step_after_a_look])
def test_after_a_batch_that_was_left_out_training_goes_on(step, how):
    loop = Loop()
    loop.gradients()
    if how == "gradients in a function":
        loop.gradients = tf.function(loop.gradients, reduce_retracing=True)

    def body():
        for _ in range(2):
            left_out(loop)
            step(loop)

    (tf.function(body) if how == "one function" else body)()
    assert loop.fall() == 2.0


# What would divide twice


def clip_each(optimizer, true, variables):
    optimizer.apply([tf.clip_by_norm(g, 1.0) for g in true], variables)


def clip_all(optimizer, true, variables):
    optimizer.apply(clipped(true), variables)


def clip_in_a_function(optimizer, true, variables):
    optimizer.apply(tf.function(clipped)(true), variables)


def clip_by_keras(optimizer, true, variables):
    optimizer.apply([keras.ops.clip(g, -1.0, 1.0) for g in true], variables)


def as_they_are(optimizer, true, variables):
    optimizer.apply(true, variables)


def only_one_of_them(optimizer, true, variables):
    optimizer.apply([true[0] * 0.5, *(tf.fill(v.shape, SCALE) for v in variables[1:])], variables)


def added_up_in_variables(optimizer, true, variables, sums=()):
    for total, grad in zip(sums, true, strict=True):
        total.assign_add(grad)
    optimizer.apply([total / 2.0 for total in sums], variables)


def after_a_look_at_the_scale(optimizer, true, variables):
    _ = optimizer.loss_scale_value
    optimizer.apply(clipped(true), variables)


def unscaled_again(optimizer, true, variables):
    optimizer.unscale([g * 2.0 for g in true])


@pytest.mark.parametrize("how", ["eager", "graph", "in a branch"])
@pytest.mark.parametrize(
    "use",
    [
        clip_each,
        clip_all,
        clip_in_a_function,
        clip_by_keras,
        as_they_are,
        only_one_of_them,
        added_up_in_variables,
        after_a_look_at_the_scale,
        unscaled_again,
    ],
)
def test_gradients_are_not_divided_twice(use, how):
    loop = Loop()
    loop.optimizer.build(loop.variables)
    sums = [tf.Variable(tf.zeros(2)) for _ in loop.variables]
    options = {"sums": sums} if use is added_up_in_variables else {}

    def step(yes):
        true, _ = loop.optimizer.unscale(loop.gradients())
        if how == "in a branch":
            tf.cond(yes, lambda: use(loop.optimizer, true, loop.variables, **options), lambda: None)
        else:
            use(loop.optimizer, true, loop.variables, **options)

    for _ in range(2):  # Refused once is refused the next time, too.
        with pytest.raises(ValueError, match="would be divided by the loss scale twice"):
            (step if how == "eager" else tf.function(step))(tf.constant(True))
    assert loop.fall() == 0.0


def loop_of_two(loop, body):
    """Adds up what ``body`` returns, in a loop of the graph."""
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
def test_gradients_that_were_unscaled_inside_are_not_divided_again_outside(inside):
    loop = Loop()
    loop.optimizer.build(loop.variables)

    @tf.function
    def step():
        true = inside(loop, lambda: loop.optimizer.unscale(loop.gradients())[0])
        loop.optimizer.apply(clipped(true), loop.variables)

    with pytest.raises(ValueError, match="would be divided by the loss scale twice"):
        step()


@pytest.mark.parametrize("inside", INSIDE)
def test_scaled_gradients_from_inside_are_divided_outside_beside_a_norm_for_the_log(inside):
    loop = Loop()
    loop.optimizer.build(loop.variables)

    @tf.function
    def step():
        def body():
            grads = loop.gradients()
            loop.optimizer.unscale(grads)
            return grads

        loop.optimizer.apply(inside(loop, body), loop.variables)

    step()
    assert loop.fall() == (2.0 if inside in (loop_of_two, branch_in_a_loop) else 1.0)


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_scaled_gradients_may_be_clipped_by_the_norm_of_the_true_ones(how):
    """The factor is computed from what unscale returned, but what it multiplies is scaled all the same."""
    loop = Loop()
    loop.optimizer.build(loop.variables)

    def step():
        grads = loop.gradients(3.0)
        true, _ = loop.optimizer.unscale(grads)
        factor = 1.5 / tf.reduce_max(tf.stack(true))
        loop.optimizer.apply([grad * factor for grad in grads], loop.variables)

    (step if how == "eager" else tf.function(step))()
    assert loop.fall() == 1.5


def test_gradients_may_be_arrays():
    loop = Loop()
    true, finite = loop.optimizer.unscale([grad.numpy() for grad in loop.gradients()])
    loop.optimizer.apply([np.clip(grad.numpy(), -0.5, 0.5) for grad in true], loop.variables, finite=bool(finite))
    loop.optimizer.apply([grad.numpy() for grad in loop.gradients()], loop.variables)
    assert loop.fall() == 1.5


def test_blame_asks_for_the_variables_where_unscale_is_called_in_a_loop():
    loop = Loop(blame=True)
    loop.optimizer.build(loop.variables)

    @tf.function
    def step():
        def body(i, finite):
            return i + 1, tf.logical_and(finite, loop.optimizer.unscale(loop.gradients())[1])

        _, finite = tf.while_loop(lambda i, _: i < 2, body, [0, True])
        loop.optimizer.apply([tf.ones(2) for _ in loop.variables], loop.variables, finite=finite)

    with pytest.raises(ValueError, match="pass the variables to unscale"):
        step()


def test_scaled_gradients_that_come_with_finite_are_refused():
    loop = Loop()
    grads = loop.gradients()
    _, finite = loop.optimizer.unscale(grads)
    with pytest.raises(ValueError, match="these are the scaled gradients"):
        loop.optimizer.apply(grads, loop.variables, finite=finite)


def test_watching_ends_with_the_step():
    """Eager operations are watched only between unscale and the end of its step."""
    from tensorflow.python.eager import context

    def watchers():
        return len(context.context().op_callbacks)

    gc.collect()
    before = watchers()
    loop = Loop()
    step_with_finite(loop)
    assert watchers() == before
    left_out(loop)
    assert watchers() == before + 1
    loop.gradients()
    assert watchers() == before
    left_out(loop)
    del loop
    gc.collect()
    assert watchers() == before


# What is only said


def never_scaled(loop):
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(v.value) for v in loop.variables)
    return tape.gradient(loss, [v.value for v in loop.variables])


def forgot(loop):
    loop.optimizer.apply(never_scaled(loop), loop.variables)


def forgot_and_clips(loop):
    grads, finite = loop.optimizer.unscale(never_scaled(loop))
    loop.optimizer.apply(clipped(grads), loop.variables, finite=finite)


def forgot_and_logs(loop):
    forgot(loop)
    float(loop.optimizer.loss_scale_value)


@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize("step", [forgot, forgot_and_clips])
@pytest.mark.parametrize("rule", [StaticLossScale(SCALE), DynamicLossScale(SCALE), LogMaxLossScale()], ids=repr)
def test_a_loop_that_never_scales_its_loss_is_told_once(step, how, rule):
    loop = Loop(rule)
    body = lambda: step(loop)  # noqa: E731
    body = body if how == "eager" else tf.function(body, jit_compile=how == "xla")
    with pytest.warns(UnscaledLossWarning, match=r"Differentiate optimizer\.scale_loss\(loss\)") as said:
        body()
    assert len(said) == 1
    for _ in range(2):
        body()


def test_a_loop_that_reads_the_scale_for_its_log_only_is_told():
    with pytest.warns(UnscaledLossWarning):
        forgot_and_logs(Loop())


def test_a_train_step_that_forgets_to_scale_is_told():
    class Forgetful(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x))
            grads = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(zip(grads, self.trainable_variables, strict=True))
            return {"loss": loss}

    model = Forgetful()
    model.compile(LossScaleOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
    with pytest.warns(UnscaledLossWarning) as said:
        model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, verbose=0)
    assert len(said) == 1


def test_a_loop_that_never_unscales_is_told():
    loop = Loop()
    grads = loop.gradients()
    with pytest.warns(UnscaledLossWarning, match="unscale was never called"):
        loop.optimizer.apply(grads, loop.variables, finite=all_finite(grads))


def by_fit(loop):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loop.optimizer, "mse", jit_compile=False)
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


def scaled_by_hand(loop):
    with tf.GradientTape() as tape:
        scaled = sum(tf.reduce_sum(v.value) for v in loop.variables) * loop.optimizer.loss_scale_value
    loop.optimizer.apply(tape.gradient(scaled, [v.value for v in loop.variables]), loop.variables)


def unscaled_by_hand(loop):
    grads = [g / loop.optimizer.loss_scale_value for g in loop.gradients()]
    loop.optimizer.apply(grads, loop.variables, finite=all_finite(grads))


def scaled_in_another_function(loop):
    grads = tf.function(loop.gradients)
    update = tf.function(lambda grads: loop.optimizer.apply(grads, loop.variables))
    for _ in range(3):
        update(grads())


def scaled_by_a_restored_optimizer(loop):
    again = Loop()
    again.optimizer.build(again.variables)
    loop.optimizer.build(loop.variables)
    again.optimizer.set_weights([v.numpy() for v in loop.optimizer.variables])
    again.optimizer.apply(again.gradients(), again.variables)


def accumulated(loop):
    total = [tf.zeros(2)] * 3
    for _ in range(4):
        total = [a + b for a, b in zip(total, loop.gradients(), strict=True)]
    loop.optimizer.apply(total, loop.variables)


@pytest.mark.parametrize(
    "use",
    [by_fit, scaled_by_hand, unscaled_by_hand, scaled_in_another_function, scaled_by_a_restored_optimizer, accumulated],
)
def test_a_right_loop_is_told_nothing(use):
    use(Loop())


@pytest.mark.parametrize("rule", [NoLossScale(), StaticLossScale(1.0)], ids=repr)
def test_without_a_scale_there_is_nothing_to_say(rule):
    forgot(Loop(rule))
