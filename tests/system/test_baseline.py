"""Real runs that are compared with a baseline at their end. The steps of their workload can be made slower."""

import pytest
from support.small_suite import SUITE, pytest_here, write

LABOURED = (
    "--mp-workloads", "suite_workloads:laboured", "--mp-modes", "fp32", "--mp-seeds", "1", "--mp-repeats", "1",
    "--mp-timing", "0.2", "--mp-jit", "off", "--benchmark-only",
)  # fmt: skip


@pytest.fixture(scope="module")
def baseline(run_suite):
    done = run_suite(*LABOURED)
    assert done.code == 0, done.output
    return (f"--mp-baseline={done.path}", "--mp-fail-on", "step_time>100%,missing", "--mp-fail-on", "metric")


# tests/pytest_plugin/test_gates_of_a_session.py has the same without trainings, and looks at what is reported.
@pytest.mark.slow
def test_more_work_in_the_step_is_measured_again_and_fails_the_run(run_suite, baseline):
    done = run_suite(*LABOURED, *baseline, slow_cases=999)
    assert done.code == 1, done.output
    assert "mpscale: slower than the baseline, measured again in 4 further processes" in done.output
    assert "fired: step_time>100%: suite_workloads:laboured fp32: +" in done.output
    assert "2 and 4 processes" in done.output
    assert [record["status"] for record in done.run.records] == ["ok"] * 6


@pytest.mark.slow
def test_a_row_that_was_slow_by_chance_is_measured_again_and_passes(run_suite, baseline):
    done = run_suite(*LABOURED, *baseline, slow_cases=2)
    assert done.code == 0, done.output
    assert "measured again in 4 further processes" in done.output
    assert "fired" not in done.output


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Run pytest with options that it must refuse before it runs anything; return its output."""
    write(tmp_path, test_it=SUITE)
    monkeypatch.chdir(tmp_path)

    def run(*options):
        code, said = pytest_here(tmp_path, *options)
        assert code == pytest.ExitCode.USAGE_ERROR, said
        assert not (tmp_path / "results").exists()
        return said

    return run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mp-baseline", "nowhere"), "baseline: no run is called 'nowhere'"),
        (("--mp-baseline", "latest", "--mp-fail-on", "speed>5%"), "'speed' is not a gate"),
        (("--mp-fail-on", "metric"), "--mp-fail-on has nothing to compare with: give --mp-baseline RUN"),
    ],
)
def test_an_unusable_baseline_is_refused_before_anything_runs(refused, options, message):
    assert message in refused(*options)


def test_a_path_that_pytest_takes_for_a_test_path_is_named(refused, tmp_path_factory):
    earlier = write(tmp_path_factory.mktemp("elsewhere")) / "earlier"
    earlier.mkdir()
    assert f"write --mp-baseline={earlier}" in refused("--mp-baseline", earlier)


def test_an_unknown_setting_is_named(refused, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.mpscale]\nbase = 3\n")
    assert "[tool.mpscale] has no setting 'base'; did you mean baseline?" in refused()
