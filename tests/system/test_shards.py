"""The examples of docs/examples, run with bash as GitHub and SLURM would; and real trainings, divided and merged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.small_suite import environment, pytest_in

import mpscale
from mpscale.core.cluster import Cluster
from mpscale.core.shard import Shard

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
WORKFLOW = YAML(typ="safe").load((EXAMPLES / "shards.yml").read_text(encoding="utf-8"))
PART, MERGE = WORKFLOW["jobs"]["part"], WORKFLOW["jobs"]["merge"]
STAND_IN = '#!/bin/sh\nfor one in "$@"; do printf "%s\\n" "$one"; done >> "$LOG"\necho -- >> "$LOG"\n'
REAL = f'#!/bin/sh\nexec {sys.executable} -m mpscale "$@"\n'


@pytest.fixture
def bash(tmp_path):
    """Run a script in a folder, with this program as `mpscale`; return the arguments of each call of it."""

    def run(program, *command, **variables):
        tool = tmp_path / "bin" / "mpscale"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(program)
        tool.chmod(0o755)
        log = tmp_path / "log"
        log.write_text("")
        path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
        # The folder first: workloads of the tests lie there.
        python = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = environment(PATH=path, LOG=str(log), PYTHONPATH=python, **variables)
        done = subprocess.run(
            ["bash", *command], cwd=tmp_path, env=own, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [call.split("\n")[:-1] for call in log.read_text().split("--\n")[:-1]]

    return run


def step(job, name):
    return next(one for one in job["steps"] if one.get("name") == name)


def expanded(text, part):
    """Replace the expressions of the matrix, as GitHub does."""
    text = text.replace("${{ matrix.part }}", str(part))
    return text.replace("${{ strategy.job-total }}", str(len(PART["strategy"]["matrix"]["part"])))


def numbers_of(array):
    first, last = array.split("-")
    return range(int(first), int(last) + 1)


def batch_options():
    lines = (EXAMPLES / "shards.sbatch").read_text().splitlines()
    return dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines if "=" in line and "#SBATCH" in line)


def measure(bash, program, part, options):
    measured = step(PART, "Measure")
    shard = expanded(measured["env"]["PART"], part)
    assert "${{" not in shard + measured["run"]
    return bash(program, "-eo", "pipefail", "-c", measured["run"], OPTIONS=options, PART=shard)


def test_the_matrix_covers_every_part_once_and_its_files_come_together(bash, tmp_path):
    given = []
    for part in PART["strategy"]["matrix"]["part"]:
        (call,) = measure(bash, STAND_IN, part, WORKFLOW["env"]["OPTIONS"])
        assert call[0] == "run" and call[-2] == "--mp-shard"
        given.append(Shard.parse(call[-1]))
    assert given == [Shard(part, len(given)) for part in range(1, len(given) + 1)]
    # Each artifact holds runs/ without its own name, and all are put into one folder.
    uploaded, downloaded = (
        next(one["with"] for one in job["steps"] if one.get("uses", "").startswith(f"actions/{name}-artifact@"))
        for job, name in ((PART, "upload"), (MERGE, "download"))
    )
    assert uploaded["path"] == "results/runs" and downloaded["merge-multiple"] is True
    assert uploaded["name"].startswith(downloaded["pattern"].rstrip("*"))
    for name in ("one", "two"):
        (tmp_path / downloaded["path"] / name).mkdir(parents=True)
    (call,) = bash(STAND_IN, "-eo", "pipefail", "-c", step(MERGE, "Merge")["run"])
    assert call == ["merge", "parts/one/", "parts/two/"]


def test_no_script_of_the_workflow_contains_an_expression():
    scripts = [one["run"] for job in (PART, MERGE) for one in job["steps"] if "run" in one]
    assert not [script for script in scripts if "${{" in script]


def test_the_tasks_of_the_array_cover_every_part_once_and_go_on(bash, tmp_path):
    tasks = numbers_of(batch_options()["array"])
    given = []
    for task in tasks:
        (call,) = bash(STAND_IN, EXAMPLES / "shards.sbatch", "--mp-seeds", "8", SLURM_ARRAY_TASK_ID=str(task))
        command, results, shard, *rest = call
        assert (command, results, rest) == ("run", f"--mp-results=shards/part-{task}", ["--mp-seeds", "8"])
        given.append(Shard.parse(shard.removeprefix("--mp-shard=")))
    assert given == [Shard(task, len(tasks)) for task in tasks]
    run = tmp_path / "shards" / "part-2" / "runs" / "one"
    run.mkdir(parents=True)
    (run / "run.json").touch()
    (call,) = bash(STAND_IN, EXAMPLES / "shards.sbatch", "--mp-seeds", "8", SLURM_ARRAY_TASK_ID="2")
    assert call == ["run", "--mp-results=shards/part-2", "--mp-resume=latest"]


SLURM = {
    "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "node1\\nnode2\\n"\n',
    "srun": '#!/bin/sh\nshift\nfor rank in 0 1; do SLURM_PROCID=$rank "$@" || exit; done\n',
}
WITH_TASK = STAND_IN.replace("for one in", 'printf "%s\\n" "$TF_CONFIG" >> "$LOG"\nfor one in')


def test_each_node_of_a_job_gets_its_task(bash, tmp_path):
    for name, program in SLURM.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(program)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]"}
    calls = bash(WITH_TASK, EXAMPLES / "multiworker.sbatch", "--mp-seeds", "8", **variables)
    assert [call[1:] for call in calls] == [["run", "--mp-strategy=multiworker", "--mp-seeds", "8"]] * 2
    clusters = [Cluster.of({"TF_CONFIG": call[0]}) for call in calls]
    assert [cluster.place for cluster in clusters] == [0, 1]
    (workers,) = {cluster.workers for cluster in clusters}
    hosts, ports = zip(*(worker.split(":") for worker in workers), strict=True)
    assert hosts == ("node1", "node2")
    # Below those that Linux gives to whoever asks for any.
    assert len(set(ports)) == 1 and 20000 <= int(ports[0]) < 32768 - 1


TRAINED = (
    "case_id", "workload", "mode", "seed", "repeat", "status", "metric_value", "initial_weights_digest",
    "data_order_digest", "workload_digest", "loss_probe", "train_loss_final", "applied_steps", "loss_scale_final",
    "series_key",
)  # fmt: skip
"""What a training on a CPU gives each time."""


@pytest.mark.slow
def test_real_trainings_divided_and_merged_equal_those_that_nobody_divided(bash, tmp_path, write_suite):
    write_suite(tmp_path)
    options = "--mp-workloads=suite_workloads:fine --mp-modes=fp32,mixed-dynamic --mp-timing=0.05 --mp-jit=off"
    options += " --mp-seeds=3 --mp-repeats=1"
    whole = pytest_in(tmp_path, *options.split(), "--mp-results=whole")
    assert whole.returncode == 0, whole.stdout
    # Two tasks of the array, then a merge, as its comment says.
    script = tmp_path / "shards.sbatch"
    script.write_text((EXAMPLES / "shards.sbatch").read_text().replace("parts=4", "parts=2"))
    for task in ("2", "1"):
        bash(REAL, script, *options.split(), SLURM_ARRAY_TASK_ID=task)
    bash(REAL, "-c", "mpscale merge shards/*/runs/* && mpscale report latest --format github-summary > summary.md")
    (one,) = (tmp_path / "whole" / "runs").iterdir()
    (two,) = (tmp_path / "results" / "runs").iterdir()
    undivided, merged = mpscale.read_run(one), mpscale.read_run(two)

    def rows(run):
        found = [{name: record[name] for name in TRAINED} for record in run.records]
        # Sessions shuffle the modes of a seed.
        return sorted(found, key=lambda row: (row["seed"], row["repeat"], row["mode"]))

    def filled(run):
        # Whether the short windows of this test show a share of the host's time is chance.
        return {name for record in run.records for name in record.to_json() if not name.startswith("host_")}

    assert rows(merged) == rows(undivided)
    assert [(r["seed"], r["repeat"]) for r in merged.records] == [(r["seed"], r["repeat"]) for r in undivided.records]
    for record in undivided.records:
        if record["repeat"] == 0:
            assert merged.step_columns(record["case_id"]) == undivided.step_columns(record["case_id"])
    assert filled(merged) == filled(undivided)
    assert (two / "report.html").is_file() and "merged from 2 runs" in (tmp_path / "summary.md").read_text()
    assert json.loads((two / "run.json").read_text())["merged"]["missing_parts"] == []
    compared = subprocess.run(
        [sys.executable, "-m", "mpscale", "compare", one, two, "--results", tmp_path / "results", "--json"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
