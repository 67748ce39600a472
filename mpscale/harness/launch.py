"""Starts the process of a case, as a child of a warm parent or as a fresh interpreter, behind one face."""

from __future__ import annotations

import contextlib
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
from typing import IO, Literal, Protocol

from mpscale.core.device import Device

# -P: a file in the working directory must not stand in for a module of the same name.
_WORKER = ("-P", "-m", "mpscale.worker.__main__")
_IMPORT_S = 180.0
_FORK_S = 30.0
_CLOSE_S = 5.0


class LaunchError(RuntimeError):
    """The process that runs cases could not be started at all."""


class Process(Protocol):
    """A started worker."""

    pid: int
    stdin: IO[bytes]
    stdout: IO[bytes]
    ended: int
    """A file descriptor that becomes readable when the process has ended."""

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None if it has not ended within ``seconds``."""

    def kill(self) -> None:
        """Ends it and every process that it left behind in its session."""


class Launcher(Protocol):
    """Starts workers whose standard error goes to a file."""

    def prepare(self) -> None:
        """Does what has to be done once and would otherwise be counted to the first case.

        Raises:
            LaunchError: it could not be done.
        """

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

    def prepare(self) -> None:
        """Nothing outlives a case, so there is nothing to prepare."""

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
        self.ended = os.pidfd_open(child.pid)

    def wait(self, seconds: float) -> int | None:
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        _kill_session(self.pid, alive=self._child.poll() is None)
        os.close(self.ended)


class ForkLauncher:
    """Children of one warm parent, which is started when first needed and again should it die.

    Args:
        environ: the whole environment of parent and children.
        log: where the parent's own standard error goes.
    """

    def __init__(self, environ: Mapping[str, str], log: Path) -> None:
        self._environ, self._log = dict(environ), log
        self._parent: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def prepare(self) -> None:
        """Starts the parent, which takes as long as importing TensorFlow does."""
        if self._parent is None or self._parent.poll() is not None:
            self.close()
            try:
                self._start_parent()
            except BaseException:
                # Also on an interrupt: a parent that is half started would answer the next case out of turn.
                self.close()
                raise

    def start(self, stderr: Path) -> Process:
        self.prepare()
        assert self._socket is not None  # prepare made it
        (stdin, ours_in), (ours_out, stdout) = os.pipe(), os.pipe()
        try:
            with stderr.open("wb") as log:
                socket.send_fds(self._socket, [b"f"], [stdin, stdout, log.fileno()])
            if not _readable(self._socket, _FORK_S):
                raise OSError(f"it did not fork within {_FORK_S:g} s")
            pid = int(json.loads(_read_line(self._socket))["pid"])
        except BaseException as error:
            os.close(ours_in)
            os.close(ours_out)
            self.close()
            if isinstance(error, OSError | ValueError | KeyError):
                raise LaunchError(f"the warm parent died: {error}; its output ends with\n{self._tail()}") from error
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        return _Forked(pid, os.fdopen(ours_in, "wb"), os.fdopen(ours_out, "rb"), self._socket)

    def close(self) -> None:
        """Closes the socket, upon which the parent ends."""
        if self._socket is not None:
            self._socket.close()
        if self._parent is not None:
            try:
                self._parent.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:
                _kill_session(self._parent.pid, alive=True)
                self._parent.wait()
        self._parent = self._socket = None

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
            raise LaunchError(
                f"the process that imports TensorFlow did not come up; its output ends with\n{self._tail()}"
            )

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class _Forked:
    def __init__(self, pid: int, stdin: IO[bytes], stdout: IO[bytes], connection: socket.socket) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._socket = connection
        self.ended = connection.fileno()
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        if self._code is None:
            deadline = time.monotonic() + seconds
            # The parent says so in one line; until it is there, nothing may be read, or half of it would be lost.
            while not _readable(self._socket, deadline - time.monotonic()):
                if time.monotonic() >= deadline:
                    return None
            line = _read_line(self._socket)
            # No line: the warm parent itself was killed, and its children with it.
            self._code = os.waitstatus_to_exitcode(json.loads(line)["status"]) if line else -int(signal.SIGKILL)
        return self._code

    def kill(self) -> None:
        _kill_session(self.pid, alive=self._code is None)


def _kill_session(pid: int, alive: bool) -> None:
    """Kills the processes of the session that ``pid`` leads or led, and itself if it lives: once it has been waited
    for, its number may be another process's.
    """
    for kill in (os.killpg, os.kill) if alive else (os.killpg,):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _readable(connection: socket.socket, seconds: float) -> bool:
    return bool(select.select([connection], [], [], max(seconds, 0))[0])


def _read_line(connection: socket.socket) -> bytes:
    """One line, byte by byte: a buffered reader would take the next line too, and waiting on the socket miss it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            return b""
        line += byte
    return line


# The environment that workers are started in: one visible device, and an allocator whose peak means something.

Allocator = Literal["cuda_malloc_async", "bfc"]

_FIRST_CUDA = (11, 2)
"""The first CUDA with pools for cuda_malloc_async."""


def worker_environment(environ: Mapping[str, str], device: Device, allocator: Allocator | None) -> dict[str, str]:
    """``environ`` with what a worker needs.

    Args:
        environ: that of this process.
        device: the one device that the worker is to see.
        allocator: TensorFlow's allocator on a GPU; None leaves the one that ``environ`` names.
    """
    environment = {**environ, "KERAS_BACKEND": "tensorflow", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if device.uuid is None or device.is_stand_in:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = device.uuid
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if device.kind == "gpu" and allocator == "cuda_malloc_async":
        environment["TF_GPU_ALLOCATOR"] = allocator
    elif allocator is not None:
        # TensorFlow's own pool; it grows as it must, since the worker asks for that.
        environment.pop("TF_GPU_ALLOCATOR", None)
    return environment


def allocators(
    asked: Literal["auto", "cuda_malloc_async", "bfc"], environ: Mapping[str, str], cuda_version: str | None
) -> list[Allocator | None]:
    """The allocators to try, the best first.

    TensorFlow's default pool grows by doubling, so its peak says little about the model; ``cuda_malloc_async`` takes
    from the driver what is needed, where driver and GPU have it.

    Args:
        asked: the option.
        environ: may name one in ``TF_GPU_ALLOCATOR``, which ``auto`` leaves as it is.
        cuda_version: the newest CUDA of the driver, such as ``"12.8"``.
    """
    if asked != "auto":
        return [asked]
    if environ.get("TF_GPU_ALLOCATOR"):
        return [None]
    if cuda_version is not None and tuple(map(int, cuda_version.split("."))) < _FIRST_CUDA:
        return ["bfc"]
    return ["cuda_malloc_async", "bfc"]
