"""The short form of ``make torture``, and that it notices what it is there for."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from torture import disks
from torture.__main__ import Bench
from torture.disks import filled_for
from torture.found import Journal, Reference, compare, is_complete, kept
from torture.rounds import Round
from torture.suite import LAYOUTS, MARKER, Place
from torture.victims import left, strike, victims

RUN = Path(__file__).parents[2] / "results" / "reference" / "20261126T191040Z-nvidia-h200-32b6"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("torture"), tmp_path_factory.getbasetemp() / "evidence", 1, "short")


def dies(session, rng):
    """Kill the warm parent while it imports TensorFlow for the first case, and the session in the second case."""
    for finished, target in ((0, "warm parent"), (1, "session")):
        while session.reach(finished, 0.3):
            session.look()
            if blow := session.blow(rng, target, signal.SIGKILL):
                yield blow
                break


@pytest.mark.timeout(300)
def test_a_run_survives_dead_processes_and_a_full_disk(bench):
    place = Place(bench.folder / "round", LAYOUTS["short"], bench.shared)
    with disks.small_disk(place.results) if disks.why_not() is None else contextlib.nullcontext() as disk:
        starved = [] if disk is None else [filled_for(disk, 1, 1.0)]
        round_ = Round(place, bench.reference("short"), Random(1), [dies, *starved], "short")
        result = round_.play()
    assert result.violations == bench.undisturbed[0].violations == []
    assert [(blow.kind, blow.signal) for blow in result.blows[:2]] == [
        ("warm parent", "SIGKILL"),
        ("session", "SIGKILL"),
    ]
    assert result.sessions[0] == -signal.SIGKILL
    assert result.compared == len(bench.reference("short").cases) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [0, 1])
def test_a_run_survives_what_chance_does_to_it(bench, number):
    assert bench.kills(number).violations == []
    if why := disks.why_not():
        pytest.skip(why)
    assert bench.disks(number).violations == []


def last_result(run):
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    place = max(number for number, line in enumerate(lines) if b'"case_finished"' in line)
    return lines, place, json.loads(lines[place])


def change_journal(run, change):
    lines, place, event = last_result(run)
    lines[place] = change(event, lines[place])
    (run / "journal.jsonl").write_bytes(b"".join(lines))


def other_metric(event, line):
    event["record"]["train_loss_final"] += 1e-12
    return json.dumps(event).encode() + b"\n"


def change_steps(run):
    path = next((run / "steps").iterdir())
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"1", b"2", 1)))


FAULTS = {
    "lost": (lambda run: change_journal(run, lambda event, line: b""), "lacks the cases"),
    "twice": (lambda run: change_journal(run, lambda event, line: line + line), "was measured 2 times"),
    "another metric": (lambda run: change_journal(run, other_metric), "train_loss_final is"),
    "other steps": (change_steps, "differs"),
    "steps cut off": (lambda run: os.truncate(next((run / "steps").iterdir()), 40), "is not whole"),
    "a report cut off": (lambda run: os.truncate(run / "report.html", 900), "report.html is not whole"),
    "no report": (lambda run: (run / "report.md").unlink(), "there is no report.md"),
    "a file half written": (lambda run: (run / ".cases.csv.partial").touch(), "files that an undisturbed run"),
    "a row lost": (lambda run: (run / "cases.csv").write_text("case_id\n"), "cases.csv has 0 rows"),
    "a stranger": (lambda run: (run.parents[1] / "left.tmp").touch(), "something else in the results folder"),
}


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "results" / "runs" / RUN.name))


def test_a_run_equals_itself(run):
    assert compare(run, Reference.of(run)) == []
    assert is_complete(run, Reference.of(run))


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_a_run_is_noticed(run, spoil, said):
    reference = Reference.of(run)
    spoil(run)
    assert any(said in each for each in compare(run, reference))


def test_only_a_case_with_a_note_may_lack_its_steps_and_only_after_a_full_disk(run):
    reference = Reference.of(run)
    next((run / "steps").glob(f"*{last_result(run)[2]['case_id']}*")).unlink()
    assert len(compare(run, reference)) == len(compare(run, reference, full_disk=True)) == 2

    def noted(event, line):
        event["record"]["note"] = "the log of steps could not be kept"
        return json.dumps(event).encode() + b"\n"

    change_journal(run, noted)
    assert not any("steps" in each for each in compare(run, reference, full_disk=True))
    assert any("steps" in each for each in compare(run, reference))


def test_lines_that_a_journal_had_must_stay(run):
    before = Journal.read(run / "journal.jsonl")
    assert kept(before, before) == []
    with (run / "journal.jsonl").open("ab") as file:
        file.write(b'{"event": "a further one"}\n{"event": "tor')
    after = Journal.read(run / "journal.jsonl")
    assert (kept(before, after), after.torn, after.broken) == ([], b'{"event": "tor', [])
    change_journal(run, other_metric)
    (said,) = kept(before, Journal.read(run / "journal.jsonl"))
    assert said.startswith("1 lines of the journal were lost or changed")


def test_attempts_are_counted_from_one(run):
    lines, place, event = last_result(run)
    assert Journal.read(run / "journal.jsonl").odd_attempts() == []
    started = json.dumps({"event": "case_started", "case_id": event["case_id"], "attempt": 1}).encode() + b"\n"
    (run / "journal.jsonl").write_bytes(b"".join([*lines[: place + 1], started, lines[place]]))
    assert len(Journal.read(run / "journal.jsonl").odd_attempts()) == 2


def test_processes_of_a_run_are_found_wherever_they_hide(tmp_path):
    program = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, MARKER: str(tmp_path)}, stdin=subprocess.PIPE
    )
    try:
        # Between its fork and its exec, a child has the command line of its parent.
        while {each.kind for each in victims(str(tmp_path), process.pid)} != {"session", "child of a worker"}:
            assert process.poll() is None
        process.kill()
        process.wait()
        (orphan,) = left(str(tmp_path), 0.0)
        assert orphan.kind == "child of a worker"
    finally:
        process.kill()
        for each in victims(str(tmp_path)):
            strike(each, signal.SIGKILL)
        process.communicate()
    assert left(str(tmp_path), 10.0) == []
