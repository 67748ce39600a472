"""How the sessions of several machines run one training together: the first one leads.

A scheduler starts the same command on every machine, with ``TF_CONFIG``. The session of the first worker plans, runs
and records; it listens on a port of TCP. Each of the others connects to it (:mod:`mpscale.harness.follower`), says what
it is (:class:`Hello`), and is accepted or refused. From then on it takes one order after the other: it starts its
worker for a case, and reports how that ended (:class:`Ended`). Messages are those of
:mod:`mpscale.core.processes.wire`. Nothing is secret or signed, no more than between TensorFlow's own servers.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from mpscale.core.cause import Cause
from mpscale.core.cluster import VARIABLE, Address, Cluster, listening
from mpscale.core.columns import STATUSES, Source, measured_columns
from mpscale.core.files.temporary import temporary_file
from mpscale.core.processes.events import Event, Finished, event_of
from mpscale.core.processes.process import KILL_S, Process
from mpscale.core.processes.wire import EVER_S, Wire, wait_for
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings, misfit
from mpscale.harness.launch import Launcher, LaunchError
from mpscale.harness.peers import Group, Judged, Member

LONGEST = 2**20
"""Bytes of the longest message. Those of a case have some thousands."""
_HELLO_S = 10.0
"""How long somebody who has connected may take to say what it is."""
_POLL_S = 0.2
_ABRUPT = ("error", "crashed", "oom", "timeout", "interrupted")
"""Statuses of a worker that did not come to its end. With any other, the first worker has or gets the same."""
_WATCHED = measured_columns(source=Source.MONITOR)


@dataclass(frozen=True)
class Hello(Event, name="hello"):
    """The first message of a session that follows.

    Args:
        place: which worker is its own, from 0.
        facts: what has to be the same on all machines.
    """

    place: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Welcome(Event, name="welcome"):
    """The session is one of the run's."""


@dataclass(frozen=True)
class Refused(Event, name="refused"):
    """The run does not take place, for this reason."""

    reason: str


@dataclass(frozen=True)
class Order(Event, name="order"):
    """Start a worker.

    Args:
        number: of the order, rising.
        case: as JSON.
        energy_s: how long the first worker measures energy, which they all do.
    """

    number: int
    case: dict[str, Any]
    energy_s: float


@dataclass(frozen=True)
class Stop(Event, name="stop"):
    """End the worker of an order, if it has not ended."""

    number: int


@dataclass(frozen=True)
class Over(Event, name="over"):
    """The run is over."""


@dataclass(frozen=True)
class Ended(Event, name="ended"):
    """How the worker of an order ended.

    Args:
        number: of the order.
        status: of the case, as if it were that of this worker alone.
        reason: in words.
        cause: for programs; None if there is none, or it is unknown here.
        output: the end of what it has printed, if it failed.
        values: what was seen of its GPUs, by column.
        missed: why other columns are empty.
        suspicion: why figures of its GPUs must not be used; None if they may.
    """

    number: int
    status: str
    reason: str | None
    cause: str | None
    output: str
    values: dict[str, Any] = field(default_factory=dict)
    missed: dict[str, Any] = field(default_factory=dict)
    suspicion: str | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Ended:
        event = super().from_json(fields)
        if event.status not in STATUSES:
            raise ValueError(f"{event.status!r:.80} is not a status of a case")
        if wrong := [name for name in (*event.values, *event.missed) if name not in _WATCHED]:
            raise ValueError(f"{wrong[0]!r:.80} is no column of a GPU")
        if wrong := [why for name, value in event.values.items() if (why := misfit(name, value))]:
            raise ValueError(wrong[0])
        event.findings()  # raises if a reason is none
        return event

    def findings(self) -> Findings:
        """What was seen of its GPUs."""
        return Findings(dict(self.values), {name: Reason.from_json(why) for name, why in self.missed.items()})


class Refusal(ValueError):
    """The sessions of a run do not fit each other."""


def tuned(end: socket.socket) -> Wire:
    """A wire over TCP that notices within two minutes that the other machine is gone."""
    end.setblocking(True)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6), ("TCP_USER_TIMEOUT", 90_000)):
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Wire(end, LONGEST)


