"""``mpscale.compare`` in a script of its own, with sessions whose cases train nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest
from support import no_training, small_suite
from support.runfolder import finished, record, write_run

import mpscale
from mpscale.analysis.answer import answer_of
from mpscale.core.given import VARIABLE, Given, NoParcel, Parcel, take
from mpscale.core.invocation import as_arguments, resume_command
from mpscale.core.runs import read_run
from mpscale.report.advice import code_of
from mpscale.report.document import document, render
from mpscale.report.files import report_page
from mpscale.report.github_summary import github_summary
from mpscale.script import comparing
from mpscale.workloads import registry

ROOT = Path(__file__).parents[2]
INVOCATION = {"program": "mpscale.compare", "arguments": [], "folder": ".", "options": {}}
SCRIPT = """
import os, random, sys
import numpy as np
import mpscale

SHIFT = 0.25
random.seed(1)
before = dict(os.environ), random.getstate()

def data():
    x = np.full((40, 3), SHIFT, "float32")
    return mpscale.Data(x, np.zeros(40, int), x, np.zeros(40, int))

own = mpscale.Workload("mine", "", lambda: None, data, "adam", train_steps=5)
print("the script runs")
"""


@pytest.fixture
def script(tmp_path):
    """Start a script; its sessions train nothing, and without ``page`` draw no page."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

    def start(code, page=True, **happen):
        (tmp_path / "script.py").write_text(SCRIPT + code)
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            **{"PYTHONPATH": path, "HAPPEN": json.dumps(happen)},
            "PYTEST_ADDOPTS": "-p no:hypothesispytest -p support.untrained" + ("" if page else " -p support.no_page"),
            **{"WAITS": str(tmp_path / "waits"), "USES_DATA": "yes"},
            "TMPDIR": str(tmp_path / "temporary"),
        }
        (tmp_path / "temporary").mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start


def test_a_script_gets_tables_a_page_and_the_answer_and_is_changed_in_nothing(script, tmp_path):
    done = script(
        'result = mpscale.compare(own, modes=["fp32", "mixed-bf16", "mixed-static"], seeds=2, results="elsewhere")\n'
        "assert before == (dict(os.environ), random.getstate())\n"
        "print(result.cases.metric_value.tolist())\n"
        "print(list(result.summary['mode']), result.summary.step_time_ms.dtype)\n"
        "print(len(result.failed), result.exit_code, result.report.is_file())\n"
        "print(repr(result))\n"
        'open("frame.html", "w").write(result._repr_html_())\n',
        **{"mixed-static": "crashed"},
    )
    output, _ = done.communicate(timeout=240)
    assert done.returncode == 0, output
    assert output.count("the script runs") == 1
    values = json.loads(re.search(r"^\[(?:0\.25|nan).*\]$", output, re.M)[0].replace("nan", "null"))
    assert sorted(values, key=str) == [0.25, 0.25, 0.25, 0.25, None, None]
    assert "['fp32', 'mixed-static', 'mixed-bf16'] float64\n2 1 True\n" in output
    assert "UserWarning: 2 cases of 6 did not end well, the first is mine--mixed-static--s" in output
    assert re.search(
        r"\nIs mixed precision worth it here\?.*\n.*\n.*\n.*\n.*\nreport: .*elsewhere/runs/.*/report.html", output
    )
    (path,) = (tmp_path / "elsewhere" / "runs").iterdir()
    run = mpscale.read_run(path)
    assert {record["workload"] for record in run.records} == {"mine"}
    assert str(tmp_path / "temporary") not in (path / "run.json").read_text()
    assert not list((tmp_path / "temporary").glob("mpscale-*"))
    assert "srcdoc=" in (tmp_path / "frame.html").read_text()


