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