class Coordinator:
    """The first session's side: has the others connect, and their workers start with its own.

    Args:
        cluster: the workers.
        listens: where the others connect to.
        facts: what has to be the same on all machines, by name.
        limit_s: how long to wait for the others.

    Raises:
        OSError: nobody can listen there.
    """

    def __init__(self, cluster: Cluster, listens: Address, facts: Mapping[str, Any], limit_s: float) -> None:
        self._cluster, self._facts, self._limit_s = cluster, dict(facts), limit_s
        self._server = listening(listens.port)
        self._server.setblocking(False)
        self._wires: dict[int, Wire] = {}
        """Those of the others, by their places."""
        self._given_up = False
        """Whether somebody did not come in time, so that nobody waits for it again."""
        self._refused: str | None = None
        """Why sessions do not fit each other; then nobody listens any longer. None if they do."""
        self._orders = 0
        self._workers: list[_Remote] = []
        """Those of the present case, or of the last one."""

    def gather(self) -> None:
        """Wait until all others are connected, between two cases.

        Raises:
            Refusal: one of them does not fit.
            TimeoutError: not all of them came in time; the message names those that are missing.
        """
        if self._refused is not None:
            raise Refusal(self._refused)
        deadline = time.monotonic() + (0.0 if self._given_up else self._limit_s)
        while missing := self._missing():
            left_s = deadline - time.monotonic()
            if not wait_for([self._server.fileno()], max(min(left_s, _POLL_S), 0.0)):
                if left_s <= 0:
                    self._given_up = True
                    names = ", ".join(f"{self._cluster.name(place)}" for place in missing)
                    raise TimeoutError(f"no session of {names} has connected within {self._limit_s:g} s")
                continue
            with contextlib.suppress(OSError):
                end, _ = self._server.accept()
                self._take(tuned(end))
        self._given_up = False

    def _missing(self) -> list[int]:
        """The places of those who are not connected."""
        for place, wire in list(self._wires.items()):
            if _is_gone(wire):
                wire.close()
                del self._wires[place]
        return [place for place in range(1, len(self._cluster.workers)) if place not in self._wires]

    def _take(self, wire: Wire) -> None:
        """Take in somebody who has connected; whoever is no session of mpscale is hung up on."""
        try:
            hello = event_of(wire.receive(_HELLO_S), (Hello,))
        except (TimeoutError, EOFError):
            wire.close()
            return
        if hello.place not in self._missing():
            known = 0 < hello.place < len(self._cluster.workers)
            why = "is connected already" if known else "is none of the run's"
            wire.send(Refused(f"worker {hello.place + 1} {why}").to_json())
            wire.close()
            return
        if different := self._differing(hello.facts):
            reason = f"{self._cluster.name(hello.place)} does not fit the first worker: {different}"
            for each in (wire, *self._wires.values()):
                each.send(Refused(reason).to_json())
            wire.close()
            self._refused = reason
            self.close(over=False)
            raise Refusal(reason)
        self._wires[hello.place] = wire
        wire.send(Welcome().to_json())

    def _differing(self, theirs: Mapping[str, Any]) -> str:
        names = [name for name in {**self._facts, **theirs} if self._facts.get(name) != theirs.get(name)]
        return "; ".join(f"{name} {_shown(theirs.get(name))}, not {_shown(self._facts.get(name))}" for name in names)

    @property
    def environ(self) -> dict[str, str]:
        """The variable with which this machine's worker joins the others."""
        return {VARIABLE: self._cluster.text}

    def launcher(self, own: Launcher) -> Launcher:
        """Return a launcher that starts the workers of all machines, this one's by ``own``."""
        return _Everywhere(own, self)

    def workers(self, logs: Sequence[IO[bytes]]) -> list[Member]:
        """Return a worker for each of the other machines, none of them begun. Their output goes to ``logs``."""
        self._orders += 1
        places = range(1, len(self._cluster.workers))
        self._workers = [
            _Remote(place, self._wires[place], self._orders, log) for place, log in zip(places, logs, strict=True)
        ]
        return [Member(self._cluster.name(each.place), each, each.output, {}) for each in self._workers]

    @property
    def others(self) -> int:
        """How many other machines there are."""
        return len(self._cluster.workers) - 1

    def name(self, place: int) -> str:
        """What a worker is called in a row."""
        return self._cluster.name(place)

    def seen(self) -> list[tuple[Findings, str | None]]:
        """What was seen of the GPUs of each other machine in the last case, and why it must not be used."""
        found: list[tuple[Findings, str | None]] = []
        for worker in self._workers:
            if worker.ended is None:
                nothing = Reason(Code.HOST_SILENT, f"{self._cluster.name(worker.place)} did not report its GPUs")
                found.append((Findings(unavailable=dict.fromkeys(_WATCHED, nothing)), None))
            else:
                suspicion = worker.ended.suspicion
                text = None if suspicion is None else f"{self._cluster.name(worker.place)}: {suspicion}"
                found.append((worker.ended.findings(), text))
        return found

    def close(self, over: bool = True) -> None:
        """Hang up, and listen no longer.

        Args:
            over: tell the others that the run is over.
        """
        for wire in self._wires.values():
            if over:
                wire.send(Over().to_json())
            wire.close()
        self._wires.clear()
        self._server.close()


