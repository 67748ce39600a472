"""Trainings in two processes, from the command line to the row: on one machine, and in two sessions of a scheduler."""

from __future__ import annotations

import json
import socket
import subprocess

import pandas as pd
import pytest
from support.processes import processes_in, wait_for
from support.small_suite import SUITE, command, environment

import mpscale

pytestmark = pytest.mark.slow  # test_peers, test_machines, test_machines_option and test_multiworker have the parts
QUICK = (
    "--mp-modes", "fp32,mixed-dynamic", "--mp-seeds", "1", "--mp-strategy", "multiworker", "--mp-steps", "30",
    "--mp-timing", "0.05", "--benchmark-only", "-p", "no:randomly",
)  # fmt: skip


@pytest.fixture(scope="module")
def on_one_machine(run_suite):
    workloads = "suite_workloads:fine,suite_workloads:second_killed,suite_workloads:second_fails"
    return run_suite("--mp-workloads", workloads, "--mp-replicas", "2", "--mp-retries", "0", *QUICK)


def test_two_workers_of_one_machine(on_one_machine):
    cases = pd.read_csv(on_one_machine.path / "cases.csv").set_index("workload")
    fine = cases.loc["suite_workloads:fine"]
    assert set(fine["status"]) == {"ok"}, fine["status_reason"]
    assert set(fine["strategy"]) == {"multiworker"} and set(fine["replicas"]) == {2}
    assert fine["series_key"].str.contains("strategy=multiworker,replicas=2/").all()
    killed, failing = cases.loc["suite_workloads:second_killed"], cases.loc["suite_workloads:second_fails"]
    assert set(killed["cause"]) == {"killed"}
    assert killed["status_reason"].str.startswith("worker 2 of 2: killed by SIGKILL").all()
    assert set(failing["cause"]) == {"exception"}
    assert failing["status_reason"].str.startswith("worker 2 of 2: ValueError: no metric in the second").all()
    assert processes_in(on_one_machine.folder) == []


def test_two_sessions_of_a_scheduler_train_the_same_and_one_may_be_replaced(on_one_machine, tmp_path, write_suite):
    held = [socket.socket() for _ in range(2)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in held]
    for each in held:
        each.close()
    cluster = {"chief": addresses[:1], "worker": addresses[1:]}
    workloads = "--mp-workloads=suite_workloads:second_waits,suite_workloads:fine"

    def start(place):
        folder = tmp_path / str(place)
        if not folder.exists():
            folder.mkdir()
            write_suite(folder, SUITE)
        task = {"type": ("chief", "worker")[place], "index": 0}
        variables = environment(
            TF_CONFIG=json.dumps({"cluster": cluster, "task": task}), SUITE_WAITS=str(tmp_path / "waits")
        )
        with (folder / "output").open("ab") as output:
            return subprocess.Popen(
                command(workloads, "--mp-retries=1", *QUICK), cwd=folder, env=variables, stdout=output, stderr=output
            )

    first, second = start(0), start(1)
    try:
        wait_for((tmp_path / "waits").exists, "the second worker", 120)
        second.kill()
        second.wait()
        second = start(1)
        codes = [session.wait(200) for session in (first, second)]
    finally:
        for session in (first, second):
            session.kill()
            session.wait()
    outputs = [(tmp_path / str(place) / "output").read_text() for place in (0, 1)]
    assert codes == [0, 0], outputs
    assert "worker 2 of 2: the run is over" in outputs[1]
    (path,) = (tmp_path / "0" / "results" / "runs").iterdir()
    cases = {(case["workload"].partition(":")[2], case["mode"]): case for case in mpscale.read_run(path).records}
    waited = next(case for case in cases.values() if case["attempts"] == 2)
    assert "worker 2 of 2: its session has ended, or its machine cannot be reached" in waited["note"]
    assert {case["status"] for case in cases.values()} == {"ok"}
    alone = {(case["workload"].partition(":")[2], case["mode"]): case for case in on_one_machine.run.records}
    for mode in ("fp32", "mixed-dynamic"):
        one, two = alone["fine", mode], cases["fine", mode]
        for column in ("train_loss_final", "metric_value", "workload_digest"):
            assert one[column] == two[column], column
        assert two["series_key"] == one["series_key"].replace("replicas=2", "replicas=2,machines=2")
    assert not (tmp_path / "1" / "results").exists()
    for place in (0, 1):
        assert processes_in(tmp_path / str(place)) == []
