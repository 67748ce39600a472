"""Sessions that TF_CONFIG makes one of several: what is refused before anything runs, and who is missed."""

import json
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from support.processes import processes_in, wait_for
from support.small_suite import SUITE, command, environment, write

MULTIWORKER = "--mp-strategy=multiworker"
STAND_IN = """
import sys
from pathlib import Path
from mpscale.harness import launch

launch._WORKER = (sys.executable, "-P", str(Path(__file__).with_name("stand_in.py")))
"""
WORKER = """
import json, os, sys, time
from mpscale.core.processes.events import Channel, Finished
from mpscale.core.processes.wire import Wire

wire = Wire.inherited(int(sys.argv[2]))
channel, request = Channel(wire), wire.receive()
task = json.loads(os.environ["TF_CONFIG"])["task"]
channel.values({"parameters": 10 + task["index"], "has_metric": False})
channel.phase("idle")
if "SUITE_WAITS" in os.environ:
    open(os.environ["SUITE_WAITS"] + str(task["index"]), "w").close()
    time.sleep(600)
if request["case"]["seed"] == 1 and "SUITE_RESUMED" not in os.environ:
    # The first waits for the second, as in a step that both take.
    os.kill(os.getpid(), 9) if task["index"] else time.sleep(60)
channel.send(Finished("ok", None, {}))
wire.receive()
"""