def test_ctrl_c_stops_in_good_order_and_names_the_call_that_goes_on(script, tmp_path):
    code = (
        "try:\n"
        '    mpscale.compare(own, modes="fp32,mixed-bf16", seeds=1)\n'
        "except KeyboardInterrupt as stopped:\n"
        '    print("STOPPED", stopped, len(stopped.comparison.cases))\n'
    )
    running = script(code, page=False, **{"mixed-bf16": "wait", "fp32": "wait"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "waits").exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=240)
    assert "mpscale: stopped by SIGINT: writing the report" in output
    named = re.search(
        r"STOPPED stopped: .* has 0 of 2 cases; to go on: mpscale\.compare\(\.\.\., resume='(.*?)'\) 1\n", output
    )
    assert named, output
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert path.name == named[1]
    assert (path / "report.html").is_file()
    assert not list((tmp_path / "temporary").glob("mpscale-*"))
    again = (
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()) as cell:\n"  # as in a notebook
        '    mpscale.compare(own, modes="fp32,mixed-bf16", seeds=1, resume="latest")\n'
        'print(cell.getvalue().count("seed 0  ok"), "Is mixed precision" in cell.getvalue())\n'
        'print("more seeds, or repeats" in cell.getvalue(), "--mp-" in cell.getvalue())\n'
    )
    output, _ = script(again, page=False).communicate(timeout=240)
    assert output == "the script runs\n2 True\nTrue False\n"
    assert mpscale.read_run(path).cases.metric_value.tolist() == [0.25, 0.25]


@pytest.mark.slow
def test_a_session_ends_with_its_script(script, tmp_path):
    running = script('mpscale.compare(own, modes="fp32", seeds=1)\n', fp32="wait")
    deadline = time.monotonic() + 60
    while not (tmp_path / "waits").exists() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    running.kill()
    output, _ = running.communicate(timeout=240)  # ends when the session has closed its end, too
    assert "stopped by SIGTERM" in output
    (path,) = (tmp_path / "results" / "runs").iterdir()
    assert [record["status"] for record in mpscale.read_run(path).records] == ["interrupted"]


OWN = mpscale.Workload("own", "", lambda: None, lambda: None, "adam")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"mode": "fp32"}, TypeError, "has no argument 'mode'; did you mean modes?"),
        ({"epoch": 3}, TypeError, "there are autotune, baseline, batch_size, benchmark_table, "),
        ({"modes": ["fp23"]}, ValueError, "modes: no mode is called 'fp23' (did you mean fp32?)"),
        ({"seeds": 0}, ValueError, "seeds: expected an integer of at least 1"),
        ({"steps": "many"}, ValueError, "steps: expected an integer"),
        ({"jit": "maybe"}, ValueError, "jit: invalid choice: 'maybe'"),
        ({"strict": 1}, TypeError, "strict must be True or False, not 1"),
        ({"timing": object}, TypeError, "timing must be a number, a text or a list of them"),
        ({"train": [1]}, TypeError, "train belong to a function; own is a Workload"),
    ],
)
def test_arguments_are_checked_before_anything_starts(arguments, error, said, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a session was started"))
    with pytest.raises(error) as refused:
        mpscale.compare(OWN, **arguments)
    assert said in str(refused.value)


@pytest.mark.parametrize("build", [3, "my_models:build", pytest.param(keras.Sequential(), id="a model")])
def test_what_is_no_function_is_refused(build):
    with pytest.raises(TypeError, match="build must be a function that returns a compiled Keras model"):
        mpscale.compare(build, train=[1])


def test_a_function_needs_data():
    with pytest.raises(TypeError, match="train is missing"):
        mpscale.compare(lambda: None)


def test_a_module_that_compares_on_import_does_not_start_itself_again(tmp_path, monkeypatch):
    (tmp_path / "compares.py").write_text(
        "import mpscale\nw = mpscale.Workload('w', '', print, print, 'adam')\nmpscale.compare(w)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(registry.UnknownWorkload, match='put the call under if __name__ == "__main__":'):
        registry.get("compares:w")


def test_a_worker_that_imports_the_script_does_not_start_it_again():
    take(Given(parcel=Parcel("nowhere", 1, [], [])))
    try:
        with pytest.raises(RuntimeError, match="put the call under"):
            mpscale.compare(OWN)
    finally:
        take(Given())


@pytest.mark.parametrize("make", [lambda path: path.chmod(0o750), lambda path: path.rmdir(), lambda path: None])
def test_only_a_private_folder_of_this_user_is_unpickled(make, tmp_path):
    folder = tmp_path / "parcel"
    folder.mkdir(mode=0o700)
    make(folder)
    with pytest.raises(NoParcel, match=f"{VARIABLE}: "):
        Parcel.read(str(folder))


def test_advice_for_the_run_of_a_script_is_a_call():
    run = mpscale.read_run(ROOT / "results" / "reference" / "20261126T190729Z-nvidia-h200-e964")
    assert code_of(answer_of(run), run) == ("mpscale run --mp-steps-per-call 20 --mp-seeds 5", "sh")
    run = dataclasses.replace(run, info={**run.info, "invocation": INVOCATION})
    assert code_of(answer_of(run), run) == ("mpscale.compare(..., steps_per_call=20, seeds=5)", "python")


def test_a_report_names_options_as_they_are_given_to_what_made_the_run(tmp_path):
    still = {"growth_interval": 2000, "attempted_steps": 40, "step_time_ms_median": 2.0, "note": "with --mp-repeats 3"}
    bad = {"status_reason": "no XLA; leave --mp-jit on out, or --mp-jit=off", "output_tail": "usage: mine --mp-jit off"}
    rows = [record("mixed-dynamic", **still), record("fp32", status="error", **bad), record("fp32", 1, device="cpu")]
    settings = {"given_by": {"--mp-name": "mpscale.compare"}}
    path = write_run(tmp_path, finished(rows), settings=settings, invocation={**INVOCATION, "program": "pytest"})
    plain = render(document(read_run(path)))
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "invocation": INVOCATION}))
    run = read_run(path)
    named = [
        ("`--mp-dynamic-scale growth_interval=4`", "`dynamic_scale='growth_interval=4'`"),
        ("with --mp-repeats 3", "with repeats=3"),
        ("leave --mp-jit on out, or --mp-jit=off", "leave jit='on' out, or jit='off'"),
        ("--mp-name", "run_name"),
    ]
    for text in (render(document(run)), report_page(run).replace("&#x27;", "'"), github_summary(run)):
        assert text.count("--mp-") == text.count("usage: mine --mp-jit off") == 1
    for option, argument in named:
        assert option in plain and argument in render(document(run))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use --mp-steps-per-call, or more", "use steps_per_call, or more"),
        ("--mp-modes fp32,mixed-bf16.", "modes='fp32,mixed-bf16'."),
        ("--mp-static-scale 2**24 is", "static_scale='2**24' is"),
        ("run it with --mp-shard 2/3, or", "run it with shard='2/3', or"),
        ("--mp-jit auto runs all", "jit='auto' runs all"),
        ("leave out --mp-strategy none of", "leave out strategy='none' of"),
        ("without --mp-strategy nonetheless", "without strategy nonetheless"),
        ("--mp-timing 0.5 s; --mp-seeds 5.", "timing=0.5 s; seeds=5."),
        ("--mpscale and mp-jit", "--mpscale and mp-jit"),
    ],
)
def test_options_in_a_text_as_arguments(text, expected):
    assert as_arguments(text) == expected


