"""--mp-resume in a session: the options and results of the run, the command that it prints, and what is refused."""

import errno
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from mpscale.core.runs import read_run
from mpscale.report.missing import lacks

MODES = "--mp-modes=fp32,mixed-dynamic"


@pytest.fixture
def started(session):
    """A session that makes a run, or makes its beginning."""

    def run(*options):
        return session("--mp-workloads=mnist1d-mlp", MODES, "--mp-seeds=2", "--mp-timing=0.05", *options)

    return run


@pytest.fixture
def stopped(started, trainings, tmp_path_factory):
    """A run that was stopped in its second case. It is made once, and copied for the other tests."""
    if not _KEPT:
        trainings(stopping(1))
        started()
        _KEPT.append(tmp_path_factory.mktemp("stopped") / "results")
        shutil.copytree("results", _KEPT[0])
    else:
        shutil.copytree(_KEPT[0], "results")
    trainings()


_KEPT = []


def the_run():
    (path,) = Path("results/runs").iterdir()
    return path


def stopping(number):
    """Be interrupted in case ``number``, counted from 0."""
    seen = []

    def happen(case):
        seen.append(case)
        if len(seen) == number + 1:
            raise KeyboardInterrupt

    return happen


def counting(happen=lambda case: {}):
    ran = []

    def count(case):
        ran.append(case.id)
        return happen(case)

    return ran, count


@pytest.mark.parametrize("stop", [0, 3])
def test_a_stopped_session_prints_the_command_that_goes_on(started, session, trainings, stop):
    trainings(stopping(stop))
    code, said = started("-x", "-k", "seed or nothing")
    assert code == pytest.ExitCode.INTERRUPTED
    path = the_run()
    assert f"run: {path}" in said
    (command,) = [line.partition("to go on: ")[2] for line in said.splitlines() if line.startswith("to go on: ")]
    program, *arguments = shlex.split(command)
    assert program == "pytest"
    assert "-x" not in arguments and "seed or nothing" in arguments
    planned = read_run(path).info["planned"]

    ran, happen = counting()
    trainings(happen)
    code, said = session(*arguments)
    assert code == pytest.ExitCode.OK
    assert ran == planned[stop:]
    assert f"goes on with {path.name}: {4 - stop} of 4 cases to run" in said
    assert "to go on" not in said
    assert [one["case_id"] for one in read_run(path).records] == planned
    assert list(Path("results/runs").iterdir()) == [path]


def test_its_options_and_results_are_those_of_the_run(started, session, trainings, pytester):
    trainings(lambda case: {"status": "error", "status_reason": "broken"} if case.seed else {})
    code, _ = started("--benchmark-json=first.json", "--mp-dynamic-scale=growth_interval=500", "--mp-cool-down=7")
    assert code == pytest.ExitCode.TESTS_FAILED
    before = the_run().joinpath("journal.jsonl").read_bytes()
    trainings(lambda case: pytest.fail("trained again"))
    code, said = session("--benchmark-json=second.json", "--mp-resume", "latest", "-rf")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "nothing to run, every case has its result" in said
    assert said.count("error: broken") >= 2
    assert "2 failed, 2 passed" in said
    assert the_run().joinpath("journal.jsonl").read_bytes() == before

    def benchmarks(name):
        found = json.loads(Path(name).read_text())["benchmarks"]
        return [(one["name"], one["extra_info"], one["stats"]["rounds"], one["stats"]["max"]) for one in found]

    assert len(benchmarks("first.json")) == 2
    assert benchmarks("second.json") == benchmarks("first.json")


@pytest.mark.usefixtures("stopped")
def test_a_selection_leaves_the_rest_missing_and_the_report_says_so(session):
    code, said = session("--mp-resume=latest", "-k", "seed1 and fp32")
    assert code == pytest.ExitCode.OK
    lacking = lacks(read_run(the_run()))
    assert lacking.count(" of mnist1d-mlp in ") in (1, 2)
    assert lacking in said
    assert "to go on: " in said
    report = the_run().joinpath("report.md").read_text()
    assert "No result yet: " in report and f"--mp-resume={the_run().name}" in report
    assert session("--mp-resume=latest")[0] == pytest.ExitCode.OK
    assert read_run(the_run()).not_started == []
    assert "No result yet" not in the_run().joinpath("report.md").read_text()


