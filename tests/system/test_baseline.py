"""The end of a run that has a baseline: real runs, of a workload that can be made to work more in its step."""

import pytest

ONE = ("--mp-workloads", "suite_workloads:laboured", "--mp-seeds", "1", "--benchmark-only", "--mp-jit", "off")
THREE = (*ONE, "--mp-repeats", "2", "--mp-timing", "0.2")
BOTH = ("--mp-modes", "fp32,mixed-dynamic")
FP32 = ("--mp-modes", "fp32")
GATES = ("--mp-fail-on", "step_time>100%,missing", "--mp-fail-on", "metric")


@pytest.fixture(scope="module")
def baseline(run_suite):
    done = run_suite(*THREE, *BOTH)
    assert done.code == 0, done.output
    return done


def test_the_same_code_passes_and_leaves_the_comparison(run_suite, baseline):
    done = run_suite(*THREE, *BOTH, *GATES, f"--mp-baseline={baseline.path}")
    assert done.code == 0, done.output
    assert "fired" not in done.output
    # How many could be told is up to the noise of the machine.
    assert "of 6 gated figures passed" in done.output
    assert "cannot-tell: metric: suite_workloads:laboured fp32: inconclusive: +0 over 1 seed" in done.output
    text = (done.path / "comparison.md").read_text()
    assert text.startswith(f"# {done.run.name} against {baseline.run.name}\n")
    assert "| missing | passed | B | suite_workloads:laboured fp32 | 3 cases |" in " ".join(text.split())
    assert len(done.run.records) == 6


def test_more_work_in_the_step_is_measured_anew_and_fails_the_run(run_suite, baseline):
    done = run_suite(*THREE, *FP32, *GATES, f"--mp-baseline={baseline.path}", environ={"SUITE_SLOW_CASES": "999"})
    assert done.code == 1, done.output
    assert "mpscale: slower than the baseline, measured again in 6 further processes" in done.output
    assert "[9/9]" in done.output
    assert "fired: step_time>100%: suite_workloads:laboured fp32: +" in done.output
    assert "3 and 6 processes" in done.output
    assert "fired: missing: suite_workloads:laboured mixed-dynamic: missing: no such row" in done.output
    assert [record["status"] for record in done.run.records] == ["ok"] * 9


@pytest.mark.slow
def test_what_was_slow_by_chance_is_measured_anew_and_passes_and_a_mode_that_is_gone_does_not(run_suite, baseline):
    done = run_suite(*THREE, *FP32, *GATES, f"--mp-baseline={baseline.path}", environ={"SUITE_SLOW_CASES": "3"})
    assert "measured again in 6 further processes" in done.output
    fired = [line.split(" (")[0] for line in done.output.splitlines() if line.startswith("fired:")]
    assert fired == ["fired: missing: suite_workloads:laboured mixed-dynamic: missing: no such row"]
    assert "cannot-tell: step_time>100%: suite_workloads:laboured mixed-dynamic: missing" in done.output
    assert done.code == 1, done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mp-baseline", "nowhere"), "baseline: no run is called 'nowhere'"),
        (("--mp-baseline", "latest", "--mp-fail-on", "speed>5%"), "'speed' is nothing that a gate knows"),
        (("--mp-fail-on", "metric"), "--mp-fail-on has nothing to compare with: give --mp-baseline RUN"),
    ],
)
def test_what_cannot_serve_is_said_before_anything_runs(run_suite, options, message):
    done = run_suite(*ONE, *FP32, *options)
    assert done.code == 4, done.output
    assert message in done.output
    assert done.run is None


def test_a_path_that_pytest_takes_for_its_own_is_found_out(run_suite, baseline):
    done = run_suite(*ONE, *FP32, "--mp-baseline", baseline.path)
    assert done.code == 4, done.output
    assert f"write --mp-baseline={baseline.path}" in done.output


@pytest.mark.parametrize("named", [False, True])
def test_a_baseline_of_another_device_stops_only_who_named_it(run_suite, baseline, named):
    text = (baseline.path / "cases.csv").read_text().replace(baseline.run.device["name"], "Another CPU")
    path = baseline.folder / "another.csv"
    path.write_text(text)
    settings = f'[tool.mpscale]\nbaseline = "{path}"\nfail-on = ["step_time>5%"]\n'
    options = [f"--mp-baseline={path}"] if named else []
    done = run_suite(*ONE, *FP32, "--mp-timing", "0.05", *options, pyproject=settings)
    assert f"baseline {path} is of Another CPU (cpu), and this is" in done.output
    assert done.code == (4 if named else 0), done.output


def test_a_setting_that_is_not_known_is_named(run_suite):
    done = run_suite(*ONE, *FP32, pyproject="[tool.mpscale]\nbase = 3\n")
    assert done.code == 4
    assert "[tool.mpscale] knows no 'base', only baseline, fail-on, strict, threshold" in done.output
