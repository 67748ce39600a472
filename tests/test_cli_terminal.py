"""Commands on terminals of several widths, and without one; lists of runs, reports in a browser, JSON, completion."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest
from support.pseudo_terminal import plain, terminal
from support.runfolder import NAME, finished, record, write_run

from mpscale.cli import main

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
"""Only what is committed: other runs in results/ depend on who runs the tests."""
BEFORE, AFTER = (REFERENCE / name for name in ("20261127T062010Z-amd-epyc-b176", "20261127T103907Z-amd-epyc-568d"))
COMMANDS = {
    "compare": ("compare", BEFORE, AFTER),
    "list": ("list", "RESULTS"),
    "history": ("history", "--mode", "fp32", *sorted(REFERENCE.glob("2*"))),
    "workloads": ("workloads",),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder with the committed runs."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(REFERENCE, folder / "reference", ignore=shutil.ignore_patterns("*.html", "steps", "figures"))
    return folder


@pytest.fixture
def run_in(monkeypatch, results):
    """Run a command in a terminal; return its exit code and what is on the screen."""

    def run_in(columns, *arguments, encoding="utf-8", **environ):
        for name in ("NO_COLOR", "CI", "FORCE_COLOR", "COLUMNS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm", **environ}.items():
            monkeypatch.setenv(name, value)
        with terminal(columns, encoding) as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen.stream)
            code = main([str(results if argument == "RESULTS" else argument) for argument in arguments])
            return code, screen.close()

    return run_in


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working directory, with a run in it."""
    rows = [
        record(mode, seed, step_time_ms_median=2.0 - 0.01 * seed, series_key=f"toy/abc/{mode}/batch=1/method=1")
        for mode in ("fp32", "mixed-bf16")
        for seed in (0, 1)
    ]
    write_run(tmp_path / "results", finished(rows), environment={
        "device": {"kind": "cpu", "name": "Test CPU"}, "git": {"commit": "0123456789abcdef", "dirty": True},
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("command", COMMANDS)
def test_output_fits_the_terminal(run_in, columns, command):
    code, text = run_in(columns, *COMMANDS[command])
    assert code == 0
    assert "\x1b[1m" in text
    assert max(map(len, plain(text).split("\n"))) <= columns


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"CI": "true"}])
def test_colours_are_left_out_where_nobody_wants_them(run_in, environ):
    assert "\x1b" not in run_in(100, *COMMANDS["list"], **environ)[1]


def test_a_terminal_that_lacks_characters_still_shows_tables(run_in):
    code, text = run_in(100, *COMMANDS["list"], encoding="ascii")
    assert code == 0
    assert "amd-epyc-b176" in text


def test_a_pipe_gets_plain_lines_of_any_length(capsys):
    main([*map(str, COMMANDS["compare"])])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    row = next(line for line in out.splitlines() if line.startswith("mnist1d-mlp") and "mixed-bf16" in line)
    assert "0.6246 ms" in row and "[-37.8%, +24.9%]" in row and "no difference shown" in row


def test_report_prints_the_results_for_a_terminal(project, run_in):
    code, text = run_in(100, "report", "latest", "--print")
    assert code == 0
    name, table, *_, files = plain(text).split("\n\n")
    assert (name, files) == (NAME, f"report: results/runs/{NAME}/report.html\n")
    assert "\nworkload" in table
    assert "Is mixed precision worth it here? " in plain(text)
    assert max(map(len, plain(text).split("\n"))) <= 100


