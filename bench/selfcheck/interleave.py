"""Several programs timed against each other: each in a process of its own, a block of steps each in turn.

In one process the order of building decides: of two identical train steps the first built was 5 to 8 % faster. Taking
turns, because the speed of a shared machine drifts by more than what is to be told apart. Fresh processes for every
restart, because processes of one program differ too.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from mpscale.lifeline import die_with_parent


@dataclass
class Times:
    """What one contestant took: one entry per restart."""

    step_s: list[float] = field(default_factory=list)
    compile_s: list[float] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)


class Contestant:
    """A process that answers lines of JSON: ready, then the seconds per step of each block asked for.

    Args:
        command: arguments of this Python.
        cores: those that it may use; None leaves it all.
        environment: its whole environment; None takes this process's.
        request: what it is asked before it is ready; None asks nothing.
        log: where its standard error goes; None leaves it where this process's goes.
    """

    def __init__(
        self,
        command: Sequence[str],
        cores: set[int] | None = None,
        environment: Mapping[str, str] | None = None,
        request: dict[str, Any] | None = None,
        log: IO[bytes] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment or os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        self.pid = self._process.pid
        if cores is not None:
            os.sched_setaffinity(self.pid, cores)
        self._sink, self._source = self._process.stdin, self._process.stdout
        self.ready = self._answer() if request is None else self.ask(request)

    def block(self, steps: int) -> float:
        return float(self.ask({"steps": steps})["step_s"])

    def end(self) -> dict[str, Any]:
        facts = self.ask({"end": True})
        self._sink.close()
        if self._process.wait(60) != 0:
            raise RuntimeError(f"{self._process.args} ended with status {self._process.returncode}")
        return facts

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._sink.write(json.dumps(question) + "\n")
        self._sink.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._source.readline()
        if not line:
            raise RuntimeError(f"process {self.pid} ended without an answer")
        return json.loads(line)


class WarmParent:
    """Forks contestants, which saves importing TensorFlow for each.

    As good as fresh interpreters as long as no device has been touched before the fork, which on a GPU importing alone
    may do.

    Args:
        command: arguments of this Python; the number of a socket follows, on which it is to :func:`serve`.
        environment: the whole environment of parent and children.
        log: where their standard error goes.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, *command, str(theirs.fileno())]
            self._process = subprocess.Popen(command, env=environment, stderr=log, pass_fds=[theirs.fileno()])

    def fork(self) -> tuple[IO[str], IO[str], int]:
        """Standard input and output of a new child, and its number."""
        (stdin, sink), (source, stdout) = os.pipe(), os.pipe()
        socket.send_fds(self._socket, [b"f"], [stdin, stdout])
        os.close(stdin)
        os.close(stdout)
        pid = self._socket.recv(20)
        if not pid:
            raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")
        return os.fdopen(sink, "w"), os.fdopen(source), int(pid)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(60)


class Forked(Contestant):
    """A contestant that is a child of ``parent``."""

    def __init__(self, parent: WarmParent, request: dict[str, Any]) -> None:
        self._sink, self._source, self.pid = parent.fork()
        self._handle = os.pidfd_open(self.pid)
        self.ready = self.ask(request)

    def end(self) -> dict[str, Any]:
        return self.ask({"end": True})

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        os.close(self._handle)
        self._sink.close()
        self._source.close()


def serve(descriptor: int, main: Callable[[], None]) -> None:
    """The warm parent's side: forks a child that runs ``main`` for every request, until the other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for the children.
    connection = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                die_with_parent()
                connection.close()
                for target, source in enumerate(descriptors):
                    os.dup2(source, target)
                    os.close(source)
                main()
            except BaseException:
                traceback.print_exc()
            finally:
                # The parent's clean-up is not the child's to do.
                os._exit(0)
        for source in descriptors:
            os.close(source)
        connection.sendall(str(pid).encode())


def race(commands: Mapping[str, Sequence[str]], restarts: int, rounds: int, block_s: float = 0.04) -> dict[str, Times]:
    """Times the programs ``commands``, arguments of this Python.

    Args:
        commands: by name.
        restarts: how often all of them are started anew.
        rounds: blocks of each per restart.
        block_s: about how long a block is, in seconds.

    Returns:
        By name, the median seconds per step of each restart.
    """
    times = {name: Times() for name in commands}
    for _ in range(restarts):
        running: dict[str, Contestant] = {}
        try:
            for name in random.sample(list(commands), len(commands)):
                running[name] = Contestant(commands[name])
                times[name].compile_s.append(running[name].ready["compile_s"])
            about_s = statistics.median(contestant.block(5) for contestant in running.values())
            steps = max(2, round(block_s / about_s))
            blocks: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(rounds):
                for name in random.sample(list(commands), len(commands)):
                    blocks[name].append(running[name].block(steps))
            for name, contestant in running.items():
                times[name].step_s.append(statistics.median(blocks[name]))
                times[name].facts.append(contestant.end())
        finally:
            for contestant in running.values():
                contestant.kill()
    return times
