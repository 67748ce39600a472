"""A run that is killed for real and goes on: the same rows as of a run that nobody disturbed, each once."""

import json
import os
import signal
import subprocess

import pytest
from support.gpu_machine import FINE, QUICK
from support.nvml_stand_in import NAME, UUID
from support.processes import wait_for
from support.small_suite import SUITE, command, environment, pytest_in

import mpscale

OPTIONS = ("--mp-workloads=suite_workloads:fine", "--mp-modes=fp32,mixed-dynamic", "--mp-timing=0.05", "--mp-jit=off")
SAME = (
    "case_id", "status", "metric_value", "final_accuracy", "initial_weights_digest", "data_order_digest",
    "workload_digest", "model_digest", "loss_probe", "train_loss_final", "applied_steps", "loss_scale_final",
    "series_key",
)  # fmt: skip
"""What a training on a CPU gives each time."""


def start(folder, *options):
    return subprocess.Popen(
        command(*options),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def journals(folder):
    return list(folder.glob("results/runs/*/journal.jsonl"))


def killed_in_case(folder, number, *options):
    """Start a session, and kill it as soon as so many cases have begun since its run began; return the run's folder."""
    session = start(folder, *options)
    try:
        wait_for(lambda: [j for j in journals(folder) if j.read_text().count('"case_started"') >= number], "the case")
        os.kill(session.pid, signal.SIGKILL)
    finally:
        session.kill()
        session.communicate()
    (journal,) = journals(folder)
    return journal.parent


def events(path, kind):
    told = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    return [event["case_id"] for event in told if event["event"] == kind]


def rows(path):
    return sorted(tuple(record[name] for name in SAME) for record in mpscale.read_run(path).records)


# tests/torture kills a session in its second case, too; tests/harness/test_resume.py has the refusal.
@pytest.mark.slow
def test_killed_and_resumed_by_one_session_at_a_time(tmp_path, write_suite):
    folder = write_suite(tmp_path)
    path = killed_in_case(folder, 2, *OPTIONS, "--mp-seeds=1", "--mp-repeats=1")
    before = (path / "journal.jsonl").read_bytes()
    (first,) = events(path, "case_finished")
    session = start(folder, "--mp-resume", "latest")
    try:
        wait_for(lambda: len(events(path, "case_started")) > 2, "the next case")
        other = pytest_in(folder, "--mp-resume", "latest")
        output, _ = session.communicate(timeout=120)
    finally:
        session.kill()
    assert other.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"is still going on: process {session.pid} on host" in other.stdout
    assert session.returncode == 0, output
    run = mpscale.read_run(path)
    assert (path / "journal.jsonl").read_bytes().startswith(before)
    assert sorted(events(path, "case_finished")) == sorted(run.info["planned"])
    assert [record["attempts"] for record in run.records] == [1, 2, 1, 1]
    assert {record["status"] for record in run.records} == {"ok"}
    # Both pairs of processes, one of which an interruption divided.
    summary = (path / "summary.csv").read_text()
    (row,) = [line for line in summary.splitlines() if ",mixed-dynamic," in line]
    values = dict(zip(summary.splitlines()[0].split(","), row.split(","), strict=False))
    assert values["speedup_fp32_low"] and values["speedup_fp32_high"]
    assert first == run.info["planned"][0]


@pytest.mark.slow
def test_killed_in_several_cases_it_equals_a_run_that_nobody_disturbed(tmp_path, write_suite):
    folder = write_suite(tmp_path / "killed")
    undisturbed = write_suite(tmp_path / "whole")
    assert pytest_in(undisturbed, *OPTIONS, "--mp-seeds=3").returncode == 0
    (whole,) = journals(undisturbed)
    path = killed_in_case(folder, 1, *OPTIONS, "--mp-seeds=3")
    for number in (3, 4, 7):
        assert killed_in_case(folder, number, "--mp-resume=latest") == path
    assert pytest_in(folder, "--mp-resume=latest").returncode == 0
    assert rows(path) == rows(whole.parent)
    assert sorted(events(path, "case_finished")) == sorted(mpscale.read_run(path).info["planned"])
    journal = (path / "journal.jsonl").read_bytes()
    again = pytest_in(folder, "--mp-resume=latest")
    assert again.returncode == 0
    assert "nothing to run, every case has its result" in again.stdout
    assert (path / "journal.jsonl").read_bytes() == journal


@pytest.mark.slow
def test_a_workload_that_was_changed_in_between_is_invalid(tmp_path, write_suite):
    folder = write_suite(tmp_path)
    path = killed_in_case(folder, 3, *OPTIONS, "--mp-seeds=2")
    module = folder / "suite_workloads.py"
    module.write_text(module.read_text().replace("def sgd(rate=0.3)", "def sgd(rate=0.2)"))
    done = pytest_in(folder, "--mp-resume=latest")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    statuses = [record["status"] for record in mpscale.read_run(path).records]
    assert statuses == ["ok", "ok", "invalid", "invalid"]
    assert "not the workload that the run began with" in done.stdout


@pytest.mark.slow
def test_on_a_gpu_the_name_must_be_the_same_and_the_number_may_differ(machine):
    options = (FINE, *QUICK, "--mp-modes=fp32,mixed-bf16", "--mp-seeds=2")
    assert machine.run(SUITE, *options).returncode == 0
    path = machine.path()
    before = rows(path)
    # As a kill in the second case leaves it.
    journal = path / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:4])[:-20])
    machine.script.set(name="NVIDIA Another GPU")
    other = machine.run(SUITE, FINE, "--mp-resume=latest")
    assert other.returncode == pytest.ExitCode.USAGE_ERROR
    assert "the machine is NVIDIA Another GPU (gpu), and was " in other.stdout
    machine.script.set(name=NAME, uuid=f"{UUID[:-1]}7")
    done = machine.run(SUITE, FINE, "--mp-resume=latest")
    assert done.returncode == 0, done.stdout
    assert rows(path) == before
    resumed = mpscale.read_run(path).info["resumed"]
    assert resumed[0]["differs"]["device uuid"] == [f"{UUID[:-1]}7", UUID]
