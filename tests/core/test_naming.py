"""Names and notes of runs: which a run may have, how a run is found by one, and what becomes of strangers' names."""

import json
from pathlib import Path

import pytest
from support.no_training import new_run
from support.runfolder import finished, record, write_run

from mpscale.analysis.compare import compare_all
from mpscale.analysis.history import make_history
from mpscale.core.files.reading import RunError
from mpscale.core.naming import NAME, NOTE, called, note_of, rename, run_name
from mpscale.core.run_lock import RunLock
from mpscale.core.runs import read_info, read_run, resolve_run
from mpscale.report.comparison import render as render_comparison
from mpscale.report.document import document, render
from mpscale.report.github_summary import github_summary
from mpscale.report.history import render as render_history
from mpscale.report.page import page

ONE, TWO = "20260101T000000Z-test-cpu-0001", "20260102T000000Z-test-cpu-0002"


def made(results, run_id, **info):
    """Write a run whose run.json holds these entries."""
    rows = [record(step_time_ms_median=2.0, series_key="toy/abc/fp32/batch=1/method=1")]
    path = write_run(results, finished(rows), name=run_id)
    (path / "run.json").write_text(json.dumps(json.loads((path / "run.json").read_text()) | info))
    return path


@pytest.fixture
def results(tmp_path):
    """Two runs: the first is called before."""
    made(tmp_path, ONE, name="before", note="as in the *paper*")
    made(tmp_path, TWO)
    return tmp_path


@pytest.mark.parametrize("name", ["before", "B2", "2026", "v1.2+jit_off-x", "a" * 60, "latest-1", "x.csv.gz", "1"])
def test_a_name_may_have_letters_digits_and_a_few_marks(name):
    assert run_name(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "begins with a letter or digit"),
        ("-x", "begins with a letter or digit"),
        (".", "begins with a letter or digit"),
        ("../up", "begins with a letter or digit"),
        ("a/b", "has only these and"),
        ("two words", "has only these and"),
        ("größer", "has only these and"),
        ("line\n", "has only these and"),
        ("a\u202eb", "has only these and"),
        ("a" * 61, "at most 60 characters, not 61"),
        ("a" * 10_000_000, "at most 60 characters"),
        ("Latest", "the run that started last"),
        ("table.CSV", "taken for a cases.csv"),
        (ONE, "begins like the id of a run"),
    ],
    ids=lambda text: text[:12],
)
def test_what_could_be_mistaken_or_break_a_line_is_no_name(name, message):
    with pytest.raises(ValueError, match=message) as refused:
        run_name(name)
    assert len(str(refused.value)) < 300


def test_a_note_is_any_text_on_one_line():
    assert note_of(" a\n\tb  c ") == "a b c"
    assert note_of("größer \ud800") == "größer \\ud800"
    for text in (" \n", "a" * 501):
        with pytest.raises(ValueError, match="at most 500 characters"):
            note_of(text)


@pytest.mark.parametrize("wanted", ["before", ONE, ONE[:8], "latest"])
def test_a_run_is_found_by_its_name_its_id_and_the_beginning_of_that(results, wanted):
    assert resolve_run(wanted, results).name == (TWO if wanted == "latest" else ONE)


def test_an_unknown_name_is_told_with_the_one_that_was_meant(results):
    with pytest.raises(RunError, match="no run is called 'befor'; did you mean before"):
        resolve_run("befor", results)


def test_a_name_that_two_runs_have_is_refused_with_their_ids(results):
    rename(results / "runs" / TWO, {NAME: "before"})
    with pytest.raises(RunError, match=f"2 runs are called 'before': {TWO}, {ONE}; take the id of one"):
        resolve_run("before", results)
    assert resolve_run(ONE, results).name == ONE


def test_a_name_that_is_also_a_folder_of_another_run_is_refused(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = write_run(tmp_path / "elsewhere", name=TWO)
    elsewhere.rename("before")
    with pytest.raises(RunError, match=r"is a folder here, and the name of .*: write \./before"):
        resolve_run("before", results)
    assert resolve_run("./before", results) == Path("before")
    Path("before/run.json").unlink()
    assert resolve_run("before", results).name == ONE


def test_a_name_of_eight_digits_comes_before_the_beginning_of_an_id(results):
    rename(results / "runs" / TWO, {NAME: "20260101"})
    assert resolve_run("20260101", results).name == TWO


@pytest.mark.parametrize(
    "value", ["../../etc", "latest", "a b", "\x1b[31m", "x" * 100, 3, ["before"], {"a": 1}, True, ""], ids=repr
)
def test_a_name_that_no_mpscale_writes_counts_as_unknown(results, value):
    path = made(results, "20260103T000000Z-test-cpu-0003", name=value, note="n" * 501)
    run = read_run(path)
    assert (run.given_name, run.note, run.shown) == (None, None, run.name)
    assert [problem.partition(" is none")[0] for problem in run.problems] == ["run.json: name", "run.json: note"]
    assert all(len(problem) < 300 for problem in run.problems)
    assert called(str(value), [path]) == []


def test_texts_show_the_name_with_the_id_and_the_note_in_plain_text(results):
    one, two = (read_run(results / "runs" / name) for name in (ONE, TWO))
    shown, note = f"before ({ONE})", r"as in the \*paper\*"
    comparisons = compare_all([one, two], force=True)
    texts = {
        "report": render(document(one)),
        "summary": github_summary(one),
        "comparison": render_comparison(comparisons, [], "markdown"),
    }
    for name, text in texts.items():
        assert shown in text, name
        assert note in text, name
    assert f"<h1>mpscale: {shown}</h1>" in page(document(one)) or f"mpscale: {shown}</h2>" in page(document(one))
    assert "<p>as in the *paper*</p>" in page(document(one))
    assert shown in render_history(make_history([one, two], "step_time"), "markdown")
    found = json.loads(render_comparison(comparisons, [], "json"))
    assert (found["baseline"], found["baseline_name"], found["comparisons"][0]["name"]) == (ONE, "before", None)
    assert f"mpscale: {TWO}" in render(document(two))


def test_another_name_changes_nothing_else(results):
    path = results / "runs" / ONE
    before = json.loads((path / "run.json").read_text())
    rename(path, {NAME: "first"})
    assert read_info(path / "run.json") == {**before, NAME: "first"}
    rename(path, {NAME: "", NOTE: ""})
    assert json.loads((path / "run.json").read_text()) == {k: v for k, v in before.items() if k not in (NAME, NOTE)}


def test_a_run_that_goes_on_is_not_renamed(results):
    path = results / "runs" / ONE
    content = (path / "run.json").read_bytes()
    lock = RunLock.take(path)
    try:
        with pytest.raises(RunError, match="is still going on, and would overwrite this"):
            rename(path, {NAME: "first"})
    finally:
        lock.free()
    assert (path / "run.json").read_bytes() == content
    assert not (path / "run.lock").exists()


def test_an_unnamed_run_has_no_keys_for_it(tmp_path, monkeypatch):
    from support.no_training import replace_trainings

    replace_trainings(monkeypatch)
    path = new_run(tmp_path / "results")
    assert not {NAME, NOTE} & json.loads((path / "run.json").read_text()).keys()
