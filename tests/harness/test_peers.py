"""Several worker processes that train one case: what its row tells, whose failure it names, and that all end."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
import time

import pytest

from mpscale.core.cause import Cause
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.harness import launch, peers
from mpscale.harness.peers import PeerLauncher

TOGETHER = "began(); meet(); channel.values({'parameters': 10 + place}); finish()"
LOST = "channel.send(Failed('UnavailableError', 'another worker is gone', Cause.PEER_LOST)); sys.exit(1)"
PRELUDE = "from mpscale.core.cause import Cause; began(); meet(); "


def each(*acts):
    """What workers do, in their order."""
    return PRELUDE + "exec((" + ", ".join(map(repr, acts)) + ")[place])"


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_row_is_that_of_the_first_worker_and_each_has_its_address(run, tmp_path, workers):
    path = tmp_path / "seen"
    note = f"open({str(path)!r} + str(place), 'w').write(os.environ['TF_CONFIG'] + repr(request['steps_path'])); "
    made, cases, _ = run(note + TOGETHER, note + TOGETHER, workers=workers)
    seen = []
    for case in cases:
        record = made.run(case).record
        assert (record["status"], record["parameters"]) == ("ok", 10), record["status_reason"]
        assert (record["strategy"], record["replicas"]) == ("multiworker", workers)
        texts = [path.with_name(f"seen{place}").read_text() for place in range(workers)]
        addresses = [re.findall(r"127\.0\.0\.1:(\d+)", text) for text in texts]
        assert all(each == addresses[0] for each in addresses)
        assert len(set(addresses[0])) == workers
        # Only the first writes the log of steps.
        assert ["None" in text for text in texts] == [False] + [True] * (workers - 1)
        seen.append(addresses[0])
    assert not set(seen[0]) & set(seen[1])


NO, HANG, KILL = "raise ValueError('no')", "time.sleep(60)", "os.kill(os.getpid(), 9)"
FAILURES = {
    "the second raises": (each(HANG, NO), "error", Cause.EXCEPTION, 2, "ValueError: no"),
    "the first raises": (each(NO, HANG), "error", Cause.EXCEPTION, 1, "ValueError: no"),
    "the second is killed": (each(HANG, KILL), "crashed", Cause.KILLED, 2, "SIGKILL"),
    "the second runs out of memory": (each(HANG, "bytearray(2**60)"), "oom", Cause.OUT_OF_MEMORY, 2, "Memory"),
    "the second exits": (each(HANG, "os._exit(0)"), "error", Cause.EXITED, 2, "exit code 0"),
    "the second sends junk": (each(HANG, "junk(b'hello\\n')"), "error", Cause.GARBLED, 2, "wrote to the"),
    "the first notices early": (each(LOST, "time.sleep(0.5); " + NO), "error", Cause.EXCEPTION, 2, "ValueError: no"),
    "the first is aborted": (each("os.abort()", "time.sleep(0.5); " + KILL), "crashed", Cause.KILLED, 2, "SIGKILL"),
    "both have lost each other": (
        each("time.sleep(0.5); " + LOST, LOST), "error", Cause.PEER_LOST, 2, "another worker is gone",
    ),
    "one has lost another that goes on": (each(LOST, HANG), "error", Cause.PEER_LOST, 1, "another worker is gone"),
}  # fmt: skip


@pytest.mark.parametrize("way", FAILURES)
def test_a_row_has_the_failure_from_which_the_others_followed(run, monkeypatch, way):
    monkeypatch.setattr(peers, "_SETTLE_S", 2.0)
    act, status, cause, number, text = FAILURES[way]
    made, (case,), _ = run("print('pid', os.getpid(), 'of', place, flush=True); " + act, workers=2)
    start = time.monotonic()
    record = made.run(case).record
    assert (record["status"], record["cause"]) == (status, cause), record["status_reason"]
    assert record["status_reason"].startswith(f"worker {number} of 2: ")
    assert text in record["status_reason"]
    assert f"of {number - 1}" in record["output_tail"] and f"of {2 - number}" not in record["output_tail"]
    assert record["parameters"] == 10
    assert time.monotonic() - start < 15
    assert made._supervisor._launcher.close() is None


@pytest.fixture
def started(monkeypatch):
    """All workers that have been started."""
    found, start = [], launch.Launcher.start
    monkeypatch.setattr(launch.Launcher, "start", lambda *given: found.append(start(*given)) or found[-1])
    return found


@pytest.mark.parametrize("how", ["timeout", "interrupt", "memory limit"])
def test_all_workers_end_when_the_case_is_ended(run, started, how):
    fill = "held = bytearray(300 * 2**20) if place else None; " if how == "memory limit" else ""
    options = {"timeout_s": 2.0} if how == "timeout" else {"memory_limit_mib": 250.0} if fill else {}
    made, (case,), _ = run("began(); " + fill + "time.sleep(60)", workers=2, **options)
    if how == "interrupt":

        def stop(*_):
            raise KeyboardInterrupt

        made._listener = stop
        with pytest.raises(KeyboardInterrupt):
            made.run(case)
        (outcome,) = made._outcomes.values()
        record = outcome.record
    else:
        record = made.run(case).record
    assert record["status"] == {"timeout": "timeout", "interrupt": "interrupted", "memory limit": "oom"}[how]
    assert len(started) == 2
    assert not any(lives(worker.pid) for worker in started)


def test_the_memory_of_the_host_is_that_of_all_workers(run):
    act = "held = bytearray(100 * 2**20); began(); meet(); [channel.phase(phase) for phase in PHASES]; finish()"
    peaks = []
    for workers in (1, 2):
        made, (case,), _ = run(act, workers=workers)
        record = made.run(case).record
        assert record["status"] == "ok", record["status_reason"]
        peaks.append(record["host_memory_peak_mib"])
    assert 1.7 < peaks[1] / peaks[0] < 2.3


def test_the_others_do_not_begin_before_the_first_has_been_seen_idle(run, tmp_path):
    first = "time.sleep(0.5); assert not mark.exists(); began(); meet(); finish()"
    acts = (first, "began(); mark.touch(); meet(); finish()")
    made, (case,), _ = run(f"mark = Path({str(tmp_path / 'mark')!r}); exec({acts!r}[place])", workers=2)
    record = made.run(case).record
    assert record["status"] == "ok", record["status_reason"]


def test_one_parent_that_must_not_fork_ends_all_of_them():
    ended = []

    class Parent(launch.Launcher):
        def prepare(self, workers=1):
            if self.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b":
                raise launch.UnsafeFork(Reason(Code.FORK_UNSAFE, "it has touched the GPU"))

        def close(self):
            ended.append(self.environ["CUDA_VISIBLE_DEVICES"])

    launcher = PeerLauncher(Parent, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, [Device("cpu", "CPU")])
    launcher.prepare(1)
    with pytest.raises(launch.UnsafeFork):
        launcher.prepare(2)
    assert ended == ["GPU-a", "GPU-b"]


def test_ports_are_held_until_the_workers_have_them(run):
    # As TensorFlow's server does with TF_GRPC_REUSE_PORT.
    bind = (
        "import socket; own = json.loads(os.environ['TF_CONFIG'])['cluster']['worker'][place]; "
        "assert os.environ['TF_GRPC_REUSE_PORT'] == 'true'; server = socket.socket(); "
        "server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); server.bind(('0.0.0.0', int(own[10:]))); "
        "server.listen(); began(); meet(); finish()"
    )
    made, (case,), _ = run(bind, workers=2)
    held = []
    start = launch.Launcher.start

    def taken(launcher, output):
        for address in re.findall(r"127\.0\.0\.1:(\d+)", launcher.environ["TF_CONFIG"]):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", int(address)))
            held.append(address)
        return start(launcher, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launcher, "start", taken)
        record = made.run(case).record
    assert record["status"] == "ok", record["status_reason"]
    assert len(held) == 4


def test_a_worker_that_cannot_be_started_leaves_none_behind(run, monkeypatch):
    started, start = [], launch.Launcher.start

    def fail_second(launcher, output):
        if started:
            raise OSError(24, "Too many open files")
        started.append(start(launcher, output))
        return started[0]

    monkeypatch.setattr(launch.Launcher, "start", fail_second)
    made, (case,), _ = run(TOGETHER, workers=2)
    record = made.run(case).record
    assert (record["status"], record["cause"]) == ("error", Cause.NOT_STARTED), record["status_reason"]
    assert started[0].wait(0.0) == -signal.SIGKILL


def test_each_worker_is_given_one_gpu_and_sees_no_other(run):
    device = Device("gpu", "Real GPU", "GPU-a", (9, 0), 81920.0, "0000:01:00.0", vendor="nvidia", beside=("GPU-b",))
    known = [device, Device("gpu", "Real GPU", "GPU-b", (9, 0), 81920.0, "0000:02:00.0", vendor="nvidia")]
    launcher = PeerLauncher(launch.Launcher, launch.worker_environment(os.environ, device, None), device.apart(known))
    run()
    launcher.prepare(2)
    act = (
        "channel.send(Failed(os.environ['CUDA_VISIBLE_DEVICES'], request['device']['uuid'] + "
        "request['device']['pci_bus_id'] + str(request['device']['beside']), Cause.PEER_LOST))"
    )
    with tempfile.TemporaryFile() as log:
        group = launcher.start(log)
        group.begin(
            {"case": {"workload": PRELUDE.replace("began(); meet(); ", act)}, "device": None, "steps_path": None}
        )
        group.receive(30)
        told = [(member.last.type, member.last.message) for member in group._members]
        group.end(0.0)
        launcher.close()
    assert told == [("GPU-a", "GPU-a0000:01:00.0[]"), ("GPU-b", "GPU-b0000:02:00.0[]")]


def test_no_worker_inherits_the_cluster_of_a_scheduler(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}')
    made, (case,), _ = run("assert 'TF_CONFIG' not in os.environ; began(); finish()")
    record = made.run(case).record
    assert record["status"] == "ok", record["status_reason"]
