"""A signal ends a session in good order at whatever moment it comes; a second one ends it at once."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from support.gpu_machine import FINE, QUICK
from support.processes import processes_in, wait_for
from support.small_suite import command, environment, write

import mpscale

pytestmark = pytest.mark.usefixtures("interruptible")

CONFTEST = """
import importlib, os, pathlib, time

def pause(moment):
    if os.environ.get("PAUSE_AT") == moment:
        pathlib.Path("there").touch()
        while not pathlib.Path("go-on").exists():
            time.sleep(0.05)

MOMENTS = {
    "report": ("mpscale.report.files", "write_reports"),
    "gates": ("mpscale.pytest_plugin.baseline", "BaselineCheck.judge"),
    "cool-down": ("mpscale.telemetry.watch", "CaseWatch.cool_down"),
}
moment = os.environ.get("PAUSE_AT")
if moment in MOMENTS:
    module, names = MOMENTS[moment]
    owner = importlib.import_module(module)
    *within, name = names.split(".")
    for each in within:
        owner = getattr(owner, each)
    real = getattr(owner, name)

    def paused(*arguments):
        pause(moment)
        return real(*arguments)

    setattr(owner, name, paused)
"""
SUITE = """
from conftest import pause

pause("collection")

def test_of_something_else():
    pause("before")

def test_training(mp_case, benchmark, request):
    mp_case.measure(benchmark)

def test_last(mp_case):
    pause("between")