def before_a_free_port():
    """A port after which there is a free one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1] - 1


def config(index=0, port=2222, kind="worker"):
    workers = [f"127.0.0.1:{port}", "127.0.0.1:9"]
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    ("told", "given", "said"),
    [
        ("{", (), "TF_CONFIG is no JSON"),
        (config(kind="ps"), (), "its task is a 'ps'"),
        (config(index=2), (), "'worker' 2, is not in its cluster"),
        (config(), ("--mp-replicas=2,4",), "give one number, a multiple of 2"),
        (config(), ("--mp-replicas=3",), "give one number, a multiple of 2"),
        (config(), ("--mp-coordinator=here",), "'here' is no HOST:PORT"),
        (config(), ("--mp-jit=on",), "XLA cannot compile the steps of"),
        (config(port=65535), (), "has the last port there is; name another with --mp-coordinator"),
        ("", ("--mp-coordinator=a:1",), "which need --mp-strategy multiworker, and TF_CONFIG"),
    ],
)
def test_what_does_not_fit_is_refused(session, monkeypatch, told, given, said):
    monkeypatch.setenv("TF_CONFIG", told)
    code, output = session(MULTIWORKER, "--mp-seeds=1", "--mp-modes=fp32", *(given or ("--mp-replicas=2",)))
    assert code == pytest.ExitCode.USAGE_ERROR, output
    assert said in output
    assert not Path("results").exists()


def test_without_the_strategy_the_cluster_of_a_scheduler_is_ignored(session, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{")
    code, output = session("--mp-seeds=1", "--mp-modes=fp32", "--mp-workloads=mnist1d-mlp")
    assert code == pytest.ExitCode.OK, output


QUICK = (MULTIWORKER, "--mp-seeds=1", "--mp-modes=fp32", "--mp-workloads=mnist1d-mlp", "--mp-timeout=0.5")


def test_machines_that_do_not_come_are_named(session, monkeypatch):
    port = before_a_free_port()
    monkeypatch.setenv("TF_CONFIG", config(0, port))
    code, output = session(*QUICK)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "no session of worker 2 of 2 has connected within 0.5 s; start the same command on every machine" in output
    assert not Path("results/runs").exists()
    monkeypatch.setenv("TF_CONFIG", config(1, port))
    code, output = session(*QUICK)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "the session of the first worker was not reached at 127.0.0.1:" in output


def test_a_port_that_is_taken_is_refused_and_another_may_be_named(session, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config())
    with socket.create_server(("", 0)) as taken:
        code, output = session(*QUICK, f"--mp-coordinator=127.0.0.1:{taken.getsockname()[1]}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "the sessions of other machines cannot connect here (Address already in use)" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_session_that_is_ended_leaves_none_of_its_workers(tmp_path, number):
    write(tmp_path, test_it=SUITE, conftest=STAND_IN, stand_in=WORKER)
    options = (*QUICK[:-1], "--mp-replicas=2", "--mp-start-method=fresh", "--benchmark-only")
    variables = environment(SUITE_WAITS=str(tmp_path / "waits"))
    with (tmp_path / "output").open("wb") as output:
        session = subprocess.Popen(command(*options), cwd=tmp_path, env=variables, stdout=output, stderr=output)
    wait_for(lambda: all((tmp_path / f"waits{place}").exists() for place in (0, 1)), "both workers")
    session.send_signal(number)
    code = session.wait(60)
    wait_for(lambda: processes_in(tmp_path) == [], "the end of all processes", 20)
    if number == signal.SIGTERM:
        assert code == pytest.ExitCode.INTERRUPTED
        (journal,) = (tmp_path / "results" / "runs").glob("*/journal.jsonl")
        (row,) = [event["record"] for event in map(json.loads, journal.open()) if event["event"] == "case_finished"]
        assert (row["status"], row["status_reason"]) == ("interrupted", "stopped by SIGTERM")


OTHER_KERAS = "from mpscale.telemetry import host\nhost.packages = lambda: {'keras': '3.0'}\n"


@pytest.fixture
def sessions(tmp_path):
    """Run two sessions at the same time, each in a folder of its own; return exit codes and outputs."""
    options = (
        MULTIWORKER, "--mp-modes=fp32", "--mp-workloads=mnist1d-mlp", "--mp-start-method=fresh", "--mp-retries=0",
        "--benchmark-only", "--mp-timeout=60", "--mp-seeds=3",
    )  # fmt: skip

    def run(*more, second="", **variables):
        port, started = before_a_free_port(), []
        for place, (own, conftest) in enumerate(((more, STAND_IN), ((), STAND_IN + second))):
            folder = tmp_path / str(place)
            write(folder, test_it=SUITE, conftest=conftest, stand_in=WORKER)
            environ = environment(TF_CONFIG=config(place, port), **variables)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command(*options, *own), cwd=folder, env=environ, **pipes))
        outputs = [session.communicate(timeout=120)[0] for session in started]
        return [session.returncode for session in started], outputs

    return run


def test_two_sessions_train_one_case_after_the_other_and_go_on(sessions, tmp_path):
    codes, outputs = sessions()
    assert codes == [pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK], outputs
    (run,) = (tmp_path / "0" / "results" / "runs").iterdir()

    def rows():
        events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        found = [event["record"] for event in events if event["event"] == "case_finished"]
        return {row["seed"]: row for row in found}, len(found)

    by_seed, number = rows()
    assert [by_seed[seed]["status"] for seed in (0, 1, 2)] == ["ok", "crashed", "ok"] and number == 3
    assert by_seed[1]["status_reason"].startswith("worker 2 of 2: killed by SIGKILL")
    assert by_seed[0]["parameters"] == by_seed[2]["parameters"] == 10
    assert {(row["replicas"], row["machines"]) for row in by_seed.values()} == {(2, 2)}
    assert "(CPU), by 2 replicas on 2 machines" in (run / "report.md").read_text()
    assert "worker 2 of 2: mnist1d-mlp--fp32--s1--r0: crashed, killed by SIGKILL" in outputs[1]
    assert "worker 2 of 2: the run is over" in outputs[1]
    # Reports get published, and name no machine.
    assert "127.0.0.1" not in "".join(path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
    codes, outputs = sessions("--mp-resume=latest", SUITE_RESUMED="yes")
    assert codes == [pytest.ExitCode.OK] * 2, outputs
    by_seed, number = rows()
    assert by_seed[1]["status"] == "ok" and number == 4
    # The second session records nothing.
    assert not (tmp_path / "1" / "results").exists()


@pytest.mark.slow  # test_machines has the same without pytest
def test_two_sessions_with_other_software_are_refused(sessions, tmp_path):
    codes, outputs = sessions(second=OTHER_KERAS)
    assert codes == [pytest.ExitCode.USAGE_ERROR] * 2, outputs
    assert all("worker 2 of 2 does not fit the first worker: mpscale unknown, not" in output for output in outputs)
