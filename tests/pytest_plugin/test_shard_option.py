"""--mp-shard in sessions: parts that are merged equal the run that nobody divided; what a part can and cannot do."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest

from mpscale.cli import main
from mpscale.core.runs import read_run
from mpscale.pytest_plugin import session as sessions

OPTIONS = ("--mp-workloads=mnist1d-mlp,beam-strain", "--mp-modes=fp32,mixed-static", "--mp-timing=0.05")
ABOUT_THE_MACHINE = ("order", "case_wall_time_s", "note")


@pytest.fixture
def session(session, monkeypatch):
    """Run pytest on two workloads and two modes in the same order each time; return its exit code and output."""
    monkeypatch.setattr(sessions, "shuffle_seed", lambda config: 7)
    return partial(session, *OPTIONS)


def runs(results="results"):
    return sorted(Path(results, "runs").iterdir()) if Path(results).exists() else []


def rows(path):
    with (path / "cases.csv").open() as file:
        return [
            {name: value for name, value in row.items() if name not in ABOUT_THE_MACHINE}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize(
    "options",
    [
        ("--mp-seeds=2", "--mp-repeats=1"),
        ("--mp-seeds=3", "--mp-static-scale=8,128", "--mp-batch-size=16,32", "-k", "mlp or seed1"),
    ],
)
def test_parts_that_are_merged_equal_the_run_that_nobody_divided(session, trainings, options):
    ran = []
    trainings(lambda case: ran.append(case.id))
    assert session(*options, "--mp-results=whole")[0] == pytest.ExitCode.OK
    (whole,) = runs("whole")
    undivided, ran[:] = list(ran), []
    for part in (3, 1, 2):
        code, said = session(*options, f"--mp-shard={part}/3", "--mp-results=results")
        assert code == pytest.ExitCode.OK, said
        assert f"mpscale: part {part} of 3: " in said
    assert sorted(ran) == sorted(undivided)
    assert main(["merge", *map(str, runs())]) == 0
    (merged,) = [path for path in runs() if "-merged-" in path.name]
    assert rows(merged) == rows(whole)
    assert (merged / "summary.csv").read_text() == (whole / "summary.csv").read_text()
    one, two = (read_run(path) for path in (whole, merged))
    assert (one.finished, two.finished, two.problems) == (True, True, [])
    assert one.info["planned"] == two.info["planned"] == undivided
    assert one.info["settings"] == two.info["settings"]
    of_parts = {case for part in two.merged for case in part["cases"]}
    assert of_parts == set(undivided)


def test_a_part_without_cases_is_no_failure_and_leaves_no_run(session):
    code, said = session("--mp-seeds=1", "--mp-shard=3/3")
    assert code == pytest.ExitCode.OK
    assert "part 3 of 3 has nothing to do: the 4 cases are 2 groups of a workload and a seed or repeat" in said
    assert runs() == []
    # All parts alike: a mistake, and no part without cases.
    assert session("--mp-seeds=1", "--mp-shard=3/3", "-k", "nothing")[0] == pytest.ExitCode.NO_TESTS_COLLECTED


def test_tests_without_a_case_run_in_every_part(session, pytester):
    pytester.makepyfile(test_other="def test_other(): pass")
    for part, number in ((1, 3), (3, 1)):
        code, said = session("--mp-seeds=1", f"--mp-shard={part}/3")
        assert code == pytest.ExitCode.OK
        assert f"{number} passed" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--mp-shard=0/3",), "expected I/N such as 2/3"),
        (("--mp-shard=4/3",), "expected I/N such as 2/3"),
        (("--mp-shard=3",), "expected I/N such as 2/3"),
        (("--mp-shard=1/2", "--mp-baseline=latest"), "--mp-baseline does not go with --mp-shard"),
        (("--mp-shard=1/2", "--mp-fail-on=step_time>5%"), "--mp-fail-on does not go with --mp-shard"),
        (("--mp-replicas=2",), "--mp-replicas: replicas need --mp-strategy"),
        (("--mp-strategy=mirrored", "--mp-replicas=2", "--mp-jit=on"), "XLA cannot compile the steps of"),
        (("--mp-strategy=mirrored",), "a CPU is one device; say how many replicas share it"),
        (("--mp-strategy=mirrored", "--mp-replicas=0"), "--mp-replicas"),
    ],
)
def test_what_a_part_or_a_strategy_cannot_do_is_refused(session, given, said):
    code, output = session(*given)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert said in output and "Traceback" not in output
    assert runs() == []


def test_a_baseline_of_the_project_waits_for_the_merged_run(session, pytester):
    pytester.makepyprojecttoml('[tool.mpscale]\nbaseline = "latest"\nfail-on = ["missing"]\nstrict = true\n')
    code, said = session("--mp-seeds=1", "--mp-shard=1/2")
    assert code == pytest.ExitCode.OK
    assert "a part of a plan is not compared with its baseline" in said


def test_a_part_that_was_stopped_goes_on_with_its_part(session, trainings):
    seen = []

    def stop(case):
        seen.append(case.id)
        if len(seen) == 2:
            raise KeyboardInterrupt

    trainings(stop)
    assert session("--mp-seeds=2", "--mp-shard=2/2")[0] == pytest.ExitCode.INTERRUPTED
    (path,) = runs()
    shard, planned = (read_run(path).info[name] for name in ("shard", "planned"))
    seen.clear()
    trainings(lambda case: seen.append(case.id))
    code, said = session("--mp-seeds=2", "--mp-resume=latest", "--mp-shard=1/2")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "--mp-shard is 1/2, and was 2/2" in said
    # Given again, or left out.
    assert session("--mp-seeds=2", "--mp-resume=latest", "--mp-shard=2/2", "--collect-only")[0] == pytest.ExitCode.OK
    assert session("--mp-seeds=2", "--mp-resume=latest")[0] == pytest.ExitCode.OK
    assert seen == planned[1:]
    run = read_run(path)
    assert (run.info["shard"], run.info["planned"], run.not_started) == (shard, planned, [])
    assert json.loads((path / "run.json").read_text())["invocation"]["options"]["--mp-shard"] == "2/2"
