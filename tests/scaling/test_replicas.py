"""LossScaleOptimizer under strategies: one decision for all replicas."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from mpscale.scaling import LossScaleOptimizer

PROGRAM = Path(__file__).parents[1] / "support" / "replica_programs.py"
CHANGED = [True, False, True, True, False, True]
COUNTERS = {"attempted": 6, "applied": 4, "skipped": 2, "overflow": 2, "first_overflow": 1, "last_overflow": 4}


def start(how, **environment):
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"} | environment
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def results(process):
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def mirrored():
    return results(start("mirrored"))


@pytest.mark.parametrize("case", ["first", "second", "second, blame", "second, blame, clipped"])
def test_overflow_on_one_replica_skips_on_all(mirrored, case):
    result = mirrored[case]
    assert result["changed"] == CHANGED
    assert result["finite"] and result["replicas_agree"]
    assert result["scales"] == [8.0, 4.0, 4.0, 4.0, 2.0, 2.0]
    assert result["counters"] | COUNTERS == result["counters"]


def test_statistics_are_taken_over_all_replicas(mirrored):
    result = mirrored["second, logmax"]
    assert result["changed"] == CHANGED
    assert result["finite"] and result["replicas_agree"]
    assert result["scales"][1] < result["scales"][0]


@pytest.mark.parametrize("case", ["second, blame", "second, blame, clipped"])
def test_a_variable_is_blamed_whichever_replica_its_gradient_is_on(mirrored, case):
    (blamed,) = mirrored[case]["counters"]["by_variable"].items()
    assert blamed[0].endswith("kernel") and blamed[1] == 2


def test_keras_optimizer_lets_an_overflow_of_the_second_replica_through(mirrored):
    """The reason for one decision over all replicas: Keras 3.15 checks only the first one."""
    assert mirrored["second, keras"]["changed"][1]
    assert not mirrored["second, keras"]["finite"]


def test_fit_skips_what_one_replica_overflows(mirrored):
    assert mirrored["fit"]["counters"] | {"attempted": 3, "applied": 2, "overflow": 1} == mirrored["fit"]["counters"]
    assert mirrored["fit"]["scale"] == 4.0


def test_jit_compile_is_refused_with_a_remedy_unlike_by_keras(mirrored):
    assert mirrored["jit, keras"].startswith("InvalidArgumentError")
    assert "model.compile(..., jit_compile=False)" in mirrored["jit"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("jit", "jit_compile=True does not work with MirroredStrategy on these devices"),
        ("not built", "call build(model.trainable_variables) under strategy.scope() before the first step"),
        ("cross-replica", "call it inside the function that you pass to strategy.run"),
        ("made outside", "was made outside strategy.scope(), so every replica would count each step again"),
        ("inner made outside", "make both under strategy.scope()"),
        ("accumulating", "gradient_accumulation_steps does not work under a strategy"),
    ],
)
def test_uses_that_cannot_work_on_several_replicas_are_refused(mirrored, case, message):
    assert mirrored[case].startswith("ValueError")
    assert message in mirrored[case]


@pytest.mark.parametrize(
    ("changed", "reductions"),
    [
        pytest.param(lambda finite: finite, 1, id="passed on"),
        pytest.param(lambda finite: finite & True, 2, id="computed from it"),
    ],
)
def test_replicas_agree_once_unless_finite_was_changed(changed, reductions, monkeypatch):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        weight = keras.Variable([0.0])
        optimizer = LossScaleOptimizer(keras.optimizers.SGD(1.0))
        optimizer.build([weight])
    calls, reduce = [], tf.distribute.ReplicaContext.all_reduce

    def counted(self, how, value, *args, **options):
        if tf.is_tensor(value):  # Keras sums gradients too, a list of them.
            calls.append(value)
        return reduce(self, how, value, *args, **options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", counted)

    def step():
        grads, finite = optimizer.unscale([optimizer.scale_loss(tf.ones(1))])
        optimizer.apply(grads, [weight], finite=changed(finite))

    tf.function(lambda: strategy.run(step), autograph=False)()
    assert len(calls) == reductions
    assert weight.numpy() == -1.0


@pytest.mark.slow  # mirrored replicas agree by the same reduction
def test_overflow_on_one_worker_skips_on_both():
    """Two processes on loopback stand for two machines."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    processes = [
        start("multiworker", TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}))
        for index in range(2)
    ]
    try:
        first, second = [results(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert first["replicas"] == second["replicas"] == 2
    for case in ("first", "second", "second, blame"):
        assert first[case] == second[case]
        assert first[case]["changed"] == CHANGED
        assert first[case]["finite"]
        assert first[case]["counters"] | COUNTERS == first[case]["counters"]