"""
# They need no process, so these sessions need no TensorFlow.
UNSUPPORTED = ("--mp-modes=tf32", "--mp-seeds=2", "--mp-workloads=mnist1d-mlp", "--benchmark-disable")


def start(folder, moment, *options, before=(), variables=None, **streams):
    write(folder, conftest=CONFTEST, test_suite=SUITE)
    return start_in(folder, [*before, *command(*options)], {**(variables or {}), "PAUSE_AT": moment}, **streams)


def start_in(folder, line, variables, **streams):
    (folder / "tmp").mkdir()
    streams = streams or {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environ = environment(TMPDIR=str(folder / "tmp"), **variables)
    return subprocess.Popen(line, cwd=folder, env=environ, text=True, start_new_session=True, **streams)


def stop(run, folder, *signals):
    """Send signals once the session is at its moment; return what it printed."""
    wait_for((folder / "there").exists, "the moment")
    for number in signals:
        os.kill(run.pid, number)
        time.sleep(0.6 if len(signals) > 1 else 0.1)  # within half a second they would be one
    if len(signals) == 1:
        (folder / "go-on").touch()
    output, _ = run.communicate(timeout=60)
    return output


def path(folder):
    (found,) = (folder / "results" / "runs").iterdir()
    return found


def events(folder):
    return [json.loads(line)["event"] for line in (path(folder) / "journal.jsonl").read_bytes().splitlines()]


def assert_nothing_is_left(folder):
    wait_for(lambda: not processes_in(folder), "the processes to end", 20)
    assert list((folder / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "how", "cases"),
    [
        ("collection", signal.SIGTERM, None),
        pytest.param("collection", signal.SIGHUP, None, marks=pytest.mark.slow),
        pytest.param("before", signal.SIGHUP, None, marks=pytest.mark.slow),
        ("between", signal.SIGHUP, 1),
        pytest.param("gates", signal.SIGTERM, 2, marks=pytest.mark.slow),
        pytest.param("gates", signal.SIGINT, 2, marks=pytest.mark.slow),
        ("report", signal.SIGTERM, 2),
        pytest.param("report", signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param("report", signal.SIGHUP, 2, marks=pytest.mark.slow),
    ],
)
def test_one_signal_ends_a_session_in_good_order(tmp_path, moment, how, cases):
    options = ("--benchmark-only", *UNSUPPORTED[:-1]) if moment == "collection" else UNSUPPORTED
    run = start(tmp_path, moment, *options)
    output = stop(run, tmp_path, how)
    assert run.returncode == 2
    assert "Traceback" not in output and "INTERNALERROR" not in output
    assert_nothing_is_left(tmp_path)
    if cases is None:
        assert f"KeyboardInterrupt: {how.name}" in output
        assert not (tmp_path / "results").exists()
        return
    assert f"stopped by {how.name}: {2 - cases} of 2 planned cases have no result" in output
    assert f"run: results/runs/{path(tmp_path).name}" in output
    assert (path(tmp_path) / "report.html").is_file()
    assert [record["status"] for record in mpscale.read_run(path(tmp_path)).records] == ["unsupported"] * cases
    assert events(tmp_path)[-1] == "run_finished"


@pytest.mark.parametrize(
    ("moment", "signals"),
    [
        ("report", (signal.SIGTERM, signal.SIGTERM)),
        pytest.param("report", (signal.SIGINT, signal.SIGINT), marks=pytest.mark.slow),
        pytest.param("report", (signal.SIGHUP, signal.SIGINT), marks=pytest.mark.slow),
    ],
)
def test_two_signals_end_a_session_at_once(tmp_path, moment, signals):
    run = start(tmp_path, moment, *UNSUPPORTED)
    output = stop(run, tmp_path, *signals)
    assert run.returncode == 2
    assert "stopped twice, so ended at once" in output
    assert "Traceback" not in output
    assert_nothing_is_left(tmp_path)
    assert sorted(file.name for file in path(tmp_path).iterdir()) == ["cases.csv", "journal.jsonl", "run.json"]
    assert events(tmp_path).count("case_finished") == 2


HANGS = ("--mp-workloads=suite_workloads:hang", "--mp-modes=fp32", "--mp-seeds=1", "--mp-timing=0.05")


def hangs(folder):
    for journal in folder.glob("results/runs/*/journal.jsonl"):
        return '"case_started"' in journal.read_text().splitlines()[-1]
    return False


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "fresh"])
@pytest.mark.parametrize("signals", [(signal.SIGINT,) * 2, (signal.SIGTERM,) * 2, (signal.SIGHUP,)])
def test_signals_in_a_case(tmp_path, write_suite, signals, method):
    run = start(write_suite(tmp_path), "", *HANGS, f"--mp-start-method={method}")
    wait_for(lambda: hangs(tmp_path), "the case")
    wait_for(lambda: any("mpscale.worker" in each for each in processes_in(tmp_path)), "its process")
    time.sleep(2)
    (tmp_path / "there").touch()
    output = stop(run, tmp_path, *signals)
    assert run.returncode == 2
    assert "Traceback" not in output
    assert_nothing_is_left(tmp_path)
    (record,) = mpscale.read_run(path(tmp_path)).records
    assert record["status"] == "interrupted"
    if len(signals) == 1:
        assert (record["status_reason"], record["cause"]) == ("stopped by SIGHUP", "stopped")
        assert (path(tmp_path) / "report.html").is_file()


@pytest.mark.slow
def test_a_signal_while_a_gpu_cools_down(machine):
    machine.script.set(event_reasons=0x40)  # throttled
    variables = machine.script.environ(machine.library)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        run = start(machine.folder, "cool-down", FINE, *QUICK, "--mp-modes=fp32", variables=variables)
    output = stop(run, machine.folder, signal.SIGTERM)
    assert run.returncode == 2
    assert "stopped by SIGTERM: 0 of 1 planned cases have no result" in output
    assert_nothing_is_left(machine.folder)
    (record,) = mpscale.read_run(path(machine.folder)).records
    assert (record["status"], record["attempts"]) == ("invalid", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "leaves"),
    [
        (("fit", "suite_workloads:fine", "--mode=fp32"), 130, "fit/*/report.html"),
        (("probe", "suite_workloads:hang"), 130, "probe/*/report.html"),
        (("run", *HANGS), 2, "runs/*/report.html"),
        (("ab", "--python", sys.executable, "--python", sys.executable, *HANGS), 130, "runs/*/report.html"),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_signals_to_the_commands(tmp_path, write_suite, arguments, code, leaves, times):
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "mpscale.cli", *arguments]
    run = start_in(write_suite(tmp_path), line, variables)
    wait_for(lambda: any("mpscale.worker" in each for each in processes_in(tmp_path)), "its process")
    time.sleep(4)
    (tmp_path / "there").touch()
    output = stop(run, tmp_path, *(signal.SIGTERM,) * times)
    assert run.returncode == code
    assert "Traceback" not in output
    assert_nothing_is_left(tmp_path)
    if times == 1:
        assert list((tmp_path / "results").glob(leaves))


@pytest.mark.slow
def test_a_session_under_nohup_goes_on_when_the_terminal_closes(tmp_path):
    run = start(tmp_path, "between", *UNSUPPORTED, before=("nohup",))
    output = stop(run, tmp_path, signal.SIGHUP)
    assert run.returncode == 0
    assert "stopped by" not in output
    assert events(tmp_path).count("case_finished") == 2


@pytest.mark.slow
def test_a_terminal_that_is_gone_costs_no_report(tmp_path):
    ours, theirs = pty.openpty()
    run = start(tmp_path, "between", *UNSUPPORTED, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    threading.Thread(target=wait_for, args=((tmp_path / "there").exists, "the moment")).run()
    os.close(ours)
    os.kill(run.pid, signal.SIGHUP)  # it has no controlling terminal whose end would send this
    (tmp_path / "go-on").touch()
    assert run.wait(timeout=60) == 2
    assert (path(tmp_path) / "report.html").is_file()
    assert_nothing_is_left(tmp_path)


SCRIPT = """
import os, signal, threading, time
from mpscale.core.processes import stopping

