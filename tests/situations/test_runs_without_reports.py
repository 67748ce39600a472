"""What becomes of the answers of cases, which a fake supervisor gives. A run without a report is never green."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

import mpscale
from mpscale.analysis.summary import summary_of
from mpscale.cli import main
from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.harness import run as harness_run
from mpscale.harness.run import BenchmarkRun
from mpscale.report import files as build
from mpscale.report.files import WRITTEN
from mpscale.telemetry.client import NoDriver

SUITE = """
def test_training(mp_case, benchmark):
    mp_case.measure(benchmark)
"""
GOOD = {
    "status": "ok",
    "series_key": "as it was",
    "step_time_ms_median": 2.0,
    "attempted_steps": 10,
    "metric_name": "accuracy",
    "metric_value": 0.9,
    "metric_higher_is_better": True,
    "metric_margin": 0.01,
}


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Let ``happen`` answer instead of the process of a case; it may return values of the record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    # Pictures take longest, and these tests are not about them.
    monkeypatch.setattr(build, "gains", lambda run: None)
    monkeypatch.setattr(build, "training", lambda run: None)

    def answers(happen):
        class Supervisor:
            why_not_forked = None

            def __init__(self, *_):
                pass

            def describe(self, *_):
                pass

            def run(self, case, steps_path, gpu_path, outcome, attempt=1):
                outcome.record.update({**GOOD, "device": "cpu", "attempts": attempt})
                outcome.record.update(happen(case, steps_path.parents[1]) or {})
                outcome.step_s = [0.002]

            def close(self):
                pass

        monkeypatch.setattr(harness_run, "Supervisor", Supervisor)

    return answers


@pytest.fixture
def benchmark_run(answers, monkeypatch):
    """Run two cases without pytest. Returns the run and its records."""
    monkeypatch.setattr(harness_run, "environment", lambda *_: {})

    def run(happen):
        answers(happen)
        cases = [Case("toy", "fp32", seed, 0, seed, Settings()) for seed in range(2)]
        device = Device("cpu", "Test CPU", None, None, None)
        options = harness_run.Options(Path("results").resolve(), Path.cwd(), "fork", 10.0, {})
        run = BenchmarkRun(cases, device, NoDriver(Reason(Code.NO_LIBRARY, "none here")), options, lambda *_: None)
        outcomes = [run.run(case) for case in cases]
        run.finish(0)
        return run, [outcome.record for outcome in outcomes]

    return run


@pytest.fixture
def run(answers, pytester):
    """Run two cases with pytest."""
    pytester.makepyfile(SUITE)

    def run(happen, *options):
        answers(happen)
        switched_off = [f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest", "unraisableexception")]
        cases = ("--mp-workloads", "mnist1d-mlp", "--mp-modes", "fp32", "--mp-seeds", "2")
        return pytester.runpytest_inprocess(*switched_off, *cases, "--color=yes", *options)

    return run


def red(result):
    """The red lines at the end."""
    return [line for line in result.outlines if "\x1b[31m" in line and "mpscale: " in line]


def only_run(results=Path("results")):
    (path,) = (results / "runs").iterdir()
    return mpscale.read_run(path)


def second(act):
    """Act in the middle of the second case."""

    def happen(case, path):
        if case.seed == 1:
            act(path)

    return happen


def rename_results(path):
    path.parents[1].rename("moved")


def empty_journal(path):
    with (path / "journal.jsonl").open("r+") as journal:
        journal.truncate(10)


LOSSES = {
    "the run's folder is deleted": shutil.rmtree,
    "the results folder is deleted": lambda path: shutil.rmtree(path.parents[1]),
    "the results folder is renamed": rename_results,
    "the journal is deleted": lambda path: (path / "journal.jsonl").unlink(),
    "the journal is cut short": empty_journal,
    "the journal is replaced by another file": lambda path: shutil.copy(
        (path / "journal.jsonl").rename(path / "old"), path / "journal.jsonl"
    ),
    "somebody else writes to the journal": lambda path: (path / "journal.jsonl").open("a").write("{}\n"),
    "run.json is deleted": lambda path: (path / "run.json").unlink(),
}


@pytest.mark.parametrize("what", LOSSES)
def test_files_lost_during_a_run_are_written_again(benchmark_run, what):
    run, _ = benchmark_run(second(LOSSES[what]))
    (trouble,) = run.troubles
    assert "was deleted, moved or changed while the run went on" in trouble
    found = only_run()
    assert found.finished
    assert [(r["seed"], r["status"], r["step_time_ms_median"]) for r in found.records] == [
        (0, "ok", 2.0),
        (1, "ok", 2.0),
    ]
    assert found.problems == []
    assert (found.path / "cases.csv").read_text().count("\n") == 3


def test_a_loss_during_a_run_is_reported_in_red_and_fails_the_session(run):
    result = run(second(rename_results))
    result.assert_outcomes(passed=2, failed=1)
    assert result.ret == 1
    assert any("was deleted, moved or changed while the run went on" in line for line in red(result)), result.outlines
    assert len(only_run().records) == 2
    assert (only_run().path / "report.html").is_file()


def put_a_file_there(path):
    shutil.rmtree(path)
    path.write_text("in the way")


def put_a_folder_there(path, name="journal.jsonl"):
    (path / name).unlink()
    (path / name / "in the way").mkdir(parents=True)


BLOCKED = {
    "a file stands where the run's folder was": put_a_file_there,
    "a folder stands where the journal was": put_a_folder_there,
    "a file stands where the results folder was": lambda path: put_a_file_there(path.parents[1]),
}


@pytest.mark.parametrize("what", BLOCKED)
def test_results_that_can_no_longer_be_written_are_kept_elsewhere(benchmark_run, what):
    run, _ = benchmark_run(second(BLOCKED[what]))
    assert "cannot be written" in run.troubles[0]
    assert run.troubles[-1] == f"everything but steps and GPU samples is kept in {run.path}"
    assert run.path.parent.name.startswith("mpscale-")
    found = mpscale.read_run(run.path)
    assert [(r["seed"], r["status"]) for r in found.records] == [(0, "ok"), (1, "ok")]


def test_a_run_that_is_kept_elsewhere_has_its_report_there(run):
    result = run(second(put_a_file_there))
    result.assert_outcomes(passed=2, failed=1)
    assert result.ret == 1
    assert any("cannot be written" in line for line in red(result))
    (path,) = Path(os.environ["TMPDIR"]).glob("mpscale-*/*")
    assert any(f"is kept in {path}" in line for line in red(result)), result.outlines
    assert (path / "report.html").is_file()


def test_a_disk_that_is_full_for_a_while_costs_no_row(benchmark_run):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def happen(case, path):
        full = case.seed == 0
        size = (path / "journal.jsonl").stat().st_size + 50
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if full else limits[0], limits[1]))

    try:
        run, _ = benchmark_run(happen)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written: the file would be larger than is allowed" in run.troubles[0]
    assert "can be written again, and its journal is whole" in run.troubles[-1]
    found = only_run()
    assert [r["status"] for r in found.records] == ["ok", "ok"]
    assert found.problems == []


def test_a_disk_that_stays_full_fails_the_session(run):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        result = run(lambda case, path: resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.ret == 1
    assert any("no report could be made of" in line for line in red(result)), result.outlines


MISFITS = {
    "0 for the metric's direction": ({"metric_higher_is_better": 0}, "metric_higher_is_better should be bool, not 0"),
    "a number for the metric's name": ({"metric_name": 5}, "metric_name should be str, not 5"),
    "True for the target": ({"metric_target": True}, "metric_target should be float, not True"),
    "a text for the margin": ({"metric_margin": "0.01"}, "metric_margin should be float, not '0.01'"),
    "a list for the optimizer": ({"optimizer": ["adam"]}, "optimizer should be str, not ['adam']"),
    "half a step": ({"attempted_steps": 10.5}, "attempted_steps should be int, not 10.5"),
    "no step time": ({"step_time_ms_median": 0.0}, "step_time_ms_median is 0.0; it must be above 0"),
    "an array": ({"metric_value": np.ones(2)}, "metric_value should be float, not array([1., 1.])"),
    "a status that does not exist": ({"status": "fine"}, "'fine' is not a status of a case"),
    "the seed as a text": ({"seed": "0"}, "seed should be int, not '0'"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_value_of_the_wrong_kind_costs_its_case_and_no_other(benchmark_run, what):
    values, message = MISFITS[what]
    run, records = benchmark_run(lambda case, path: values if case.seed == 1 else None)
    assert (records[1]["status"], records[1]["status_reason"]) == ("invalid", message)
    found = only_run()
    assert [(r["seed"], r["status"]) for r in found.records] == [(0, "ok"), (1, "invalid")]
    assert found.records[1].to_json() == records[1].to_json()
    assert (found.problems, run.troubles) == ([], [])


def test_a_value_of_the_wrong_kind_fails_its_test_at_once(run):
    result = run(lambda case, path: {"metric_higher_is_better": 0} if case.seed == 1 else None)
    result.assert_outcomes(passed=1, failed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*s1--r0: invalid: metric_higher_is_better should be bool, not 0*"])
    assert "metric_higher_is_better should be bool, not 0" in (only_run().path / "report.md").read_text()


def test_numbers_of_numpy_are_numbers(benchmark_run):
    values = {
        "metric_higher_is_better": np.bool_(True),
        "metric_target": np.float32(0.5),
        "metric_margin": np.float64(0.01),
        "batch_size": np.int64(20),
        "metric_value": np.array(0.75),
        "metric_name": np.str_("accuracy"),
    }
    benchmark_run(lambda case, path: values)
    record = only_run().records[0]
    assert {name: record[name] for name in values} == {name: value.item() for name, value in values.items()}


def test_a_report_that_cannot_be_made_is_reported_in_red_below_the_table(run, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(build, "page", fail)
    result = run(lambda case, path: None)
    result.assert_outcomes(passed=2, failed=1)
    assert result.ret == 1
    assert any("no report could be made of" in line and "ZeroDivisionError: no page" in line for line in red(result))
    assert any("2.00 [2.00, 2.00] ms" in line for line in result.outlines), result.outlines
    assert not any("report.html" in line for line in result.outlines)


def test_a_diverged_training_fails_unless_a_loss_scale_is_on_trial(run):
    diverged = {"status": "diverged", "status_reason": "the weights were not finite"}
    result = run(lambda case, path: diverged, "--mp-modes", "fp32,mixed-unscaled", "--mp-seeds", "1")
    result.assert_outcomes(passed=1, failed=1)
    assert {row["speedup_fp32"] for row in summary_of(only_run())} == {None}


def test_a_mode_that_starts_from_other_weights_is_invalid(run):
    result = run(
        lambda case, path: {"initial_weights_digest": f"of {case.mode}"}, "--mp-modes", "fp32,mixed-bf16",
        "--mp-seeds", "1",
    )  # fmt: skip
    result.assert_outcomes(passed=1, failed=1)
    first, second = only_run().records
    assert (first["status"], second["status"]) == ("ok", "invalid")
    assert "initial weights" in second["status_reason"]


SHARED = """
import pytest


