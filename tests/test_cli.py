"""The `mpscale` command. Tests of streams, exit code and imports start a process; the others call `main`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.imports import run_and_list_imports
from support.runfolder import NAME, finished, record, write_run

from mpscale import __version__
from mpscale.cli import main


@pytest.fixture
def mpscale(capsys):
    """Run the command; return its exit code, its output and its messages."""

    def run(*arguments):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory, with a run in it."""
    one = record(step_time_ms_median=2.0, series_key="toy/abc/fp32/batch=1/method=1")
    write_run(tmp_path / "results", finished([one]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_names_the_commands_and_imports_nothing_slow():
    done, imported = run_and_list_imports("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "workloads" in done.stdout
    assert "report" in done.stdout
    assert re.search(r"^ {4}workloads +list workloads", done.stdout, re.M)
    assert '\n    eval "$(register-python-argcomplete mpscale)"' in done.stdout
    assert not imported & {
        "tensorflow",
        "keras",
        "numpy",
        "scipy",
        "pandas",
        "matplotlib",
        "pytest",
        "tabulate",
        "rich",
    }


def test_help_breaks_no_option(mpscale, monkeypatch):
    for width in range(50, 120, 10):
        monkeypatch.setenv("COLUMNS", str(width))
        code, text, err = mpscale("run", "--help")
        assert (code, err) == (0, "")
        assert "    mpscale run mnist1d-cnn --modes fp32,mixed-bf16 --seeds 5 --mp-name before\n" in text
        assert {"--mp-baseline,", "--benchmark-only`", "--batch-size,"} <= set(text.split())


def test_without_a_command_there_is_help_and_no_success(mpscale):
    code, out, err = mpscale()
    assert (code, err) == (2, "")
    assert out == mpscale("--help")[1]


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "mpscale", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"mpscale {__version__}\n")


def test_version(mpscale):
    assert mpscale("--version") == (0, f"mpscale {__version__}\n", "")


def test_workloads_lists_what_can_be_trained_and_the_modes(mpscale):
    code, out, err = mpscale("workloads")
    assert code == 0, err
    for name in ("mnist1d-mlp", "article-mlp", "fp32", "mixed-dynamic"):
        assert f"\n{name} " in f"\n{out}"


@pytest.mark.parametrize("wanted", ["latest", NAME, NAME[:8], f"results/runs/{NAME}"])
def test_report_rebuilds_the_files_and_lists_them(mpscale, project, wanted):
    code, out, err = mpscale("report", wanted)
    assert (code, err) == (0, "")
    paths = [project / line for line in out.splitlines()]
    assert [path.name for path in paths] == ["report.html", "report.md", "summary.csv", "cases.csv"]
    assert all(path.is_file() for path in paths)


def test_report_prints_the_report(mpscale, project, monkeypatch):
    monkeypatch.chdir("/")
    _, out, _ = mpscale("report", "latest", "--results", project / "results", "--format", "markdown", "--print")
    assert out == (project / "results" / "runs" / NAME / "report.md").read_text(encoding="utf-8")


def test_report_for_github_is_printed_and_writes_nothing(mpscale, project):
    before = sorted(project.rglob("*"))
    code, out, err = mpscale("report", "latest", "--format", "github-summary")
    assert (code, err) == (0, "")
    assert out.startswith("# mpscale: Test CPU (CPU)\n")
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("measure",), "invalid choice: 'measure'"),
        (("report",), "RUN"),
        (("report", "latest", "--format", "pdf"), "invalid choice: 'pdf'"),
        (("report", "latest", "--format", "github-summary", "--json"), "--json does not go with --format"),
        (("list", "elsewhere"), "there is no run in elsewhere/runs or elsewhere/reference; make one"),
        (("open",), f"runs/{NAME}/report.html: no such file; `mpscale report latest` makes it"),
        (("open", "nightly", "--json"), "no run is called 'nightly'"),
        (("report", "nightly", "--format", "github-summary"), "no run is called 'nightly'"),
        (("report", "nightly"), f"no run is called 'nightly'; the newest in results are {NAME}"),
        (("report", "latest", "--results", "elsewhere"), "make one with `mpscale run`"),
        (("report", "."), "holds no run.json"),
        (("history", "--results", "elsewhere"), "there is no run in elsewhere/runs or elsewhere/reference; make one"),
        (("history", "nightly"), f"no run is called 'nightly'; the newest in results are {NAME}"),
        (("history", "--quantity", "speed"), "invalid choice: 'speed'"),
        (("history", "--workload", "toys"), "no run has the workload 'toys'; there are toy"),
        (("history", "--quantity", "energy"), "no run has a value of energy per step"),
        (("fit", "toys"), "toys"),
        (("fit", "article-mlp", "--mode", "fp23"), "invalid choice: 'fp23'"),
        (("fit", "article-mlp", "--max-batch", "0"), "expected an integer of at least 1"),
        (("fit", "article-mlp", "--output", "x" * 300), "File name too long"),
        (("fit", "article-mlp", "--output", "/tmp"), "--output /tmp: it is a folder"),
        (("fit", "article-mlp", "--memory-limit", "4"), "such as 800MiB or 4GiB"),
        (("fit", "article-mlp", "--results", "/proc"), "/proc is not a folder that can be written to"),
        (("probe", "toys"), "toys"),
        (("probe", "article-mlp", "--scale", "100"), "a loss scale must be a power of two from 2**-100 to 2**100"),
        (("probe", "article-mlp", "--scale", "0"), "power of two"),
        (("probe", "article-mlp", "--steps", "0"), "expected an integer of at least 1"),
        (("probe", "article-mlp", "--seed", "-1"), "expected an integer of at least 0 and at most 4294967295"),
        (("probe", "article-mlp", "--results", "/proc"), "/proc is not a folder that can be written to"),
        (("history", "--figure", "h.pdf"), "h.pdf: '.pdf' files cannot be made; end it in .svg or .png"),
        (("history", "--figure", "nowhere/h.svg"), "nowhere/h.svg: there is no such file or folder"),
    ],
)
def test_a_mistake_gets_a_message_of_one_line(mpscale, project, arguments, message):
    code, out, err = mpscale(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("mpscale: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_broken_run_gets_a_message_of_one_line(mpscale, project):
    path = project / "results" / "runs" / NAME / "run.json"
    path.write_text("{")
    code, _, err = mpscale("report", "latest")
    assert code == 2
    assert f"runs/{NAME}/run.json: not readable as JSON" in err
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_written_gets_a_message_of_one_line(mpscale, project):
    # A folder in the place of the file: this fails for root as well, which permissions do not.
    (project / "results" / "runs" / NAME / "report.md").mkdir()
    code, _, err = mpscale("report", "latest")
    assert code == 2
    assert err.startswith("mpscale: error: ")
    assert "report.md: it is a folder and not a file" in err


def test_a_closed_pipe_is_not_an_error(project):
    command = f"{sys.executable} -m mpscale.cli report latest --print | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=project, timeout=60)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "141\n")


def test_history_shows_all_runs_and_skips_what_it_cannot_read(mpscale, project):
    (project / "results" / "reference" / "torn").mkdir(parents=True)
    code, out, err = mpscale("history")
    assert code == 0
    assert NAME in out
    assert err.startswith("mpscale: skipped results/reference/torn: ")
    assert err.count("\n") == 1


def test_history_takes_runs_by_name_and_a_cases_csv(mpscale, project):
    assert mpscale("report", "latest")[0] == 0
    path = f"results/runs/{NAME}/cases.csv"
    code, out, err = mpscale("history", NAME[:8], path, "--format", "csv")
    assert (code, err) == (0, "")
    assert [line.split(",")[0] for line in out.splitlines()] == ["workload", "toy", "toy"]
    assert NAME in out and path in out


def test_history_writes_table_and_figure_to_the_named_files(mpscale, project):
    code, out, err = mpscale("history", "-o", "h.md", "--format", "markdown", "--figure", "h.svg")
    assert (code, out, err) == (0, "", "")
    assert NAME in (project / "h.md").read_text(encoding="utf-8")
    assert "line-1-1" in (project / "h.svg").read_text(encoding="utf-8")


def test_a_result_that_standard_output_cannot_take_gets_a_message_of_one_line(project):
    command = [sys.executable, "-m", "mpscale.cli", "list"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=project, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mpscale: error: the output cannot be written: the disk is full: free some space")
    assert done.stderr.count("\n") == 1
