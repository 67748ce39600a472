"""Every way in which a case can fail, caused for real in a worker without TensorFlow: its status and its cause."""

from __future__ import annotations

import re
import sys

import pytest

from mpscale.core.case import Case
from mpscale.core.cause import Cause
from mpscale.core.columns import FAILED
from mpscale.core.processes.events import Again
from mpscale.harness import launch

BEGAN = "began(); "
SAY = BEGAN + "print('terminate called after throwing an instance of std::bad_alloc', flush=True); "
KILL = "os.kill(os.getpid(), signal.SIG{}); time.sleep(60)"

# What the worker does, its status, and its cause.
FAILURES = {
    "raises": (BEGAN + "raise ValueError('no')", "error", Cause.EXCEPTION),
    "runs out of memory": (BEGAN + "bytearray(2**60)", "oom", Cause.OUT_OF_MEMORY),
    "fills the disk": (BEGAN + "os.write(os.open('/dev/full', os.O_WRONLY), b'x')", "error", Cause.FILE_SYSTEM),
    "exits": (BEGAN + "os._exit(0)", "error", Cause.EXITED),
    "hangs up": (BEGAN + "wire.close(); time.sleep(60)", "crashed", Cause.EXITED),
    "hangs": (BEGAN + "time.sleep(60)", "timeout", Cause.TIMEOUT),
    "segmentation fault": (BEGAN + KILL.format("SEGV"), "crashed", Cause.FATAL_SIGNAL),
    "aborts": (BEGAN + "os.abort()", "crashed", Cause.FATAL_SIGNAL),
    "aborts for lack of memory": (SAY + "os.abort()", "oom", Cause.OUT_OF_MEMORY),
    "uses up its CPU time": (BEGAN + KILL.format("XCPU"), "crashed", Cause.LIMIT),
    "is killed": (BEGAN + KILL.format("KILL"), "crashed", Cause.KILLED),
    "is terminated": (BEGAN + KILL.format("TERM"), "crashed", Cause.KILLED),
    "computes in another precision": (BEGAN + "finish('invalid', 'float32')", "invalid", Cause.OTHER_PRECISION),
    "trains another model": (
        BEGAN + "channel.values({'model_digest': os.urandom(8).hex()}); finish()",
        "invalid",
        Cause.OTHER_TRAINING,
    ),
}
# Junk at every moment; test_wire has all kinds that a parser may choke on.
JUNK = {
    "before the first message": "junk(b'hello\\n')",
    "in the middle of a message": BEGAN + 'junk(b\'{"event": "val\'); finish()',
    "without an end": BEGAN + "junk(b'x' * (2**26 + 2**20)); time.sleep(60)",
    "an object that is no event": BEGAN + "junk(b'{}\\n')",
    "an event of other types": BEGAN + "wire.send({'event': 'values', 'values': {'parameters': 'many'}})",
    "not a number": BEGAN + 'junk(b\'{"event": "progress", "done": NaN, "total": 3}\\n\')',
}
FAILURES |= {f"junk: {name}": (act, "error", Cause.GARBLED) for name, act in JUNK.items()}


@pytest.mark.parametrize("way", FAILURES)
def test_a_row_has_its_status_its_cause_and_what_was_measured(run, way):
    act, status, cause = FAILURES[way]
    made, cases, _ = run(act, timeout_s=0.5 if way == "hangs" else 20.0)
    if cause is Cause.OTHER_TRAINING:
        other = Case(act, "mixed-static", 0, 0, 0, cases[0].settings)
        assert made.run(other).record["status"] == "ok"
    record = made.run(cases[0]).record
    assert (record["status"], record["cause"]) == (status, cause), record["status_reason"]
    assert record["status_reason"]
    if way != "junk: before the first message":
        assert record["parameters"] == 10


def test_every_failure_has_a_cause_and_every_cause_that_a_worker_can_have_is_caused_here():
    assert {cause for _, _, cause in FAILURES.values()} >= set(Cause) - {
        Cause.OOM_KILLER,  # test_oom_killer
        Cause.BAD_RECORD,  # below
        Cause.XLA_REFUSED,  # test_without_xla
        Cause.OTHER_COMPILER,  # test_without_xla
        Cause.STOPPED,  # below
        Cause.NOT_STARTED,  # below
        Cause.PEER_LOST,  # test_peers
        Cause.NO_END,  # test_runs
        Cause.UNREADABLE,  # test_runs
        Cause.GPU_STATE,  # test_driver_failures
        Cause.GPU_LOST,  # test_driver_failures
    }
    assert {status for _, status, _ in FAILURES.values()} == set(FAILED) - {"interrupted"}


def test_junk_after_the_last_message_costs_nothing(run):
    made, (case,), _ = run(BEGAN + "finish(); junk(b'bye\\n')")
    assert made.run(case).record["status"] == "ok"


def test_a_case_that_the_user_stops_is_interrupted(run, attempts):
    made, (case,), _ = run(BEGAN + "time.sleep(60)")

    def stop(*_):
        raise KeyboardInterrupt

    made._listener = stop
    with pytest.raises(KeyboardInterrupt):
        made.run(case)
    (record,) = attempts(made)
    assert (record["status"], record["cause"], record["parameters"]) == ("interrupted", Cause.STOPPED, 10)


