"""When pytest-benchmark shows its table of the cases, which is wider than any terminal, and what it compares."""

from __future__ import annotations

import json

import pytest
from pytest_benchmark.session import PerformanceRegression
from support.no_training import replace_trainings
from support.small_suite import SUITE, pytest_here, write

CASES = """
def test_training(mp_case, benchmark):
    benchmark.pedantic(lambda: None, rounds=2)
"""
OTHERS = """
def test_of_another_kind(benchmark):
    benchmark.pedantic(lambda: None, rounds=2)
"""


@pytest.mark.parametrize(
    ("suite", "options", "ours", "theirs"),
    [
        pytest.param(CASES, (), False, False, id="only cases"),
        pytest.param(CASES + OTHERS, (), False, True, id="others, too"),
        pytest.param(CASES, ("--mp-benchmark-table",), True, False, id="asked for"),
        pytest.param(CASES, ("--benchmark-columns=min,max",), True, False, id="its columns"),
        pytest.param(CASES + OTHERS, ("--benchmark-group-by=func",), True, True, id="its groups"),
    ],
)
def test_the_table_has_the_benchmarks_that_are_not_ours(tmp_path, suite, options, ours, theirs):
    write(tmp_path, test_suite=suite)
    code, output = pytest_here(tmp_path, tmp_path, "--mp-workloads=mnist1d-mlp", *options)
    assert code == 0, output
    shown = output.splitlines()
    assert any(line.startswith("test_training[") for line in shown) == ours
    assert any(line.startswith("test_of_another_kind") for line in shown) == theirs
    assert ("Name (time in" in output) == (ours or theirs)


def test_a_comparison_needs_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, test_suite=CASES)
    options = (tmp_path, "--mp-workloads=mnist1d-mlp", f"--benchmark-storage=file://{tmp_path}/kept")
    assert (
        "Name (time in" not in pytest_here(tmp_path, *options, "--benchmark-save=one", "--benchmark-json=out.json")[1]
    )
    assert (tmp_path / "out.json").stat().st_size
    assert "Name (time in" in pytest_here(tmp_path, *options, "--benchmark-compare")[1]


def test_a_comparison_is_of_the_times_of_training_steps(tmp_path, monkeypatch):
    """A saved run whose times are a hundredth of the truth makes this one a regression."""
    monkeypatch.chdir(tmp_path)
    replace_trainings(monkeypatch)
    monkeypatch.setattr("mpscale.report.files._page", lambda run, report: "a page")  # which takes longest
    write(tmp_path, test_suite=SUITE)
    options = (tmp_path, "--mp-workloads=mnist1d-mlp", f"--benchmark-storage=file://{tmp_path}/kept")
    fails = ("--benchmark-compare", "--benchmark-compare-fail=median:500%")
    assert pytest_here(tmp_path, *options, "--benchmark-save=one")[0] == 0
    assert pytest_here(tmp_path, *options, *fails)[0] == 0
    (saved,) = tmp_path.glob("kept/*/*_one.json")
    stored = json.loads(saved.read_text())
    (benchmark,) = stored["benchmarks"]
    assert (benchmark["stats"]["min"], benchmark["stats"]["max"]) == (0.002, 0.003)
    for name in ("min", "max", "mean", "median"):
        benchmark["stats"][name] /= 100
    saved.write_text(json.dumps(stored))
    with pytest.raises(PerformanceRegression, match="Performance has regressed"):
        pytest_here(tmp_path, *options, *fails)


def test_a_case_that_is_measured_again_without_xla_has_its_last_times_or_fails_the_session(tmp_path, monkeypatch):
    """XLA refuses seed 1, so both cases of seed 0 are measured again, of which one fails."""

    def happen(case):
        if case.settings.jit:
            refused = {"status": "error", "status_reason": "no", "cause": "xla-refused", "xla_refused": "Lu"}
            return refused if case.seed == 1 else {}
        failed = {"status": "oom", "status_reason": "no memory", "cause": "out-of-memory"}
        return failed if (case.seed, case.mode) == (0, "fp32") else {}

    monkeypatch.chdir(tmp_path)
    replace_trainings(monkeypatch, happen)
    monkeypatch.setattr("mpscale.report.files._page", lambda run, report: "a page")
    write(tmp_path, test_suite=SUITE)
    options = ("--mp-workloads=mnist1d-mlp", "--mp-modes=fp32,mixed-dynamic", "--mp-seeds=2")
    code, output = pytest_here(tmp_path, tmp_path, *options, "--benchmark-json=out.json")
    assert (code, "4 passed" in output) == (1, True), output
    end = output.rpartition("= mpscale =")[2]
    assert "mnist1d-mlp--fp32--s0--r0, measured again without XLA: oom: no memory" in end
    (journal,) = tmp_path.glob("results/runs/*/journal.jsonl")
    ended = [line for line in journal.read_text().splitlines() if '"case_finished"' in line]
    assert len(ended) == 2 + 1 + 2 + 4  # with XLA, refused, set aside, and without XLA
    benchmarks = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    found = sorted((one["extra_info"]["case_id"], one["extra_info"]["jit"]) for one in benchmarks)
    assert found == [
        ("mnist1d-mlp--fp32--s1--r0", False),
        ("mnist1d-mlp--mixed-dynamic--s0--r0", False),
        ("mnist1d-mlp--mixed-dynamic--s1--r0", False),
    ]
