"""A case that dies, in whatever way, has a row with the reason, and all other rows are complete."""

import json

import pandas as pd
import pytest
from support.processes import processes_in

WAYS = {
    "exception": ("error", "ValueError: the metric could not be computed"),
    "leaves": ("error", "exit code 3"),
    "memory": ("oom", "MemoryError"),
    "orphans": ("crashed", "SIGKILL"),
    "progress_bar": ("crashed", "SIGSEGV"),
    "exits": ("error", "SystemExit: no more"),
    "cancelled": ("error", "CancelledError: the data were cancelled"),
}


DISTURBED = ("parentless", "tidied")
"""The process that forks workers is killed; the temporary files are removed."""


def die(run_suite, ways, method, timeout_s, **variables):
    """A run in which dying cases stand between two healthy ones."""
    workloads = ",".join(f"suite_workloads:{name}" for name in ("fine", *ways, "regression"))
    return run_suite(
        "--mp-workloads", workloads, "--mp-modes", "fp32", "--mp-seeds", "1", "--mp-timing", "0.05",
        "--mp-timeout", str(timeout_s), "--mp-start-method", method, "--mp-jit", "off", page=False, **variables,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deaths(run_suite, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    done = die(run_suite, [*WAYS, *DISTURBED], "fork", timeout_s=60, TMPDIR=str(temporary), SUITE_TIDY="yes")
    done.temporary = temporary
    return done


def row(deaths, name):
    cases = deaths.run.cases
    return cases[cases["workload"] == f"suite_workloads:{name}"].iloc[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_row_has_the_end_of_its_case_and_what_was_known_before(deaths, way):
    status, reason = WAYS[way]
    dead = row(deaths, way)
    assert dead["status"] == status, deaths.output
    assert reason in dead["status_reason"]
    # It died during training: the model was built, nothing was timed.
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
    assert f"{len(WAYS)} failed, {2 + len(DISTURBED)} passed" in deaths.output
    for way in WAYS:
        assert f"FAILED test_suite.py::test_training[suite_workloads:{way}-fp32-seed0]" in deaths.output
    assert "was not used at all" not in deaths.output


def test_processes_left_behind_by_a_case_end_with_it(deaths):
    assert processes_in(deaths.folder) == []


@pytest.mark.parametrize(("name", "attempts"), [("parentless", 2), ("tidied", 1)])
def test_a_disturbed_case_is_not_lost(deaths, name, attempts):
    case = row(deaths, name)
    assert (case["status"], case["attempts"]) == ("ok", attempts), deaths.output
    assert case["step_time_ms_median"] > 0


def test_a_killed_parent_is_told_as_that_and_not_as_a_lack_of_memory(deaths):
    events = map(json.loads, (deaths.path / "journal.jsonl").read_text().splitlines())
    (first, second) = [
        event["record"] for event in events if event["event"] == "case_finished" and "parentless" in event["case_id"]
    ]
    assert (first["status"], first["cause"], second["status"]) == ("crashed", "not-started", "ok")
    assert "the process that forks workers has died (killed by SIGKILL)" in first["status_reason"]
    assert "memory" not in first["status_reason"]


def test_no_temporary_file_is_left(deaths):
    assert list(deaths.temporary.iterdir()) == []


def test_cases_csv_is_intact_whatever_a_case_printed(deaths):
    cases = pd.read_csv(deaths.path / "cases.csv")
    assert cases["workload"].tolist() == deaths.run.cases["workload"].tolist()
    assert "100%" in cases.set_index("workload").loc["suite_workloads:progress_bar", "output_tail"]


def test_output_of_dead_cases_is_kept(deaths):
    assert "the metric could not be computed" in row(deaths, "exception")["output_tail"]
    assert "Traceback" in row(deaths, "exception")["output_tail"]


def test_reports_are_still_written(deaths):
    report = (deaths.path / "report.md").read_text()
    assert "SIGSEGV" in report
    assert len((deaths.path / "summary.csv").read_text().splitlines()) == 1 + len(WAYS) + len(DISTURBED) + 2


def test_metric_other_than_accuracy_has_its_own_column(deaths):
    case = row(deaths, "regression")
    assert case["metric_name"] == "squared_error"
    assert case["metric_value"] < 0.3
    assert case["unavailable"]["final_accuracy"] == "the workload's metric is squared_error"


@pytest.mark.slow  # tests/harness/test_causes.py has a worker that hangs
def test_a_case_that_hangs_is_killed_with_all_that_it_has_started(run_suite):
    done = die(run_suite, ["hang"], "fork", timeout_s=15)
    assert done.run.cases["status"].tolist() == ["ok", "timeout", "ok"], done.output
    assert "not finished after 15 s" in row(done, "hang")["status_reason"]
    assert processes_in(done.folder) == []


@pytest.mark.slow
def test_fresh_interpreters_die_in_the_same_ways(run_suite):
    """One way per code path that differs from that of a forked child."""
    ways = ("progress_bar", "exception", "orphans")
    done = die(run_suite, ways, "fresh", timeout_s=120)
    expected = ["ok", *(WAYS[way][0] for way in ways), "ok"]
    assert done.run.cases["status"].tolist() == expected, done.output
    assert set(done.run.cases["start_method"]) == {"fresh"}
    for way in ways:
        assert WAYS[way][1] in row(done, way)["status_reason"]
