"""`mpscale ab` with scripts as interpreters: they take turns as pytest sessions do, and go wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mpscale.cli import main
from mpscale.core.files.temporary import remove_left_behind
from mpscale.terminal.progress import LiveLine, Screen
from mpscale.terminal.streams import Surface

CASES = [("fp32", 0), ("mixed-dynamic", 0), ("fp32", 1), ("mixed-dynamic", 1)]

INTERPRETER = """#!{python}
import json, os, shutil, signal, sys, time
from pathlib import Path

script = json.loads({script!r})
if sys.argv[1] == "-P" and sys.argv[2].endswith("/about.py"):
    if "about_fails" in script:
        sys.exit(script["about_fails"])
    packages = {{"tensorflow": "2.99", "keras": "3.99", "mpscale": "0.1.0", **script.get("packages", {{}})}}
    told = {{"turns": 1, "method_version": 1, "schema_version": 1, "python": "3.99", "broken": {{}}}}
    print(json.dumps({{**told, "packages": packages, **script.get("about", {{}})}}))
    sys.exit()

assert sys.argv[1:4] == ["-P", "-m", "pytest"], sys.argv
sys.path.insert(0, {tests!r})
from mpscale.ab import turns
from support.runfolder import finished, record, write_run

print("what pytest prints", *sys.argv[4:])
act = script.get("act", {{}})
def do(when):
    what = act.get(when)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        Path("hangs").write_text(str(os.getpid()))
        time.sleep(600)
    elif what is not None:
        sys.exit(what)

mine = turns.join(os.environ)
do("start")
side = mine.entry["side"]
def note(text):
    with open("log", "a") as log:
        log.write(f"{{side}} {{text}}\\n")
plan = [{{"workload": "toy", "mode": mode, "seed": seed, "repeat": 0}} for mode, seed in script["cases"]]
plan = [{{"id": f"toy--{{case['mode']}}--s{{case['seed']}}--r0", **case}} for case in plan]
mine.send(turns.Plan(plan, script.get("turn_s", 600.0)))
do("planned")
records, run = [], None
def write(finish):
    shutil.rmtree(run, ignore_errors=True)
    write_run(Path("results"), finished(records), name=side, finish=finish, interleaved=mine.entry)
code = 0 if plan else 5
try:
    for number in script.get("run", range(len(plan))):
        case = plan[number]
        mine.wait(turns.Ready(case["id"]))
        note("begins " + case["id"])
        do(f"case {{number}}")
        note("ends " + case["id"])
        status = "crashed" if number == script.get("crashes") else "ok"
        code = 1 if status == "crashed" else code
        key = "toy/abc/" + case["mode"] + "/batch=1/method=1"
        time_ms = None if status == "crashed" else 2.0
        one = record(case["mode"], case["seed"], status=status, step_time_ms_median=time_ms, series_key=key)
        records = [old for old in records if old["seed"] != one["seed"] or old["mode"] != one["mode"]] + [one]
        run = "results/runs/" + side
        write(False)
        mine.send(turns.Done(case["id"], status, "it broke" if code else None, time_ms, run))
except turns.Stopped as why:
    print("stopped:", why)
    code = 2
except KeyboardInterrupt:
    code = 2
mine.end(run)
note("leaves")
do("leave")
if run:
    write(True)
sys.exit(code)
"""


@pytest.fixture
def interpreter(tmp_path):
    """Make a script that stands in for an interpreter; return its path."""

    def make(name, cases=CASES, **script):
        path = tmp_path / name / "python"
        path.parent.mkdir()
        script = json.dumps({"cases": cases, **script})
        text = INTERPRETER.format(python=sys.executable, script=script, tests=str(Path(__file__).parents[1]))
        path.write_text(text)
        path.chmod(0o755)
        return path

    return make


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    """The folder for the sessions' output, which is kept if one fails."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "logs"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "logs"


