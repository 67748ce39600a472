"""Runs read back from disk: whole, cut short, and broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from runfolder import NAME, finished, record, started, write_run, write_steps

from mpscale.analysis.runs import RunError, read_run, resolve_run
from mpscale.columns import COLUMNS, SCHEMA_VERSION


def test_records_come_in_the_order_of_the_plan(tmp_path):
    first, second, extra = record(seed=0), record(seed=1), record(seed=2)
    planned = [first["case_id"], second["case_id"], "never-started"]
    run = read_run(write_run(tmp_path, finished([extra, second, first]), planned=planned))
    assert [r["seed"] for r in run.records] == [0, 1, 2]
    assert run.not_started == ["never-started"]
    assert (run.name, run.finished, run.device["name"]) == (NAME, True, "Test CPU")


def test_columns_have_dtypes_that_know_of_unknown(tmp_path):
    one = record(step_time_ms_median=2.5, jit=True, overflow_steps=3)
    one.miss("batch_size", "never built")
    cases = read_run(write_run(tmp_path, finished([one, record(seed=1)]))).cases
    assert list(cases.columns) == list(COLUMNS)
    kinds = {"str": "string", "int": "Int64", "float": "float64", "bool": "boolean", "json": "object"}
    assert {name: str(cases[name].dtype) for name in COLUMNS} == {name: kinds[c.kind] for name, c in COLUMNS.items()}
    assert cases["overflow_steps"].tolist() == [3, pd.NA]
    assert cases["unavailable"].tolist() == [{"batch_size": "never built"}, {}]


def test_the_last_attempt_counts(tmp_path):
    crashed, good = record(status="crashed", attempts=1), record(attempts=2)
    run = read_run(write_run(tmp_path, finished([crashed]) + finished([good])))
    assert [(r["status"], r["attempts"]) for r in run.records] == [("ok", 2)]


def test_a_case_without_an_end_is_interrupted(tmp_path):
    one = record("mixed-static", seed=3)
    run = read_run(write_run(tmp_path, [started(one, order=5)], finish=False))
    (found,) = run.records
    names = ("case_id", "workload", "mode", "seed", "repeat", "order", "attempts", "status", "device_name", "policy")
    assert [found[name] for name in names] == [
        one["case_id"], "toy", "mixed-static", 3, 0, 5, 1, "interrupted", "Test CPU", "mixed_float16",
    ]  # fmt: skip
    assert {c.name for c in COLUMNS.values() if c.measured} <= set(found.unavailable)
    assert not run.finished


def test_an_attempt_without_an_end_follows_one_that_ended(tmp_path):
    one = record(status="crashed")
    run = read_run(write_run(tmp_path, [*finished([one]), started(one, attempt=2)]))
    assert [(r["status"], r["attempts"]) for r in run.records] == [("interrupted", 2)]


@pytest.mark.parametrize("torn", [b'{"event": "case_fin', '{"event": "é'.encode()[:-1], b"   "])
def test_a_last_line_that_was_cut_off_is_ignored(tmp_path, torn):
    run = read_run(write_run(tmp_path, finished([record()]), torn=torn, finish=False))
    assert [r["status"] for r in run.records] == ["ok"]


def test_columns_of_another_version_are_dropped(tmp_path):
    event = finished([record()])
    event[1]["record"]["column_of_tomorrow"] = 1
    assert len(read_run(write_run(tmp_path, event)).records) == 1


BROKEN_RECORDS = {
    "status": ("fine", "'fine' is no status"),
    "seed": (None, "has no seed"),
    "step_time_ms_median": (0.0, "must be above 0"),
    "overflow_steps": ("12", "should be int, not '12'"),
    "jit": (1, "should be bool, not 1"),
    "attempted_steps": (True, "should be int, not True"),
    "final_accuracy": ("high", "should be float, not 'high'"),
}


@pytest.mark.parametrize("column", BROKEN_RECORDS)
def test_a_record_that_would_mislead_is_refused(tmp_path, column):
    value, message = BROKEN_RECORDS[column]
    events = finished([record()])
    events[1]["record"][column] = value
    path = write_run(tmp_path, events)
    with pytest.raises(RunError, match=message) as raised:
        read_run(path)
    assert "journal.jsonl, line 3" in str(raised.value)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"event": "case_finished", "case_id": "a"}, "line 2: the event lacks 'record'"),
        ({"event": "case_started", "case_id": "a"}, "line 2: the event lacks 'case'"),
        ({"event": "case_finished", "case_id": "a", "record": [1]}, "line 2: "),
        ({"event": "case_finished", "case_id": "a", "record": {"unavailable": "x"}}, "line 2: "),
    ],
)
def test_an_event_that_lacks_its_parts_is_named_by_line(tmp_path, event, message):
    path = write_run(tmp_path, [event], planned=[])
    with pytest.raises(RunError, match=message):
        read_run(path)


@pytest.mark.parametrize(("line", "message"), [("{oops\n", "line 2: not readable"), ("3\n", "line 2: should hold")])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line, message):
    path = write_run(tmp_path, finished([record()]))
    journal = path / "journal.jsonl"
    first, *rest = journal.read_text().splitlines(keepends=True)
    journal.write_text(first + line + "".join(rest))
    with pytest.raises(RunError, match=message):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "should hold a JSON object"),
        ("{}", "schema_version should be an integer"),
        (json.dumps({"schema_version": SCHEMA_VERSION + 1}), "upgrade"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "planned": [1]}), "planned should be"),
    ],
)
def test_a_broken_run_json_is_named(tmp_path, text, message):
    path = write_run(tmp_path)
    (path / "run.json").write_text(text)
    with pytest.raises(RunError, match=message) as raised:
        read_run(path)
    assert "run.json" in str(raised.value)


@pytest.mark.parametrize("name", ["run.json", "journal.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    path = write_run(tmp_path)
    (path / name).unlink()
    with pytest.raises(RunError, match=rf"{name}: no such file"):
        read_run(path)


def test_steps_keep_nan_losses_and_leave_unknown_empty(tmp_path):
    path = write_run(tmp_path, finished([record(), record("mixed-static")]))
    write_steps(
        path, "toy--mixed-static--s0--r0", "step,loss,loss_scale,overflow\n0,2.5,128,0\n1,nan,128,1\n2,inf,64,0\n"
    )
    write_steps(path, "toy--fp32--s0--r0", "step,loss,loss_scale,overflow\n0,2.5,,\n")
    run = read_run(path)
    steps = run.steps("toy--mixed-static--s0--r0")
    assert steps["overflow"].tolist() == [False, True, False]
    assert steps["loss_scale"].tolist() == [128.0, 128.0, 64.0]
    assert steps["loss"].isna().tolist() == [False, True, False]
    unchecked = run.steps("toy--fp32--s0--r0")
    assert unchecked["overflow"].isna().all()
    assert unchecked["loss_scale"].isna().all()


def test_steps_that_are_not_there_are_named(tmp_path):
    path = write_run(tmp_path, finished([record()]))
    run = read_run(path)
    with pytest.raises(RunError, match="did you mean toy--fp32--s0--r0"):
        run.steps("toy--fp32--s0--r1")
    with pytest.raises(RunError, match=r"has no case '\.\./\.\./secret'"):
        run.steps("../../secret")
    with pytest.raises(RunError, match=r"r0\.csv\.gz: no such file"):
        run.steps("toy--fp32--s0--r0")
    write_steps(path, "toy--fp32--s0--r0", "step,loss\n0,1\n")
    with pytest.raises(RunError, match="has no column loss_scale, overflow"):
        run.steps("toy--fp32--s0--r0")
    (path / "steps" / "toy--fp32--s0--r0.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(RunError, match="cannot be read as gzipped CSV"):
        run.steps("toy--fp32--s0--r0")


NAMES = ["20260101T000000Z-a-1111", "20260101T000000Z-b-2222", "20260202T000000Z-a-3333"]


@pytest.fixture
def results(tmp_path):
    for name in NAMES:
        write_run(tmp_path, name=name)
    (tmp_path / "runs" / "20990101T000000Z-not-a-run").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "name"),
    [("latest", NAMES[2]), (NAMES[0], NAMES[0]), ("202602", NAMES[2]), ("20260101T000000Z-b", NAMES[1])],
)
def test_a_run_is_found_by_name_beginning_or_latest(results, wanted, name):
    assert resolve_run(wanted, results) == results / "runs" / name


def test_a_run_is_found_by_its_path_anywhere(results, tmp_path):
    path = results / "runs" / NAMES[0]
    assert resolve_run(str(path), tmp_path / "elsewhere") == path


def test_a_run_that_was_kept_is_found_by_name_and_is_never_the_latest(results):
    (results / "reference").mkdir()
    kept = results / "reference" / "20990101T000000Z-kept"
    (results / "runs" / NAMES[2]).rename(kept)
    assert resolve_run("2099", results) == kept
    assert resolve_run("latest", results).name == NAMES[1]


def test_a_run_that_is_in_both_folders_is_one_run(results):
    made = results / "runs" / NAMES[2]
    shutil.copytree(made, results / "reference" / NAMES[2])
    assert resolve_run(NAMES[2][:-3], results) == made


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("20260101", f"2 runs begin with '20260101': {NAMES[1]}, {NAMES[0]}"),
        ("nightly", f"no run is called 'nightly'; the newest in .* are {NAMES[2]}, {NAMES[1]}, {NAMES[0]}"),
        ("", "no run is called ''"),
    ],
)
def test_a_run_that_is_not_there_is_answered_with_those_that_are(results, wanted, message):
    with pytest.raises(RunError, match=message):
        resolve_run(wanted, results)


def test_a_folder_that_is_no_run_is_refused(results):
    with pytest.raises(RunError, match=r"holds no run\.json"):
        resolve_run(str(results), results)


@pytest.mark.parametrize("wanted", ["latest", "nightly"])
def test_without_any_run_the_message_says_how_to_make_one(tmp_path, wanted):
    with pytest.raises(RunError, match="make bench"):
        resolve_run(wanted, tmp_path)


@pytest.mark.parametrize("module", ["mpscale.cli", "mpscale.analysis.runs", "mpscale.report.build"])
def test_reading_imports_no_tensorflow(module):
    program = f"import sys, {module}; print(*{{'tensorflow', 'keras', 'pytest'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
