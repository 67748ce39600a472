"""The commands that a project begins with and names its runs by: `mpscale init` and `mpscale name`."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.no_training import replace_trainings
from support.runfolder import finished, record, write_run
from support.small_suite import environment, forget, pytest_here

from mpscale.cli import main

ONE, TWO = "20260101T000000Z-test-cpu-0001", "20260102T000000Z-test-cpu-0002"
WRITTEN = ["my_workloads.py", "bench/test_mixed_precision.py", ".gitignore", "pyproject.toml"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mpscale(here, capsys):
    """Run the command; return its exit code, its output and its messages."""

    def run(*arguments):
        return main([*map(str, arguments)]), *capsys.readouterr()

    return run


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_init_writes_a_project_whose_suite_trains_its_workload(mpscale, here):
    code, out, err = mpscale("init")
    assert (code, err) == (0, "")
    assert [line.removeprefix("wrote ") for line in out.splitlines() if line.startswith("wrote ")] == WRITTEN
    assert sorted(files(here)) == sorted(WRITTEN)
    code, said = pytest_here(here, "bench", f"--rootdir={here}", "-c", "pyproject.toml", "--collect-only", "-q")
    assert code == 0, said
    assert [line for line in said.splitlines() if "::" in line] == [
        "bench/test_mixed_precision.py::test_training[my_workloads:signs-fp32-seed0]"
    ]


def test_init_adds_to_what_is_there_and_changes_nothing_of_it(mpscale, here):
    before = b'# mine\r\n[project]\r\nname = "x"\r\n\r\n[tool.ruff]\r\nline-length = 100'
    (here / "pyproject.toml").write_bytes(before)
    (here / ".gitignore").write_bytes(b"*.pyc\n/results/runs\nresults/fit/")
    code, _, err = mpscale("init", ".")
    assert (code, err) == (0, "")
    after = (here / "pyproject.toml").read_bytes()
    assert after.startswith(before)
    assert b"\n" not in after.replace(b"\r\n", b"")
    found = tomllib.loads(after.decode())
    assert found["tool"]["ruff"] == {"line-length": 100}
    assert found["tool"]["mpscale"] == {"workloads": ["my_workloads:signs"], "seeds": 3}
    ignored = b"*.pyc\n/results/runs\nresults/fit/\nresults/probe/\nresults/cache/\n"
    assert (here / ".gitignore").read_bytes() == ignored


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("my_workloads.py", "mine", "my_workloads.py is there already, and would be overwritten"),
        ("bench/test_mixed_precision.py", "", "test_mixed_precision.py is there already"),
        ("pyproject.toml", "[tool.mpscale]\nseeds = 1\n", "has a table [tool.mpscale] already"),
        ("pyproject.toml", "tool.mpscale.seeds = 1\n", "has a table [tool.mpscale] already"),
        ("pyproject.toml", "tool = {}\n", "add it by hand"),
        ("pyproject.toml", "tool = 3\n", "add it by hand"),
        ("pyproject.toml", "[tool\n", "cannot be read"),
        ("pyproject.toml", "a = '''\n", "cannot be read"),
    ],
)
def test_init_refuses_before_it_writes_anything(mpscale, here, name, content, message):
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_text(content)
    before = files(here)
    code, out, err = mpscale("init", "--json")
    assert (code, out) == (2, "")
    assert "nothing was written: " in err and message in err
    assert files(here) == before


def test_init_goes_on_where_it_was_cut_off_and_makes_folders(mpscale, here):
    assert mpscale("init", "a/b")[0] == 0
    written = files(here / "a/b")
    (here / "a/b/pyproject.toml").unlink()
    code, out, _ = mpscale("init", "a/b", "--json")
    assert (code, json.loads(out)["written"]) == (0, ["a/b/pyproject.toml"])
    assert files(here / "a/b") == written
    (here / "file").write_text("")
    code, _, err = mpscale("init", "file")
    assert code == 2
    assert "file" in err


def test_init_follows_a_link_to_the_settings_and_refuses_one_that_leads_nowhere(mpscale, here):
    (here / "real.toml").write_text("[a]\n")
    (here / "pyproject.toml").symlink_to("real.toml")
    assert mpscale("init")[0] == 0
    assert (here / "pyproject.toml").is_symlink()
    assert (here / "real.toml").read_text().startswith("[a]\n\n[tool.mpscale]\n")
    (here / "x").mkdir()
    (here / "x" / "pyproject.toml").symlink_to("nowhere")
    code, _, err = mpscale("init", "x")
    assert code == 2
    assert "is a link that leads nowhere" in err


@pytest.fixture
def imports(here, monkeypatch):
    """Modules of the working directory may be imported, and are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    forget(here)


@pytest.mark.usefixtures("imports")
def test_the_workloads_of_a_project_are_listed_with_mpscales(mpscale, here):
    mpscale("init")
    text = (here / "pyproject.toml").read_text().replace('signs"]', 'signs", "my_workloads:no", "article-mlp"]')
    (here / "pyproject.toml").write_text(text)
    code, out, err = mpscale("workloads", "--json")
    found = json.loads(out)
    names = [one["workload"] for one in found["workloads"]]
    assert (code, err, names.count("article-mlp"), names.count("my_workloads:signs")) == (0, "", 1, 1)
    assert [one["workload"] for one in found["broken"]] == ["my_workloads:no"]
    code, out, err = mpscale("workloads")
    assert f"my_workloads:signs is in {here / 'my_workloads.py'}" in out
    assert "broken: my_workloads:no: " in err


