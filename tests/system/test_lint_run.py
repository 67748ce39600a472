"""`mpscale lint` on this machine's CPU, in a process of its own, and the same at the start of a run."""

import json
import subprocess
import sys

import pytest

WORKLOAD = """
import mpscale
import numpy as np


def data():
    x = np.random.default_rng(0).normal(size=(64, 8))
    x[3, 1] = np.nan
    y = (x[:, 0] > 0).astype("int64")
    return mpscale.Data(train_x=x, train_y=y, test_x=x, test_y=y)


@mpscale.workload("tiny", data=data, optimizer="sgd", batch_size=16, train_steps=12)
def tiny():
    from keras import Input, Sequential, layers

    return Sequential([Input((8,)), layers.Dense(8, activation="relu"), layers.Dense(8, dtype="float32")])
"""
EXPECTED = {"inputs-not-finite": "problem", "float64-data": "caution"}


@pytest.mark.slow  # The worker's part and the command's are tested without a process, in tests/worker and tests/report.
def test_lint_and_the_start_of_a_run_find_the_same(tmp_path):
    (tmp_path / "tiny.py").write_text(WORKLOAD)

    def mpscale(*arguments):
        command = [sys.executable, "-m", "mpscale.cli", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    done = mpscale("lint", "tiny:tiny", "--mode", "fp32", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["modes"], found["failed"]) == (["fp32"], {})
    checks = {each["check"]: each["severity"] for each in found["findings"]}
    # Whether a step is mostly dispatch depends on the machine, and whether a bad example is in the first batch on luck.
    assert {check: checks[check] for check in checks if check not in ("dispatch-bound", "first-loss")} == EXPECTED
    assert not (tmp_path / "results").exists()

    options = ("--mp-modes", "fp32", "--mp-seeds", "2", "--mp-timing", "0.1", "--mp-energy", "0")
    run = mpscale("run", "--mp-workloads", "tiny:tiny", *options)
    told = [line for line in run.stdout.splitlines() if "inputs-not-finite" in line and line.startswith("mpscale: ")]
    assert len(told) == 1, run.stdout
    (journal,) = tmp_path.glob("results/runs/*/journal.jsonl")
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    records = {row["record"]["seed"]: row["record"] for row in rows if row["event"] == "case_finished"}
    assert {each["check"]: each["severity"] for each in json.loads(records[0]["lint"])} == EXPECTED
    assert "lint" not in records[1]
    assert "## Lint" in (journal.parent / "report.md").read_text()