def _is_gone(wire: Wire) -> bool:
    """Whether a session that has nothing to say has hung up."""
    try:
        wire.arrived()
    except EOFError:
        return True
    return wire.closed


def _shown(value: object) -> str:
    return "unknown" if value is None else f"{value!s:.200}"


class _Remote(Process):
    """The worker of another machine. The session there starts it, answers it and judges it.

    Args:
        place: which one it is.
        wire: to that session.
        number: of the order.
        output: takes the end of what it has printed, if it fails.
    """

    def __init__(self, place: int, wire: Wire, number: int, output: IO[bytes]) -> None:
        super().__init__(0, wire, None)
        self.place, self._number, self.output = place, number, output
        self.ended: Ended | None = None

    def begin(self, order: Mapping[str, Any]) -> None:
        self.send(Order(self._number, order["case"], order["energy_s"]).to_json())

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Return that it has finished, or raise how it ended.

        Raises:
            TimeoutError, EOFError, Garbled: as those of :class:`Process`, about the session there.
            Judged: the worker failed.
        """
        deadline = time.monotonic() + (EVER_S if seconds is None else seconds)
        while True:
            # Below 0 nothing would be read.
            ended = event_of(self.wire.receive(max(deadline - time.monotonic(), 0.0)), (Ended,))
            if ended.number == self._number:  # else of a case before, which did not wait for it
                break
        self.ended = ended
        if ended.status in _ABRUPT:
            self.output.write(ended.output.encode(errors="backslashreplace"))
            self.output.flush()
            raise Judged(ended.status, str(ended.reason), Cause.of(ended.cause))
        return Finished(ended.status, ended.reason).to_json()

    def end(self, seconds: float, kill_s: float = KILL_S) -> int | None:
        """Wait until the worker has ended, and have it ended if it has not; the session there stays."""
        for stop, limit_s in ((False, seconds), (True, kill_s)):
            if self.ended is None and not self.wire.closed:
                if stop:
                    self.send(Stop(self._number).to_json())
                with contextlib.suppress(TimeoutError, EOFError, Judged):
                    self.receive(limit_s)
        if self.ended is None:
            self.wire.close()
        return self.wait(0.0)

    def wait(self, seconds: float) -> int | None:
        if self.ended is None and self.wire.closed:
            self.abandoned = "its session has ended, or its machine cannot be reached"
        return None if self.ended is None else 0

    def _kill(self, seconds: float) -> int | None:
        self.wire.close()
        return self.wait(0.0)


class _Everywhere(Launcher):
    """Starts the worker of this machine, and has the other sessions start theirs."""

    def __init__(self, own: Launcher, coordinator: Coordinator) -> None:
        super().__init__(own.environ)
        self._own, self._coordinator = own, coordinator
        self._of_case = contextlib.ExitStack()

    def prepare(self, workers: int = 1) -> None:
        self._own.begin()
        try:
            self._coordinator.gather()
        except (TimeoutError, Refusal) as error:
            raise LaunchError(str(error), Cause.NOT_STARTED) from error
        self._own.prepare()

    def start(self, output: IO[bytes]) -> Process:
        self._of_case.close()
        logs = [self._of_case.enter_context(temporary_file()) for _ in range(self._coordinator.others)]
        self._own.environ = {**self.environ, **self._coordinator.environ}
        others = self._coordinator.workers(logs)
        return Group([Member(self._coordinator.name(0), self._own.start(output), output, {}), *others])

    def close(self) -> int | None:
        self._of_case.close()
        return self._own.close()