@pytest.mark.parametrize(
    ("statuses", "finish", "outcome"),
    [
        (["ok", "ok"], True, "well"),
        (["ok", "unsupported"], True, "well"),
        (["ok", "diverged"], True, "training lost: 1 of 2 cases"),
        (["ok", "stalled"], True, "training lost: 1 of 2 cases"),
        (["diverged", "crashed"], True, "failed: 2 of 2 cases"),
        (["ok"], False, "unfinished"),
    ],
)
def test_list_says_how_a_run_went(tmp_path, capsys, statuses, finish, outcome):
    cases = [record(seed=seed, status=status) for seed, status in enumerate(statuses)]
    write_run(tmp_path, finished(cases), finish=finish)
    assert main(["list", str(tmp_path)]) == 0
    row, _, summary = capsys.readouterr().out.splitlines()[2:]
    assert row.endswith(outcome)
    assert summary.startswith("1 run in ")


def test_list_has_a_row_for_a_run_that_cannot_be_read(project, capsys):
    broken = project / "results" / "runs" / "20260103T000000Z-torn"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    assert main(["list"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert rows[0].split()[:6] == [NAME, "2026-01-02", "Test", "CPU", "01234567+", "2"]
    assert "unreadable: " in rows[1] and "not readable as JSON" in rows[1]


@pytest.fixture
def browser(monkeypatch):
    """A browser that notes what it was told to open."""
    opened = []
    monkeypatch.setenv("BROWSER", "some-browser")
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    return opened


@pytest.mark.parametrize(
    ("arguments", "times"), [((), 1), (("latest",), 1), ((f"results/runs/{NAME}",), 1), (("--print",), 0)]
)
def test_open_opens_the_report_and_prints_its_path(project, browser, capsys, arguments, times):
    page = project / "results" / "runs" / NAME / "report.html"
    page.write_text("<p>")
    assert main(["open", *arguments]) == 0
    assert capsys.readouterr() == (f"results/runs/{NAME}/report.html\n", "")
    assert browser == [page.as_uri()] * times


def test_open_prints_the_path_where_there_is_no_display(project, monkeypatch, capsys):
    (project / "results" / "runs" / NAME / "report.html").write_text("<p>")
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(webbrowser, "open", lambda address: pytest.fail("opened a browser"))
    assert main(["open"]) == 0
    out, err = capsys.readouterr()
    assert out == f"results/runs/{NAME}/report.html\n"
    assert err == "mpscale: no browser could be opened here: open that file in one\n"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("list",), "runs"),
        (("open", "--print"), "report"),
        (("report", "latest"), "rows"),
        (("history",), "series"),
        (("compare", NAME, NAME, "--force"), "comparisons"),
        (("workloads",), "workloads"),
    ],
)
def test_every_command_prints_json_of_one_shape(project, capsys, arguments, key):
    (project / "results" / "runs" / NAME / "report.html").write_text("<p>")
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert list(found)[:2] == ["schema_version", "command"]
    assert (found["schema_version"], found["command"], err) == (1, arguments[0], "")
    assert found[key]


@pytest.mark.parametrize(
    "arguments", [("report", "no"), ("history", "no"), ("open", "no"), ("compare", "no", "no"), ("merge", "no")]
)
def test_errors_are_told_in_a_line_even_with_json(project, capsys, arguments):
    assert main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mpscale: error: no run is called 'no'")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("mpscale hi", ["history"]),
        ("mpscale compare --thr", ["--threshold"]),
        ("mpscale compare 2026", [NAME]),
        ("mpscale merge 2026", [NAME]),
        ("mpscale run --mp-resume 2026", [NAME]),
        ("mpscale run --mp-res", ["--mp-resume"]),
        ("mpscale lint article", ["article-mlp"]),
        ("mpscale history --mode mixed-b", ["mixed-bf16"]),
    ],
)
def test_a_shell_completes(project, typed, offered):
    pytest.importorskip("argcomplete")
    answer = project / "answer"
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9",
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "mpscale"], env={**os.environ, **asked}, cwd=project, timeout=60, check=False)
    assert [shlex.split(one)[0] for one in answer.read_text().split("\n") if one.strip()] == offered


def test_without_argcomplete_a_shell_gets_no_answer_and_no_error(project, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("COMP_LINE", "mpscale ")
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "")
