"""Overflows are counted for the variables whose gradients they are, however a loop passes gradients on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import HOW, Loop, clipped, compiled

from mpscale.scaling import LossScaleOptimizer


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
        for how in HOW
        # Python decides who is blamed: everything is tried eagerly, and the orders unlike build's are also compiled.
        if how == "eager" or order in ("cab", "cb")
    ],
)
def test_the_variable_of_the_gradient_is_blamed(order, use, how):
    loop = Loop(blame=True)
    loop.optimizer.build(loop.variables)
    by_name = dict(zip("abc", loop.variables, strict=True))
    variables = [by_name[name] for name in order]

    def step(bad):
        grads = loop.gradients(variables=variables)
        grads = [g * tf.where(tf.equal(bad, "abc".index(n)), np.inf, 1.0) for n, g in zip(order, grads, strict=True)]
        use(loop.optimizer, grads, variables)

    step = compiled(step, how)
    for name in ("b", order[0], "none"):
        step(tf.constant("abc".find(name)))
    expected = {"b": 2} if order[0] == "b" else {"b": 1, order[0]: 1}
    assert loop.optimizer.counters()["by_variable"] == {by_name[n].path: count for n, count in expected.items()}
    assert loop.optimizer.counters()["overflow"] == 2


def test_nobody_is_blamed_before_the_first_step():
    assert Loop(blame=True).optimizer.counters()["by_variable"] == {}


def test_two_variables_of_one_path_are_counted_apart():
    with keras.name_scope("layer"):
        one, other = keras.Variable([0.0], name="w"), keras.Variable([0.0], name="w")
    optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0), blame=True)
    optimizer.scale_loss(0.0)
    optimizer.apply([tf.ones(1), tf.constant([np.nan])], [one, other])
    assert optimizer.counters()["by_variable"] == {"layer/w (2)": 1}


def test_unscale_and_apply_in_separate_functions_need_the_variables():
    loop = Loop(blame=True)
    look = tf.function(lambda grads: loop.optimizer.unscale(grads))
    update = tf.function(lambda grads, finite: loop.apply(grads, finite))
    with pytest.raises(ValueError, match=r"optimizer\.unscale\(grads, variables\)"):
        update(*look(loop.gradients()))
    look = tf.function(lambda grads: loop.optimizer.unscale(grads, loop.variables))
    update = tf.function(lambda grads, finite: loop.apply(grads, finite))
    update(*look(loop.gradients(np.inf)))
    assert loop.optimizer.counters()["by_variable"] == {v.path: 1 for v in loop.variables}


def unknown_variable(loop):
    loop.optimizer.build(loop.variables[:2])
    loop.apply(loop.gradients())


def fewer_gradients_than_were_unscaled(loop):
    grads, finite = loop.optimizer.unscale(loop.gradients())
    loop.optimizer.apply(grads[:2], loop.variables[:2], finite=finite)


def unscale_in_a_loop(loop):
    loop.optimizer.build(loop.variables)

    def body(i, finite):
        return i + 1, tf.logical_and(finite, loop.optimizer.unscale(loop.gradients())[1])

    @tf.function
    def step():
        _, finite = tf.while_loop(lambda i, _: i < 2, body, [0, True])
        loop.apply(loop.constants(), finite)

    step()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (unknown_variable, "was not built with c; give build all variables"),
        (fewer_gradients_than_were_unscaled, "3 gradients cannot be blamed on the 2 variables"),
        (unscale_in_a_loop, "pass the variables to unscale"),
    ],
)
def test_gradients_that_cannot_be_blamed_on_a_variable_are_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use(Loop(blame=True))


@pytest.mark.parametrize("options", [{}, {"blame": True}], ids=["plain", "blame"])
def test_gradients_without_a_variable_are_refused(options):
    loop = Loop(**options)
    with pytest.raises(ValueError, match="3 gradients were given for 2 variables"):
        loop.optimizer.apply(loop.gradients(), loop.variables[:2])
