"""Gates at the end of a pytest session: its exit code, its last line with the colour, and junit.xml."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.no_training import replace_trainings
from support.small_suite import SUITE, WORKLOAD, pytest_here, write

# Imported here, since pytester forgets what a session imports, and some modules cannot be imported twice.
from mpscale.analysis import gates  # noqa: F401
from mpscale.report import files

BASELINE = "--mp-baseline=latest"
COLOURS = {"red": "\x1b[31m", "green": "\x1b[32m", "yellow": "\x1b[33m"}


def faster(case):
    """fp32 takes 2 and 3 ms in the two seeds, and others half of that."""
    return {"step_time_ms_median": (2.0 + case.seed) / (1 if case.mode == "fp32" else 2)} | FACTS


FACTS = {
    "metric_margin": 0.01, "metric_higher_is_better": True, "has_metric": True, "parameters": 1000, "batch_size": 20,
}  # fmt: skip


def another_model(case):
    key = f"{case.workload}/sha256:another/{case.mode}/batch=40,steps=30/method=6"
    return {**FACTS, "series_key": key, "parameters": 2000, "batch_size": 40}


def stopped(case):
    if case.seed:
        raise KeyboardInterrupt
    return FACTS


def broken(case):
    return {"status": "error", "status_reason": "it broke"} if case.seed else FACTS


@pytest.fixture
def session(pytester, monkeypatch):
    """Run pytest on two modes and two seeds; return exit code, output and the counts in its last line."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(files, "write_reports", lambda run, table: None)
    monkeypatch.setattr("sys.argv", ["pytest"])
    pytester.makepyfile(test_it=SUITE)
    pytester.makeini("[pytest]")

    def run(*options, happen=faster):
        replace_trainings(monkeypatch, happen)
        result = pytester.runpytest_inprocess(
            "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:unraisableexception", "--color=yes",
            "--mp-workloads=mnist1d-mlp", "--mp-modes=fp32,mixed-bf16", "--mp-seeds=2", "--mp-timing=0.05",
            "--junitxml=junit.xml", *options, no_reraise_ctrlc=True,
        )  # fmt: skip
        said = result.stdout.str() + result.stderr.str()
        last = next((line for line in reversed(said.splitlines()) if re.search(r" in .*\d.*s", line)), "")
        return int(result.ret), said, last

    return run


def slower(cases):
    """The first cases take three times as long."""
    seen = []

    def happen(case):
        seen.append(case)
        return FACTS | {"step_time_ms_median": (6.0 if len(seen) <= cases else 2.0) + len(seen) / 1000}

    return happen


def gates_in_junit():
    suite = ElementTree.parse("junit.xml").getroot()[0]
    ours = [each for each in suite.iter("testcase") if str(each.get("classname")).startswith("mpscale.")]
    return {each.get("name"): each[0].tag if len(each) else "passed" for each in ours}


@pytest.mark.parametrize(
    ("options", "happen", "code", "counts", "colour", "junit"),
    [
        pytest.param((), faster, 0, "4 passed", "green", {}, id="no gate"),
        pytest.param(
            ("--mp-fail-on=step_time<=60ms",), faster, 0, "4 passed", "green",
            {"step_time<=60ms[mnist1d-mlp-fp32]": "passed", "step_time<=60ms[mnist1d-mlp-mixed-bf16]": "passed"},
            id="passed",
        ),
        pytest.param(
            ("--mp-fail-on=speedup>=1.5", "--mp-fail-on=speedup>=4"), faster, 1, "1 failed, 4 passed", "red",
            {"speedup>=1.5[mnist1d-mlp-mixed-bf16]": "passed", "speedup>=4[mnist1d-mlp-mixed-bf16]": "failure"},
            id="fired",
        ),
        pytest.param(
            ("--mp-fail-on=accuracy[fp32]>=0.905",), faster, 0, "4 passed, 1 gate could not tell", "yellow",
            {"accuracy[fp32]>=0.905[mnist1d-mlp-fp32]": "skipped"}, id="could not tell",
        ),
        pytest.param(
            ("--mp-fail-on=accuracy>=0.905", "--mp-strict"), faster, 1, "2 failed, 4 passed", "red", None, id="strict"
        ),
        pytest.param(
            ("--mp-fail-on=gpu_memory<=8GiB",), faster, 0, "4 passed, 1 gate could not tell", "yellow",
            {"gpu_memory<=8GiB[no row]": "skipped"}, id="nothing to judge",
        ),
        pytest.param(
            ("--mp-fail-on=accuracy[*/fp32]>=0.99",), broken, 1, "3 failed, 2 passed", "red", None, id="a case failed"
        ),
        pytest.param(("--mp-fail-on=speedup>=1.5",), stopped, 2, "2 passed", "green", {}, id="interrupted"),
        pytest.param(("--mp-fail-on=speedup>5%",), faster, 4, "", "", None, id="no gate at all"),
        pytest.param(("--mp-fail-on=metric,speedup>=2",), faster, 4, "", "", None, id="no baseline"),
        pytest.param(("--mp-fail-on=speedup[other]>=2",), faster, 4, "", "", None, id="no such row"),
        pytest.param(("--mp-force",), faster, 4, "", "", None, id="nothing to force"),
    ],
)  # fmt: skip
def test_exit_code_last_line_and_junit_agree(session, options, happen, code, counts, colour, junit):
    found, said, last = session(*options, happen=happen)
    assert found == code, said
    if code == 4:
        assert not Path("results").exists()
        return
    assert counts in re.sub(r"\x1b\[[0-9;]*m", "", last), said
    assert last.startswith(COLOURS[colour]), repr(last)
    assert junit is None or gates_in_junit() == junit
    assert ("FAILED" in said) == ("failed" in counts)


