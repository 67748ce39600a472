"""An injector called on gradients: which steps and gradients it hits, what it keeps, what it refuses."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_step import HOW, compiled

from mpscale.testing import inject_overflow


class Named:
    """The part of a variable that the injector uses."""

    def __init__(self, path):
        self.path = path


VARIABLES = [Named("dense/kernel"), Named("dense/bias"), Named("head/kernel")]


def gradients():
    """Return three gradients of different dtype and shape, the last one sparse."""
    sparse = tf.IndexedSlices(tf.ones((2, 3)), tf.constant([4, 1], tf.int64), tf.constant([5, 3], tf.int64))
    return [tf.ones((2, 2), tf.float16), tf.ones((), tf.bfloat16), sparse]


def values(grad):
    return grad.values if isinstance(grad, tf.IndexedSlices) else grad


def hits(inject, how, steps, variables=VARIABLES):
    """Call one function ``steps`` times; return the places hit, as (step, gradient, flat index), and the values."""
    traces = []

    def train_step():
        traces.append(1)
        return inject(gradients(), variables)

    function = compiled(train_step, how)
    hit, found = set(), set()
    for step in range(steps):
        for index, grad in enumerate(map(values, function())):
            flat = grad.numpy().astype(np.float32).reshape(-1)
            assert (flat[np.isfinite(flat)] == 1).all()
            hit |= {(step, index, int(place)) for place in np.flatnonzero(~np.isfinite(flat))}
            found |= set(map(str, flat[~np.isfinite(flat)]))
    assert len(traces) == (steps if how == "eager" else 1)
    assert inject.calls == steps
    return hit, found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("arguments", "hit", "found"),
    [
        pytest.param({"step": 0, "variable": 0}, {(0, 0, 0)}, {"inf"}, id="the first step"),
        pytest.param({"step": (1, 3), "variable": 1}, {(1, 1, 0), (3, 1, 0)}, {"inf"}, id="several steps"),
        pytest.param(
            {"step": 2, "variable": 2, "value": math.nan}, {(2, 2, 0)}, {"nan"}, id="nan in a sparse gradient"
        ),
        pytest.param({"step": 2, "value": -math.inf}, {(2, i, 0) for i in range(3)}, {"-inf"}, id="-inf in all"),
    ],
)
def test_only_the_chosen_steps_and_gradients_are_hit(how, arguments, hit, found):
    assert hits(inject_overflow(**arguments), how, 4) == (hit, found)


@pytest.mark.parametrize(
    ("step", "steps"),
    [
        (range(1, 3), {1, 2}),
        (iter([2, 0]), {0, 2}),
        (np.array([1, 1]), {1}),
        (np.int64(3), {3}),
        (np.array(1), {1}),
        ([], set()),
        (9, set()),
    ],
)
def test_steps_are_an_integer_or_any_iterable_of_them(step, steps):
    assert {place[0] for place in hits(inject_overflow(step, variable=0), "eager", 4)[0]} == steps


@pytest.mark.parametrize(
    ("variable", "index"),
    [
        pytest.param("dense/kernel", 0, id="whole path"),
        pytest.param("bias", 1, id="end of a path"),
        pytest.param("head/kernel:0", 2, id="TensorFlow's way"),
        pytest.param(2, 2, id="index"),
    ],
)
def test_a_variable_is_chosen_by_path_or_index(variable, index):
    assert hits(inject_overflow(0, variable=variable), "eager", 1)[0] == {(0, index, 0)}


def test_a_whole_path_takes_precedence_over_the_end_of_another():
    variables = [Named("block/kernel"), Named("kernel"), Named("bias")]
    assert hits(inject_overflow(0, variable="kernel"), "eager", 1, variables)[0] == {(0, 1, 0)}


@pytest.mark.parametrize(
    "variable", [keras.Variable(0.0, name="w"), tf.Variable(0.0, name="w"), tf.Variable(0.0, name="layer/w")]
)
def test_paths_are_those_of_keras_and_tensorflow_variables(variable):
    (grad,) = inject_overflow(0, variable="w")([tf.constant(1.0)], [variable])
    assert math.isinf(grad)


@pytest.mark.parametrize("how", HOW)
def test_kind_shape_and_dtype_stay(how):
    inject = inject_overflow(0)
    injected = compiled(lambda: inject(gradients()), how)()
    for after, before in zip(injected, gradients(), strict=True):
        assert type(after) is type(before) or not isinstance(before, tf.IndexedSlices)
        assert values(after).dtype == values(before).dtype
        assert values(after).shape == values(before).shape
    assert injected[2].indices.numpy().tolist() == [4, 1]
    assert injected[2].dense_shape.numpy().tolist() == [5, 3]


@pytest.mark.parametrize("variable", [1, None])
def test_gradients_that_are_none_stay_none(variable):
    first, second = inject_overflow(0, variable=variable)(iter([None, tf.ones(2)]))
    assert first is None
    assert second.numpy().tolist() == [math.inf, 1.0]


@pytest.mark.parametrize(("rows", "after"), [(2, [[math.inf], [1.0]]), (0, [])])
def test_the_number_of_elements_may_be_unknown_while_tracing(rows, after):
    inject = inject_overflow(0)
    function = tf.function(
        lambda grad: inject([grad])[0], input_signature=[tf.TensorSpec((None, 1), tf.float32, name="grad")]
    )
    assert function.get_concrete_function().output_shapes.as_list() == [None, 1]
    assert function(tf.ones((rows, 1))).numpy().tolist() == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step must be an integer of at least 0 or several of them, not -1"),
        ({"step": [0, 1.5]}, "not \\[0, 1.5\\]"),
        ({"step": True}, "not True"),
        ({"step": "3"}, "not '3'"),
        ({"step": None}, "not None"),
        ({"step": 0, "replica": -1}, "replica must be an integer of at least 0, or None for all replicas; not -1"),
        ({"step": 0, "replica": "0"}, "replica must be an integer"),
        ({"step": 0, "variable": -1}, "variable must be an integer of at least 0, a path such as 'dense/kernel'"),
        ({"step": 0, "variable": 1.0}, "not 1.0"),
        ({"step": 0, "value": 65504.0}, "value must be inf, -inf or nan, not 65504.0"),
        ({"step": 0, "value": "inf"}, "not 'inf'"),
        ({"step": 0, "value": None}, "not None"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        inject_overflow(**arguments)


@pytest.mark.parametrize(
    ("arguments", "grads", "variables", "message"),
    [
        ({"variable": "bias"}, [1.0], None, "'bias' is a path, so pass the variables along with the gradients"),
        ({"variable": "gamma"}, [1.0] * 3, VARIABLES, "'gamma'; there are dense/kernel, dense/bias, head/kernel"),
        ({"variable": "ernel"}, [1.0] * 3, VARIABLES, "no variable is called 'ernel'"),
        ({"variable": "kernel"}, [1.0] * 3, VARIABLES, "can be dense/kernel or head/kernel; give the whole path"),
        ({"variable": "w"}, [1.0] * 2, [Named("w")] * 2, "can be w or w; .* the index in w, w"),
        ({"variable": 3}, [1.0] * 3, VARIABLES, "variable=3 is not among the 3 gradients of dense/kernel"),
        ({"variable": 1}, [1.0], None, "variable=1 is not among the 1 gradients; the first is 0"),
        ({}, [1.0], VARIABLES, "1 gradients and 3 variables"),
        ({"variable": "bias"}, [1.0, None, 1.0], VARIABLES, "the gradient of variable='bias' is None or empty"),
        ({}, [None, None], None, "all gradients are None or empty"),
        ({}, [], None, "all gradients are None or empty"),
        ({"variable": 0}, [np.ones((0, 2))], None, "the gradient of variable=0 is None or empty"),
        ({"replica": 1}, [1.0], None, "replica=1, but 1 are in sync"),
    ],
)
def test_a_place_that_does_not_exist_is_refused(arguments, grads, variables, message):
    with pytest.raises(ValueError, match=message):
        inject_overflow(0, **arguments)(grads, variables)


@pytest.mark.parametrize("grads", [tf.ones(2), np.ones(2), gradients()[2], {"w": tf.ones(2)}])
def test_gradients_have_to_be_a_list(grads):
    with pytest.raises(TypeError, match="put it into a list"):
        inject_overflow(0)(grads)
