"""Workloads without a metric: nothing is evaluated, and no page says how good a training is."""

import keras
import numpy as np
import pytest
from support.one_case import blobs, dense, train, workload
from support.runfolder import finished, record, write_run

from mpscale.analysis.compare import compare
from mpscale.analysis.gates import exit_code, judge_gates, parse_gates
from mpscale.analysis.history import make_history
from mpscale.analysis.quantities import Outcome, Verdict
from mpscale.analysis.summary import summarise
from mpscale.cli import main
from mpscale.core.cases_csv import read_cases
from mpscale.core.reason import Code, Reason
from mpscale.core.record import settle, to_csv
from mpscale.core.runs import RunError, read_run
from mpscale.report.document import document, render
from mpscale.report.github_summary import github_summary
from mpscale.workloads import Data

X, Y = blobs()
SYNTHETIC = {"has_metric": False, "synthetic_inputs": True}
OWN = {"has_metric": False, "synthetic_inputs": False}
SILENT = ("non-inferior", "worse", "inconclusive", "accuracy nan", "final accuracy", "diverged")
"""What no page may say of a training that ended well."""


def without_test_set():
    return Data(X, Y)


def test_a_workload_of_ones_own_may_have_no_metric_and_no_test_set():
    mine = workload(dense(), without_test_set, metric=None)
    outcome = train(mine, "mixed-dynamic")
    assert (outcome.status, outcome.reason) == ("ok", None)
    assert (outcome.row["has_metric"], outcome.row["synthetic_inputs"]) == (False, False)
    assert outcome.row["train_loss_final"] < outcome.row["train_loss_first"]
    for column in (
        "metric_name",
        "metric_value",
        "final_accuracy",
        "metric_target",
        "steps_to_target",
        "test_examples",
    ):
        assert outcome.missed[column].code is Code.NOT_IN_WORKLOAD
        assert column not in outcome.row


def test_a_training_without_a_metric_may_diverge():
    def one_hot():
        return Data(X, np.eye(3, dtype="float32")[Y])

    # At this rate the weights leave float32.
    options = {"loss": "mse", "optimizer": lambda: keras.optimizers.SGD(1e30)}
    assert train(workload(dense(), one_hot, metric=None, **options)).status == "diverged"


def test_a_metric_needs_a_test_set():
    with pytest.raises(ValueError, match="metric=None"):
        train(workload(dense(), without_test_set))


@pytest.mark.parametrize(
    "options",
    [
        {"metric": None, "target": 0.9},
        {"metric": None, "margin": 0.01},
        {"metric": None, "metric_name": "accuracy"},
        {"metric": None, "metric_higher_is_better": True},
        {"synthetic": True},
    ],
)
def test_fields_that_contradict_the_lack_of_a_metric_are_refused(options):
    with pytest.raises(ValueError, match="metric"):
        workload(dense(), without_test_set, **options)


def cases(facts, mode="fp32", ms=2.0, **values):
    known = {"series_key": f"key-{mode}", "train_loss_first": 7.0, "train_loss_final": 6.9, "examples_per_s": 5e3}
    made = [
        record(mode, seed, step_time_ms_median=ms * (1 + seed / 1000), batch_size=10, **{**known, **facts, **values})
        for seed in range(2)
    ]
    for each in made:
        each.miss("metric_value", Reason(Code.NOT_IN_WORKLOAD, "synthetic inputs: no accuracy"))
    return made


def both(facts, **values):
    return [*cases(facts), *cases(facts, "mixed-dynamic", ms=1.0, **values)]


@pytest.fixture
def run(tmp_path):
    def made(records, name="20260101T000000Z-test-cpu-aaaa"):
        return read_run(write_run(tmp_path / "results", finished(records), name=name))

    return made


@pytest.mark.parametrize(("facts", "why"), [(SYNTHETIC, "synthetic inputs"), (OWN, "no metric")])
def test_every_page_says_why_there_is_no_accuracy_and_gives_no_verdict(run, facts, why):
    shown = run(both(facts))
    made = document(shown)
    for text in (render(made), github_summary(shown)):
        results = text.split("## How to read this")[0]
        assert why in results
        assert not [word for word in SILENT if word in results.lower()]
    assert "5000" in render(made).split("## Workloads without a metric")[1].split("##")[0]


def test_the_summary_has_no_verdict_unless_a_seed_was_lost():
    rows = {row["mode"]: row for row in summarise(both(SYNTHETIC))}
    assert all(row["metric_verdict"] is None and row["has_metric"] is False for row in rows.values())
    assert rows["mixed-dynamic"]["seeds_planned"] == 2
    lost = both(SYNTHETIC)
    lost[-1].update({"status": "diverged", "status_reason": "the loss was not finite"})
    (row,) = (row for row in summarise(lost) if row["mode"] == "mixed-dynamic")
    assert (row["metric_verdict"], row["left_out"]) == (Verdict.WORSE, "seed 1: diverged")


def test_a_table_of_cases_keeps_its_trainings_well(tmp_path):
    (tmp_path / "cases.csv").write_text(to_csv(both(SYNTHETIC)))
    assert [case["status"] for case in settle(read_cases(tmp_path / "cases.csv"))] == ["ok"] * 4


@pytest.mark.parametrize(
    ("after", "outcomes", "code"),
    [
        pytest.param(both(SYNTHETIC), {Outcome.NOT_APPLICABLE}, 0, id="well"),
        pytest.param(both(SYNTHETIC, status="diverged"), {Outcome.NOT_APPLICABLE, Outcome.FIRED}, 1, id="diverged"),
        pytest.param(both(SYNTHETIC, status="timeout"), {Outcome.NOT_APPLICABLE}, 0, id="failed: for the gate missing"),
    ],
)
def test_the_gate_metric_does_not_apply_unless_a_training_was_lost(run, after, outcomes, code):
    comparison = compare(run(both(SYNTHETIC)), run(after, "20260102T000000Z-test-cpu-bbbb"))
    findings = judge_gates(comparison, parse_gates(["metric"]))
    assert {finding.outcome for finding in findings} == outcomes
    assert exit_code(findings, strict=True) == code


def test_a_seed_that_is_gone_is_noticed_without_a_metric(run):
    comparison = compare(run(both(SYNTHETIC)), run(both(SYNTHETIC)[:-1], "20260102T000000Z-test-cpu-bbbb"))
    (found,) = (f for f in judge_gates(comparison, parse_gates(["missing"])) if f.row == ("toy", "mixed-dynamic"))
    assert "seed 1" in found.text


def test_the_history_of_a_metric_says_that_there_is_none(run):
    with pytest.raises(RunError, match="synthetic inputs"):
        make_history([run(both(SYNTHETIC))], "metric")


def test_the_list_of_workloads_tells_synthetic_ones_apart(capsys):
    main(["workloads"])
    lines = capsys.readouterr().out.splitlines()
    places = [next(n for n, line in enumerate(lines) if line.startswith(name)) for name in ("article-mlp", "resnet50 ")]
    assert places == sorted(places)
    assert "none: synthetic inputs" in lines[places[1]]
    assert not any(line.startswith("resnet50-tiny") for line in lines)
    main(["workloads", "resnet50-tiny"])
    assert "resnet50-tiny" in capsys.readouterr().out
