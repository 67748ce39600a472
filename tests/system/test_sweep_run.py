"""Several batch sizes and constant loss scales in one run, from the command line to the report."""

import json

import pandas as pd
import pytest
from support.small_suite import pytest_here, write

from mpscale.analysis.summary import summary_of
from mpscale.cli import main

SWEEP = ("--mp-batch-size", "40,10,40", "--mp-static-scale", "8,2**24")
FINE = ("--mp-workloads", "suite_workloads:fine", "--mp-modes", "fp32,mixed-static", "--mp-seeds", "1")
PLACES = [
    ("suite_workloads:fine @10", "fp32"),
    ("suite_workloads:fine @10", "mixed-static @8"),
    ("suite_workloads:fine @10", "mixed-static @2^24"),
    ("suite_workloads:fine @40", "fp32"),
    ("suite_workloads:fine @40", "mixed-static @8"),
    ("suite_workloads:fine @40", "mixed-static @2^24"),
]


@pytest.fixture(scope="module")
def job(run_suite):
    done = run_suite(
        *FINE, *SWEEP, "--mp-steps", "12", "--mp-timing", "0.05", "--mp-jit", "off", "--benchmark-only",
        "--benchmark-json", "out.json",
    )  # fmt: skip
    assert done.code == 0, done.output
    return done


@pytest.fixture(scope="module")
def cases(job):
    return pd.read_csv(job.path / "cases.csv")


def test_every_mode_runs_at_every_batch_and_only_the_constant_scale_at_every_scale(cases):
    there = cases[["mode", "batch_size", "swept_batch", "swept_scale"]].fillna(0)
    assert sorted(there.itertuples(index=False, name=None)) == sorted(
        (mode, batch, batch, scale)
        for batch in (10, 40)
        for mode, scale in (("fp32", 0), ("mixed-static", 8), ("mixed-static", 2**24))
    )
    assert set(cases["workload"]) == {"suite_workloads:fine"}
    assert "suite_workloads+fine--mixed-static--batch10--scale16777216--s0--r0" in set(cases["case_id"])


def test_each_case_trains_with_its_own_batch_and_scale(job, cases):
    for _, case in cases.iterrows():
        assert f"batch={case['batch_size']},steps=12" in case["series_key"]
        assert (case["batch_size"], case["attempted_steps"]) == (case["swept_batch"], 12)
        if case["mode"] == "mixed-static":
            assert f"scale={case['swept_scale']:.0f}/" in case["series_key"]
            steps = job.run.steps(case["case_id"])
            assert set(steps["loss_scale"]) == {case["swept_scale"]}
    status = cases.set_index(["swept_batch", "swept_scale"])["status"]
    assert {status[batch, 8] for batch in (10, 40)} == {"ok"}
    # All of its gradients overflow, so the weights stay as they were.
    assert {status[batch, 2.0**24] for batch in (10, 40)} == {"stalled"}


def test_modes_start_alike_at_each_batch(cases):
    assert cases["initial_weights_digest"].nunique() == cases["workload_digest"].nunique() == 1
    orders = cases.groupby("swept_batch")["data_order_digest"]
    assert orders.nunique().tolist() == [1, 1]
    assert orders.first().nunique() == 2


def test_the_baseline_of_a_mode_is_that_of_its_batch(job):
    time = {case.place: case["step_time_ms_median"] for case in job.run.records}
    rows = {(row["swept_batch"], row["swept_scale"]): row for row in summary_of(job.run)}
    assert len(rows) == 6
    for batch in (10, 40):
        fp32, static = (time[f"suite_workloads:fine @{batch}", mode] for mode in ("fp32", "mixed-static @8"))
        assert rows[batch, 8]["speedup_fp32"] == pytest.approx(fp32 / static)
        assert rows[batch, 2.0**24]["metric_verdict"] == "worse"