@pytest.mark.benchmark(group="mine", min_rounds=3)
def test_speed(mp_case, benchmark):
    assert mp_case.measure(benchmark)["step_time_ms_median"] > 0


def test_accuracy(mp_case, benchmark):
    assert mp_case.measure(benchmark)["final_accuracy"] > 0.8


@pytest.mark.xfail(reason="too much to ask", strict=True)
def test_perfection(mp_case, benchmark):
    assert mp_case.measure(benchmark)["final_accuracy"] == 1.0
"""


def test_tests_that_share_a_case_share_its_measurement(run, pytester):
    """They keep their benchmark markers, but for the timer, which has to be the replayed one."""
    pytester.makepyfile(SHARED)
    measured = []

    def happen(case, path):
        measured.append(case.seed)
        return {"final_accuracy": 0.9}

    result = run(happen, "--benchmark-json", "out.json")
    result.assert_outcomes(passed=4, xfailed=2)
    assert sorted(measured) == [0, 1]
    benchmarks = json.loads(Path("out.json").read_text())["benchmarks"]
    assert {one["group"] for one in benchmarks} == {"mine", "mnist1d-mlp"}
    assert {one["stats"]["median"] for one in benchmarks} == {0.002}


def other_run(name, info):
    path = Path("results/runs") / name
    path.mkdir(parents=True)
    (path / "run.json").write_text(info)
    (path / "journal.jsonl").write_text("")
    return path


def like_this_one(**changes):
    """The run.json of the only run, changed."""
    return json.dumps(json.loads((only_run().path / "run.json").read_text()) | changes)


def test_other_runs_that_are_broken_are_named_and_left_out(run):
    run(lambda case, path: None)
    others = {
        "cut short": "{",
        "without version": "{}",
        "newer": '{"schema_version": 99}',
        "a list": "[]",
        "of a strange environment": like_this_one(environment=5),
        "of strange settings": like_this_one(settings=[1]),
        "of strange packages": like_this_one(environment={**only_run().info["environment"], "packages": 5}),
        "without a journal": like_this_one(),
    }
    for name, info in others.items():
        other_run(name, info)
    (Path("results/runs/without a journal") / "journal.jsonl").unlink()
    put_a_folder_there(other_run("a folder", "{}"), "run.json")
    before = set(Path("results/runs").iterdir())
    result = run(lambda case, path: None)
    result.assert_outcomes(passed=2)
    assert result.ret == 0, result.outlines
    (new,) = set(Path("results/runs").iterdir()) - before
    report = (new / "report.md").read_text()
    for name in ("cut short", "without version", "newer", "a list", "without a journal", "a folder"):
        assert f"results/runs/{name} was left out: " in report
    assert main(["history"]) == 0
    assert main(["report", new.name]) == 0
    assert main(["compare", new.name, new.name]) == 0


def test_the_latest_run_that_can_be_read_is_the_baseline(run):
    run(lambda case, path: None)
    first = only_run()
    other_run("20990101T000000Z-cpu-0000", "{")
    result = run(lambda case, path: None, "--mp-baseline", "latest", "--mp-fail-on", "missing")
    text = result.stdout.str()
    assert result.ret == 0, text
    assert "fired" not in text
    assert (max(Path("results/runs").glob("*/comparison.md")).read_text()).startswith("# ")
    assert "20990101T000000Z-cpu-0000 cannot be the baseline: " in text
    assert f"against {first.name}:" in text


def test_without_a_readable_baseline_the_run_does_not_start(run):
    other_run("20990101T000000Z-cpu-0000", "{")
    result = run(lambda case, path: None, "--mp-baseline", "latest")
    assert result.ret == 4
    assert len(list(Path("results/runs").iterdir())) == 1


@pytest.mark.parametrize("cut", ["behind the first case", "in the second case"])
def test_a_journal_that_was_cut_off_later_does_not_take_the_table_with_it(benchmark_run, capsys, cut):
    benchmark_run(lambda case, path: None)
    path = only_run().path
    lines = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert main(["report", "latest"]) == 0
    assert capsys.readouterr().err == ""
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.name in WRITTEN}
    (path / "journal.jsonl").write_bytes(b"".join(lines[: 3 if cut == "behind the first case" else 4]))
    assert main(["report", "latest"]) == 0
    said = "journal.jsonl lacks results of 1 case that cases.csv has, such as toy--fp32--s1--r0"
    assert said in capsys.readouterr().err
    assert len(before) == 4
    assert {name: (path / name).read_bytes() for name in before} == before


def test_another_attempt_that_was_cut_off_has_lost_nothing(benchmark_run, capsys):
    benchmark_run(lambda case, path: None)
    path = only_run().path
    begun = json.loads((path / "journal.jsonl").read_text().splitlines()[3])
    with (path / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({**begun, "attempt": 2}) + "\n")
    assert main(["report", "latest"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert [r["status"] for r in only_run().records] == ["ok", "interrupted"]
