"""The main job as its user sees it: files, tables, pytest-benchmark's own options."""

import json

import pandas as pd
import pytest
from support.small_suite import SUITE, pytest_here, write

from mpscale.core.columns import COLUMNS

MODES = "fp32,mixed-dynamic,tf32,graph-rewrite"
FINE = ("--mp-workloads", "suite_workloads:fine", "--mp-modes", MODES, "--mp-seeds", "1")
QUICK = ("--mp-timing", "0.1")


@pytest.fixture(scope="module")
def job(run_suite):
    return run_suite(
        *FINE, *QUICK, "--mp-repeats", "1", "--benchmark-only", "--benchmark-json", "out.json",
        "--benchmark-save", "first", "--benchmark-histogram", "picture", "--benchmark-group-by", "param:mode",
        "--mp-dynamic-scale", "maximum=2**16",
    )  # fmt: skip


def test_it_passes_and_leaves_its_files(job):
    assert job.code == 0, job.output
    assert {p.name for p in job.path.iterdir()} >= {
        "run.json", "journal.jsonl", "cases.csv", "summary.csv", "report.md", "report.html", "steps",
    }  # fmt: skip


def test_cases_csv_reads_without_arguments_and_has_every_column(job):
    cases = pd.read_csv(job.path / "cases.csv")
    assert list(cases.columns) == list(COLUMNS)
    assert len(cases) == 8
    assert cases["workload_digest"].dropna().str.startswith("sha256:").all()


def test_every_empty_cell_of_a_measured_column_has_a_reason(job):
    cases = pd.read_csv(job.path / "cases.csv")
    for _, row in cases.iterrows():
        reasons = json.loads(row["unavailable"])
        empty = {c.name for c in COLUMNS.values() if c.measured and pd.isna(row[c.name])}
        assert set(reasons) == empty


def test_seed_trains_and_repeat_only_times(job):
    cases = job.run.cases.query("mode == 'mixed-dynamic'").set_index("repeat")
    assert cases.loc[0, "attempted_steps"] == 30
    assert cases.loc[0, "final_accuracy"] > 0.8
    assert pd.isna(cases.loc[1, "attempted_steps"])
    assert cases.loc[1, "unavailable"]["final_accuracy"] == "timing-only process"
    assert (cases["step_time_ms_median"] > 0).all()
    assert cases.loc[0, "examples_per_s"] == pytest.approx(20e3 / cases.loc[0, "step_time_ms_median"])
    assert cases.loc[0, "timed_overflow_steps"] == 0


def test_modes_of_a_seed_start_alike(job):
    trained = job.run.cases.query("repeat == 0 and status == 'ok'")
    assert len(trained) == 2
    for column in ("initial_weights_digest", "data_order_digest", "data_digest", "workload_digest"):
        assert trained[column].nunique() == 1, column


@pytest.mark.parametrize(
    ("mode", "reason"),
    [("tf32", "compute capability 8.0"), ("graph-rewrite", "capability 7.0 or newer and --mp-jit off")],
)
def test_an_unsupported_mode_is_a_row_and_a_skipped_test(job, mode, reason):
    row = pd.read_csv(job.path / "cases.csv").query("mode == @mode").iloc[0]
    assert row["status"] == "unsupported"
    assert reason in row["status_reason"]
    assert "4 passed, 4 skipped" in job.output


def test_arguments_of_the_loss_scale_make_a_series_of_their_own(job):
    keys = job.run.cases.query("repeat == 0").set_index("mode")["series_key"]
    assert "growth_interval=20,maximum=65536" in keys["mixed-dynamic"]
    assert "maximum" not in keys["fp32"]
    settings = json.loads((job.path / "run.json").read_text())["settings"]
    assert settings["dynamic_scale"] == {"maximum": 2**16}
    of_the_workload = {"dynamic_scale": {"growth_interval": 20, "maximum": 2**16}}
    assert settings["set_apart"] == {"suite_workloads:fine": of_the_workload}


def test_steps_of_each_training_are_there(job):
    steps = job.run.steps("suite_workloads+fine--mixed-dynamic--s0--r0")
    assert list(steps.columns) == ["step", "loss", "loss_scale", "overflow"]
    assert len(steps) == 30
    assert steps["loss"].iloc[-1] < steps["loss"].iloc[0]
    assert steps["loss_scale"].tolist() == [2.0**15] * 20 + [2.0**16] * 10
    cases = job.run.cases.query("repeat == 0").set_index("mode")
    assert cases.loc["mixed-dynamic", "growth_interval"] == 20


def test_run_json_describes_machine_and_settings(job):
    info = json.loads((job.path / "run.json").read_text())
    environment = info["environment"]
    assert environment["runtime"]["tensorflow"] == environment["packages"]["tensorflow"]
    assert environment["cpu"]["logical_cores"] >= 1
    assert info["settings"]["timing_s"] == 0.1
    assert len(info["planned"]) == 8