@pytest.mark.parametrize(
    ("code", "tail", "said"),
    [
        (4, ["collected 0 items\n", "ERROR: --mp-baseline: no run\n", "\n"], "exit code 4\nbaseline: no run"),
        (-9, ["[1/2]  mine  fp32  ok\n"], "signal 9"),
    ],
)
def test_what_the_session_said_is_in_the_exception(code, tail, said):
    with pytest.raises(comparing.NotCompared) as error:
        comparing._judged(code, False, tail, None)
    assert said in str(error.value).replace("ERROR: ", "")


def test_no_command_goes_on_with_the_run_of_a_script(tmp_path, monkeypatch):
    no_training.replace_trainings(monkeypatch, environment=no_training.ENVIRONMENT)
    path = no_training.new_run(tmp_path / "results")
    info = json.loads((path / "run.json").read_text())
    info["invocation"]["program"] = "mpscale.compare"
    info["planned"].append("toy--fp32--s7--r0")
    (path / "run.json").write_text(json.dumps(info))
    assert resume_command(mpscale.read_run(path), tmp_path) == f"mpscale.compare(..., resume={path.name!r})"
    (tmp_path / "test_suite.py").write_text(small_suite.SUITE)
    code, output = small_suite.pytest_here(tmp_path, f"--rootdir={tmp_path}", tmp_path, f"--mp-resume={path.name}")
    assert code == 4
    assert f"call mpscale.compare there again, with resume={path.name!r}" in output


def test_a_full_disk_is_said_with_what_to_do(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpscale.script.sending.send", full)
    with pytest.raises(
        comparing.NotCompared, match="set TMPDIR to another folder, or pass functions that return the data"
    ):
        mpscale.compare(OWN)
