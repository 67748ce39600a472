"""A run on one and on two replicas, from the command line to the report."""

import pandas as pd
import pytest

from mpscale.analysis.summary import summary_of


@pytest.mark.slow  # tests/worker/test_replica_cases.py has its parts
def test_a_compiled_model_and_its_pipeline_run_on_each_number_of_replicas(run_suite):
    done = run_suite(
        "--mp-workloads", "suite_workloads:fed", "--mp-modes", "fp32,mixed-dynamic", "--mp-seeds", "1",
        "--mp-strategy", "mirrored", "--mp-replicas", "1,2", "--mp-timing", "0.05",
    )  # fmt: skip
    assert done.code == 0, done.output
    cases = pd.read_csv(done.path / "cases.csv").sort_values(["swept_replicas", "mode"])
    assert cases["status"].tolist() == ["ok"] * 4
    assert cases["batch_size"].tolist() == [20, 20, 40, 40]
    assert cases["input_batches"].str.endswith(("x12", "x24")).all()
    assert (cases["test_examples"] == 37).all() and not cases["jit"].any()
    assert cases["step_time_ms_with_input"].notna().all()
    for column, kinds in (("initial_weights_digest", 1), ("data_order_digest", 2), ("data_digest", 1)):
        assert cases[column].nunique() == kinds


@pytest.mark.slow  # tests/worker/test_replica_cases.py and tests/report/test_sweep.py have its parts
def test_every_mode_runs_on_each_number_of_replicas_and_the_report_has_their_efficiency(run_suite):
    done = run_suite(
        "--mp-workloads", "suite_workloads:fine", "--mp-modes", "fp32,mixed-bf16,graph-rewrite", "--mp-seeds", "1",
        "--mp-strategy", "mirrored", "--mp-replicas", "2,1", "--mp-steps", "12", "--mp-timing", "0.05",
        "--benchmark-only",
    )  # fmt: skip
    assert done.code == 0, done.output
    cases = pd.read_csv(done.path / "cases.csv")
    trained = cases[cases["mode"] != "graph-rewrite"].sort_values(["swept_replicas", "mode"])
    assert trained["status"].tolist() == ["ok"] * 4
    assert trained["case_id"].tolist() == [
        f"suite_workloads+fine--{mode}--replicas{number}--s0--r0"
        for number in (1, 2)
        for mode in ("fp32", "mixed-bf16")
    ]
    assert (trained["strategy"] == "mirrored").all() and not trained["jit"].any()
    assert (trained["batch_size"] == trained["replicas"] * trained["replica_batch_size"]).all()
    assert trained["replica_batch_size"].nunique() == 1
    assert trained["xla_refused"].str.contains("merge_call").all()
    for _, case in trained.iterrows():
        rate = case["batch_size"] / case["step_time_ms_median"] * 1e3
        assert abs(case["examples_per_s"] / rate - 1) < 1e-9
        assert f"strategy=mirrored,replicas={case['replicas']}/" in case["series_key"]
    # Modes of as many replicas start from the same weights and see the same data.
    for column, kinds in (("initial_weights_digest", 1), ("data_order_digest", 2)):
        assert trained[column].nunique() == kinds
    refused = cases[cases["mode"] == "graph-rewrite"]
    assert set(refused["status"]) == {"unsupported"}
    assert refused["status_reason"].str.contains("not measured on replicas").all()
    rows = {(row["swept_replicas"], row["mode"]): row["speedup_fp32"] for row in summary_of(done.run)}
    assert rows[1, "fp32"] == rows[2, "fp32"] == 1.0
    report = (done.path / "report.md").read_text()
    assert "## Scaling over replicas" in report
    assert "ran without XLA in all modes, because it cannot compile the merge_call" in report
