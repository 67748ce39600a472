"""The report of a run that was stopped names what is missing, and the command that goes on is safe to copy."""

import json
import shlex

import pytest
from support.runfolder import finished, record, started, write_run

from mpscale import read_run
from mpscale.cli import main
from mpscale.core.invocation import resume_command
from mpscale.report.document import document, render
from mpscale.report.first_screen_page import html_of
from mpscale.report.github_summary import github_summary
from mpscale.report.missing import go_on, interruptions, lacks

TYPED = ["bench", "-x", "-xqv", "--maxfail", "2", "--maxfail=3", "--exitfirst", "-k", "a  b", "--mp-seeds=2"]
INVOCATION = {"program": "pytest", "arguments": TYPED, "folder": "../../..", "options": {"--mp-seeds": "2"}}


def stopped(folder, invocation=INVOCATION, **info):
    """A run of two workloads: a killed case, a case that failed for a reason that may pass, and three not started."""
    killed = record("mixed-dynamic", 1, status="interrupted")
    lost = record("fp32", 0, workload="other", status="crashed", cause="killed")
    done = [record("fp32", 0), record("mixed-dynamic", 0), record("fp32", 1, status="error", cause="exception")]
    planned = [one["case_id"] for one in (*done, killed, lost)] + [f"toy--fp32--s{seed}--r0" for seed in (2, 3, 4)]
    events = [*finished([*done, lost]), started(killed)]
    return read_run(write_run(folder / "results", events, finish=False, planned=planned, invocation=invocation, **info))


SAID = (
    "No result yet: 3 of toy in fp32, 1 of toy in mixed-dynamic; failed for a reason that may pass: 1 of other in fp32."
)


def test_every_view_names_what_is_missing_and_the_command(tmp_path, monkeypatch, capsys):
    run = stopped(tmp_path)
    command = f"pytest bench -qv -k 'a  b' --mp-seeds=2 --mp-resume={run.name}"
    assert lacks(run) == SAID
    assert go_on(run) == command
    whole = document(run)
    assert f"```text\n{command}\n```" in render(whole)
    assert whole.findings.count("No result yet") == 1
    page = html_of(whole.screen)
    assert SAID in page and command.replace("'", "&#x27;") in page
    assert command in github_summary(run)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "latest"]) == 0
    assert f"{SAID} To go on:\n{command}\n" in capsys.readouterr().err
    assert main(["list"]) == 0
    assert f"to go on with {run.name}: {command}\n" in capsys.readouterr().out
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["go_on"] == command


def test_elsewhere_the_command_goes_to_the_folder_first(tmp_path):
    run = stopped(tmp_path / "my project")
    command = resume_command(run, tmp_path)
    assert command.startswith(f"cd {shlex.quote(str(tmp_path / 'my project'))} && pytest bench ")


def test_a_whole_run_lacks_nothing(tmp_path):
    run = read_run(write_run(tmp_path / "results", finished([record()]), invocation=INVOCATION))
    assert (lacks(run), go_on(run)) == ("", "")
    assert "The run is not complete" not in html_of(document(run).screen)


@pytest.mark.parametrize(
    "invocation",
    [
        None,
        "pytest",
        {**INVOCATION, "program": "rm -rf ."},
        {**INVOCATION, "program": "pytest; rm"},
        {**INVOCATION, "arguments": ["a\x1b[2Jb"]},
        {**INVOCATION, "folder": "../../..\x1b[2J"},
        {**INVOCATION, "folder": "\0"},
        {**INVOCATION, "arguments": ["a\nb"]},
        {**INVOCATION, "arguments": [1]},
        {**INVOCATION, "options": []},
        {**INVOCATION, "options": {"@/etc/passwd": True}},
        {**INVOCATION, "options": {"--mp-seeds": []}},
        {**INVOCATION, "options": {"--mp-seeds": 2}},
        {**INVOCATION, "folder": "\x1b[2J"},
        {**INVOCATION, "folder": "a\0b"},
    ],
)
def test_a_run_json_of_a_stranger_gives_no_other_command(tmp_path, invocation):
    run = stopped(tmp_path, invocation)
    assert (lacks(run), go_on(run), go_on(run, tmp_path)) == (SAID, "", "")
    assert "To go on" not in render(document(run))


def test_a_hostile_argument_stays_one_argument(tmp_path):
    arguments = ["$(touch x)", "`touch x`", "```", "'; touch x; '", "--", "path"]
    run = stopped(tmp_path, {**INVOCATION, "arguments": arguments})
    (command,) = [line for line in render(document(run)).splitlines() if line.startswith("pytest ")]
    assert shlex.split(command) == ["pytest", *arguments[:4], f"--mp-resume={run.name}", "--", "path"]
    assert f"````text\n{command}\n````" in render(document(run))


@pytest.mark.parametrize("where", ["reference", "interleaved"])
def test_what_cannot_go_on_has_no_command(tmp_path, where):
    if where == "interleaved":
        run = stopped(tmp_path, interleaved={"run": "other"})
    else:
        run = stopped(tmp_path)
        run.path.parent.rename(tmp_path / "results" / "reference")
        run = read_run(tmp_path / "results" / "reference" / run.name)
    assert (lacks(run), go_on(run)) == (SAID, "")


def resumed(**facts):
    return {"time": "2026-01-03T04:05:06.789+00:00", "cut_bytes": 0, "differs": {}, "apart": [], **facts}


def test_interruptions_are_told_with_the_longest(tmp_path):
    groups = [{"workload": "toy", "seed": seed, "repeat": 0, "seconds": 3600 * 5 * seed + 61} for seed in (0, 1)]
    again = [{"workload": "toy", "seed": 1, "repeat": 0, "seconds": 7200}]
    entries = [resumed(apart=groups, differs={"git commit": ["b", "a"]}), resumed(apart=again)]
    said = list(interruptions(stopped(tmp_path, resumed=entries)))
    assert said[0] == "The run was stopped and went on 2 times (2026-01-03 04:05, 2026-01-03 04:05 UTC)."
    assert said[1] == "Not the same as before: git commit (run.json has the values)."
    assert said[2].startswith("An interruption of 2 hours fell between the modes of toy, seed 1, and between those of ")
    assert "1 other seed" in said[2]


@pytest.mark.parametrize(
    "entries",
    [
        5,
        "text",
        {"time": 1},
        [None, 5, []],
        [resumed(apart=5, differs=5)],
        [resumed(apart=[5, {"seconds": "1"}, {"seconds": True}, {"seconds": 2**62}, {"seconds": float("nan")}])],
        [{"differs": {"a": 1}, "apart": [{"workload": [], "seed": {}, "seconds": 99}]}],
    ],
)
def test_entries_of_a_stranger_break_no_report(tmp_path, entries):
    assert all(isinstance(one, str) for one in interruptions(stopped(tmp_path, resumed=entries)))
