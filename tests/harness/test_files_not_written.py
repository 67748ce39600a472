"""Files of a run that cannot be written: no case fails for it, the journal is whole, and the run says what is lost."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess

import pytest

import mpscale
from mpscale.core.cause import Cause

# A worker is another process than the one that writes the files of the run, and so can spoil them.
RUN = "run = max(Path({!r}).glob('runs/*')); "
IN_THE_WAY = RUN + "(run / '{}').unlink(); (run / '{}' / 'x').mkdir(parents=True); began(); finish()"
FILL = """
began()
try:
    with open({!r}, 'ab', 0) as file:
        while True:
            file.write(b'x' * 512)
except OSError:
    finish()
"""
FREE = "os.unlink({!r}); began(); finish()"


def ends(made):
    """How the cases of a run ended, in its journal, which must be whole."""
    found = mpscale.read_run(made.path)
    assert found.problems == []
    assert found.finished
    return [record["status"] for record in found.records]


def run_all(made, cases):
    for case in cases:
        made.run(case)
    made.finish(0)


def test_a_table_that_cannot_be_written_costs_nothing_but_itself(run, tmp_path):
    results = tmp_path / "results"
    block = IN_THE_WAY.format(str(results), "cases.csv", "cases.csv")
    made, cases, _ = run("began(); finish()", block, "began();  finish()")
    run_all(made, cases)
    assert made.path.parent == results / "runs"
    assert ends(made) == ["ok"] * 3
    (trouble,) = made.troubles
    assert trouble.startswith(f"{made.path}/cases.csv cannot be written: it is a folder and not a file")


def test_a_run_whose_description_cannot_be_written_is_kept_elsewhere(run, tmp_path):
    results = tmp_path / "results"
    block = IN_THE_WAY.format(str(results), "run.json", "run.json")
    made, cases, _ = run("began(); finish()", block, "began();  finish()")
    run_all(made, cases)
    assert ends(made) == ["ok"] * 3
    assert made.path.parent.parent != results
    assert any("run.json cannot be written" in trouble for trouble in made.troubles)
    assert made.troubles[-1] == f"everything but steps and GPU samples is kept in {made.path}"
    assert b"case_finished" in next(results.glob("runs/*/journal.jsonl")).read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_for_a_while_costs_no_case(run, small_disk):
    filler = str(small_disk / "filler")
    acts = ("began(); finish()", FILL.format(filler), "began();  finish()", FREE.format(filler))
    made, cases, _ = run(*acts, results=small_disk)
    run_all(made, cases)
    assert made.path.parent == small_disk / "runs"
    assert ends(made) == ["ok"] * 4
    assert all("the disk is full: free some space" in trouble for trouble in made.troubles[:-1])
    assert made.troubles[-1] == f"{made.path} can be written again, and its journal is whole"


def test_a_disk_that_stays_full_has_its_run_kept_elsewhere(run, small_disk):
    made, cases, _ = run("began(); finish()", FILL.format(str(small_disk / "filler")), results=small_disk)
    run_all(made, cases)
    assert made.path.parent.parent != small_disk
    assert ends(made) == ["ok"] * 2


def test_too_many_open_files_cost_the_case_in_hand(run, attempts):
    made, cases, _ = run("began(); finish()", "began();  finish()", retries=0)
    made.run(cases[0])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        made.run(cases[1])
    finally:
        for each in opened:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    made.finish(1)
    first, second = attempts(made)
    assert first["status"] == "ok"
    assert (second["status"], second["cause"]) == ("error", Cause.NOT_STARTED)
    assert "too many files open" in second["status_reason"]
