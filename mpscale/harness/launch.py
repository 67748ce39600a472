"""Starts the process of a case, as a child of a warm parent or as a fresh interpreter, behind one face."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

_WORKER = ("-m", "mpscale.harness.worker")
_IMPORT_S = 180.0


class LaunchError(RuntimeError):
    """The process that runs cases could not be started at all."""


class Process(Protocol):
    """A started worker."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None if it has not ended within ``seconds``."""

    def kill(self) -> None:
        """Ends it and every process of its session."""


class Launcher(Protocol):
    """Starts workers whose standard error goes to a file."""

    def start(self, stderr: Path) -> Process:
        """Starts one.

        Raises:
            LaunchError: it could not be started.
        """

    def close(self) -> None:
        """Ends whatever outlives a case."""


class FreshLauncher:
    """A new interpreter for each case: what a GPU needs.

    Args:
        environ: the whole environment of the workers.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)

    def start(self, stderr: Path) -> Process:
        with stderr.open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, *_WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environ,
                start_new_session=True,
            )
        return _Fresh(child)

    def close(self) -> None:
        """Nothing outlives a case."""


class _Fresh:
    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None and child.stdout is not None  # both were asked for
        self._child = child
        self.pid, self.stdin, self.stdout = child.pid, child.stdin, child.stdout

    def wait(self, seconds: float) -> int | None:
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        _kill_session(self.pid)


class ForkLauncher:
    """Children of one warm parent, which is started when first needed and again should it die.

    Args:
        environ: the whole environment of parent and children.
        log: where the parent's own standard error goes.
    """

    def __init__(self, environ: Mapping[str, str], log: Path) -> None:
        self._environ, self._log = dict(environ), log
        self._parent: subprocess.Popen[bytes] | None = None
        self._lines: IO[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, stderr: Path) -> Process:
        if self._parent is None or self._parent.poll() is not None:
            self.close()
            self._start_parent()
        assert self._socket is not None and self._lines is not None  # _start_parent made them
        ends = [os.pipe(), os.pipe()]
        with stderr.open("wb") as log:
            try:
                socket.send_fds(self._socket, [b"f"], [ends[0][0], ends[1][1], log.fileno()])
                pid = int(json.loads(self._lines.readline())["pid"])
            except (OSError, ValueError) as error:
                for descriptor in (ends[0][1], ends[1][0]):
                    os.close(descriptor)
                raise LaunchError(f"the warm parent died: {error}; its output ends with\n{self._tail()}") from error
            finally:
                os.close(ends[0][0])
                os.close(ends[1][1])
        return _Forked(pid, os.fdopen(ends[0][1], "wb"), os.fdopen(ends[1][0], "rb"), self._socket, self._lines)

    def close(self) -> None:
        """Closes the socket, upon which the parent ends."""
        for resource in (self._lines, self._socket):
            if resource is not None:
                resource.close()
        if self._parent is not None:
            try:
                self._parent.wait(5)
            except subprocess.TimeoutExpired:
                self._parent.kill()
                self._parent.wait()
        self._parent = self._lines = self._socket = None

    def _start_parent(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("ab") as log:
            self._parent = subprocess.Popen(
                [sys.executable, *_WORKER, "--serve", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours
        ours.settimeout(_IMPORT_S)
        try:
            line = _read_line(ours)
        except TimeoutError:
            line = b""
        ours.settimeout(None)
        if not line:
            tail = self._tail()
            self.close()
            raise LaunchError(f"the process that imports TensorFlow did not come up; its output ends with\n{tail}")
        self._lines = ours.makefile("rb")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class _Forked:
    def __init__(
        self, pid: int, stdin: IO[bytes], stdout: IO[bytes], connection: socket.socket, lines: IO[bytes]
    ) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._socket, self._lines = connection, lines
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        if self._code is None:
            deadline = time.monotonic() + seconds
            # The parent says so in one line; until it is there, nothing may be read, or half of it would be lost.
            while not _readable(self._socket, deadline - time.monotonic()):
                if time.monotonic() >= deadline:
                    return None
            line = self._lines.readline()
            # No line: the warm parent itself was killed, and its children with it.
            self._code = os.waitstatus_to_exitcode(json.loads(line)["status"]) if line else -int(signal.SIGKILL)
        return self._code

    def kill(self) -> None:
        _kill_session(self.pid)


def _kill_session(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _readable(connection: socket.socket, seconds: float) -> bool:
    return bool(select.select([connection], [], [], max(seconds, 0))[0])


def _read_line(connection: socket.socket) -> bytes:
    """One line, byte by byte: a buffered reader on a socket with a time-out may lose what it has read."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        line += byte
    return line