def test_a_value_that_does_not_belong_there(run):
    made, (case,), _ = run(BEGAN + "finish()")
    finish = made._finish_case

    def spoiled(journal, case, outcome):
        outcome.record._values["parameters"] = "many"
        finish(journal, case, outcome)

    made._finish_case = spoiled
    record = made.run(case).record
    assert (record["status"], record["cause"]) == ("invalid", Cause.BAD_RECORD)


def test_a_process_that_cannot_be_started(run, monkeypatch):
    made, (case,), _ = run("finish()")
    monkeypatch.setattr(launch, "_WORKER", ("/there/is/no/python",))
    record = made.run(case).record
    assert (record["status"], record["cause"]) == ("error", Cause.EXITED)
    assert "exit code 127" in record["status_reason"]
    assert "/there/is/no/python cannot be started" in record["output_tail"]


def test_the_output_of_a_failed_case_is_kept_without_secrets(run, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hush-hush-1234")
    made, (case,), _ = run(BEGAN + "print('key', os.environ['SOME_TOKEN'], flush=True); os._exit(3)")
    assert made.run(case).record["output_tail"] == "key <secret>"


ONCE = """
marker = os.path.join(os.path.dirname(sys.argv[0]), 'been')
first = not os.path.exists(marker)
open(marker, 'w').close()
began()
if first:
    {}
finish()
"""


@pytest.mark.parametrize(
    ("does", "status", "cause"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "crashed", Cause.KILLED),
        ("junk(b'hello\\n')", "error", Cause.GARBLED),
        ("os.write(os.open('/dev/full', os.O_WRONLY), b'x')", "error", Cause.FILE_SYSTEM),
    ],
)
def test_a_transient_cause_is_retried_and_the_row_says_so(run, attempts, does, status, cause):
    made, (case,), heard = run(ONCE.format(does), retries=1)
    record = made.run(case).record
    first, second = attempts(made)
    assert (first["status"], first["cause"], first["attempts"]) == (status, cause, 1)
    assert (second["status"], second["attempts"]) == ("ok", 2)
    assert record["note"] == f"attempt 1 was {status} ({cause}): {first['status_reason']}"
    assert [event.reason for event in heard if isinstance(event, Again)] == [f"{status}, {first['status_reason']}"]


@pytest.mark.parametrize(
    ("act", "retries", "expected"),
    [
        (BEGAN + KILL.format("KILL"), 2, ["crashed"] * 3),
        (BEGAN + KILL.format("KILL"), 0, ["crashed"]),
        (BEGAN + "raise ValueError('no')", 2, ["error"]),
        (BEGAN + KILL.format("SEGV"), 2, ["crashed"]),
        (BEGAN + "bytearray(2**60)", 2, ["oom"]),
    ],
)
def test_attempts_are_as_many_as_were_asked_for_and_one_for_what_will_not_pass(run, attempts, act, retries, expected):
    made, (case,), _ = run(act, retries=retries)
    assert made.run(case).record["status"] == expected[-1]
    rows = attempts(made)
    assert [row["status"] for row in rows] == expected
    assert [row["attempts"] for row in rows] == list(range(1, len(expected) + 1))
    assert len(re.findall("attempt [0-9] was", rows[-1].get("note", ""))) == len(expected) - 1


def test_a_file_that_cannot_be_kept_is_noted_and_fails_the_run_but_not_the_case(run):
    made, (case,), _ = run(BEGAN + "channel.send(NotKept('its steps', 'the disk is full')); finish()")
    record = made.run(case).record
    assert (record["status"], record["note"]) == ("ok", "its steps could not be kept: the disk is full")
    assert made.troubles == [f"{case.id}: its steps could not be kept: the disk is full"]


PARENT = """
import os, sys
from mpscale.core.processes.wire import Wire

wire, told = Wire.inherited(int(sys.argv[2])), os.environ.get("HELD", '{"held": null}')
wire._socket.sendall(told.encode() + b"\\n")
wire.receive()
wire._socket.sendall(os.environ["ANSWER"].encode() + b"\\n")
wire.receive()
"""


@pytest.mark.parametrize(
    "said",
    [
        {"HELD": "hello"},
        {"HELD": '{"held": 5}'},
        {"ANSWER": "hello"},
        {"ANSWER": "{}"},
        {"ANSWER": '{"pid": "one"}'},
        {"ANSWER": '{"pid": null}'},
    ],
    ids=str,
)
def test_junk_from_the_process_that_forks_workers(run, tmp_path, monkeypatch, said):
    (tmp_path / "parent.py").write_text(PARENT)
    made, (case,), _ = run("finish()", method="fork")
    monkeypatch.setattr(launch, "_WORKER", (sys.executable, "-P", str(tmp_path / "parent.py")))
    for name, value in {"ANSWER": "{}", **said}.items():
        monkeypatch.setenv(name, value)
    record = made.run(case).record
    assert (record["status"], record["cause"]) == ("error", Cause.GARBLED), record["status_reason"]
