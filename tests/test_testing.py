"""Overflows that are injected on purpose: where they hit, where they do not, and what scalers make of them."""

import json
import math
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpscale
from mpscale.testing import inject_overflow

COMPILE = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}


class Named:
    """As much of a variable as the injector looks at."""

    def __init__(self, path):
        self.path = path


VARIABLES = [Named("dense/kernel"), Named("dense/bias"), Named("head/kernel")]


def gradients():
    """Three gradients of different dtype and shape, the last one sparse."""
    sparse = tf.IndexedSlices(tf.ones((2, 3)), tf.constant([4, 1], tf.int64), tf.constant([5, 3], tf.int64))
    return [tf.ones((2, 2), tf.float16), tf.ones((), tf.bfloat16), sparse]


def values(grad):
    return grad.values if isinstance(grad, tf.IndexedSlices) else grad


def hits(inject, how, steps, variables=VARIABLES):
    """What was hit, as (step, gradient, flat index), and with which values, in ``steps`` calls of one function."""
    traces = []

    def train_step():
        traces.append(1)
        return inject(gradients(), variables)

    function = COMPILE[how](train_step)
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


@pytest.mark.parametrize("how", COMPILE)
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


def test_a_whole_path_goes_before_the_end_of_another():
    variables = [Named("block/kernel"), Named("kernel"), Named("bias")]
    assert hits(inject_overflow(0, variable="kernel"), "eager", 1, variables)[0] == {(0, 1, 0)}


@pytest.mark.parametrize(
    "variable", [keras.Variable(0.0, name="w"), tf.Variable(0.0, name="w"), tf.Variable(0.0, name="layer/w")]
)
def test_paths_are_those_of_keras_and_tensorflow_variables(variable):
    (grad,) = inject_overflow(0, variable="w")([tf.constant(1.0)], [variable])
    assert math.isinf(grad)


@pytest.mark.parametrize("how", COMPILE)
def test_kind_shape_and_dtype_stay(how):
    inject = inject_overflow(0)
    injected = COMPILE[how](lambda: inject(gradients()))()
    for after, before in zip(injected, gradients(), strict=True):
        assert type(after) is type(before) or not isinstance(before, tf.IndexedSlices)
        assert values(after).dtype == values(before).dtype
        assert values(after).shape == values(before).shape
    assert injected[2].indices.numpy().tolist() == [4, 1]
    assert injected[2].dense_shape.numpy().tolist() == [5, 3]


@pytest.mark.parametrize("variable", [1, None])
def test_gradients_that_are_none_are_passed_through(variable):
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


IN_REPLICAS = textwrap.dedent(
    """
    import json, math
    import keras, numpy as np, tensorflow as tf
    from mpscale.testing import inject_overflow

    cpu, two = tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    MULTI_WORKER = tf.distribute.MultiWorkerMirroredStrategy()
    MIRRORED = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    answers = {}

    def hits(strategy, how, **arguments):
        inject, hit, traces = inject_overflow(variable="w", **arguments), [], []
        with strategy.scope():
            variables = [tf.Variable(1.0, name="v"), tf.Variable(1.0, name="w")]
        def train_step():
            traces.append(1)
            return strategy.run(lambda: inject([tf.ones(2), tf.ones(2)], variables))
        if how == "graph":
            train_step = tf.function(train_step)
        for step in range(3):
            for index, grad in enumerate(train_step()):
                for replica, local in enumerate(strategy.experimental_local_results(grad)):
                    hit += [[step, replica, index]] * math.isinf(local.numpy().max())
        assert len(traces) == (3 if how == "eager" else 1)
        return sorted(hit), [inject.calls] + [int(v) for v in strategy.experimental_local_results(inject._count)]

    for name, strategy in ("mirrored", MIRRORED), ("multi-worker", MULTI_WORKER):
        for how in "eager", "graph":
            for replica in None, 0, 1:
                if replica is None or replica < strategy.num_replicas_in_sync:
                    answers[f"{name} {how} {replica}"] = hits(strategy, how, step=[0, 2], replica=replica)

    with MIRRORED.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(1e-3), "mse")
    def fit():
        model.fit(np.ones((4, 2)), np.ones((4, 1)), batch_size=4, verbose=0)
        return [bool(np.isfinite(weight).all()) for weight in model.get_weights()]
    inject = inject_overflow(step=1, replica=1, variable=0)
    with inject.into(model.optimizer):
        answers["fit 0"] = fit()
    answers["fit outside"] = fit()
    with inject.into(model.optimizer):
        answers["fit 1"] = fit()
    answers["fit calls"] = inject.calls

    wanted = []
    function = tf.function(lambda n: MIRRORED.run(lambda: [one([tf.ones(n)])[0] for one in wanted]))
    function(1)
    wanted.append(inject_overflow(0, replica=1))
    (grad,) = function(2)
    answers["traced before"] = [local.numpy().tolist() for local in MIRRORED.experimental_local_results(grad)]

    def error(function):
        try:
            function()
        except ValueError as error:
            return str(error)

    def outside():
        with MIRRORED.scope():
            inject_overflow(0)([tf.ones(1)])

    answers["outside"] = error(outside)
    everywhere = inject_overflow(0)
    MIRRORED.run(lambda: everywhere([tf.ones(1)]))
    answers["elsewhere"] = error(lambda: everywhere([tf.ones(1)]))
    answers["too many"] = error(lambda: MIRRORED.run(lambda: inject_overflow(0, replica=2)([tf.ones(1)])))
    print(json.dumps(answers))
    """
)


