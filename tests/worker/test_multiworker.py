"""Worker processes that train one case together train as one process does, and none waits for one that is gone."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import worker_groups
from support.processes import wait_for

from mpscale.core.case import Settings
from mpscale.core.cluster import BadCluster, Cluster
from mpscale.worker.cluster import meet, replicas_here
from mpscale.worker.errors import PeerLost

TOGETHER = {"strategy": "multiworker", "replicas": 2}
TIMED = {"steps_per_call": 4, "timing_s": 0.1, "timing_blocks": 3, "energy_s": 0.2}
MIRRORED = {"strategy": "mirrored", "replicas": 2}
SHORT = TOGETHER | {"train_steps": 4}
LONG = TOGETHER | {"train_steps": 100_000}


def group(workload, *workers, **options):
    return {"workload": f"support.cluster_workloads:{workload}", "workers": list(workers), **options}


GROUPS = {
    "one device": group("plain", {"batch_size": 40}),
    "two workers": group("plain", *[TOGETHER | TIMED] * 2),
    "two of two": group("plain", *[TOGETHER | {"replicas": 4, "batch_size": 10}] * 2, chief=True),
    "one worker": group("plain", TOGETHER | TIMED),
    "overflow": group("overflowing", *[TOGETHER] * 2, mode="mixed-dynamic"),
    "overflow, mirrored": group("overflowing", MIRRORED, mode="mixed-dynamic"),
    "compiled": group("fitted", *[TOGETHER] * 2),
    "compiled, mirrored": group("fitted", MIRRORED),
    "its own train_step": group("own_step", *[TOGETHER | TIMED] * 2, mode="mixed-dynamic"),
    "its own train_step, mirrored": group("own_step", MIRRORED, mode="mixed-dynamic"),
    "a pipeline": group("texts", *[TOGETHER] * 2),
    "a pipeline, mirrored": group("texts", MIRRORED),
    "statistics": group("statistics", *[TOGETHER] * 2),
    "the second killed": group("plain", *[LONG] * 2, kill=(1, "SIGTERM")),
    "the first killed": group("plain", *[LONG] * 2, kill=(0, "SIGKILL")),
    "other steps": group("plain", TOGETHER, TOGETHER | {"train_steps": 25}),
    "other replicas": group("plain", TOGETHER, TOGETHER | {"replicas": 4}),
    "other data": group("differing", *[TOGETHER] * 2),
    "shared unequally": group("plain", *[TOGETHER | {"replicas": 3}] * 2),
    "other callbacks": group("other_rates", *[SHORT] * 2),
    "other batches": group("other_texts", *[TOGETHER] * 2),
    "batches in any order": group("unordered", *[SHORT] * 2),
    "Keras' scaling": group("own_step", *[SHORT] * 2, mode="mixed-keras"),
}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Processes of their own, as a worker joins the others before TensorFlow touches a device."""
    program, folder = Path(worker_groups.__file__), tmp_path_factory.mktemp("cluster")
    paths = os.pathsep.join([str(program.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(program), str(folder)], input=json.dumps(GROUPS), capture_output=True,
        text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(worker):
    return np.array(worker["loss"], float)


@pytest.mark.parametrize("name", ["two workers", "two of two", "one worker"])
def test_workers_train_as_one_device_with_the_whole_batch(groups, name):
    (one,) = groups["one device"]
    for worker in groups[name]:
        assert (worker["code"], worker["end"]["status"], worker["remarks"]) == (0, "ok", [])
        assert losses(worker) == pytest.approx(losses(one), rel=1e-6)
        for fact in ("initial_weights_digest", "data_order_digest", "flops_per_step", "metric_value", "batch_size"):
            assert worker["row"][fact] == one["row"][fact] is not None


def test_workers_agree_on_the_number_of_steps_that_they_time(groups):
    first, second = (worker["row"] for worker in groups["two workers"])
    assert first["timed_steps"] == second["timed_steps"] >= 3 * 4
    assert first["examples_per_s"] == pytest.approx(40 / first["step_time_ms_median"] * 1e3)


def test_an_overflow_on_one_worker_is_one_decision_of_all(groups):
    (mirrored,) = groups["overflow, mirrored"]
    assert mirrored["overflow"].count("1") == 6
    for worker in groups["overflow"]:
        assert (worker["overflow"], worker["scale"]) == (mirrored["overflow"], mirrored["scale"])
        assert losses(worker) == pytest.approx(losses(mirrored), rel=5e-3, nan_ok=True)


@pytest.mark.parametrize("name", ["compiled", "its own train_step", "a pipeline"])
def test_compiled_models_and_pipelines_train_as_on_the_replicas_of_one_process(groups, name):
    (mirrored,) = groups[f"{name}, mirrored"]
    # In float16, sums differ by the order in which they are made.
    precision = 5e-3 if name == "its own train_step" else 1e-6
    for worker in groups[name]:
        assert (worker["code"], worker["end"]["status"], worker["remarks"]) == (0, "ok", mirrored["remarks"])
        assert losses(worker) == pytest.approx(losses(mirrored), rel=precision, nan_ok=True)
        assert (worker["overflow"], worker["scale"]) == (mirrored["overflow"], mirrored["scale"])
        assert worker["row"]["metric_value"] == pytest.approx(mirrored["row"]["metric_value"], rel=1e-6)
        for fact in ("initial_weights_digest", "data_order_digest", "batch_size", "input_shapes"):
            assert worker["row"][fact] == mirrored["row"][fact] is not None
    assert len(losses(mirrored)) == 24
    assert mirrored["overflow"].count("1") == (6 if name == "its own train_step" else 0)
    told = ["is not divided by the number of replicas" in remark for remark in mirrored["remarks"]]
    assert told == ([True] if name == "a pipeline" else [])


def test_a_model_with_statistics_of_batches_is_evaluated_on_all_workers(groups):
    first, second = groups["statistics"]
    assert (first["end"]["status"], second["end"]["status"]) == ("ok", "ok")
    assert first["row"]["metric_value"] > 0.5
    assert first["row"]["steps_to_target"] == second["row"]["steps_to_target"] == 12
    assert first["loss"] == second["loss"]


@pytest.mark.parametrize(
    ("name", "killed", "code"),
    [
        pytest.param("the second killed", 1, -15, id="the second"),
        pytest.param("the first killed", 0, -9, id="the first"),
    ],
)
def test_a_worker_ends_by_itself_soon_after_another_one_was_killed(groups, name, killed, code):
    dead, other = groups[name][killed], groups[name][1 - killed]
    assert (dead["code"], dead["end"]) == (code, None)
    assert (other["code"], other["end"]["type"], other["end"]["cause"]) == (1, "PeerLost", "peer-lost")
    assert other["end"]["message"].startswith("another worker of the case ended, or cannot be reached: ")
    assert other["seconds"] < 30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other steps", "worker 2 of 2 would not train the same as worker 1 (train_steps: 25, not null)"),
        ("other replicas", "worker 2 of 2 would not train the same as worker 1 (replicas: 4, not 2)"),
        ("other data", "data_digest: "),
        ("other callbacks", "worker 2 of 2 would not train the same as worker 1 (weights after the callbacks: "),
        ("other batches", "worker 2 of 2 would not train the same as worker 1 (data_order_digest: "),
        ("batches in any order", "a pipeline with deterministic=False, of which each worker would see other batches"),
        ("shared unequally", "3 replicas cannot be shared equally by 2 workers; give --mp-replicas a multiple of 2"),
    ],
)
def test_workers_that_would_train_something_else_say_so(groups, name, message):
    for worker in groups[name]:
        assert (worker["end"]["type"], worker["end"]["cause"]) == ("ValueError", "exception")
        assert message in worker["end"]["message"]


