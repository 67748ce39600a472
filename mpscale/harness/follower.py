"""The sessions of further machines: each takes orders from the first one (:mod:`mpscale.harness.coordinator`)."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from mpscale.core.case import Case
from mpscale.core.cluster import VARIABLE, Address, Cluster
from mpscale.core.columns import Source, measured_columns
from mpscale.core.device import Device
from mpscale.core.processes.events import Event, Failed, event_of
from mpscale.core.processes.process import KILL_S, Process
from mpscale.core.processes.wire import EVER_S, Garbled, Wire, wait_for
from mpscale.core.record import Findings, Record
from mpscale.harness.coordinator import Ended, Hello, Order, Over, Refusal, Refused, Stop, Welcome, tuned
from mpscale.harness.launch import Launcher
from mpscale.harness.supervisor import Options, Outcome, Supervisor
from mpscale.telemetry.client import Driver

_AGAIN_S = 0.3
"""Between two attempts to connect."""
_EXIT_S = 1.0
"""How long a worker that has failed may take to end."""
_ORDERS = (Welcome, Refused, Order, Stop, Over)


class FirstIsGone(RuntimeError):
    """The first session cannot be reached, or has hung up before the run was over."""


class _Stopped(Exception):
    """The first session has ordered that the worker end, or that the whole run is over."""


class Follower:
    """A session that follows.

    Args:
        cluster: the workers.
        first: where the first session listens.
        facts: what has to be the same on all machines, by name.
        limit_s: how long to try to reach it.
    """

    def __init__(self, cluster: Cluster, first: Address, facts: Mapping[str, Any], limit_s: float) -> None:
        self._cluster, self._first, self._facts, self._limit_s = cluster, first, dict(facts), limit_s
        self._wire: Wire | None = None
        self._order: Order | None = None
        self._over = False

    def join(self) -> None:
        """Connect to the first session, and be accepted.

        Raises:
            FirstIsGone: it does not answer.
            Refusal: it refuses this session.
        """
        deadline, why = time.monotonic() + self._limit_s, "nobody listens there"
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise FirstIsGone(
                    f"the session of the first worker was not reached at {self._first} within {self._limit_s:g} s "
                    f"({why}); see whether it has started, and name another address with --mp-coordinator HOST:PORT if "
                    "its machine has another name here or its port is closed"
                )
            try:
                end = socket.create_connection((self._first.host, self._first.port), timeout=max(left_s, _AGAIN_S))
            except OSError as error:
                why = error.strerror or str(error)
                time.sleep(min(_AGAIN_S, max(left_s, 0.0)))
                continue
            self._wire = tuned(end)
            self._wire.send(Hello(self._cluster.place, self._facts).to_json())
            try:
                answer = event_of(self._wire.receive(max(deadline - time.monotonic(), _AGAIN_S)), _ORDERS)
            except TimeoutError:
                why = "it does not answer"
            except Garbled:
                raise FirstIsGone(f"what listens at {self._first} is no session of mpscale") from None
            except EOFError:
                why = "it hung up"
                time.sleep(_AGAIN_S)
            else:
                if isinstance(answer, Refused):
                    raise Refusal(answer.reason)
                return
            self._wire.close()

    def follow(self, device: Device, driver: Driver, options: Options, tell: Callable[[Case, Record], object]) -> None:
        """Take one order after the other until the run is over.

        Args:
            device: where the worker trains.
            driver: of the GPU.
            options: how it is started.
            tell: called with each case and how its worker here has ended.

        Raises:
            FirstIsGone: the first session has hung up, or says what is no order.
        """
        # How long a case may take, the first session decides.
        options = dataclasses.replace(options, machines=self, timeout_s=EVER_S)
        supervisor = Supervisor(device, driver, options, lambda *_: None)
        try:
            supervisor.warm_up()
            while (order := self._next()) is not None:
                self._run(supervisor, order, tell)
        finally:
            supervisor.close()
            self.close()

    def _run(self, supervisor: Supervisor, order: Order, tell: Callable[[Case, Record], object]) -> None:
        case = Case.from_json(order.case)
        outcome = Outcome(Record(case.identity()))
        self._order = order
        try:
            supervisor.run(case, None, None, outcome)
        except _Stopped:
            pass
        finally:
            self._order = None
        record = outcome.record
        watched = measured_columns(source=Source.MONITOR)
        values = {name: record[name] for name in watched if record[name] is not None}
        missed = {name: why.to_json() for name in watched if (why := record.why_empty(name)) is not None}
        ended = Ended(
            order.number,
            str(record["status"]),
            record["status_reason"],
            record["cause"],
            str(record["output_tail"] or ""),
            values,
            missed,
            record["gpu_suspicion"],
        )
        self._send(ended)
        tell(case, record)

    def _send(self, ended: Ended) -> None:
        assert self._wire is not None  # it has joined
        self._wire.send(ended.to_json())

    def _next(self) -> Order | None:
        """Wait for the next order; None if the run is over."""
        while not self._over:
            assert self._wire is not None  # it has joined
            match self._received(None):
                case Order() as order:
                    return order
                case Over():
                    break
                case Refused(reason):
                    raise Refusal(reason)
        return None

    def _received(self, seconds: float | None) -> Event:
        assert self._wire is not None  # it has joined
        try:
            return event_of(self._wire.receive(seconds), _ORDERS)
        except Garbled as error:
            raise FirstIsGone(f"what came from {self._first} is no order of mpscale") from error
        except EOFError as error:
            raise FirstIsGone(
                f"the session of the first worker has ended or cannot be reached ({self._first}) before the run was "
                "over; its own output says why"
            ) from error

    def look(self, order: Order) -> None:
        """See whether the first session says something while the worker of an order runs.

        Raises:
            _Stopped: the worker is to end.
            FirstIsGone: as :meth:`follow`.
        """
        try:
            said = self._received(0.0)
        except TimeoutError:
            return
        self._over = isinstance(said, Over)
        if self._over or (isinstance(said, Stop) and said.number == order.number):
            raise _Stopped

    def launcher(self, own: Launcher) -> Launcher:
        """Return a launcher of workers that end when the first session says so."""
        return _Led(own, self)

    @property
    def environ(self) -> dict[str, str]:
        """The variable with which this machine's worker joins the others."""
        return {VARIABLE: self._cluster.text}

    @property
    def order(self) -> Order:
        """The present order."""
        assert self._order is not None  # a case runs
        return self._order

    @property
    def wire(self) -> Wire:
        """To the first session."""
        assert self._wire is not None  # it has joined
        return self._wire

    def seen(self) -> list[tuple[Findings, str | None]]:
        """Nothing: the first session puts together what all have seen."""
        return []

    def close(self) -> None:
        """Hang up."""
        if self._wire is not None:
            self._wire.close()