@pytest.fixture
def ab(tmp_path, monkeypatch, capsys):
    """Run the command; return its exit code, its output and its standard error."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        try:
            code = main(["ab", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run
    signal.signal(signal.SIGTERM, before)


def start(folder, a, b, *arguments):
    command = [sys.executable, "-m", "mpscale.cli", "ab", "--python", str(a), "--python", str(b), *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def log(folder):
    path = folder / "log"
    return path.read_text().splitlines() if path.exists() else []


def spans(lines):
    """The cases in the order in which they ran; fails if one began before another had ended."""
    cases = [line.split() for line in lines if not line.endswith("leaves")]
    begins, ends = cases[::2], cases[1::2]
    assert [what for _, what, _ in begins] == ["begins"] * len(begins)
    assert [(side, "ends", case) for side, _, case in begins] == [tuple(end) for end in ends]
    return [(side, case) for side, _, case in begins]


def test_cases_run_in_pairs_and_each_side_begins_half_of_them(tmp_path, interpreter, ab):
    one, two = interpreter("one"), interpreter("two", packages={"numpy": "9"})
    code, output, said = ab("--python", one, "--python", two, "--strict-markers", "x/")
    assert code == 0, said
    ran = spans(log(tmp_path))
    pairs = list(zip(ran[::2], ran[1::2], strict=True))
    assert [case for (_, case), _ in pairs] == [f"toy--{mode}--s{seed}--r0" for mode, seed in CASES]
    assert all({first, second} == {"A", "B"} and case == other for (first, case), (second, other) in pairs)
    firsts = {case.split("--s")[0]: [] for _, case in ran}
    for (first, case), _ in pairs:
        firsts[case.split("--s")[0]].append(first)
    assert all(sorted(letters) == ["A", "B"] for letters in firsts.values())

    assert "B against A: 2 rows; step time 2" in output
    lines = said.splitlines()
    assert re.fullmatch(r"A: .*/one/python \(Python 3.99, tensorflow 2.99, keras 3.99, mpscale 0.1.0\)", lines[0])
    assert lines[2] == "also differ: 1 package only in B"
    assert "[1/4] toy fp32 seed 0: A 2 ms, B 2 ms" in said
    assert lines[-3:-1] == ["A: results/runs/A", "B: results/runs/B"]
    entries = [json.loads((tmp_path / f"results/runs/{side}/run.json").read_text())["interleaved"] for side in "AB"]
    assert entries[0]["id"] == entries[1]["id"]
    assert [(entry["side"], Path(entry["python"]).parent.name) for entry in entries] == [("A", "one"), ("B", "two")]


GONE = "B has ended after {} of 4 cases"
DEAD = "B: it was killed by SIGKILL; its output, "


@pytest.mark.parametrize(
    ("a", "b", "code", "said", "ran"),
    [
        pytest.param({}, {"act": {"start": "die"}}, 2, [GONE.format(0), DEAD, "nothing to compare"], 0, id="at start"),
        pytest.param({}, {"act": {"planned": "die"}}, 2, [GONE.format(0), DEAD], 0, id="dies when it has planned"),
        pytest.param({}, {"act": {"start": 4}}, 2, ["B: pytest was called incorrectly (exit code 4)"], 0, id="usage"),
        pytest.param(
            {}, {"act": {"case 2": 3}}, 1, [GONE.format(2), "pytest itself failed (exit code 3)"], 2, id="dies"
        ),
        pytest.param({}, {"act": {"leave": 3}}, 1, ["pytest itself failed"], 4, id="dies at its end"),
        pytest.param({}, {"cases": []}, 2, [GONE.format(0), "B: no case was selected (exit code 5)"], 0, id="no cases"),
        pytest.param({"cases": []}, {"cases": []}, 2, ["A: no case was selected", "nothing to compare"], 0, id="none"),
        pytest.param(
            {},
            {"cases": [*CASES[:3], ("mixed-bf16", 0)]},
            2,
            ["only A has toy--mixed-dynamic--s1--r0; only B has toy--mixed-bf16--s0--r0"],
            0,
            id="other cases",
        ),
        pytest.param({}, {"cases": CASES[::-1]}, 2, ["they are in another order"], 0, id="another order"),
        pytest.param(
            {},
            {"crashes": 1},
            1,
            [
                "B crashed (it broke)",
                "B: some of its tests failed (exit code 1): toy--mixed-dynamic--s0--r0 crashed; its output",
            ],
            4,
            id="a case crashes",
        ),
        pytest.param(
            {}, {"crashes": 1, "run": [0, 1]}, 1, [GONE.format(2), "some of its tests failed"], 2, id="ends early"
        ),
        pytest.param(
            {}, {"run": [0, 1, 1, 2, 3]}, 0, ["[4/4] toy mixed-dynamic seed 1: A 2 ms, B 2 ms"], 4, id="again"
        ),
        pytest.param({}, {"run": [0, 1, 2, 3, 1]}, 0, ["[2/4] toy mixed-dynamic seed 0"], 4, id="again in the end"),
        pytest.param(
            {},
            {"turn_s": 4.0, "act": {"case 1": "hang"}},
            1,
            ["B: it was silent for 4 s", GONE.format(1)],
            1,
            id="hangs",
        ),
    ],
)
def test_a_failing_session_ends_the_other_and_says_so(tmp_path, interpreter, ab, logs, a, b, code, said, ran):
    ended, output, errors = ab("--python", interpreter("one", **a), "--python", interpreter("two", **b))
    assert ended == code, errors
    for text in said:
        assert text in errors
    # Only a case in which one of the two died may lack its partner.
    done = [line.split()[2] for line in log(tmp_path) if " ends " in line and line.startswith("B")]
    assert len(dict.fromkeys(done)) == ran
    assert ("B against A" in output) == (code != 2)
    assert ("what pytest prints" in errors) == ("; its output, " in errors)
    remove_left_behind()  # as the next run does: what the user was told of stays
    assert bool(list(logs.rglob("?.log"))) == (code != 0)


def test_a_session_that_hangs_at_its_start_is_killed(tmp_path, interpreter, ab):
    hangs = interpreter("two", act={"start": "hang"})
    code, _, errors = ab("--python", interpreter("one"), "--python", hangs, "--start-timeout", "4")
    assert code == 2
    assert "B: it did not collect its cases within 4 s (--start-timeout)" in errors
    assert not alive(int((tmp_path / "hangs").read_text()))


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_for(condition, what):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopping_leaves_no_process_and_no_file(tmp_path, interpreter, logs, how):
    hangs = {"act": {"case 1": "hang"}}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(tmp_path, interpreter("one", **hangs), interpreter("two", **hangs))
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for((tmp_path / "hangs").exists, "the second case")
    wait_for((tmp_path / "hangs").read_text, "its process")
    os.kill(process.pid, how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how != signal.SIGKILL else -how)
    wait_for(lambda: not alive(int((tmp_path / "hangs").read_text())), "the session to end")
    if how != signal.SIGKILL:
        assert "stopping both" in errors
        assert errors.endswith("A: results/runs/A\nB: results/runs/B\n")
        assert sorted(path.name for path in (tmp_path / "results/runs").iterdir()) == ["A", "B"]
    else:
        remove_left_behind()
    assert list(logs.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "ab compares two environments, and none was given: give --python twice"),
        (("--python", "good"), "and 1 was given"),
        (("--python", "good") * 3, "and 3 was given"),
        (("--python", "good", "--python", "./nowhere"), "--python ./nowhere: no such file"),
        (("--python", "good", "--python", "no-such-python"), "no program of this name is on PATH"),
        (("--python", "good", "--python", "./venv"), "this is a folder; did you mean"),
        (("--python", "good", "--python", "./file"), "this cannot be executed"),
        (
            ("--python", "good", "--python", "lacks"),
            "has no mpscale that can take turns (ModuleNotFoundError: No module named 'mpscale')",
        ),
        (
            ("--python", "good", "--python", "fails"),
            "is not a Python of 3.11 or newer in which mpscale works: Unknown option: -P",
        ),
        (("--python", "good", "--python", "newer"), "takes turns by version 2 of the protocol"),
        (("--python", "good", "--python", "schema"), "writes runs of schema version 99"),
        (("--python", "good", "--python", "method"), "A measures by method 1 and B by method 99"),
        (("--python", "good", "--python", "broken"), "tensorflow does not work in"),
        (("--mp-baseline=x",), "--mp-baseline=x does not go with `mpscale ab`: A is the baseline"),
        (("--mp-fail-on", "metric"), "--mp-fail-on does not go with `mpscale ab`: write --fail-on"),
        (("--mp-results", "x"), "write --results"),
        (("--mp-name=x",), "both runs would have it; `mpscale name` gives each its own"),
        (("-n4",), "cases side by side would disturb each other"),
        (("--collect-only",), "nothing would be run"),
        (("--pdb",), "nobody could answer"),
        (("--junitxml=x",), "both sessions would write to one place"),
        (("--fail-on", "speed>5%"), "'speed' is not a gate"),
        (("--threshold", "much"), "'much' is not a percentage above 0"),
        (("-o", "nowhere/x.md"), "there is no folder nowhere"),
        (("--start-timeout", "0"), "expected a number of seconds above 0"),
    ],
)
def test_a_mistake_is_answered_in_one_line_before_anything_runs(tmp_path, interpreter, ab, arguments, message):
    scripts = {
        "good": {},
        "lacks": {"about": {"turns": None, "broken": {"mpscale": "ModuleNotFoundError: No module named 'mpscale'"}}},
        "fails": {"about_fails": "Unknown option: -P"},
        "newer": {"about": {"turns": 2}},
        "schema": {"about": {"schema_version": 99}},
        "method": {"about": {"method_version": 99}},
        "broken": {"about": {"broken": {"tensorflow": "ImportError: no library"}}},
    }
    (tmp_path / "file").write_text("")
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text("")
    given = [
        str(interpreter(name, **scripts[name])) if name in scripts and name != "good" else name for name in arguments
    ]
    good = interpreter("good")
    code, output, errors = ab(*(good if name == "good" else name for name in given))
    assert (code, output) == (2, "")
    assert errors.startswith("mpscale: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ((), "bench"),
        (("-x", "--mp-modes", "fp32"), "-x --mp-modes fp32 bench"),
        (("-k", "bench"), "-k bench bench"),
        (("bench/test_x.py::test_y", "-q"), "bench/test_x.py::test_y -q"),
        (("-q", "other"), "-q other"),
        (("--results", "here"), "bench --mp-results={here}"),
    ],
)
def test_unknown_arguments_go_to_pytest(tmp_path, interpreter, ab, given, passed):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/test_x.py").write_text("")
    (tmp_path / "other").mkdir()
    python = interpreter("one", cases=[])
    _, _, errors = ab("--python", python, "--python", python, *given)
    printed = [line for line in errors.splitlines() if line.startswith("what pytest prints")]
    assert printed == ["what pytest prints " + passed.format(here=tmp_path / "here")] * 2


def test_a_terminal_shows_the_running_pair_on_a_live_line():
    text = []
    screen = Screen(("A", "B"), LiveLine(text.append, Surface(60, live=True)), lambda: 0.0)
    case = {"id": "c", "workload": "w", "mode": "fp32", "seed": 0, "repeat": 1}
    screen.plan([case])
    screen.running("B", "c")
    screen.done("B", {"case": "c", "status": "ok", "step_time_ms": 1.234, "reason": None})
    screen.running("A", "c")
    screen.done("A", {"case": "c", "status": "timeout", "step_time_ms": None, "reason": "not finished\nafter 9 s"})
    screen.end()
    shown = [line.strip() for line in "".join(text).replace("\n", "\r").split("\r") if line.strip()]
    assert shown == [
        "1 pair of cases, interleaved",
        "[1/1] w fp32 repeat 1: B running",
        "[1/1] w fp32 repeat 1: A running, B 1.23 ms",
        "[1/1] w fp32 repeat 1: A timeout (not finished), B 1.23 ms",
    ]