def test_a_scaling_by_which_workers_would_wait_for_each_other_is_refused(groups):
    for worker in groups["Keras' scaling"]:
        assert worker["end"]["status"] == "unsupported"
        assert "would wait for each other for ever; use mixed-dynamic" in worker["end"]["reason"]


def test_workers_that_never_come_are_named():
    addresses = tuple(worker_groups.free_addresses(3))
    with pytest.raises(PeerLost, match=r"^worker 2 of 3 and worker 3 of 3 did not come within 0.1 s$"):
        meet(Cluster(addresses, 0, ""), 0.1)
    with pytest.raises(PeerLost, match=r"^worker 1 of 3 did not come within 0.1 s \(.*refused\)$"):
        meet(Cluster(addresses, 2, ""), 0.1)


def test_a_worker_does_not_wait_for_ever_for_something_that_is_not_the_first_one():
    cluster = Cluster(tuple(worker_groups.free_addresses(2)), 1, "")
    host, port = cluster.workers[0].split(":")
    with socket.create_server((host, int(port))) as server, ThreadPoolExecutor() as pool:
        second = pool.submit(meet, cluster, 0.2)
        while not second.done():
            server.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                server.accept()[0].close()
        assert str(second.exception()) == "worker 1 of 2 did not come within 0.2 s"


def test_workers_wait_for_each_other_and_for_nobody_else():
    cluster = Cluster(tuple(worker_groups.free_addresses(3)), 0, "")
    host, port = cluster.workers[0].split(":")
    with ThreadPoolExecutor() as pool:
        with socket.create_server((host, int(port))) as of_a_case_before:
            second = pool.submit(meet, replace(cluster, place=1), 60.0)
            connection, _ = of_a_case_before.accept()
            connection.sendall(b"something else")
            connection.close()
        first = pool.submit(meet, cluster, 60.0)
        wait_for(lambda: connects(host, int(port), b"GET / HTTP/1.1\r\n"), "the first worker", 30)
        assert not first.done() and not second.done()
        third = pool.submit(meet, replace(cluster, place=2), 60.0)
        assert first.result(60) is None
        # TensorFlow's server comes to the same address.
        with socket.create_server((host, int(port))):
            assert second.result(60) is third.result(60) is None


def connects(host, port, words):
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, port)) as connection:
        connection.sendall(words)
        return True


@pytest.mark.parametrize(
    "config", ["", "{", '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}']
)
def test_a_cluster_without_this_process_is_refused(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(BadCluster, match="TF_CONFIG"):
        replicas_here(Settings(**TOGETHER))
