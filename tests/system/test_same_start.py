"""Modes are only compared if they started alike."""

import pytest

MODES = "fp32,mixed-static,mixed-bf16,article"


@pytest.mark.slow  # tests/situations/test_identical_work.py compares them without processes
def test_digests_are_equal_over_modes_and_differ_over_seeds(run_suite):
    done = run_suite(
        "--mp-workloads", "suite_workloads:fine", "--mp-modes", MODES, "--mp-seeds", "2", "--benchmark-disable"
    )  # fmt: skip
    assert done.code == 0, done.output
    cases = done.run.cases
    assert len(cases) == 8
    for column in ("initial_weights_digest", "data_order_digest"):
        assert cases.groupby("seed")[column].nunique().tolist() == [1, 1]
        assert cases[column].nunique() == 2
    assert cases["data_digest"].nunique() == cases["workload_digest"].nunique() == 1


def test_a_model_that_ignores_the_seed_is_found_out(run_suite):
    done = run_suite(
        "--mp-workloads", "suite_workloads:unseeded", "--mp-modes", "fp32,mixed-bf16", "--mp-seeds", "1",
        "--benchmark-disable",
    )  # fmt: skip
    assert done.code == 1
    first, second = done.run.records
    assert first["status"] == "ok"
    assert second["status"] == "invalid"
    assert "initial weights" in second["status_reason"]
    assert done.run.cases.iloc[1]["unavailable"]["step_time_ms_median"] == "timing was off"


@pytest.mark.slow  # tests/situations/test_identical_work.py has it without processes
def test_a_model_function_that_sets_the_policy_is_found_out(run_suite):
    done = run_suite(
        "--mp-workloads", "suite_workloads:scripted", "--mp-modes", "fp32,mixed-static", "--mp-seeds", "1",
        "--benchmark-disable",
    )  # fmt: skip
    assert done.code == 1
    cases = done.run.cases.set_index("mode")
    assert cases["status"].to_dict() == {"fp32": "invalid", "mixed-static": "ok"}
    assert "float16" in cases.loc["fp32", "status_reason"]
    assert cases["product_dtypes"].to_dict() == {"fp32": "float16 2", "mixed-static": "float16 2"}
    assert cases["policy"].to_dict() == {"fp32": "float32", "mixed-static": "mixed_float16"}