@pytest.fixture(scope="module")
def in_replicas():
    """What happens under strategies, in a process of its own: logical devices have to be made before all else."""
    done = subprocess.run([sys.executable, "-c", IN_REPLICAS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize(
    ("strategy", "replicas", "replica", "hit"),
    [
        pytest.param("mirrored", 2, 0, [0], id="the first of two replicas"),
        pytest.param("mirrored", 2, 1, [1], id="the second of two replicas"),
        pytest.param("mirrored", 2, None, [0, 1], id="both replicas"),
        pytest.param("multi-worker", 1, 0, [0], id="a worker of its own"),
        pytest.param("multi-worker", 1, None, [0], id="a worker, whichever"),
    ],
)
def test_the_chosen_replica_is_hit_in_the_chosen_steps(in_replicas, strategy, replicas, how, replica, hit):
    assert in_replicas[f"{strategy} {how} {replica}"] == [
        [[step, one, 1] for step in (0, 2) for one in hit],
        [3] * (1 + replicas),
    ]


def test_an_overflow_on_one_replica_reaches_the_weights_of_all_in_fit(in_replicas):
    assert in_replicas["fit 0"] == in_replicas["fit outside"] == [True] * 4
    assert in_replicas["fit 1"] == [False, True, True, True]
    assert in_replicas["fit calls"] == 2


def test_a_function_that_was_called_before_takes_a_new_injector(in_replicas):
    assert in_replicas["traced before"] == [[1.0, 1.0], [math.inf, 1.0]]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("outside", "call it in the function that strategy.run runs"),
        ("elsewhere", "counts its calls under MirroredStrategy and was now called under _DefaultDistributionStrategy"),
        ("too many", "replica=2, but 2 are in sync"),
    ],
)
def test_wrong_use_under_a_strategy_is_refused(in_replicas, where, message):
    assert message in in_replicas[where]