def test_the_whole_run_is_compared_with_a_baseline_that_is_not_itself(started, session, trainings):
    code, said = started()
    assert code == pytest.ExitCode.OK
    baseline = the_run()
    # Names tell seconds, and both runs may begin in the same one.
    baseline.rename(baseline.with_name("20200101T000000Z-test-cpu-abcd"))
    trainings(stopping(2))
    started("--mp-baseline=latest", "--mp-fail-on=missing")
    trainings()
    code, said = session("--mp-resume=latest")
    assert code == pytest.ExitCode.OK, said
    assert f"against {baseline.name}:" in said
    assert "2 of 2 gated figures passed" in said


def test_rows_that_are_measured_again_for_a_gate_go_on_where_they_were_stopped(started, session, trainings):
    started("--mp-modes=fp32")
    baseline = the_run()
    baseline.rename(baseline.with_name("20200101T000000Z-test-cpu-abcd"))

    def slower(case):
        return {"step_time_ms_median": 50.0 + case.repeat / 100}

    stop = stopping(4)
    trainings(lambda case: stop(case) or slower(case))
    code, said = started("--mp-modes=fp32", "--mp-baseline=latest", "--mp-fail-on=step_time>5%")
    assert code == pytest.ExitCode.INTERRUPTED
    assert "no gate was judged; --mp-resume goes on with them" in said
    assert "Not measured again for a gate: 1 of mnist1d-mlp in fp32" in said
    assert "to go on: pytest" in said
    stopped = max(Path("results/runs").iterdir())
    ran, happen = counting(slower)
    trainings(happen)
    code, said = session("--mp-resume=latest")
    assert code == pytest.ExitCode.TESTS_FAILED, said
    assert "rows are measured again for a gate, and all else has its result" in said
    assert "measured again in 2 further processes" in said
    assert ran == [f"mnist1d-mlp--fp32--s0--r{repeat}" for repeat in (3, 4)]
    assert "2 and 4 processes" in said and "fired: step_time>5%" in said
    assert lacks(read_run(stopped)) == ""
    trainings(lambda case: pytest.fail("measured again"))
    code, said = session("--mp-resume=latest")
    assert (code, "2 and 4 processes" in said) == (pytest.ExitCode.TESTS_FAILED, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--mp-seeds=3", "--mp-seeds is 3, and was 2"),
        ("--mp-modes=fp32", "--mp-modes is fp32, and was fp32,mixed-dynamic"),
        ("--mp-jit=off", "--mp-jit is off, and was not given"),
        ("--mp-keep-suspect", "--mp-keep-suspect is given, and was not given"),
        ("--mp-static-scale=8", "--mp-static-scale is 8, and was not given"),
        ("--mp-steps-per-call=2", "--mp-steps-per-call is 2, and was not given"),
        ("--benchmark-disable", "the setting timing_s is 0.0, and was 0.05"),
        ("-n2", "run without -n"),
        ("-oaddopts=--mp-resume=latest", "give it on the command line, not in addopts"),
        ("-oaddopts=--mp-seeds=4", "--mp-seeds is 4, and was 2"),
        ("--mp-baseline=latest", "there is no run in"),
    ],
)
@pytest.mark.usefixtures("stopped")
def test_what_does_not_fit_the_run_is_refused_and_leaves_it_alone(session, given, said):
    before = {file.name: file.read_bytes() for file in the_run().iterdir() if file.is_file()}
    code, output = session("--mp-resume=latest", given)
    assert code == pytest.ExitCode.USAGE_ERROR, output
    assert said in output
    assert "Traceback" not in output
    assert {file.name: file.read_bytes() for file in the_run().iterdir() if file.is_file()} == before