@pytest.mark.slow
def test_what_init_writes_passes_its_first_run(here):
    def done(*command):
        found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    command = (sys.executable, "-P", "-m", "mpscale")
    done(*command, "init")
    quick = ("--mp-seeds=1", "--mp-modes=fp32,mixed-bf16", "--mp-timing=0.1")
    said = done(*command, "run", *quick, "--mp-name=first")
    assert "pyproject.toml sets workloads; the command line overrides seeds of pyproject.toml" in said
    assert "2 passed" in said
    said = done(sys.executable, "-P", "-m", "pytest", "bench/", "--benchmark-only", *quick)
    assert "2 passed" in said
    found = json.loads(done(*command, "list", "--json"))["runs"]
    assert [(run["name"], run["rows"], run["outcome"]) for run in found] == [("first", 2, "well"), (None, 2, "well")]
    assert json.loads(done(*command, "report", "first", "--json"))["rows"][0]["metric_mean"] > 0.8


@pytest.fixture
def runs(here):
    rows = [record(step_time_ms_median=2.0, series_key="toy/abc/fp32/batch=1/method=1")]
    for name in (ONE, TWO):
        write_run(here / "results", finished(rows), name=name)
    return here / "results" / "runs"


def test_a_run_is_named_and_then_found_by_its_name(mpscale, runs):
    assert mpscale("name", ONE, "before", "--note", "as\nit  was") == (0, f"{ONE}: before, as it was\n", "")
    assert mpscale("name", "latest", "after")[0] == 0
    assert mpscale("compare", "before", "after", "--force")[0] == 0
    found = json.loads(mpscale("list", "--json")[1])["runs"]
    assert [(run["run"], run["name"], run["note"]) for run in found] == [
        (ONE, "before", "as it was"), (TWO, "after", None),
    ]  # fmt: skip
    assert "before" in mpscale("list")[1]
    assert json.loads(mpscale("name", "before", "--json")[1])["note"] == "as it was"
    assert mpscale("name", "before", "first", "--note", "") == (0, f"{ONE}: first, no note\n", "")
    assert mpscale("name", "first", "")[1] == f"{ONE}: no name, no note\n"
    assert "name" not in mpscale("list")[1].splitlines()[0].split("  ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TWO, "before"), f"{ONE} is called before already"),
        ((TWO, "latest"), "the run that started last"),
        ((TWO, "a/b"), "has only these and"),
        ((TWO, "--note", "x" * 501), "at most 500 characters"),
        (("nobody", "x"), "no run is called 'nobody'"),
        (("table.csv", "x"), "a table without a run.json"),
    ],
)
def test_a_name_that_cannot_be_given_changes_nothing(mpscale, runs, arguments, message):
    mpscale("name", ONE, "before")
    Path("table.csv").write_text("")
    before = files(runs)
    code, out, err = mpscale("name", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert files(runs) == before


def test_a_run_may_keep_the_name_that_it_has(mpscale, runs):
    mpscale("name", ONE, "before")
    assert mpscale("name", "before", "before", "--note", "x") == (0, f"{ONE}: before, x\n", "")


def test_a_report_that_lacks_the_name_is_made_again_by_its_command(mpscale, runs):
    (runs / ONE / "report.html").write_text("old")
    _, _, err = mpscale("name", ONE, "before")
    assert f"`mpscale report results/runs/{ONE}`" in err


def test_a_session_names_its_run_once(here, pytester, monkeypatch):
    replace_trainings(monkeypatch)
    monkeypatch.setattr("mpscale.report.files._page", lambda run, report: "a page")
    monkeypatch.chdir(pytester.path)
    pytester.makepyfile(test_it="from mpscale.suite import test_training")
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    plain = ("--mp-workloads=mnist1d-mlp", "--mp-modes=fp32", "--mp-seeds=1", "--mp-timing=0.05")
    plain += ("-pno:cacheprovider", "-pno:hypothesispytest", "-pno:unraisableexception")

    def session(*options):
        result = pytester.runpytest_inprocess(*plain, *options)
        return int(result.ret), result.stdout.str() + result.stderr.str()

    code, said = session("--mp-name=before", "--mp-note=a note")
    assert code == 0, said
    (path,) = Path("results/runs").iterdir()
    info = json.loads((path / "run.json").read_text())
    assert (info["name"], info["note"]) == ("before", "a note")
    assert f"run: {path} (before)" in said
    code, said = session("--mp-name=before")
    assert code == 4
    assert f"--mp-name: {path.name} is called before already" in said
    assert list(Path("results/runs").iterdir()) == [path]
    # A run that goes on is found by its name, and keeps it.
    code, said = session("--mp-resume=before")
    assert code == 0, said
    assert json.loads((path / "run.json").read_text())["name"] == "before"
    code, said = session("--mp-resume=before", "--mp-name=other")
    assert code == 4
    assert "--mp-name is other, and was before" in said
    code, said = session("--mp-name=after", "--mp-baseline=before")
    assert code == 0, said
    assert f"against before ({path.name}):" in said
    assert session("--mp-name=a b")[0] == 4


@pytest.mark.parametrize("typed", ["mpscale compare bef", "mpscale run --mp-baseline bef", "mpscale name bef"])
def test_a_shell_completes_names(mpscale, runs, typed):
    pytest.importorskip("argcomplete")
    # Where the project has its results.
    Path("pyproject.toml").write_text('[tool.mpscale]\nresults = "there"\n')
    Path("results").rename("there")
    assert mpscale("name", ONE, "before")[0] == 0
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": "answer", "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9",
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "mpscale"], env={**os.environ, **asked}, timeout=60, check=False)
    assert [shlex.split(one)[0] for one in Path("answer").read_text().split("\n") if one.strip()] == ["before"]
