"""Messages between real processes, whatever happens to the sender."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import time
from pathlib import Path

import pytest

from mpscale.core.cause import Cause
from mpscale.core.processes.events import (
    WORKER_EVENTS,
    Blocks,
    EnergySteps,
    Failed,
    Finished,
    Missed,
    NotKept,
    Phase,
    PhaseReached,
    Remarked,
    StepsDone,
    Values,
    event_of,
)
from mpscale.core.processes.process import Child, describe_exit
from mpscale.core.processes.wire import Garbled, Wire, wait_for
from mpscale.core.reason import Code, Reason

PROGRAM = """
import os, signal, subprocess, sys, time
from mpscale.core.processes.wire import Wire

given = int(sys.argv[1])
wire = Wire.inherited(given)
wire.send({"pid": os.getpid()})
"""
LONG = 10_000_000
"""Bytes: more than any buffer between two processes holds."""


@pytest.fixture
def child():
    """Start a process that sends its id and then runs the given code."""
    made = []

    def start(does, output=None):
        ends = Wire.pair()
        made.append(Child([sys.executable, "-c", PROGRAM + does, str(ends[1].fileno())], None, output, ends=ends))
        assert made[-1].receive(60) == {"pid": made[-1].pid}
        return made[-1]

    yield start
    for each in made:
        each.kill()


@pytest.mark.parametrize(
    "event",
    [
        Values({"status": "ok", "step_time_ms_median": 1.5}),
        Missed(["metric_target"], Reason(Code.NOT_IN_WORKLOAD, "no target", "set one")),
        PhaseReached(Phase.WARM),
        StepsDone(3, 10),
        Blocks([0.1, 0.2]),
        EnergySteps(5, None),
        Finished("diverged", "no finite metric", {"cuda": None}),
        NotKept("its steps", "the disk is full"),
        Remarked("without XLA, because the model asks for that"),
        Failed("ValueError", "größe \udcff", Cause.OUT_OF_MEMORY),
    ],
    ids=lambda event: event.name,
)
def test_an_event_arrives_as_it_was_sent(event):
    ours, theirs = Wire.pair()
    theirs.send(event.to_json())
    assert event_of(ours.receive(1), WORKER_EVENTS) == event


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"event": "party"},
        {"event": ["phase"]},
        {"event": "phase", "phase": "lunch"},
        {"event": "blocks"},
        {"event": "blocks", "step_s": [0.1, "fast"]},
        {"event": "blocks", "step_s": [10**400]},
        {"event": "progress", "done": 1.5, "total": 3},
        {"event": "progress", "done": True, "total": 3},
        {"event": "values", "values": ["status"]},
        {"event": "values", "values": {"speed": 1}},
        {"event": "values", "values": {"step_time_ms_median": "fast"}},
        {"event": "miss", "columns": ["speed"], "reason": "none"},
        {"event": "miss", "columns": "status", "reason": "none"},
        {"event": "miss", "columns": ["metric_target"], "reason": 5},
        {"event": "look", "step": 1, "loss": "low", "gradients": [], "in_float32": []},
        {"event": "energy", "steps": None, "overflow_steps": None},
        {"event": "done", "status": "great", "reason": None},
        {"event": "done", "status": "ok", "reason": None, "runtime": 3},
        {"event": "error", "type": "ValueError", "message": "no", "cause": "whim"},
    ],
    ids=str,
)
def test_other_messages_are_garbled(message):
    with pytest.raises(Garbled):
        event_of(message, WORKER_EVENTS)


def test_a_message_of_any_length_arrives_whole(child):
    process = child(f"wire.send({{'text': 'x' * {LONG}}})")
    assert process.receive(60) == {"text": "x" * LONG}
    with pytest.raises(EOFError):
        process.receive(60)
    assert process.wait(60) == 0


# The other side has ended in all of these, but a process that it left behind may hold its socket open.
HOLD = "\nif os.fork() == 0:\n    time.sleep(600)\n"


@pytest.mark.parametrize(
    ("does", "code"),
    [
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, id="killed"),
        pytest.param(HOLD + "os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, id="killed, leaving a process"),
        pytest.param(HOLD + "sys.exit(3)", 3, id="ended, leaving a process"),
        pytest.param(
            HOLD + "os.write(wire.fileno(), b'{\"half\": '); os.kill(os.getpid(), signal.SIGKILL)",
            -signal.SIGKILL,
            id="killed inside a message, leaving a process",
        ),
    ],
)
def test_a_wire_ends_with_its_process_and_earlier_messages_are_read(child, does, code):
    process = child("wire.send({'last': 1}); wire.send({'last': 2}); " + does)
    assert [process.receive(60), process.receive(60)] == [{"last": 1}, {"last": 2}]
    with pytest.raises(EOFError):
        process.receive(60)
    assert process.wait(60) == code
    # What it left behind ends with its session.
    process.kill()
    end = time.monotonic() + 20
    while session_of(process.pid):
        assert time.monotonic() < end
        time.sleep(0.01)


def session_of(leader):
    """The living processes of a session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(process.name)
    return found