def send(name):
    os.kill(os.getpid(), getattr(signal, name))

def late(name):
    time.sleep(0.6)
    send(name)

"""


@pytest.mark.parametrize(
    ("script", "printed", "code"),
    [
        ("with stopping.held():\n  send('SIGTERM'); print('on')\nprint('never')", "on\nSIGTERM\n", 0),
        ("with stopping.held():\n  send('SIGTERM')\n  with stopping.opened(): print('never')", "SIGTERM\n", 0),
        ("with stopping.held(), stopping.opened():\n  send('SIGHUP')\n  print('never')", "SIGHUP\n", 0),
        ("with stopping.held():\n  send('SIGINT'); send('SIGTERM'); print('one')", "one\nSIGINT\n", 0),
        ("with stopping.held():\n  send('SIGINT'); print('a', flush=True); late('SIGTERM'); print('never')", "a\n", 5),
        ("with stopping.whole():\n  send('SIGINT'); late('SIGINT'); print('line')\nprint('never')", "line\n", 5),
        ("with stopping.held():\n  send('SIGINT'); print(stopping.taken())\nprint('on')", "SIGINT\non\n", 0),
        ("stopping.before_ending_at_once(lambda: print('last'))\nwith stopping.held():\n"
         "  send('SIGINT'); late('SIGHUP')", "last\n", 5),
        pytest.param("stopping.before_ending_at_once(lambda: time.sleep(60))\nwith stopping.held():\n"
                     "  send('SIGINT'); late('SIGHUP')", "", 5, marks=pytest.mark.slow),
        ("if os.fork() == 0: send('SIGTERM')\nprint(os.wait()[1])", "15\n", 0),
    ],
)  # fmt: skip
def test_when_a_signal_is_raised_and_when_it_ends_the_process(script, printed, code):
    text = "\n".join(f"    {line}" for line in script.splitlines())
    main = f"{SCRIPT}try:\n  with stopping.listening(5):\n{text}\nexcept KeyboardInterrupt as error: print(error)\n"
    done = subprocess.run([sys.executable, "-c", main], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == (printed, "", code)


JOURNAL = """
import os, pathlib, signal, sys
from mpscale.core.processes import stopping
from mpscale.core.case import Case, Settings
from mpscale.core.run_folder import Journal

case = Case("toy", "fp32", 0, 0, 0, Settings())
journal, fsync = Journal(pathlib.Path(sys.argv[1]), "cpu", {}, {}, [case]), os.fsync

def interrupted(descriptor):
    fsync(descriptor)
    os.kill(os.getpid(), signal.SIGINT)

with stopping.listening(5):
    os.fsync = interrupted
    try:
        journal.case_started(case, 1)
    except KeyboardInterrupt:
        print("stopped")
    os.fsync = fsync
    journal.finish(2)
print(journal.troubles)
"""


def test_a_signal_while_a_line_is_written_is_no_trouble_of_the_journal(tmp_path):
    done = subprocess.run([sys.executable, "-c", JOURNAL, tmp_path], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("stopped\n[]\n", "")


ON_A_GPU = """
import pathlib, sys
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.harness.supervisor import Options, Supervisor
from mpscale.telemetry.client import NoDriver

folder = pathlib.Path(sys.argv[1])
with stopping.listening(5), stopping.held():
    options = Options(folder, folder, "fresh", 1.0, {})
    kept = Supervisor(Device("gpu", "A100", uuid="GPU-1"), NoDriver(Reason(Code.NO_LIBRARY, "none")), options, print)
    print(len(list((folder / "notes").iterdir())), flush=True)
    send("SIGINT"); late("SIGINT")
"""


def test_two_signals_leave_no_note_on_a_gpu(tmp_path):
    (tmp_path / "notes").mkdir()
    environ = environment(MPSCALE_NOTES=str(tmp_path / "notes"), TMPDIR=str(tmp_path))
    line = [sys.executable, "-c", SCRIPT + ON_A_GPU, tmp_path]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 5)
    assert list((tmp_path / "notes").iterdir()) == []


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_handlers_of_the_host_process_stay_or_are_put_back():
    from mpscale.core.processes import stopping

    before = handlers()
    ours = signal.signal(signal.SIGTERM, print), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.listening(2), stopping.listening(3):
            within = handlers()
        assert within[0] is not before[0]
        assert within[1:] == [print, signal.SIG_IGN]
        assert handlers() == [before[0], print, signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGTERM, ours[0])
        signal.signal(signal.SIGHUP, ours[1])


def test_a_session_in_a_thread_has_no_handlers_and_works():
    from mpscale.core.processes import stopping

    found, before = [], handlers()

    def session():
        with stopping.listening(2), stopping.held():
            found.append(handlers())

    thread = threading.Thread(target=session)
    thread.start()
    thread.join()
    assert found == [before]
