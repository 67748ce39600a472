"""A stopped run keeps what it had and leaves no process behind."""

import json
import os
import signal
import subprocess
import sys

import pytest
from support.processes import processes_in, wait_for
from support.small_suite import command, environment

import mpscale
from mpscale.cli import main

WORKLOADS = "suite_workloads:fine,suite_workloads:hang,suite_workloads:regression"


def start(folder, *options):
    (folder / "tmp").mkdir()
    return subprocess.Popen(
        command(
            "--mp-workloads", WORKLOADS, "--mp-modes=fp32", "--mp-seeds=1", "--mp-timing=0.05", "--mp-jit=off", *options
        ),
        cwd=folder,
        env=environment(TMPDIR=str(folder / "tmp")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


WORKERS = {"fork": 5, "fresh": 4}
"""The warm parent if there is one, the process that hangs, and three that this has started."""


def hanging_case(folder, method):
    """The run's folder, once its second case hangs in its training."""
    for journal in folder.glob("results/runs/*/journal.jsonl"):
        if '"case_started"' in journal.read_text() and "hang" in journal.read_text().splitlines()[-1]:
            return journal.parent if len(workers(folder)) >= WORKERS[method] else None
    return None


def workers(folder):
    """All but keepers, whose command line has that of a worker, too."""
    return [
        command for command in processes_in(folder) if "mpscale.worker.__main__" in command and "keeper" not in command
    ]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("method", ["fork", pytest.param("fresh", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        # Of the same: tests/torture kills a session in its second case, and then looks for processes and lost rows.
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_stopped_run_keeps_its_rows_and_leaves_no_process(tmp_path, write_suite, how, method):
    folder = write_suite(tmp_path)
    run = start(folder, "--mp-start-method", method)
    try:
        path = wait_for(lambda: hanging_case(folder, method), "the second case", 240)
        os.kill(run.pid, how)
        output, _ = run.communicate(timeout=240)
    finally:
        run.kill()
    wait_for(lambda: not processes_in(folder), "the workers and what they have started to end", 20)

    assert main(["report", str(path)]) == 0
    first, second = mpscale.read_run(path).records
    assert (first["status"], second["status"]) == ("ok", "interrupted")
    assert first["step_time_ms_median"] > 0
    assert "suite_workloads:regression" not in (path / "cases.csv").read_text()
    assert "1 planned case was not started" in (path / "report.md").read_text()
    events = [json.loads(line)["event"] for line in (path / "journal.jsonl").read_text().splitlines()]
    assert events.count("run_finished") == (0 if how == signal.SIGKILL else 1)
    if how != signal.SIGKILL:
        assert (second["status_reason"], second["cause"]) == (f"stopped by {how.name}", "stopped")
        assert run.returncode == 2
        assert "KeyboardInterrupt" in output
        assert "= mpscale =" in output
        assert "was not used at all" not in output
        assert (path / "report.html").exists()
    else:
        # As the next run does.
        code = "from mpscale.core.files.temporary import remove_left_behind; remove_left_behind()"
        subprocess.run([sys.executable, "-c", code], check=True, env=environment(TMPDIR=str(folder / "tmp")))
    assert list((folder / "tmp").iterdir()) == []
