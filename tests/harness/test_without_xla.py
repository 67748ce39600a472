"""A workload that XLA refuses in one of its cases runs without XLA in all of them; its rows never mix."""

import dataclasses
import json
import shutil

import pytest
from support.no_training import CASES, CPU, DRIVER, ENVIRONMENT, figures, options, replace_trainings

from mpscale.analysis.pairs import State, pair_rows
from mpscale.core.case import Case, SeriesKey, Settings
from mpscale.core.cause import Cause
from mpscale.core.processes.events import Again, Noted
from mpscale.core.runs import read_run
from mpscale.harness import resume as harness_resume
from mpscale.harness import run as harness_run
from mpscale.report.findings import findings

OTHER = [Case("other", mode, 0, 0, 6 + place, Settings()) for place, mode in enumerate(("fp32", "mixed-dynamic"))]
WHAT = "EagerPyFunc in layer 'noise' (Noise)"


def refuse(when, then=None):
    """What a case gives if XLA refuses those for which ``when`` is true; ``then``: what others give without XLA."""

    def happen(case):
        key = SeriesKey("toy", "sha256:1", case.mode, {"batch": "20", "jit": "on" if case.settings.jit else "off"}, "6")
        if case.settings.jit and when(case):
            told = dict.fromkeys(figures(case))
            error = {"status": "error", "status_reason": f"InvalidArgumentError: XLA cannot compile {WHAT}: no kernel"}
            return {**told, **error, "cause": "xla-refused", "xla_refused": WHAT}
        slower = {} if case.settings.jit else {"step_time_ms_median": 50.0, **((then and then(case)) or {})}
        return {"series_key": str(key), **slower}

    return happen


def of_toy(mode, seed):
    return lambda case: (case.workload, case.mode, case.seed) == ("toy", mode, seed)