@pytest.mark.usefixtures("stopped")
def test_what_agrees_with_the_run_is_accepted(session):
    given = ("--mp-seeds=2", "--mp-jit=auto", "--mp-static-scale=128", MODES, "--mp-benchmark-table", "--mp-strict")
    code, output = session("--mp-resume=latest", *given)
    assert code == pytest.ExitCode.OK, output


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("latest", "there is no run in"),
        ("nothing", "no run is called 'nothing'"),
        ("table.csv", "is not in a folder runs/"),
        ("results/reference/kept", "is not in a folder runs/"),
        ("results/runs/older", "has no invocation, which a run needs to go on; an older mpscale made it"),
        ("results/runs/broken", "not readable as JSON"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(session, request, named, said):
    if named != "latest":
        request.getfixturevalue("stopped")
        made = the_run()
        shutil.copytree(made, "results/reference/kept")
        shutil.copy(made / "cases.csv", "table.csv")
        shutil.copytree(made, "results/runs/broken")
        Path("results/runs/broken/run.json").write_text("{")
        info = json.loads((made / "run.json").read_text())
        del info["invocation"]
        (made / "run.json").write_text(json.dumps(info))
        made.rename("results/runs/older")
    code, output = session("--mp-resume", named)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert said in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("settings", {"\x1b[2J": 1}, "the setting \\x1b[2J is not set"),
        ("planned", ["\x1b[2J"], "such as \\x1b[2J"),
        ("invocation", {"options": {"--mp-modes": "\x1b[2J"}}, "\\x1b[2J"),
        ("invocation", {"options": {"@run.json": True}}, "has no invocation"),
        ("invocation", {"options": {"--mp-seeds": []}}, "has no invocation"),
    ],
)
@pytest.mark.usefixtures("stopped")
def test_the_run_of_a_stranger_writes_nothing_of_its_own_to_the_terminal(session, key, value, said):
    file = the_run() / "run.json"
    info = json.loads(file.read_text())
    info[key] = {**info[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(info))
    code, output = session("--mp-resume=latest")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert said in output
    assert "\x1b[2J" not in output and "Traceback" not in output


@pytest.mark.usefixtures("stopped")
def test_a_signal_while_the_run_is_opened_leaves_no_lock(session, monkeypatch):
    before = sorted(the_run().iterdir())

    def signal():
        raise KeyboardInterrupt

    monkeypatch.setattr("mpscale.telemetry.host.busy_words", signal)
    code, _ = session("--mp-resume=latest")
    assert code == pytest.ExitCode.INTERRUPTED
    assert sorted(the_run().iterdir()) == before


@pytest.mark.usefixtures("stopped")
def test_a_run_on_a_full_disk_is_refused_in_words_and_left_as_it_is(session, monkeypatch):
    before = sorted(the_run().iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwrite", full)
    code, output = session("--mp-resume=latest")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "run.lock: the disk is full: free some space" in output
    assert sorted(the_run().iterdir()) == before


@pytest.mark.usefixtures("stopped")
def test_to_collect_shows_the_plan_of_the_run_and_changes_nothing(session):
    before = the_run().joinpath("journal.jsonl").read_bytes()
    code, output = session("--mp-resume=latest", "--collect-only", "-q")
    assert code == pytest.ExitCode.OK
    shown = [line for line in output.splitlines() if "test_training[" in line]
    planned = read_run(the_run()).info["planned"]
    assert [line.partition("[")[2] for line in shown] == [
        f"{'-'.join(case_id.split('--')[:2])}-seed{case_id.split('--s')[1][0]}]" for case_id in planned
    ]
    assert the_run().joinpath("journal.jsonl").read_bytes() == before
    assert not the_run().joinpath("run.lock").exists()


@pytest.mark.usefixtures("stopped")
def test_a_run_elsewhere_is_named_by_its_folder(session, tmp_path):
    Path("results").rename(tmp_path / "other")
    (path,) = (tmp_path / "other" / "runs").iterdir()
    code, _ = session("--mp-resume", path)
    assert code == pytest.ExitCode.OK
    assert read_run(path).not_started == []
    assert not Path("results").exists()