def fitting(optimizer, **compile_arguments):
    """A model, and a function that trains it for one step on data with a gradient for every weight."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")])
    model.compile(optimizer, "mse", **compile_arguments)

    def fit():
        model.fit(np.ones((4, 2)), np.full((4, 1), 9.0), batch_size=4, verbose=0)
        return [weight.copy() for weight in model.get_weights()]

    return model, fit


def same(weights, others):
    return all(np.array_equal(one, other) for one, other in zip(weights, others, strict=True))


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        pytest.param(
            lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=64.0),
            lambda optimizer: float(optimizer.dynamic_scale),
            id="Keras",
        ),
        pytest.param(
            lambda: mpscale.LossScaleOptimizer(
                keras.optimizers.SGD(1e-3), mpscale.DynamicLossScale(initial=64.0, maximum=64.0)
            ),
            lambda optimizer: float(optimizer.loss_scale_value),
            id="mpscale",
        ),
    ],
)
def test_a_loss_scale_optimizer_skips_the_step_in_fit_and_halves_its_scale(make, scale):
    optimizer = make()
    model, fit = fitting(optimizer)
    with inject_overflow(step=1, variable="dense/kernel").into(model):
        steps = [(fit(), scale(optimizer)) for _ in range(3)]
    assert [one for _, one in steps] == [64.0, 32.0, 32.0]
    assert same(steps[0][0], steps[1][0])
    assert not same(steps[1][0], steps[2][0])


@pytest.mark.parametrize("arguments", [{}, {"run_eagerly": True}, {"jit_compile": True}])
def test_a_bare_optimizer_takes_the_overflow_into_the_weight(arguments):
    optimizer = keras.optimizers.SGD(1e-3)
    _, fit = fitting(optimizer, **arguments)
    with inject_overflow(step=1, variable="kernel").into(optimizer):
        before, after = fit(), fit()
    assert all(np.isfinite(weight).all() for weight in before)
    assert not np.isfinite(after[0][0]).any()
    assert np.isfinite(after[0][1:]).all() and np.isfinite(after[1]).all()


@pytest.mark.parametrize("by", ["model", "optimizer"])
def test_nothing_is_injected_before_or_after_the_block(by):
    optimizer = keras.optimizers.SGD(1e-3)
    model, fit = fitting(optimizer)
    inject = inject_overflow(step=[0, 2])
    for _ in range(2):
        fit()
    with inject_overflow(step=9).into(model):
        fit()
    with inject.into(model if by == "model" else optimizer):
        model.train_function = None if by == "optimizer" else model.train_function
        assert not np.isfinite(fit()[0]).all()
        model.set_weights([np.ones((2, 1)), np.ones(1)])
        fit()
    for _ in range(2):
        assert all(np.isfinite(weight).all() for weight in fit())
    assert inject.calls == 2
    assert "apply" not in vars(optimizer)


def test_a_function_traced_in_one_block_is_injected_into_in_the_next():
    optimizer = keras.optimizers.SGD(1e-3)
    _, fit = fitting(optimizer)
    inject = inject_overflow(step=1)
    with inject.into(optimizer):
        fit()
    fit()
    with inject.into(optimizer):
        assert not np.isfinite(fit()[0]).all()


def test_apply_works_as_ever_inside_the_block():
    optimizer, weight = keras.optimizers.SGD(1.0), keras.Variable(3.0, name="w")
    with inject_overflow(step=3, variable="w").into(optimizer):
        optimizer.apply([tf.constant(1.0)], [weight])
        optimizer.apply([tf.constant(1.0)])
        optimizer.apply_gradients(zip([tf.constant(1.0)], [weight], strict=True))
        assert float(weight) == 0.0
        optimizer.apply([tf.constant(1.0)])
    assert math.isinf(float(weight))


def test_optimizer_is_as_before_when_training_fails():
    optimizer, inject = keras.optimizers.SGD(), inject_overflow(0)
    with pytest.raises(ZeroDivisionError), inject.into(optimizer):
        raise ZeroDivisionError
    assert "apply" not in vars(optimizer)
    assert not inject._inside


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
def test_a_place_that_is_not_there_is_refused(arguments, grads, variables, message):
    with pytest.raises(ValueError, match=message):
        inject_overflow(0, **arguments)(grads, variables)


@pytest.mark.parametrize("grads", [tf.ones(2), np.ones(2), gradients()[2], {"w": tf.ones(2)}])
def test_gradients_are_a_list(grads):
    with pytest.raises(TypeError, match="put it into a list"):
        inject_overflow(0)(grads)


def block(target, inside=lambda: None):
    with inject_overflow(0).into(target):
        inside()


def apply_a_step_that_was_judged():
    optimizer, weight = mpscale.LossScaleOptimizer(keras.optimizers.SGD()), keras.Variable(1.0)
    optimizer.build([weight])
    block(optimizer, lambda: optimizer.apply([tf.constant(1.0)], [weight], finite=tf.constant(True)))


def fit_what_was_traced_before():
    optimizer = keras.optimizers.SGD()
    _, fit = fitting(optimizer)
    fit()
    block(optimizer, fit)


def nest():
    inject, optimizer = inject_overflow(0), keras.optimizers.SGD()
    with inject.into(optimizer), inject.into(optimizer):
        pass


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (apply_a_step_that_was_judged, ValueError, "call the injector on the gradients before unscale"),
        (fit_what_was_traced_before, RuntimeError, "set model.train_function = None"),
        (nest, RuntimeError, "make another with inject_overflow"),
        (lambda: block(keras.optimizers.Adam()), RuntimeError, "no gradients arrived in the apply of Adam"),
        (lambda: tf.function(lambda: block(keras.optimizers.SGD()))(), RuntimeError, "is inside a tf.function"),
        (lambda: block("sgd"), TypeError, "takes a compiled Keras model or a Keras optimizer, not 'sgd'"),
        (lambda: block(keras.Sequential(name="m")), ValueError, "the model 'm' has no optimizer; compile it"),
    ],
)
def test_wrong_use_of_a_block_is_refused(use, error, message):
    with pytest.raises(error, match=message):
        use()
