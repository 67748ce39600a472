"""Start processes, exchange messages with them and end them.

Nothing that a process of :func:`start_kept` has started outlives it, or this process, on Linux; see
:mod:`mpscale.core.processes.keeper`. Elsewhere that holds for what has stayed in its process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from mpscale.core.processes import keeper
from mpscale.core.processes.keeper import die_with_parent as die_with_parent
from mpscale.core.processes.wire import Wire, wait_for

_living: WeakSet[Process] = WeakSet()
"""Those that have been started and not yet been killed."""

KILL_S = 15.0
"""How long to wait for a process that has been killed: one inside a hanging driver cannot even be killed."""


class Process(ABC):
    """A process at the other end of a wire. It leads a session of its own.

    Args:
        pid: its process id.
        wire: this process's end, None if it has none.
        ended: becomes readable when the process has ended; see :meth:`Wire.receive`.
    """

    keeper: int | None = None
    """The process id of its parent, if all that it starts and leaves behind becomes a child of that process."""
    abandoned: str | None = None
    """In words, that the end of a process above it has ended it; None as long as that is not known."""
    beside: Sequence[Process] = ()
    """Further processes of this machine that do the same work with it."""
    who = ""
    """Of several such processes, which one failed, such as ``worker 2 of 2: ``; empty if there is only one."""
    log: IO[bytes] | None = None
    """What the one that failed has printed, if that is not in the file that was given for the first."""

    def __init__(self, pid: int, wire: Wire | None, ended: Wire | int | None) -> None:
        self.pid, self._wire, self._ended = pid, wire, ended
        _living.add(self)

    @property
    def wire(self) -> Wire:
        """This process's end of the wire."""
        assert self._wire is not None  # only used with processes that were started with one
        return self._wire

    def sources(self) -> list[Wire | int]:
        """What becomes readable when the process has sent something or has ended."""
        return [each for each in (self._wire, self._ended) if each is not None]

    def begin(self, order: Mapping[str, Any]) -> None:
        """Send the first message, which says what to do."""
        self.send(order)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message."""
        self.wire.send(message)

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """Return the next message; raises as :meth:`Wire.receive` does."""
        return self.wire.receive(seconds, self._ended)

    def end(self, seconds: float, kill_s: float = KILL_S) -> int | None:
        """Close the wire, which should make the process end, and kill what is left.

        Args:
            seconds: how long the process may take to end.
            kill_s: how long to wait after killing it.

        Returns:
            Its exit code, negative for a signal; None if it is still alive.
        """
        if self._wire is not None:
            self._wire.close()
        self.wait(seconds)
        return self.kill(kill_s)

    @abstractmethod
    def wait(self, seconds: float) -> int | None:
        """Return the exit code, negative for a signal; None if the process has not ended within ``seconds``."""

    def kill(self, seconds: float = KILL_S) -> int | None:
        """Kill the process and what it has started; return what :meth:`wait` does."""
        _living.discard(self)
        return self._kill(seconds)

    @abstractmethod
    def _kill(self, seconds: float) -> int | None:
        """As :meth:`kill`."""


class Child(Process):
    """A process that this one starts. It is killed with its process group.

    Args:
        command: program and arguments.
        environ: its environment; None for this process's.
        output: takes what it prints; None discards it.
        errors: takes what it prints on standard error; None for ``output``.
        ends: a new wire, our end first. The process inherits the other end; ``command`` must name its number.
        inherited: other descriptors that it inherits.

    Raises:
        OSError: it could not be started.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        environ: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
        errors: IO[bytes] | None = None,
        ends: tuple[Wire, Wire] | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        ours, theirs = ends or (None, None)
        try:
            self._process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output or subprocess.DEVNULL,
                stderr=errors or subprocess.STDOUT,
                pass_fds=[*inherited, theirs.fileno()] if theirs else inherited,
                start_new_session=True,
            )
        except BaseException:
            if ours is not None:
                ours.close()
            raise
        finally:
            if theirs is not None:
                theirs.close()
        self._pidfd: int | None = None
        # Kernels before 5.3, and interpreters built for them, have none; then the end of the wire has to do.
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(self._process.pid)
        super().__init__(self._process.pid, ours, self._pidfd)

    def wait(self, seconds: float) -> int | None:
        if self._pidfd is not None:
            wait_for([self._pidfd], max(seconds, 0.0))
            return self._process.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(seconds, 0.0))
        return None

    def _kill(self, seconds: float) -> int | None:
        kill_session(self.pid, alive=self._process.poll() is None)
        code = self.wait(seconds)
        if self._wire is not None:
            self._wire.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = self._ended = None
        return code

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does, but only to this process."""
        self._process.send_signal(signal.SIGINT)


class _Kept(Process):
    """A process below two keepers. Where :class:`Child` has arguments of the same name, they are the same."""

    def __init__(
        self, command: Sequence[str | Path], environ: Mapping[str, str], output: IO[bytes], ends: tuple[Wire, Wire]
    ) -> None:
        self._control, theirs = Wire.pair()
        self._code: int | None = None
        self._killed = False
        passed, starter = ends[1].fileno(), os.getpid()
        script = [sys.executable, "-I", "-S", keeper.__file__, str(theirs.fileno()), str(starter), str(passed)]
        try:
            self._keeper = Child([*script, *command], environ, output, ends=ends, inherited=[theirs.fileno()])
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
        try:
            started = self._control.receive(KILL_S)
        except BaseException as error:
            self._control.close()
            code = self._keeper.kill()
            if isinstance(error, TimeoutError | EOFError):
                raise OSError(f"{command[0]} was not started: its keeper was {describe_exit(code)}") from error
            raise
        super().__init__(started["pid"], self._keeper.wire, self._control)
        self.keeper = started["keeper"]

    def wait(self, seconds: float) -> int | None:
        if self._code is None:
            try:
                self._code = os.waitstatus_to_exitcode(self._control.receive(max(seconds, 0.0))["status"])
            except TimeoutError:
                pass
            except EOFError:
                # A keeper was killed, or told to end, and with it the process.
                self._code = -int(signal.SIGKILL)
                if not self._killed:
                    self.abandoned = "the process that watches over the worker was killed, and the worker with it"
        return self._code

    def _kill(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        self._killed = True
        self._control.send({"end": True})
        code = self.wait(seconds)
        # Both keepers have the other end, and close it when nothing is left.
        with contextlib.suppress(TimeoutError, EOFError):
            while True:
                self._control.receive(max(deadline - time.monotonic(), 0.0))
        self._keeper.wait(max(deadline - time.monotonic(), 0.0))
        self._keeper.kill(0.0)
        self._control.close()
        return code


def start_kept(
    command: Sequence[str | Path], environ: Mapping[str, str], output: IO[bytes], ends: tuple[Wire, Wire]
) -> Process:
    """Start a process with everything that it starts under control. Arguments and errors are those of :class:`Child`.

    On Linux, :meth:`Process.wait` returns once nothing of that is left.
    """
    return (_Kept if _CAN_KEEP else Child)(command, environ, output, ends=ends)


_CAN_KEEP = sys.platform == "linux"


def kill_living() -> None:
    """Kill all that this process has started and not yet ended, without waiting for their end."""
    for process in list(_living):
        with contextlib.suppress(Exception):
            process.kill(0.0)


def kill_session(leader: int, alive: bool) -> None:
    """Kill the processes of a session.

    Args:
        leader: the process that leads or led it.
        alive: whether the leader may be alive: once it has been waited for, its id may belong to another process.
    """
    for kill in (os.killpg, os.kill) if alive else (os.killpg,):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(leader, signal.SIGKILL)


def describe_exit(code: int | None) -> str:
    """How a process ended, such as ``killed by SIGKILL``.

    Args:
        code: its exit code, negative for a signal; None if it has not ended.
    """
    if code is None:
        return "not ended"
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"
