"""Nothing that a process has started outlives it or whoever started it, and nothing else is ever killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import wait_for

from mpscale.core.processes.process import start_kept
from mpscale.core.processes.wire import Wire
from mpscale.telemetry.__main__ import Family

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has child subreapers")

PROGRAM = """
import os, signal, subprocess, sys, time

folder = sys.argv[1]

def note(name):
    open(f"{folder}/{name}-{os.getpid()}", "w").close()

def stay(name, *actions):
    if os.fork() == 0:
        for action in actions:
            action()
        note(name)
        time.sleep(600)

def ignore(*numbers):
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)

def fork_again():
    if os.fork():
        os._exit(0)

stay("session", os.setsid)
stay("daemon", os.setsid, fork_again)
stay("deaf", lambda: ignore(signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
stay("group", lambda: os.setpgid(0, 0))
stay("grandchild", lambda: stay("child", os.setsid))
stay("stopped", lambda: note("stopped"), lambda: os.kill(os.getpid(), signal.SIGSTOP))
subprocess.Popen(["sh", "-c", f"touch {folder}/nohup-$$; exec nohup sleep 600"], env={}, start_new_session=True)
while len(os.listdir(folder)) < 8:
    time.sleep(0.01)
note("main")
os.read(int(sys.argv[2]), 1)
"""
KINDS = {"session", "daemon", "deaf", "group", "grandchild", "child", "stopped", "nohup", "main"}

STARTER = """
import os, sys, time
from mpscale.core.processes.process import start_kept
from mpscale.core.processes.wire import Wire

ends = Wire.pair()
command = [sys.executable, "-I", "-S", "-c", sys.argv[1], sys.argv[2], str(ends[1].fileno())]
process = start_kept(command, os.environ, sys.stdout.buffer, ends)
time.sleep(600)
"""


def alive(pid):
    """Whether a process runs: one that has ended may wait for a parent that does not ask."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def started(folder):
    """The process ids of all kinds, once they run."""
    pids = {name: int(pid) for name, _, pid in (path.name.rpartition("-") for path in folder.iterdir())}
    return pids if pids.keys() == KINDS else None


@pytest.fixture
def bystander():
    """A process of the session, with a child of its own, that runs all the time."""
    with subprocess.Popen(["sh", "-c", "sleep 600 & wait"], start_new_session=True) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def begin(folder):
    ends = Wire.pair()
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, folder, str(ends[1].fileno())]
    with (folder.parent / "log").open("ab") as log:
        process = start_kept(command, os.environ, log, ends)
    return process, wait_for(lambda: started(folder), "all processes", 30)


def send(pid, number):
    # When the outer keeper dies, it may take the inner one along before that gets its own signal.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


ENDS = {
    "ends": lambda process, pids: process.wire.close(),
    "is killed": lambda process, pids: os.kill(pids["main"], signal.SIGKILL),
    "has its session killed": lambda process, pids: os.killpg(pids["main"], signal.SIGKILL),
    "loses its keeper": lambda process, pids: os.kill(parent(pids["main"]), signal.SIGKILL),
    "loses its keeper's keeper": lambda process, pids: os.kill(parent(parent(pids["main"])), signal.SIGKILL),
    "loses the group of its keeper's keeper": lambda process, pids: os.killpg(
        parent(parent(pids["main"])), signal.SIGKILL
    ),
    **{
        f"loses both keepers to {number.name}": lambda process, pids, number=number: [
            send(keeper, number) for keeper in (parent(parent(pids["main"])), parent(pids["main"]))
        ]
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    },
    "is ended by the session": lambda process, pids: process.kill(),
}


@pytest.mark.parametrize("how", ENDS)
def test_nothing_outlives_a_process_that(how, tmp_path, bystander):
    (tmp_path / "pids").mkdir()
    process, pids = begin(tmp_path / "pids")
    assert process.pid == pids["main"]
    assert process.keeper == parent(process.pid)
    # The GPU monitor must take none of them for somebody else's.
    family = Family(process.pid, process.keeper)
    assert [name for name, pid in pids.items() if pid not in family] == []
    assert bystander.pid not in family
    ENDS[how](process, pids)
    code = process.wait(10)
    process.end(10)
    assert code == (0 if how == "ends" else -signal.SIGKILL)
    assert (process.abandoned is not None) == how.startswith("loses")
    assert [name for name, pid in pids.items() if alive(pid)] == []
    assert bystander.poll() is None
    assert (tmp_path / "log").read_text() == ""


def test_nothing_outlives_a_killed_starter(tmp_path, bystander):
    (tmp_path / "pids").mkdir()
    with subprocess.Popen([sys.executable, "-P", "-c", STARTER, PROGRAM, tmp_path / "pids"]) as starter:
        pids = wait_for(lambda: started(tmp_path / "pids"), "all processes", 30)
        keepers = [parent(pids["main"]), parent(parent(pids["main"]))]
        starter.kill()
    wait_for(lambda: not any(map(alive, [*pids.values(), *keepers])), "all to end", 20)
    assert bystander.poll() is None


def test_exit_code_and_output_are_those_of_the_program(tmp_path):
    for body, expected in (("print('x'); sys.exit(3)", 3), ("os.kill(os.getpid(), 11)", -11), ("pass", 0)):
        ends = Wire.pair()
        with (tmp_path / "log").open("ab") as log:
            process = start_kept([sys.executable, "-c", f"import os, sys; {body}"], os.environ, log, ends)
        assert process.wait(20) == expected
        assert process.kill() == expected
    assert (tmp_path / "log").read_text() == "x\n"


def test_a_program_may_have_processes_of_its_own(tmp_path):
    body = """
import multiprocessing, os
if __name__ == "__main__":
    for method in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context(method).Pool(2) as pool:
            print(pool.map(abs, [-1, -2]), flush=True)
    print(os.waitpid(os.spawnlp(os.P_NOWAIT, "false", "false"), 0)[1])
"""
    (tmp_path / "program.py").write_text(body)
    ends = Wire.pair()
    with (tmp_path / "log").open("ab") as log:
        process = start_kept([sys.executable, tmp_path / "program.py"], os.environ, log, ends)
    assert process.wait(60) == 0
    process.kill()
    assert (tmp_path / "log").read_text() == "[1, 2]\n" * 3 + "256\n"


def test_a_starter_that_has_blocked_signals_has_its_processes_kept_all_the_same(tmp_path):
    (tmp_path / "pids").mkdir()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])
    try:
        process, pids = begin(tmp_path / "pids")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGCHLD])
    os.kill(parent(parent(pids["main"])), signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    process.kill()
    assert [name for name, pid in pids.items() if alive(pid)] == []


def test_what_ends_by_itself_is_given_a_moment(tmp_path):
    """As Python's own helper of a dead process does, which removes its shared memory."""
    name = f"mpscale-test-{os.getpid()}"
    body = (
        "import os, signal; from multiprocessing import shared_memory; "
        f"shared_memory.SharedMemory({name!r}, create=True, size=64); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ends = Wire.pair()
    with (tmp_path / "log").open("ab") as log:
        process = start_kept([sys.executable, "-c", body], os.environ, log, ends)
    assert process.end(20) == -signal.SIGKILL
    assert not Path("/dev/shm", name).exists()
    assert "leaked shared_memory" in (tmp_path / "log").read_text()


def test_a_program_that_cannot_be_started_says_so(tmp_path):
    ends = Wire.pair()
    with (tmp_path / "log").open("ab") as log:
        process = start_kept([tmp_path / "missing"], os.environ, log, ends)
    assert process.end(20) == 127
    assert "missing cannot be started: [Errno 2]" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_chain_of_processes_that_fork_and_end_is_caught(tmp_path):
    body = "import os, time\nif os.fork(): time.sleep(0.2); os._exit(0)\nos.setsid()\nwhile not os.fork(): pass\n"
    ends = Wire.pair()
    start = time.monotonic()
    with (tmp_path / "log").open("ab") as log:
        process = start_kept([sys.executable, "-I", "-S", "-c", body], os.environ, log, ends)
    process.end(20)
    assert time.monotonic() - start < 10
