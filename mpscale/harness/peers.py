"""Starts the worker processes that train one case together, and makes one process of them for the supervisor.

``tf.distribute.MultiWorkerMirroredStrategy`` takes each step in all of them. What the first one reports is recorded;
the others tell the same, and only how they end counts. If one fails, the rest can do nothing but wait or fail, too: the
row has the first failure, with the number of its worker, and never what followed from it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from mpscale.core.cause import Cause
from mpscale.core.device import Device
from mpscale.core.files.temporary import temporary_file
from mpscale.core.processes.events import WORKER_EVENTS, Event, Failed, Finished, PhaseReached, event_of
from mpscale.core.processes.process import KILL_S, Process
from mpscale.core.processes.wire import Garbled, Wire, wait_for
from mpscale.harness.launch import Launcher

_SETTLE_S = 5.0
"""How long to wait for the failure from which another one followed: TensorFlow may tell of that one first."""
_EXIT_S = 1.0
"""How long a worker that has failed or hung up may take to end."""


class Judged(Exception):
    """A worker of another machine failed, and the session there has found out how.

    Args:
        status: of the case.
        reason: in words.
        cause: for programs.
    """

    def __init__(self, status: str, reason: str, cause: Cause | None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.cause = status, reason, cause


class Member:
    """One of the workers of a case.

    Args:
        name: which one it is, such as ``worker 2 of 2``.
        process: the worker.
        log: what it prints.
        changes: in what its order differs from that of the first worker.
    """

    def __init__(self, name: str, process: Process, log: IO[bytes] | None, changes: Mapping[str, Any]) -> None:
        self.name, self.process, self.log, self.changes = name, process, log, changes
        self.last: Event | EOFError | Judged | None = None
        """Its last message, or that it ended without one; None as long as it goes on."""
        self.waits = False
        """Whether it waits for the answer to a phase."""

    def messages(self) -> list[dict[str, Any]]:
        """Return what has arrived, without waiting. After the last message, :attr:`last` is set."""
        found: list[dict[str, Any]] = []
        while self.last is None:
            try:
                message = self.process.receive(0.0)
                event = event_of(message, WORKER_EVENTS)
            except TimeoutError:
                break
            except (EOFError, Judged) as error:
                self.last = error
                break
            found.append(message)
            self.waits = self.waits or isinstance(event, PhaseReached)
            if isinstance(event, Finished | Failed):
                self.last = event
        return found

    def answer(self) -> None:
        """Answer a phase, if it waits for that."""
        if self.waits:
            self.process.send({})
            self.waits = False

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not by finishing."""
        return self.last is not None and not isinstance(self.last, Finished)

    def certainty(self) -> int:
        """How surely its failure followed from none of another worker: 2, 1 or 0."""
        if isinstance(self.last, Failed | Judged):
            # TensorFlow aborts some processes that have lost another one.
            return {Cause.PEER_LOST: 0, Cause.FATAL_SIGNAL: 1}.get(self.last.cause or Cause.EXCEPTION, 2)
        aborted = not isinstance(self.last, Garbled) and self.process.wait(_EXIT_S) == -signal.SIGABRT
        return 1 if aborted else 2