def test_terminal_shows_progress_and_both_tables(job):
    assert "[1/8]  suite_workloads:fine" in job.output
    assert "[8/8]  suite_workloads:fine" in job.output
    cases = [line for line in job.output.splitlines() if line.startswith("[")]
    assert len(cases) == 8
    between = job.output[job.output.index(cases[0]) : job.output.index(cases[-1])]
    assert [line for line in between.splitlines() if not line.startswith("[") and set(line) <= {"."}] == []
    table = job.output[job.output.index("= mpscale =") :]
    assert "mixed-dynamic" in table
    assert str(job.path.relative_to(job.folder)) in table
    assert "benchmark 'mode=mixed-dynamic'" in job.output


def test_benchmark_json_holds_the_times_of_training_steps(job):
    benchmarks = json.loads((job.folder / "out.json").read_text())["benchmarks"]
    assert len(benchmarks) == 4
    by_case = {b["extra_info"]["case_id"]: b for b in benchmarks}
    for _, row in job.run.cases.query("status == 'ok'").iterrows():
        saved = by_case[row["case_id"]]
        assert saved["stats"]["median"] * 1e3 == pytest.approx(row["step_time_ms_median"])
        assert saved["stats"]["rounds"] == row["timed_blocks"]
    trained = by_case["suite_workloads+fine--mixed-dynamic--s0--r0"]["extra_info"]
    assert trained["overflow_steps"] == 0
    assert trained["final_accuracy"] > 0.8
    assert trained["host_memory_peak_mib"] > 0


def test_benchmark_histogram_is_drawn(job):
    assert list(job.folder.glob("picture*.svg"))


@pytest.mark.slow  # in this process, and without a training, in test_benchmark_table
def test_benchmark_compare_fail_compares_training_steps(job, run_suite):
    """A saved run whose times are a hundredth of the truth makes this one a regression, on any machine."""
    (saved,) = job.folder.glob(".benchmarks/*/*_first.json")
    stored = json.loads(saved.read_text())
    for benchmark in stored["benchmarks"]:
        for name in ("min", "max", "mean", "median"):
            benchmark["stats"][name] /= 100
    saved.write_text(json.dumps(stored))
    done = run_suite(
        *FINE, *QUICK, "-k", "fp32", "--benchmark-storage", f"file://{job.folder / '.benchmarks'}",
        "--benchmark-compare", "--benchmark-compare-fail", "median:500%",
    )  # fmt: skip
    assert done.code != 0
    assert "Performance has regressed" in done.output
    assert "= mpscale =" in done.output
    assert done.run.cases["status"].tolist() == ["ok"]


def test_a_dry_run_lists_the_cases(run_suite):
    done = run_suite("--collect-only", "-q")
    assert done.code == 0, done.output
    assert "test_training[mnist1d-cnn-mixed-bf16-seed2]" in done.output
    assert "81 tests collected" in done.output
    assert "tf32" not in done.output  # which a CPU lacks
    assert done.path is None


def test_parallel_cases_are_refused(run_suite):
    done = run_suite(*FINE, "-n", "1")
    assert done.code == 1
    assert "would disturb each other: run without -n" in done.output
    assert done.path is None


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        pytest.param(["--benchmark-skip"], 0, "6 skipped", id="benchmark-skip"),
        pytest.param(["-k", "nothing"], 5, "6 deselected", id="nothing chosen"),
        pytest.param(["--mp-modes", "fp32,fp61"], 4, "no mode is called 'fp61'", id="unknown mode"),
        pytest.param(["--mp-modes", "mixed-dynamc"], 4, "did you mean mixed-dynamic?", id="misspelt mode"),
        pytest.param(["--mp-workloads", "mnist"], 4, "the workloads are mnist1d-mlp", id="unknown workload"),
        pytest.param(["--mp-preset", "huge"], 4, "invalid choice: 'huge'", id="unknown preset"),
    ],
)
def test_without_a_case_nothing_is_left_and_wrong_options_are_explained(tmp_path, monkeypatch, options, code, said):
    write(tmp_path, test_suite=SUITE)
    monkeypatch.chdir(tmp_path)
    found, output = pytest_here(tmp_path, *options)
    assert found == code, output
    assert said in output
    assert not (tmp_path / "results").exists()


def test_mode_without_a_finite_check_has_no_count_of_overflows(job):
    row = job.run.cases.query("mode == 'fp32' and repeat == 0").iloc[0]
    assert pd.isna(row["overflow_steps"])
    assert row["unavailable"]["overflow_steps"] == "fp32 checks no gradient"
    assert pd.isna(row["loss_scale_final"])