@pytest.mark.parametrize(
    "does",
    [
        pytest.param("time.sleep(600)", id="silent"),
        pytest.param("os.write(wire.fileno(), b'{\"half\": '); time.sleep(600)", id="stuck inside a message"),
        pytest.param(
            "while True: os.write(wire.fileno(), b'x' * 1000); time.sleep(0.001)", id="inside an endless message"
        ),
    ],
)
def test_receiving_times_out(child, does):
    process = child(does)
    with pytest.raises(TimeoutError):
        process.receive(0.3)


def test_messages_without_end_do_not_outlast_a_deadline(child):
    process = child("while True: wire.send({'more': 1})")
    deadline = time.monotonic() + 0.5
    with pytest.raises(TimeoutError):
        [process.receive(deadline - time.monotonic()) for _ in itertools.count()]


@pytest.mark.parametrize(
    "said",
    [
        "b'hello\\n'",
        "b'[1]\\n'",
        "bytes(range(256)) + b'\\n'",
        "b'{\"a\": ' * 10**5 + b'\\n'",  # nested more deeply than Python's parser goes
        "b'{\"a\": ' + b'9' * 10**5 + b'}\\n'",  # more digits than Python converts
        "b'\\xff\\xfe{}\\n'",
        "b'x' * 2**27",  # longer than any message, without an end
    ],
    ids=lambda said: said[:20],
)
def test_anything_but_messages_is_garbled(child, said):
    process = child(f"wire.send({{'last': 1}}); wire._socket.sendall({said}); time.sleep(600)")
    assert process.receive(60) == {"last": 1}
    with pytest.raises(Garbled):
        process.receive(60)


def test_what_a_process_prints_and_reads_is_not_on_the_wire(child, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = child(
            "print(repr(sys.stdin.read()), flush=True); os.write(2, b'errors')\n"
            "[os.write(number, b'oops') for number in range(3, 10) if os.path.exists(f'/proc/self/fd/{number}')]\n"
            "wire.send({'last': 1})",
            log,
        )
        assert process.receive(60) == {"last": 1}
    assert process.wait(60) == 0
    assert (tmp_path / "log").read_text() == "''\nerrors"


LINKS = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')[:-1]])"


def test_programs_that_a_process_starts_do_not_inherit_its_wire(child):
    process = child(
        f"links = [sys.executable, '-c', {LINKS!r}]\n"
        "found = subprocess.run(links, close_fds=False, capture_output=True, text=True).stdout\n"
        "wire.send({'found': found, 'own': os.readlink(f'/proc/self/fd/{wire.fileno()}'), 'number': wire.fileno()})"
    )
    told = process.receive(60)
    assert told["number"] > 100
    assert told["own"].startswith("socket:")
    assert told["found"].startswith("[")
    assert told["own"] not in told["found"]


def test_ended_processes_and_waiting_messages_are_ready_and_silent_ones_are_not(child):
    silent, says, ended = child("time.sleep(600)"), child("wire.send({}); time.sleep(600)"), child("")
    assert ended.wait(60) == 0
    assert says.receive(60) == {}
    sources = {id(source): each for each in (silent, says, ended) for source in each.sources()}
    ready = wait_for([source for each in (silent, says, ended) for source in each.sources()], 0.0)
    assert {sources[id(source)] for source in ready} == {ended}


@pytest.mark.parametrize(
    ("does", "code"),
    [
        pytest.param("wire.receive()", 1, id="one that ends with its wire"),
        pytest.param("time.sleep(600)", -signal.SIGKILL, id="one that does not"),
    ],
)
def test_ending_a_process(child, does, code):
    process = child(does)
    assert process.end(20 if code == 1 else 0.1) == code
    assert process.kill() == code


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-9, "killed by SIGKILL"),
        (-40, "killed by signal 40"),
        (None, "not ended"),
    ],
)
def test_how_a_process_ended(code, words):
    assert describe_exit(code) == words