class Group(Process):
    """The workers of a case as one process: the first one, with the others behind it.

    Args:
        members: the workers.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        first = members[0].process
        super().__init__(first.pid, first.wire, None)
        self._members, self._first = members, members[0]
        self.keeper = first.keeper
        self.beside = [member.process for member in members[1:] if member.process.pid]
        self._news: deque[dict[str, Any]] = deque()
        self._answered = False
        """Whether the first worker has had an answer to a phase."""
        self._failures: list[tuple[float, Member]] = []
        """Failures in their order, and when each was seen."""
        self._blamed: Member | None = None

    def sources(self) -> list[Wire | int]:
        return [source for member in self._members if member.last is None for source in member.process.sources()]

    def begin(self, order: Mapping[str, Any]) -> None:
        """Send each worker its order."""
        for member in self._members:
            member.process.begin({**order, **member.changes})

    def send(self, message: Mapping[str, Any]) -> None:
        """Answer the first worker. The others wait until its first phase, so that the machine is seen while idle."""
        self._answered = True
        self._first.process.send(message)
        self._answer_others()

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Return the next message of the first worker, or the failure of any.

        Raises:
            TimeoutError, EOFError, Garbled: as :meth:`Process.receive`, the last two for the worker that failed.
            Judged: that is one of another machine.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            self._listen()
            if self._news:
                return self._news.popleft()
            if (settled := self._settled()) <= time.monotonic():
                return self._tell()
            left = settled if deadline is None else min(deadline, settled)
            if deadline is not None and deadline <= time.monotonic():
                raise TimeoutError
            # Without any source, all have ended, and that has settled it.
            wait_for(self.sources(), None if left == float("inf") else max(left - time.monotonic(), 0.0))

    def _listen(self) -> None:
        for member in self._members:
            was_well = not member.failed
            messages = member.messages()
            if member is self._first:
                self._news.extend(each for each in messages if each["event"] != Failed.name)
            if was_well and member.failed:
                self._failures.append((time.monotonic(), member))
        if self._answered:
            self._answer_others()

    def _answer_others(self) -> None:
        for member in self._members[1:]:
            member.answer()

    def _settled(self) -> float:
        """When it is known which failure was the first, on the monotonic clock; infinite without any failure."""
        if not self._failures:
            return float("inf")
        seen, _ = self._failures[0]
        certain = any(member.certainty() == 2 for _, member in self._failures)
        return seen if certain or all(member.last is not None for member in self._members) else seen + _SETTLE_S

    def _tell(self) -> dict[str, Any]:
        """Return or raise the first failure of those that followed from no other as far as is known."""
        _, self._blamed = max(self._failures, key=lambda failure: (failure[1].certainty(), -failure[0]))
        self.who, self.log = f"{self._blamed.name}: " if len(self._members) > 1 else "", self._blamed.log
        if isinstance(self._blamed.last, EOFError | Judged):
            raise self._blamed.last
        assert isinstance(self._blamed.last, Failed)
        return self._blamed.last.to_json()

    def wait(self, seconds: float) -> int | None:
        """Return the exit code of the worker that failed, or of the first."""
        process = (self._blamed or self._first).process
        code = process.wait(seconds)
        self.abandoned = process.abandoned
        return code

    def end(self, seconds: float, kill_s: float = KILL_S) -> int | None:
        """End all workers. If none has failed, each may take ``seconds`` to come to its end."""
        deadline = time.monotonic() + (0.0 if self._failures else seconds)
        while (sources := self.sources()) and (left_s := deadline - time.monotonic()) > 0:
            wait_for(sources, left_s)
            self._listen()
        last = self._blamed or self._first
        for member in self._members:
            if member is not last:
                member.process.end(max(deadline - time.monotonic(), 0.0), kill_s)
        # One that has failed by itself may have something to put in order.
        left_s = min(seconds, _EXIT_S) if self._blamed else deadline - time.monotonic()
        code = last.process.end(max(left_s, 0.0), kill_s)
        self._members = []  # their process ids may be those of others from now on
        return code

    def _kill(self, seconds: float) -> int | None:
        codes = [member.process.kill(seconds) for member in self._members]
        return next(iter(codes), None)


class PeerLauncher(Launcher):
    """Starts the workers of a case on this machine, one for each device, by a launcher of its own for each.

    Each case gets ports of its own. They are held open here, so that no other process takes one before its worker does;
    the worker may bind it, too, because both say SO_REUSEPORT.

    Args:
        make: makes the launcher of a worker from an environment.
        environ: the environment of a worker that uses all devices.
        devices: what the workers use, each one of them; a single one is shared by all.
    """

    def __init__(
        self, make: Callable[[Mapping[str, str]], Launcher], environ: Mapping[str, str], devices: Sequence[Device]
    ) -> None:
        super().__init__(environ)
        self._make, self._devices = make, devices
        self._launchers: list[Launcher] = []
        self._workers = 1
        self._of_case = contextlib.ExitStack()
        """The ports and files of the present case."""

    def prepare(self, workers: int = 1) -> None:
        """Have a launcher ready for each worker; raises as their ``prepare`` does."""
        self._workers = workers
        try:
            while len(self._launchers) < workers:
                self._launchers.append(self._make(self._environ_of(len(self._launchers))))
            for launcher in self._launchers[:workers]:
                launcher.begin()
            for launcher in self._launchers[:workers]:
                launcher.prepare()
        except BaseException:
            self.close()
            raise

    def start(self, output: IO[bytes]) -> Process:
        self._of_case.close()
        members: list[Member] = []
        try:
            addresses = [f"127.0.0.1:{self._hold_port()}" for _ in range(self._workers)]
            for place, launcher in enumerate(self._launchers[: self._workers]):
                task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": place}}
                launcher.environ = {**self._environ_of(place), "TF_CONFIG": json.dumps(task)}
                log = output if place == 0 else self._of_case.enter_context(temporary_file())
                device = self._devices[place % len(self._devices)]
                changes = {"device": device.to_json(), **({} if place == 0 else {"steps_path": None})}
                name = f"worker {place + 1} of {self._workers}"
                members.append(Member(name, launcher.start(log), log, changes))
        except BaseException:
            for member in members:
                member.process.kill()
            self._of_case.close()
            raise
        return Group(members)

    def close(self) -> int | None:
        """End what the launchers keep; return the exit code of the first one's."""
        self._of_case.close()
        codes = [launcher.close() for launcher in self._launchers]
        self._launchers = []
        return next(iter(codes), None)

    def _hold_port(self) -> int:
        """Hold a free port until the next case, and return its number.

        Raises:
            OSError: there is none.
        """
        held = self._of_case.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        return int(held.getsockname()[1])

    def _environ_of(self, place: int) -> dict[str, str]:
        """The environment of a worker, which sees its own device alone."""
        visible = self.environ["CUDA_VISIBLE_DEVICES"].split(",")
        own = visible[place % len(visible)]
        return {**self.environ, "CUDA_VISIBLE_DEVICES": own, "TF_GRPC_REUSE_PORT": "true"}
