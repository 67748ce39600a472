"""Two sessions that train the same cases over TCP, on one machine: the first leads, the second follows."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from dataclasses import replace

import pytest
from support.processes import wait_for

from mpscale.core.cause import Cause
from mpscale.core.cluster import Address, Cluster
from mpscale.core.processes.wire import EVER_S
from mpscale.core.reason import Code
from mpscale.harness import follower, launch
from mpscale.harness.coordinator import Coordinator, Refusal
from mpscale.harness.follower import FirstIsGone, Follower

PRELUDE = "from mpscale.core.cause import Cause; print('place', place, flush=True); meet(); "
FACTS = {"tensorflow": "2.21.0", "device": "cpu"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def send(stranger, said):
    with contextlib.suppress(OSError):  # it is hung up on
        stranger.sendall(said)


def each(*acts):
    return PRELUDE + "exec((" + ", ".join(map(repr, acts)) + ")[place])"


class Machines:
    """A session that leads, and one that follows it in a thread."""

    def __init__(self, run, *acts, limit_s=20.0, **options):
        self.port = free_port()
        addresses = ["127.0.0.1:1", "127.0.0.1:2"]
        self.clusters = [
            Cluster(tuple(addresses), place, self.config(addresses, place)) for place in range(len(addresses))
        ]
        self.first = Coordinator(self.clusters[0], self.address, FACTS, limit_s)
        self.made, self.cases, _ = run(*acts, workers=2, **options)
        self.made._options = replace(self.made._options, machines=self.first)
        self.told, self.ends, self.second = [], [], None

    @property
    def address(self):
        return Address("127.0.0.1", self.port)

    @staticmethod
    def config(addresses, place):
        return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": place}})

    def follow(self, facts=FACTS, limit_s=20.0):
        """Have a second session follow."""
        self.second = Follower(self.clusters[1], self.address, facts, limit_s)

        def follow():
            try:
                self.second.join()
                how = replace(self.made._options, machines=None)
                self.second.follow(self.made._device, self.made._driver, how, lambda *told: self.told.append(told))
                self.ends.append("over")
            except Exception as error:
                self.ends.append(error)

        self.thread = threading.Thread(target=follow, daemon=True)
        self.thread.start()

    def end(self):
        self.made.finish(0)
        self.first.close()
        if self.second is not None:
            self.thread.join(20)
            assert not self.thread.is_alive()


@pytest.fixture
def machines(run):
    """Make two sessions; see :class:`Machines`."""
    made = []

    def make(*acts, **options):
        made.append(Machines(run, *acts, **options))
        return made[-1]

    yield make
    for each in made:
        each.first.close()
        if each.second is not None:
            each.second.close()
            each.thread.join(20)


@pytest.fixture
def started(monkeypatch):
    """All workers that have been started."""
    found, start = [], launch.Launcher.start
    monkeypatch.setattr(launch.Launcher, "start", lambda *given: found.append(start(*given)) or found[-1])
    return found


def test_one_order_after_the_other_and_the_end(machines, tmp_path):
    note = "open({!r} + str(place), 'a').write(repr([os.environ['TF_CONFIG'], request['steps_path']]) + '\\n'); "
    act = (
        PRELUDE
        + note.format(str(tmp_path / "seen"))
        + "began(); meet(); channel.values({'parameters': 5 + place}); finish()"
    )
    both = machines(act, act.replace("5 +", "7 +"))
    both.follow()
    both.first.gather()
    for case, parameters in zip(both.cases, (5, 7), strict=True):
        record = both.made.run(case).record
        assert (record["status"], record["parameters"]) == ("ok", parameters), record["status_reason"]
    both.end()
    assert both.ends == ["over"]
    assert [(case.id, record["status"]) for case, record in both.told] == [(case.id, "ok") for case in both.cases]
    seen = [(tmp_path / f"seen{place}").read_text().splitlines() for place in (0, 1)]
    for place, lines in enumerate(seen):
        assert all(both.clusters[place].text in line for line in lines)
        assert [line.endswith("None]") for line in lines] == [place == 1] * 2


NO, HANG, KILL = "began(); raise ValueError('no')", "began(); time.sleep(60)", "began(); os.kill(os.getpid(), 9)"
LOST = "began(); channel.send(Failed('Unavailable', 'a worker is gone', Cause.PEER_LOST)); sys.exit(1)"
FAILURES = {
    "the second raises": (each(HANG, NO), "error", Cause.EXCEPTION, 2, "ValueError: no"),
    "the first raises": (each(NO, HANG), "error", Cause.EXCEPTION, 1, "ValueError: no"),
    "the second is killed": (each(HANG, KILL), "crashed", Cause.KILLED, 2, "killed by SIGKILL"),
    "the second lacks memory": (each(HANG, "began(); bytearray(2**60)"), "oom", Cause.OUT_OF_MEMORY, 2, "Memory"),
    "the first notices early": (each(LOST, "time.sleep(0.5); " + NO), "error", Cause.EXCEPTION, 2, "ValueError: no"),
    "the second notices early": (each("time.sleep(0.5); " + NO, LOST), "error", Cause.EXCEPTION, 1, "ValueError: no"),
}


def test_a_row_names_the_worker_that_failed_and_the_run_goes_on(machines, started):
    both = machines(*(failure[0] for failure in FAILURES.values()), each("began(); finish()", "began(); finish()"))
    both.follow()
    for case, (way, (_, status, cause, number, text)) in zip(both.cases, FAILURES.items(), strict=False):
        record = both.made.run(case).record
        assert (record["status"], record["cause"]) == (status, cause), (way, record["status_reason"])
        assert record["status_reason"].startswith(f"worker {number} of 2: "), way
        assert text in record["status_reason"], way
        assert f"place {number - 1}" in record["output_tail"], way
        assert f"place {2 - number}" not in record["output_tail"], way
        assert all(worker.wait(5.0) is not None for worker in started), way
    assert both.made.run(both.cases[-1]).record["status"] == "ok"
    both.end()
    assert both.ends == ["over"]


def test_a_second_session_that_is_gone_costs_its_case_and_may_come_back(machines, started):
    good = each("began(); finish()", "began(); finish()")
    both = machines(HANG, good, good, limit_s=1.0)
    both.follow()

    def hang_up(*_):
        wait_for(lambda: len(started) == 2, "both workers")
        both.second._wire._socket.shutdown(socket.SHUT_RDWR)

    listen, both.made._listener = both.made._listener, hang_up
    record = both.made.run(both.cases[0]).record
    both.made._supervisor._listener = listen
    assert (record["status"], record["cause"]) == ("crashed", Cause.NOT_STARTED)
    assert record["status_reason"].startswith("worker 2 of 2: its session has ended, or its machine cannot be reached")
    both.thread.join(20)
    assert isinstance(both.ends[0], FirstIsGone)
    assert all(worker.wait(5.0) is not None for worker in started)
    missing = both.made.run(both.cases[1]).record
    assert (missing["status"], missing["cause"]) == ("error", Cause.NOT_STARTED)
    assert "no session of worker 2 of 2 has connected within 1 s" in missing["status_reason"]
    start = time.monotonic()
    both.made.run(both.cases[1])
    assert time.monotonic() - start < 0.9  # nobody is waited for twice
    both.follow()
    wait_for(lambda: both.second._wire is not None, "the second session")
    assert both.made.run(both.cases[2]).record["status"] == "ok"
    both.end()
    assert both.ends[1] == "over"


@pytest.mark.parametrize("how", ["timeout", "interrupt", "the first session dies"])
def test_the_worker_of_the_second_session_ends_with_the_case(machines, started, how):
    both = machines(PRELUDE + HANG, timeout_s=1.5 if how == "timeout" else 30.0)
    both.follow()

    def stop(*_):
        wait_for(lambda: len(started) == 2, "both workers")
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "the first session dies":
            for wire in both.first._wires.values():
                wire._socket.shutdown(socket.SHUT_RDWR)

    both.made._listener = stop
    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            both.made.run(both.cases[0])
    else:
        both.made.run(both.cases[0])
    assert len(started) == 2
    wait_for(lambda: all(worker.wait(0.0) is not None for worker in started), "their end", 10)
    both.end()
    (end,) = both.ends
    assert isinstance(end, FirstIsGone) if how == "the first session dies" else end == "over"
    if isinstance(end, FirstIsGone):
        assert "has ended or cannot be reached" in str(end)


def test_the_first_session_gets_what_the_second_has_seen_of_its_gpus(machines, monkeypatch):
    class Supervisor(follower.Supervisor):
        def run(self, case, steps_path, gpu_path, outcome, attempt=1):
            super().run(case, steps_path, gpu_path, outcome, attempt)
            outcome.record.update({"gpu_power_w_mean": 150.0, "gpu_suspicion": "throttled by heat"})
            outcome.record.end("invalid", "throttled by heat", Cause.GPU_STATE)

    monkeypatch.setattr(follower, "Supervisor", Supervisor)
    both = machines(each("began(); finish()", "began(); finish()"))
    both.follow()
    assert both.made.run(both.cases[0]).record["status"] == "ok"
    ((found, why),) = both.first.seen()
    assert found.values == {"gpu_power_w_mean": 150.0}
    assert found.unavailable["gpu_energy_j_per_step"].code is Code.NO_GPU
    assert why == "worker 2 of 2: throttled by heat"


def test_sessions_that_do_not_fit_are_refused_by_what_differs(machines):
    both = machines(HANG)
    both.follow({"tensorflow": "2.20.0", "device": "cpu", "keras": "3"})
    with pytest.raises(Refusal) as refused:
        both.first.gather()
    said = "worker 2 of 2 does not fit the first worker: tensorflow 2.20.0, not 2.21.0; keras 3, not unknown"
    assert str(refused.value) == said
    # Nobody listens any more, and a case that is tried again says why.
    with pytest.raises(Refusal, match="does not fit"):
        both.first.gather()
    both.thread.join(20)
    assert [str(end) for end in both.ends] == [said]


def test_a_first_session_that_never_comes(machines):
    both = machines(HANG)
    both.first.close()
    both.follow(limit_s=0.5)
    both.thread.join(20)
    (end,) = both.ends
    assert isinstance(end, FirstIsGone)
    assert f"not reached at 127.0.0.1:{both.port} within 0.5 s (Connection refused)" in str(end)


def test_whoever_else_connects_is_hung_up_on(machines):
    good = each("began(); finish()", "began(); finish()")
    both = machines(good)
    strangers = []
    for said in (
        b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"\x00" * 4096 + b"\n", b'{"event": "hello", "place": "1", "facts": {}}\n',
        b'{"event": "hello", "place": 7, "facts": {}}\n', b'{"event": "hello", "place": 0, "facts": {}}\n', b"",
        b"[" * 2**21,
    ):  # fmt: skip
        stranger = socket.create_connection(("127.0.0.1", both.port))
        stranger.settimeout(10)
        threading.Thread(target=send, args=[stranger, said], daemon=True).start()
        if not said:
            stranger.shutdown(socket.SHUT_WR)
        strangers.append(stranger)
    both.follow()
    assert both.made.run(both.cases[0]).record["status"] == "ok"
    for stranger in strangers:
        with stranger:
            try:
                while stranger.recv(65536):
                    pass
            except ConnectionResetError:
                pass
    both.end()
    assert both.ends == ["over"]


@pytest.mark.parametrize("said", [b"hello\n", b'{"event": "order", "number": 1}\n', b'{"event": "order"', b""])
def test_a_first_session_that_is_none(said):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1])
        follower = Follower(Cluster(("a:1", "b:1"), 1, ""), address, FACTS, 1.0)

        def answer():
            while True:
                try:
                    end, _ = server.accept()
                except OSError:
                    return
                end.sendall(said)
                end.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(FirstIsGone, match="is no session of mpscale" if said.endswith(b"\n") else "it hung up"):
            follower.join()


def test_a_wait_without_end_fits_the_system():
    assert EVER_S * 1e3 < 2**31