def test_what_compares_with_a_baseline_names_the_options_that_pytest_has(session):
    assert session()[0] == 0
    (first,) = Path("results/runs").iterdir()
    code, said, last = session(BASELINE, "--mp-fail-on=step_time>50%,speedup>=0.1", happen=another_model)
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", said).split())
    assert code == 1 and "1 failed, 4 passed" in re.sub(r"\x1b\[[0-9;]*m", "", last)
    assert "use --mp-compare-by name to judge versions of a model, or --mp-force to compare them all the same" in plain
    # A limit needs no baseline, so one that cannot be compared does not keep it from being judged.
    assert gates_in_junit() == {"baseline": "failure", "speedup>=0.1[mnist1d-mlp-mixed-bf16]": "passed"}
    for option in ("--mp-compare-by=name", "--mp-force"):
        code, said, _ = session(
            f"--mp-baseline={first.name}", option, "--mp-fail-on=host_memory>5%", happen=another_model
        )
        assert code == 0, said
        assert "mnist1d-mlp: the model changed: parameters 1000 to 2000; batch 20 to 40" in said
    newest = max(Path("results/runs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert "| mnist1d-mlp | all" in " ".join((newest / "comparison.md").read_text().split())


AGAIN = ("--mp-modes=fp32", "--mp-seeds=1", "--mp-repeats=1", "--color=no")


def test_a_row_that_looks_slower_is_measured_again_and_fails_the_run(session):
    assert session(*AGAIN, happen=slower(0))[0] == 0
    (before,) = Path("results/runs").iterdir()
    judged = ("--mp-fail-on=step_time>100%,missing", "--mp-fail-on=metric")
    code, said, last = session(*AGAIN, BASELINE, *judged, happen=slower(6))
    assert code == 1, said
    assert "mpscale: slower than the baseline, measured again in 4 further processes" in said
    assert "[6/6]" in said
    assert "fired: step_time>100%: mnist1d-mlp fp32: +" in said
    assert "2 and 4 processes" in said
    assert "cannot-tell: metric: mnist1d-mlp fp32: inconclusive: +0 over 1 seed" in said
    assert "1 failed, 2 passed, 1 gate could not tell" in last
    assert "FAILED mpscale/gates.py::step_time>100%[mnist1d-mlp-fp32]" in said
    assert gates_in_junit() == {
        f"{gate}[mnist1d-mlp-fp32]": how
        for gate, how in (("step_time>100%", "failure"), ("missing", "passed"), ("metric", "skipped"))
    }
    suite = ElementTree.parse("junit.xml").getroot()[0]
    (fired,) = suite.iter("failure")
    assert fired.get("message").startswith("fired: step_time>100%: mnist1d-mlp fp32: +")
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "1", "1")
    (path,) = set(Path("results/runs").iterdir()) - {before}
    found = json.loads((path / "comparison.json").read_text())
    assert (found["fails"], found["note"], len(found["gates"])) == (True, None, 3)
    text = (path / "comparison.md").read_text()
    assert text.startswith(f"# {path.name} against ")
    assert "| missing | passed | B | mnist1d-mlp fp32 | 6 cases |" in " ".join(text.split())


def test_a_row_that_was_slow_by_chance_is_measured_again_and_passes(session):
    assert session(*AGAIN, happen=slower(0))[0] == 0
    code, said, _ = session(*AGAIN, BASELINE, "--mp-fail-on=step_time>100%", happen=slower(2))
    assert code == 0, said
    assert "measured again in 4 further processes" in said
    assert "fired" not in said


def test_a_report_that_cannot_be_made_is_told_in_the_last_line(session, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_reports", fail)
    code, said, last = session()
    assert code == 1
    assert "1 failed, 4 passed" in re.sub(r"\x1b\[[0-9;]*m", "", last), said
    assert gates_in_junit() == {"files": "failure"}


def test_limits_alone_leave_what_they_found_beside_the_run(session):
    code, _, _ = session("--mp-fail-on=speedup>=4")
    assert code == 1
    (run,) = Path("results/runs").iterdir()
    assert "| speedup>=4 | fired" in " ".join((run / "comparison.md").read_text().split())
    assert '"fails": true' in (run / "comparison.json").read_text()


def test_two_workloads_of_one_series_are_refused_before_anything_runs(tmp_path, monkeypatch):
    second = WORKLOAD.replace('"mine"', '"mine", series="s"')
    write(tmp_path, test_it=SUITE, one=second, two=second)
    monkeypatch.chdir(tmp_path)
    code, said = pytest_here(tmp_path, "--mp-workloads=one:w,two:w", f"--rootdir={tmp_path}")
    assert code == 4, said
    assert "the workloads one:w and two:w have the series 's'; give each one of its own" in said