def test_terminal_and_report_name_batch_and_scale(job):
    table = job.output[job.output.index("= mpscale =") :]
    report = (job.path / "report.md").read_text()
    for workload, mode in PLACES:
        assert any(line.split("  ")[0] == workload and f"  {mode} " in line for line in table.splitlines())
        # So that GitHub mentions nobody; readers of the page see neither.
        assert f"| {workload} | {mode} ".replace("@", "@<!-- -->") in " ".join(report.split())
    assert "batches of 10 and 40, and over constant loss scales of 8 and 2^24" in report
    assert "## Speed-up over batch" in report and "## Static loss scales" in report
    assert 'id="throughput-1"' in (job.path / "report.html").read_text()
    assert "[1/6]  suite_workloads:fine @" in job.output


def test_benchmarks_are_named_and_grouped_by_batch(job):
    saved = json.loads((job.folder / "out.json").read_text())["benchmarks"]
    assert {one["group"] for one in saved} == {"suite_workloads:fine @10", "suite_workloads:fine @40"}
    assert {one["extra_info"].get("swept_batch") for one in saved} == {10, 40}
    assert "test_training[suite_workloads:fine-mixed-static-batch40-scale16777216-seed0]" in {
        one["name"] for one in saved
    }


def test_settings_of_the_run_list_what_was_swept(job):
    settings = json.loads((job.path / "run.json").read_text())["settings"]
    assert settings["batch_size"] == [10, 40]
    assert settings["static_scale"] == [8.0, 2.0**24]
    assert settings["set_apart"] == {"suite_workloads:fine": {"dynamic_scale": {"growth_interval": 20}}}


def test_the_report_is_made_again_from_the_journal(job, capsys):
    before = {name: (job.path / name).read_bytes() for name in ("cases.csv", "summary.csv", "report.md")}
    for name in before:
        (job.path / name).unlink()
    assert main(["report", str(job.path)]) == 0
    capsys.readouterr()
    assert {name: (job.path / name).read_bytes() for name in before} == before


def test_a_sweep_can_be_compared_with_itself(job, capsys):
    code = main(["compare", str(job.path), str(job.path / "cases.csv"), "--fail-on", "missing"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "6 rows" in printed
    assert "suite_workloads:fine @40  mixed-static @8" in printed


def test_cases_are_told_apart_beside_parameters_of_the_suite(tmp_path, monkeypatch):
    suite = """import pytest

@pytest.mark.parametrize("own", ["p", "q"])
def test_training(own, mp_case, mode, mp_variant):
    print("RUN", own, mp_case.case.id, mp_case.case.mode == mode, mp_variant)
"""
    write(tmp_path, test_suite=suite)
    monkeypatch.chdir(tmp_path)
    code, output = pytest_here(
        tmp_path, "-s", "--mp-workloads=mnist1d-mlp", "--mp-modes=fp32,mixed-static", "--mp-batch-size=8,16",
        "--benchmark-disable",
    )  # fmt: skip
    assert code == 0, output
    ran = [line.partition("RUN ")[2] for line in output.splitlines() if "RUN " in line]
    assert sorted(ran) == sorted(
        f"{own} mnist1d-mlp--{mode}--batch{batch}--s0--r0 True batch{batch}"
        for own in "pq"
        for mode in ("fp32", "mixed-static")
        for batch in (8, 16)
    )


def test_a_dry_run_names_swept_cases_and_selects_among_them(tmp_path, monkeypatch, write_suite):
    write_suite(tmp_path)
    monkeypatch.chdir(tmp_path)
    choice = ("--mp-repeats=1", "--collect-only", "-q", "-k", "batch10 and not scale8")
    code, output = pytest_here(tmp_path, *FINE, *SWEEP, *choice)
    assert code == 0, output
    named = sorted(line.partition("[")[2] for line in output.splitlines() if "[" in line)
    assert named == [
        f"suite_workloads:fine-{mode}-batch10{scale}-{which}]"
        for mode, scale in (("fp32", ""), ("mixed-static", "-scale16777216"))
        for which in ("repeat1", "seed0")
    ]