@pytest.fixture
def trainings(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    return lambda happen: replace_trainings(monkeypatch, happen, ENVIRONMENT)


def session(results, cases=(*CASES, *OTHER), resumed=None, interleaved=None, jit_fallback=True):
    """Run cases as a session does; return the run's folder, what was said, and the ids of what was measured again."""
    how = dataclasses.replace(options(results, jit_fallback=jit_fallback), interleaved=interleaved)
    if resumed is not None:
        resumed = harness_resume.resume(resumed, list(cases), CPU, DRIVER, how)
    said, again = [], []
    run = harness_run.BenchmarkRun(cases, CPU, DRIVER, how, lambda case, event: said.append(event), resumed)
    try:
        for case in cases:
            if run.measured(case) is None:
                run.run(case)
            for each in run.take_outdated():
                run.run(each)
                again.append(each.id)
    finally:
        run.finish(0)
    assert run.troubles == []
    return run.path, said, again


def measured(path):
    """The rows that count, by workload: whether they were compiled with XLA."""
    found = {}
    for record in read_run(path).records:
        if record["status"] == "ok":
            found.setdefault(record["workload"], set()).add(record["jit"])
    return found


def results_of(path):
    lines = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    return [event["record"] for event in lines if event["event"] == "case_finished"]


# The order of the cases is mixed-dynamic, fp32, seed after seed.
@pytest.mark.parametrize(
    ("mode", "seed", "outdated"),
    [("mixed-dynamic", 0, 0), ("fp32", 0, 1), ("mixed-dynamic", 1, 2), ("fp32", 2, 5)],
    ids=["the first case", "in one mode only", "in a later seed", "in the last case"],
)
def test_what_was_measured_with_xla_is_measured_again_and_nothing_is_lost(trainings, tmp_path, mode, seed, outdated):
    trainings(refuse(of_toy(mode, seed)))
    path, said, again = session(tmp_path)
    assert again == [case.id for case in CASES[:outdated]]
    assert measured(path) == {"toy": {False}, "other": {True}}
    rows = read_run(path).records
    assert [row["case_id"] for row in rows] == [case.id for case in (*CASES, *OTHER)]
    toys = [row for row in rows if row["workload"] == "toy"]
    assert {row["xla_refused"] for row in toys} == {f"{WHAT}, first in {mode}"}
    assert {row["step_time_ms_median"] for row in toys} == {50.0}
    assert all("jit=off" in row["series_key"] for row in toys)
    assert {row["xla_refused"] for row in rows if row["workload"] == "other"} == {None}
    with_xla = [row for row in results_of(path) if row["jit"] and row["status"] == "ok" and row["workload"] == "toy"]
    assert [row["case_id"] for row in with_xla] == again
    assert [row["attempts"] for row in toys if row["case_id"] in again] == [2] * outdated
    assert all("other-compiler" in row["note"] for row in toys if row["case_id"] in again)
    assert len((path / "cases.csv").read_text().splitlines()) == 1 + len(rows)
    assert [event.reason for event in said if isinstance(event, Again)] == [f"XLA cannot compile {WHAT}"]
    (noted,) = (event.text for event in said if isinstance(event, Noted))
    assert noted.startswith("toy goes on without XLA in all modes; float16")
    told = findings(read_run(path))
    assert told.count("ran without XLA") == 1
    assert f"toy ran without XLA in all modes, because it cannot compile {WHAT}" in told.replace("\\", "")
    assert "On a CPU, float16 without XLA" in told


def test_stopped_anywhere_no_workload_has_rows_of_both_kinds_and_resumed_it_is_the_whole_run(trainings, tmp_path):
    trainings(refuse(of_toy("fp32", 1)))
    whole, _, _ = session(tmp_path / "whole")
    data = (whole / "journal.jsonl").read_bytes()
    for number, size in enumerate(place + 1 for place, byte in enumerate(data) if byte == ord("\n")):
        path = tmp_path / str(number) / "runs" / whole.name
        shutil.copytree(whole, path)
        (path / "journal.jsonl").write_bytes(data[:size])
        refused = b'"xla-refused"' in data[:size]
        assert all(len(kinds) == 1 for kinds in measured(path).values()) or refused
        session(path.parent.parent, resumed=path)
        assert measured(path) == {"toy": {False}, "other": {True}}
        assert all(row["status"] == "ok" for row in read_run(path).records)
        if refused:  # XLA is not asked again
            attempts = results_of(path)
            assert sum(row.get("cause") == Cause.XLA_REFUSED for row in attempts) == 1


def test_with_xla_demanded_the_case_fails_and_says_what_to_do(trainings, tmp_path):
    trainings(refuse(of_toy("fp32", 0)))
    path, said, again = session(tmp_path, jit_fallback=False)
    assert (said, again) == ([], [])
    (row,) = (row for row in read_run(path).records if row["status"] != "ok")
    assert (row["cause"], row["xla_refused"], row["jit"]) == ("xla-refused", WHAT, True)
    assert WHAT in row["status_reason"]
    assert "--mp-jit auto" in row["status_reason"]
    assert not row.may_pass
    assert "ran without XLA" not in findings(read_run(path))


@pytest.mark.parametrize("cause", [Cause.OUT_OF_MEMORY, Cause.EXCEPTION, Cause.TIMEOUT, Cause.FATAL_SIGNAL])
def test_no_other_failure_makes_a_workload_go_on_without_xla(trainings, tmp_path, cause):
    trainings(lambda case: {"status": "error", "cause": cause.value} if case.mode == "fp32" else {})
    path, _, again = session(tmp_path)
    assert (again, measured(path)) == ([], {"toy": {True}, "other": {True}})


def test_a_case_that_takes_too_long_without_xla_says_so_in_its_row(trainings, tmp_path):
    late = {"status": "timeout", "cause": "timeout", "status_reason": "not finished after 9 s", "metric_value": None}
    trainings(refuse(of_toy("fp32", 0), then=lambda case: late if case.mode == "mixed-dynamic" else {}))
    path, _, _ = session(tmp_path)
    rows = [row for row in read_run(path).records if row["workload"] == "toy" and row["mode"] == "mixed-dynamic"]
    assert {(row["status"], row["jit"], row["xla_refused"]) for row in rows} == {
        ("timeout", False, f"{WHAT}, first in fp32")
    }


def test_interleaved_runs_measure_nothing_again(trainings, tmp_path):
    trainings(refuse(of_toy("fp32", 0)))
    path, _, again = session(tmp_path / "late", interleaved={"id": "1"})
    assert (again, measured(path)["toy"]) == ([], {True})
    (row,) = (row for row in read_run(path).records if row["status"] != "ok")
    assert row["status_reason"].endswith("use --mp-jit off")
    trainings(refuse(of_toy("mixed-dynamic", 0)))
    path, _, again = session(tmp_path / "first", interleaved={"id": "1"})
    assert (again, measured(path)["toy"]) == ([], {False})


def test_rows_with_and_without_xla_are_not_compared_and_it_is_said_why(trainings, tmp_path):
    trainings(refuse(lambda case: False))
    before, _, _ = session(tmp_path)
    trainings(refuse(of_toy("fp32", 0)))
    after, _, _ = session(tmp_path)
    pairs = {pair.place: pair for pair in pair_rows(read_run(before), read_run(after))}
    assert pairs["other", "fp32"].state is State.PAIRED
    for mode in ("fp32", "mixed-dynamic"):
        pair = pairs["toy", mode]
        assert pair.state is State.NOT_COMPARABLE
        expected = f"jit on against jit off (in the other run XLA cannot compile {WHAT}, first in fp32)"
        assert pair.reason == expected