class _Led(Launcher):
    """Starts the worker of this machine for an order."""

    def __init__(self, own: Launcher, follower: Follower) -> None:
        super().__init__(own.environ)
        self._own, self._follower = own, follower

    def begin(self) -> None:
        self._own.begin()

    def prepare(self, workers: int = 1) -> None:
        self._own.prepare()

    def start(self, output: IO[bytes]) -> Process:
        self._own.environ = {**self.environ, **self._follower.environ}
        return _LedWorker(self._own.start(output), self._follower)

    def close(self) -> int | None:
        return self._own.close()


class _LedWorker(Process):
    """A worker to which the first session may put an end."""

    def __init__(self, worker: Process, follower: Follower) -> None:
        super().__init__(worker.pid, worker.wire, None)
        self._worker, self._follower, self.keeper = worker, follower, worker.keeper
        self._failed = self._has_ended = False

    def begin(self, order: Mapping[str, Any]) -> None:
        # Only the first worker writes the log of steps, and all measure energy for as long as it does.
        self._worker.begin({**order, "steps_path": None, "energy_s": self._follower.order.energy_s})

    def send(self, message: Mapping[str, Any]) -> None:
        self._worker.send(message)

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Return its next message; raises as :meth:`Process.receive`, and what :meth:`Follower.look` raises."""
        deadline = time.monotonic() + (EVER_S if seconds is None else seconds)
        while True:
            try:
                message = self._worker.receive(0.0)
            except TimeoutError:
                self._follower.look(self._follower.order)
            else:
                self._failed = self._failed or message.get("event") == Failed.name
                return message
            if (left_s := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            wait_for([*self._worker.sources(), self._follower.wire], left_s)

    def wait(self, seconds: float) -> int | None:
        code = self._worker.wait(seconds)
        self.abandoned = self._worker.abandoned
        return code

    def end(self, seconds: float, kill_s: float = KILL_S) -> int | None:
        # Without the others, one that has failed may wait for them in vain; and the first session waits for its end.
        code = self._worker.end(min(seconds, _EXIT_S) if self._failed else seconds, kill_s)
        self._has_ended = True
        return code

    def _kill(self, seconds: float) -> int | None:
        # Its process id may be that of another once it has been waited for.
        return None if self._has_ended else self._worker.kill(seconds)
