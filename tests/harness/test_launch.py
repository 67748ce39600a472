"""Workers that cannot be started: a row that says why, and no endless tries. And one whose output has no place."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from mpscale.core.case import Case, Settings
from mpscale.core.cause import Cause
from mpscale.core.reason import Code, Reason
from mpscale.harness.launch import Launcher
from mpscale.harness.run import BenchmarkRun
from mpscale.harness.supervisor import Options
from mpscale.telemetry import host
from mpscale.telemetry.client import NoDriver

# Python runs this at its start.
DIES = """
import os, sys
if "--serve" in sys.orig_argv:
    with open({log!r}, "a") as log:
        log.write("started\\n")
    {act}
"""


@pytest.fixture
def run(tmp_path):
    """Run two cases; return their records and how often each was tried."""

    def run():
        options = Options(tmp_path, tmp_path, "fork", 60.0, asked={})
        cases = [Case("mnist1d-mlp", "fp32", 0, repeat, repeat, Settings()) for repeat in (0, 1)]
        driver = NoDriver(Reason(Code.NO_LIBRARY, "none here"))
        benchmark = BenchmarkRun(cases, host.cpu(), driver, options, lambda *_: None)
        records = [benchmark.run(case).record for case in cases]
        benchmark.finish(1)
        assert benchmark.path is not None
        lines = (benchmark.path / "journal.jsonl").read_text().splitlines()
        tries = [json.loads(line)["attempt"] for line in lines if json.loads(line)["event"] == "case_started"]
        return records, tries

    return run


@pytest.mark.parametrize(
    ("act", "how", "tries"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL", [1, 2, 1, 2]),
        pytest.param("os.kill(os.getpid(), 15)", "killed by SIGTERM", [1, 2, 1, 2], marks=pytest.mark.slow),
        ("print('no library', flush=True); os._exit(7)", "ended with exit code 7", [1, 1]),
    ],
)
def test_a_parent_that_dies_every_time_is_not_started_for_ever(run, tmp_path, monkeypatch, act, how, tries):
    (tmp_path / "sitecustomize.py").write_text(DIES.format(log=str(tmp_path / "log"), act=act))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    records, tried = run()
    assert tried == tries
    assert (tmp_path / "log").read_text().count("started") == len(tries)
    for record in records:
        assert (record["status"], record["cause"]) == ("error", Cause.EXITED if "7" in how else Cause.NOT_STARTED)
        assert f"the process that imports TensorFlow did not come up ({how})" in record["status_reason"]
        assert ("no library" in record["status_reason"]) == ("7" in how)


def test_a_full_disk_for_temporary_files_is_said_with_what_to_do(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    records, tried = run()
    assert tried == [1, 2, 1, 2]
    for record in records:
        assert (record["status"], record["cause"]) == ("error", Cause.FILE_SYSTEM)
        assert (
            f"no temporary file can be made in {tmp_path / 'file'}: a part of the path is a file"
            in record["status_reason"]
        )
        assert "set TMPDIR to another folder" in record["status_reason"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_worker_reports_its_end_even_if_it_can_print_nothing():
    with Path("/dev/full").open("wb") as full:
        worker = Launcher(os.environ).start(full)
    worker.send({"case": {"settings": {"jit": False}}})  # the rest is missing, so it fails before it trains
    assert worker.receive(60) == {"event": "error", "type": "KeyError", "message": "'autotuning'", "cause": "exception"}
    assert worker.end(60) == 1


def test_a_worker_that_somebody_interrupts_reports_no_exception(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        worker = Launcher(os.environ).start(log)
    worker.send({"case": {"settings": {"jit": False}}, "autotuning": None})  # next, it imports TensorFlow
    time.sleep(1.0)
    os.kill(worker.pid, signal.SIGINT)
    assert worker.wait(60) == -signal.SIGINT
    worker.end(60)
    assert "Traceback" not in (tmp_path / "log").read_text()
