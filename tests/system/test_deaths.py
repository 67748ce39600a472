"""A case that dies, however it dies, leaves a row of its own and every other row whole."""

import pytest

WAYS = {
    "killed": ("crashed", "SIGKILL"),
    "segfault": ("crashed", "SIGSEGV"),
    "exception": ("error", "ValueError: the metric could not be computed"),
    "leaves": ("error", "exit code 3"),
    "memory": ("oom", "MemoryError"),
    "hang": ("timeout", "not finished after 12 s"),
}


@pytest.fixture(scope="module", params=["fork", "fresh"])
def deaths(request, run_suite):
    """One run in which each way of dying stands between two cases that are well."""
    names = [name for way in WAYS for name in (f"suite_workloads:{way}",)]
    workloads = ",".join(["suite_workloads:fine", *names, "suite_workloads:regression"])
    return run_suite(
        "--mp-workloads", workloads, "--mp-modes", "fp32", "--mp-seeds", "1", "--mp-timing", "0.05",
        "--mp-timeout", "12", "--mp-start-method", request.param,
    )  # fmt: skip


def row(deaths, name):
    cases = deaths.run.cases
    return cases[cases["workload"] == f"suite_workloads:{name}"].iloc[0]


@pytest.mark.parametrize("way", WAYS)
def test_its_row_says_how_it_ended_and_keeps_what_it_had(deaths, way):
    status, reason = WAYS[way]
    dead = row(deaths, way)
    assert dead["status"] == status, deaths.output
    assert reason in dead["status_reason"]
    # It died in the middle of its training: the model was built, nothing was timed.
    assert dead["parameters"] == 10
    assert dead["first_step_s"] > 0
    assert dead["host_memory_peak_mib"] > 0
    assert dead["unavailable"]["step_time_ms_median"] == f"the case ended before that ({status})"


def test_cases_around_it_are_untouched(deaths):
    for name in ("fine", "regression"):
        well = row(deaths, name)
        assert well["status"] == "ok"
        assert well["step_time_ms_median"] > 0
        assert well["attempted_steps"] == 30


def test_each_death_fails_its_test_and_nothing_else(deaths):
    assert deaths.code == 1
    assert f"{len(WAYS)} failed, 2 passed" in deaths.output


def test_output_of_the_dead_is_kept(deaths):
    assert "the metric could not be computed" in row(deaths, "exception")["output_tail"]
    assert "Traceback" in row(deaths, "exception")["output_tail"]


def test_reports_are_written_all_the_same(deaths):
    report = (deaths.path / "report.md").read_text()
    assert "SIGSEGV" in report
    assert len((deaths.path / "summary.csv").read_text().splitlines()) == 1 + len(WAYS) + 2


def test_metric_other_than_accuracy_has_its_own_column(deaths):
    case = row(deaths, "regression")
    assert case["metric_name"] == "squared_error"
    assert case["metric_value"] < 0.3
    assert case["unavailable"]["final_accuracy"] == "the workload's metric is squared_error"
