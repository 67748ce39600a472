"""Runs read back from disk: whole, cut short, and broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from support.runfolder import NAME, finished, record, started, write_run, write_steps

from mpscale.analysis.summary import summary_of
from mpscale.cli import main
from mpscale.core.case import Case, Settings
from mpscale.core.cases_csv import read_cases
from mpscale.core.cause import Cause
from mpscale.core.columns import COLUMNS, SCHEMA_VERSION
from mpscale.core.reason import Code, Reason
from mpscale.core.record import to_csv
from mpscale.core.run_folder import Journal
from mpscale.core.runs import RunError, read_run, resolve_run
from mpscale.report.document import document


def test_records_come_in_the_order_of_the_plan(tmp_path):
    first, second, extra = record(seed=0), record(seed=1), record(seed=2)
    planned = [first["case_id"], second["case_id"], "never-started"]
    run = read_run(write_run(tmp_path, finished([extra, second, first]), planned=planned))
    assert [r["seed"] for r in run.records] == [0, 1, 2]
    assert run.not_started == ["never-started"]
    assert (run.name, run.finished, run.device["name"]) == (NAME, True, "Test CPU")


def test_a_large_cases_csv_is_written_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    """Writing it after every case would take longer and longer; the journal has every result at once."""
    monkeypatch.setattr("mpscale.core.run_folder._QUICK_S", -1.0)
    monkeypatch.setattr("mpscale.core.run_folder._PAUSE", 1e9)
    cases = [Case("toy", "fp32", seed, 0, seed, Settings()) for seed in range(3)]
    journal = Journal(tmp_path, "x", {}, {}, cases)
    rows = []
    for case in cases:
        journal.case_finished(case, record(seed=case.seed), [], {})
        rows.append((journal.path / "cases.csv").read_text().count("\n") - 1)
    assert rows == [1, 1, 1]
    assert len(read_run(journal.path).records) == 3
    journal.finish(0)
    assert (journal.path / "cases.csv").read_text().count("\n") - 1 == 3
    assert journal.troubles == []


def test_columns_have_dtypes_that_can_hold_missing_values(tmp_path):
    one = record(step_time_ms_median=2.5, jit=True, overflow_steps=3)
    one.miss("batch_size", Reason(Code.NOT_REACHED, "never built"))
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


def test_a_second_attempt_without_an_end_replaces_the_first(tmp_path):
    one = record(status="crashed")
    run = read_run(write_run(tmp_path, [*finished([one]), started(one, attempt=2)]))
    assert [(r["status"], r.cause, r["attempts"]) for r in run.records] == [("interrupted", Cause.NO_END, 2)]


@pytest.mark.parametrize("torn", [b'{"event": "case_fin', '{"event": "é'.encode()[:-1], b"   "])
def test_a_last_line_that_was_cut_off_is_ignored(tmp_path, torn):
    run = read_run(write_run(tmp_path, finished([record()]), torn=torn, finish=False))
    assert [r["status"] for r in run.records] == ["ok"]


def test_a_report_is_made_even_if_a_reason_holds_a_lone_surrogate(tmp_path):
    """Names of files that are not UTF-8 come as lone surrogates; earlier versions wrote them into the journal."""
    events = finished([record(status="error", status_reason="no file"), record(seed=1, step_time_ms_median=1.0)])
    events[1]["record"] |= {"status_reason": "no file d\udcff", "unavailable": {"jit": "because of d\udcff"}}
    path = write_run(tmp_path, events)
    assert main(["report", str(path)]) == 0
    (found, _) = read_cases(path / "cases.csv")
    assert (found["status_reason"], str(found.why_empty("jit"))) == (r"no file d\udcff", r"because of d\udcff")
    assert r"no file d\\udcff" in (path / "report.md").read_text()


def test_columns_of_another_version_are_dropped(tmp_path):
    event = finished([record()])
    event[1]["record"]["column_of_tomorrow"] = 1
    assert len(read_run(write_run(tmp_path, event)).records) == 1


BROKEN_RECORDS = {
    "an unknown status": ("status", "fine", "'fine' is not a status of a case"),
    "no status": ("status", None, "has no status"),
    "no seed": ("seed", None, "has no seed"),
    "a seed that is a text": ("seed", "0", "seed should be int, not '0'"),
    "a step time of zero": ("step_time_ms_median", 0.0, "must be above 0"),
    "a text for a number": ("overflow_steps", "12", "should be int, not '12'"),
    "1 for True": ("jit", 1, "should be bool, not 1"),
    "0 for the metric's direction": ("metric_higher_is_better", 0, "should be bool, not 0"),
    "a number for the metric's name": ("metric_name", 5, "should be str, not 5"),
    "True for the target": ("metric_target", True, "should be float, not True"),
    "a text for the margin": ("metric_margin", "0.01", "should be float, not '0.01'"),
    "True for a count": ("attempted_steps", True, "should be int, not True"),
    "a word for an accuracy": ("final_accuracy", "high", "should be float, not 'high'"),
    "a list for a name": ("device_name", ["a"], "should be str, not ['a']"),
    "an object for an order": ("order", {}, "should be int, not {}"),
    "a count beyond 64 bits": ("parameters", 2**63, "does not fit into 64 bits"),
    "a text instead of reasons": ("unavailable", "x", "unavailable should hold reasons by column, not 'x'"),
    "an empty list of reasons": ("unavailable", [], "unavailable should hold reasons by column, not []"),
    "a number as a reason": ("unavailable", {"jit": 1}, "a reason should be a text or an object with a text, not 1"),
}


@pytest.mark.parametrize("what", BROKEN_RECORDS)
def test_a_broken_record_is_invalid_and_the_others_stay(tmp_path, what):
    column, value, message = BROKEN_RECORDS[what]
    others = [record(seed=1, step_time_ms_median=2.0), record(seed=2)]
    events = finished([record(step_time_ms_median=1.0), *others])
    events[1]["record"][column] = value
    path = write_run(tmp_path, events)
    run = read_run(path)
    assert [r["status"] for r in run.records] == ["invalid", "ok", "ok"]
    assert [r["seed"] for r in run.records] == [0, 1, 2]
    assert run.records[0].cause is Cause.BAD_RECORD
    reason = run.records[0]["status_reason"]
    assert reason.startswith("journal.jsonl, line 3: ")
    assert message in reason
    assert run.problems == [f"toy--fp32--s0--r0 counts as invalid: {reason}"]
    row = summary_of(run)[0]
    assert (row["cases"], row["ok"], row["step_time_ms"]) == (3, 2, 2.0)
    assert "toy--fp32--s0--r0 counts as invalid" in document(run).parts_of("What could not be read")[0]


def test_a_broken_record_of_a_failure_keeps_its_status(tmp_path):
    events = finished([record(status="oom", status_reason="MemoryError: no more")])
    events[1]["record"]["jit"] = 1
    (found,) = read_run(write_run(tmp_path, events)).records
    assert found["status"] == "oom"
    assert found["status_reason"].startswith("MemoryError: no more; journal.jsonl, line 3: ")


LINES = {
    "not JSON": ("{oops", "not readable as JSON"),
    "a number": ("3", "should hold a JSON object, not int"),
    "an object without an event": ("{}", "the line lacks 'event'"),
    "bytes that are not UTF-8": (b"\xff\xfe", "not readable as JSON"),
    "zeros, as left by a power failure": (b"\x00\x00", "not readable as JSON"),
    "an end without a record": ('{"event": "case_finished", "case_id": "toy--fp32--s0--r0"}', "lacks 'record'"),
    "an end whose record is a list": (
        '{"event": "case_finished", "case_id": "toy--fp32--s0--r0", "record": [1]}',
        "record should be dict, not [1]",
    ),
    "an end of a case without a name": ('{"event": "case_finished", "case_id": 3, "record": {}}', "should be str"),
    "brackets that go deeper than Python": ("[" * 100_000, "not readable as JSON"),
}


def read_with_line(path, number, line):
    """Read a run after replacing a line of its journal, counted from 1."""
    journal = path / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lines[number - 1] = line
    journal.write_bytes(b"\n".join(lines))
    return read_run(path)


@pytest.mark.parametrize("what", LINES)
def test_a_broken_line_costs_only_the_running_case(tmp_path, what):
    line, message = LINES[what]
    path = write_run(tmp_path, finished([record(), record(seed=1), record(seed=2)]))
    run = read_with_line(path, 5, line if isinstance(line, bytes) else line.replace("s0", "s1").encode())
    assert [(r["seed"], r["status"]) for r in run.records] == [(0, "ok"), (1, "invalid"), (2, "ok")]
    assert run.records[1].cause is Cause.UNREADABLE
    assert run.records[1]["status_reason"].startswith("journal.jsonl, line 5: ")
    assert message in run.records[1]["status_reason"]
    assert len(run.problems) == 1
    assert "journal.jsonl, line 5: " in document(run).parts_of("What could not be read")[0]
    assert run.finished


def test_a_complete_attempt_replaces_a_broken_line(tmp_path):
    path = write_run(tmp_path, [*finished([record()]), *finished([record(attempts=2)])])
    run = read_with_line(path, 3, b"{oops")
    assert [(r["status"], r["attempts"]) for r in run.records] == [("ok", 2)]
    assert len(run.problems) == 1


def test_a_result_counts_even_if_the_start_of_the_case_is_broken(tmp_path):
    path = write_run(tmp_path, finished([record(), record("mixed-static", seed=3)]))
    run = read_with_line(path, 4, b'{"event": "case_started", "case_id": "toy--mixed-static--s3--r0"}')
    assert [(r["mode"], r["status"]) for r in run.records] == [("fp32", "ok"), ("mixed-static", "ok")]
    assert "line 4: the event lacks 'case'" in run.problems[0]


@pytest.mark.parametrize("end", ["no end", "a broken end", "a good end"])
@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("swept_batch", 0),
        ("swept_batch", True),
        ("swept_batch", 10**30),
        ("swept_batch", "64"),
        ("swept_scale", -1.0),
        ("swept_scale", [128]),
        ("seed", 2**63),
        ("repeat", 0.5),
        ("order", "first"),
        ("mode", 3),
        ("workload", None),
    ],
)
def test_a_start_with_an_odd_fact_costs_no_other_case(tmp_path, fact, value, end):
    start = started(record(), order=1)
    start["case"][fact] = value
    done = {"event": "case_finished", "case_id": record()["case_id"], "record": record().to_json()}
    ends = {"no end": [], "a broken end": [{**done, "record": {"seed": "zero"}}], "a good end": [done]}
    run = read_run(write_run(tmp_path, [*finished([record(seed=1)]), start, *ends[end], *finished([record(seed=2)])]))
    statuses = {one["seed"]: one["status"] for one in run.records}
    assert statuses == {0: "ok" if end == "a good end" else "invalid", 1: "ok", 2: "ok"}
    assert fact in "".join(run.problems)


def test_a_case_can_be_identified_by_its_id_alone(tmp_path):
    lost = {"event": "case_finished", "case_id": "a+b--mixed-static--s3--r2", "record": {"status": "ok"}}
    nameless = {"event": "case_finished", "case_id": "x", "record": {"status": "ok"}}
    run = read_run(write_run(tmp_path, [lost, nameless, *finished([record()])]))
    assert [(r["workload"], r["mode"], r["seed"], r["repeat"], r["status"]) for r in run.records] == [
        ("a:b", "mixed-static", 3, 2, "invalid"),
        ("toy", "fp32", 0, 0, "ok"),
    ]
    assert "'x' does not say which case it is" in run.problems[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "should hold a JSON object"),
        ("{}", "schema_version should be an integer"),
        (json.dumps({"schema_version": SCHEMA_VERSION + 1}), "upgrade"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "planned": [1]}), "planned should be"),
        (json.dumps({"schema_version": True}), "schema_version should be an integer, not True"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "method_version": "5"}), "method_version should be an integer"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "method_version": 10**30}), "does not fit into 64 bits"),
        ("[" * 200_000, "not readable as JSON: its values are nested deeper"),
    ],
)
def test_a_broken_run_json_is_named(tmp_path, text, message):
    path = write_run(tmp_path)
    (path / "run.json").write_text(text)
    with pytest.raises(RunError, match=message) as raised:
        read_run(path)
    assert "run.json" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\0\n\0\n", b'{"event": "run_st', b"\n\n"])
@pytest.mark.parametrize("table", [False, True])
def test_a_journal_without_events_is_an_error_rather_than_an_empty_run(tmp_path, content, table):
    path = write_run(tmp_path, finished([record()]))
    (path / "journal.jsonl").write_bytes(content)
    if table:
        (path / "cases.csv").write_text(to_csv([record()]))
    with pytest.raises(RunError, match=r"journal.jsonl: holds no event that can be read \(") as raised:
        read_run(path)
    assert (f"its cases can be compared: {path}/cases.csv" in str(raised.value)) == table


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
    assert [str(dtype) for dtype in steps.dtypes] == ["Int64", "float64", "float64", "boolean"]
    assert list(steps.columns) == ["step", "loss", "loss_scale", "overflow"]
    assert run.step_columns("toy--mixed-static--s0--r0")["overflow"] == [False, True, False]
    unchecked = run.steps("toy--fp32--s0--r0")
    assert unchecked["overflow"].isna().all()
    assert unchecked["loss_scale"].isna().all()
    unknown = {"loss_scale": [None], "overflow": [None]}
    assert run.step_columns("toy--fp32--s0--r0") == {"step": [0], "loss": [2.5], **unknown}


def test_missing_steps_are_named(tmp_path):
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
    with pytest.raises(RunError, match="not compressed with gzip"):
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


def test_latest_skips_unreadable_runs_only_on_request(results):
    (results / "runs" / NAMES[2] / "journal.jsonl").unlink()
    (results / "runs" / NAMES[1] / "run.json").write_text("{")
    with pytest.raises(RunError, match=rf"the latest run cannot be read: .*{NAMES[2]}.* is {NAMES[0]}: name it"):
        resolve_run("latest", results)
    left_out = []
    assert resolve_run("latest", results, left_out).name == NAMES[0]
    assert [Path(folder).name for folder, _ in left_out] == [NAMES[2], NAMES[1]]
    (results / "runs" / NAMES[0] / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"no run in .* can be read; the newest of 3 runs: "):
        resolve_run("latest", results, left_out)


def test_a_reference_run_is_found_by_name_and_is_never_the_latest(results):
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
def test_an_unknown_run_is_answered_with_the_known_ones(results, wanted, message):
    with pytest.raises(RunError, match=message):
        resolve_run(wanted, results)


def test_a_folder_that_is_not_a_run_is_refused(results):
    with pytest.raises(RunError, match=r"holds no run\.json"):
        resolve_run(str(results), results)


@pytest.mark.parametrize("wanted", ["latest", "nightly"])
def test_without_any_run_the_message_says_how_to_make_one(tmp_path, wanted):
    with pytest.raises(RunError, match="make bench"):
        resolve_run(wanted, tmp_path)
