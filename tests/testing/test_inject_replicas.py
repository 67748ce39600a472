"""An overflow injected into one of several replicas."""

import json
import math
import subprocess
import sys
import textwrap

import pytest

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
    """Results of a process of its own, because logical devices have to be configured before TensorFlow starts."""
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
