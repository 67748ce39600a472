"""`mpscale ab` with real sessions."""

import json
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.processes import processes_in, wait_for
from support.small_suite import QUICK, environment, without_page

import mpscale
from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION

KNOWN = """#!{python}
import os, sys
if not sys.argv[2].endswith("/about.py"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
print('{about}')
"""
"""An interpreter that at once reports what it contains: importing TensorFlow to find out takes long."""

ABOUT = {
    "turns": 1,
    "method_version": METHOD_VERSION,
    "schema_version": SCHEMA_VERSION,
    "python": "3",
    "packages": {},
    "broken": {},
}

BREAKS_OFF = """#!{python}
import os, sys
if sys.argv[2].endswith("/about.py"):
    os.execv({known!r}, [{known!r}, *sys.argv[1:]])
from mpscale.ab import turns

mine = turns.join(os.environ)
case = {{"workload": "suite_workloads:fine", "mode": "fp32", "seed": 0}}
ids = [f"suite_workloads+fine--fp32--s0--r{{repeat}}" for repeat in range(2)]
mine.send(turns.Plan([{{**case, "id": name, "repeat": repeat}} for repeat, name in enumerate(ids)], 600.0))
mine.wait(turns.Ready(ids[0]))
sys.exit("no more")
"""
"""An interpreter whose session ends in its first case."""


def interpreter(folder, text, **values):
    path = folder / "bin/python"
    path.parent.mkdir(parents=True)
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def known(tmp_path):
    return interpreter(tmp_path / "known", KNOWN, about=json.dumps(ABOUT))


@pytest.fixture
def suite(tmp_path, write_suite):
    """A suite outside the repository, whose project has a baseline that `ab` must ignore."""
    write_suite(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.mpscale]\nbaseline = "nowhere"\nfail-on = ["missing"]\n')
    # What is imported is the environment's own mpscale.
    (tmp_path / "mpscale").mkdir()
    (tmp_path / "mpscale/__init__.py").write_text("raise ImportError('from the working directory')\n")
    return tmp_path


def start(folder, one, other, *options):
    command = [Path(sys.executable).with_name("mpscale"), "ab", "--python", one, "--python", other, "--mp-jit", "off"]
    return subprocess.Popen(
        [*command, *QUICK, "--mp-preset", "smoke", "--mp-timing", "0.05", *options],
        cwd=folder,
        env=environment(TMPDIR=str(folder), **without_page()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def runs(folder):
    """The runs, A's first."""
    found = [mpscale.read_run(path.parent) for path in (folder / "results/runs").glob("*/run.json")]
    return sorted(found, key=lambda run: run.info["interleaved"]["side"])


def cases(run):
    """When each case began and ended, from the journal."""
    events = [json.loads(line) for line in (run.path / "journal.jsonl").read_text().splitlines()]
    times = {"case_started": {}, "case_finished": {}}
    for event in events:
        if event["event"] in times:
            times[event["event"]][event["case_id"]] = event["time"]
    return [(begin, times["case_finished"][case], case) for case, begin in times["case_started"].items()]


@pytest.mark.parametrize("untrained", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_same_environment_twice_is_interleaved_and_compared(suite, known, untrained):
    """Sessions take turns, whatever a case does."""
    modes = ("--mp-modes", "fp32,mixed-dynamic", *(("-p", "support.untrained") if untrained else ()))
    process = start(suite, sys.executable, known, "--mp-workloads", "suite_workloads:fine", *modes)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    a, b = runs(suite)
    entries = [run.info["interleaved"] for run in (a, b)]
    assert [(entry["side"], entry["python"]) for entry in entries] == [("A", sys.executable), ("B", known)]
    assert entries[0]["id"] == entries[1]["id"]
    assert [record["status"] for run in (a, b) for record in run.records] == ["ok"] * 4
    assert a.info["planned"] == b.info["planned"]

    ran = sorted([*cases(a), *cases(b)])
    assert [case for _, _, case in ran[::2]] == [case for _, _, case in ran[1::2]] == a.info["planned"]
    assert all(before[1] <= after[0] for before, after in pairwise(ran))
    assert all((run.path / "report.md").is_file() for run in (a, b))

    assert re.search(rf"^A: .* \(Python \S+, tensorflow \S+, keras \S+, mpscale {mpscale.__version__}\)$", errors, re.M)
    assert "2 pairs of cases, interleaved" in errors
    for number, name in enumerate(a.info["planned"], 1):
        assert f"[{number}/2] suite_workloads:fine {name.split('--')[1]} seed 0: A " in errors
    assert "B against A: 2 rows; step time" in output
    assert "missing" in output
    assert "passed" in output


def test_a_session_whose_partner_has_ended_keeps_what_it_has(suite, known):
    other = interpreter(suite, BREAKS_OFF, known=known)
    options = ("--mp-workloads", "suite_workloads:fine", "--mp-modes", "fp32", "--mp-repeats", "1")
    process = start(suite, known, other, *options)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "B has ended after 0 of 2 cases" in errors
    assert "no more" in errors
    # Which of the two had the first case is random.
    for run in runs(suite):
        assert run.finished
        assert [record["status"] for record in run.records] == ["ok"]
        assert run.not_started == ["suite_workloads+fine--fp32--s0--r1"]
        assert (run.path / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_stopped_by_the_user_both_runs_keep_what_they_have(suite, known):
    workloads = "suite_workloads:fine,suite_workloads:hang"
    process = start(suite, known, known, "--mp-workloads", workloads, "--mp-modes", "fp32")

    def hangs():
        journals = suite.glob("results/runs/*/journal.jsonl")
        return any("hang" in journal.read_text().splitlines()[-1] for journal in journals)

    wait_for(hangs, "the second pair")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    found = runs(suite)
    assert sorted(tuple(record["status"] for record in run.records) for run in found) == [
        ("ok",),
        ("ok", "interrupted"),
    ]
    assert all(run.finished for run in found)
    assert "stopping both" in errors
    assert [line[:3] for line in errors.splitlines()[-2:]] == ["A: ", "B: "]
    assert processes_in(suite) == []
