"""Starts the process of a case: as a fork of a warm parent, or as a fresh interpreter."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import IO, Literal

from mpscale.core.cause import Cause
from mpscale.core.device import Device
from mpscale.core.files.temporary import temporary_file
from mpscale.core.processes.process import Process, describe_exit, kill_session, start_kept
from mpscale.core.processes.wire import Garbled, Wire
from mpscale.core.reason import Reason

# -P: a file in the working directory must not stand in for a module of the same name.
_WORKER = (sys.executable, "-P", "-m", "mpscale.worker.__main__")
_IMPORT_S = 180.0
_FORK_S = 30.0
_CLOSE_S = 5.0
_GARBLED = "something other than mpscale wrote to the connection of the process that imports TensorFlow"


class LaunchError(RuntimeError):
    """The process that runs cases could not be started.

    Args:
        text: why.
        cause: why, for programs.
    """

    def __init__(self, text: str, cause: Cause) -> None:
        super().__init__(text)
        self.cause = cause


class UnsafeFork(LaunchError):
    """A child of the warm parent might not be able to use the GPU."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text, Cause.NOT_STARTED)
        self.reason = reason


class Launcher:
    """Starts workers: each a new interpreter.

    Args:
        environ: the whole environment of the workers.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = dict(environ)
        """That of the next worker. It may be replaced between two cases."""

    def begin(self) -> None:
        """Begin what :meth:`prepare` waits for, so that several launchers do it at the same time.

        Raises:
            OSError: a process could not be started.
        """

    def prepare(self, workers: int = 1) -> None:
        """Do once what would otherwise count as time of the first case.

        Args:
            workers: how many of them train the next case together; of interest to those who start several.

        Raises:
            LaunchError: it could not be done.
        """

    def start(self, output: IO[bytes]) -> Process:
        """Start a worker, whose standard output and error go to ``output``.

        Raises:
            LaunchError: the process that starts workers failed.
            OSError: the worker could not be started.
        """
        return self._child("--wire", output)

    def close(self) -> int | None:
        """End whatever outlives a case."""
        return None

    def _child(self, option: str, output: IO[bytes], environ: Mapping[str, str] | None = None) -> Process:
        ends = Wire.pair()
        return start_kept([*_WORKER, option, str(ends[1].fileno())], environ or self.environ, output, ends)


class ForkLauncher(Launcher):
    """Has a warm parent fork a child for each case. The parent is started when it is needed, and again if it has died.

    The parent sees no GPU. Each child sets what differs in its own environment before it does anything else, which is
    early enough: TensorFlow and CUDA read their variables when they first touch a device.

    Args:
        environ: the whole environment of the children.
        on_gpu: whether the children use a GPU, so that the parent must not hold one.
    """

    def __init__(self, environ: Mapping[str, str], on_gpu: bool) -> None:
        super().__init__(environ)
        self._on_gpu = on_gpu
        self._log: IO[bytes] | None = None
        """Takes the parent's own output."""
        self._parent: Process | None = None
        self._parents_environ: dict[str, str] = {}
        self._imported = False
        """Whether the parent has imported TensorFlow, and may fork."""

    def begin(self) -> None:
        """Start the parent, unless it lives.

        Raises:
            OSError: it could not be started.
        """
        if self._parent is not None and self._parent.wait(0.0) is None:
            return
        self.close()
        self._parents_environ = {**self.environ, "CUDA_VISIBLE_DEVICES": "-1"}
        self._log, self._imported = temporary_file(), False
        self._parent = self._child("--serve", self._log, self._parents_environ)

    def prepare(self, workers: int = 1) -> None:
        """Start the parent, which takes as long as importing TensorFlow does.

        Raises:
            LaunchError: it did not come up.
            UnsafeFork: it holds a GPU, or nothing shows that it does not.
            OSError: it could not be started.
        """
        self.begin()
        assert self._parent is not None  # it has been begun
        if self._imported:
            return
        try:
            held = self._parent.receive(_IMPORT_S).get("held")
            reason = None if held is None else Reason.from_json(held)
            if reason is not None and self._on_gpu:
                raise UnsafeFork(reason)
            self._imported = True
        except BaseException as error:
            # Also on an interrupt: a half-started parent would answer the next case out of turn.
            code = self.close()
            if isinstance(error, Garbled | TypeError):
                raise LaunchError(_GARBLED, Cause.GARBLED) from error
            if isinstance(error, OSError | EOFError):
                cause = Cause.NOT_STARTED if code is None or code < 0 else Cause.EXITED
                within = f" within {_IMPORT_S:g} s" if isinstance(error, TimeoutError) else ""
                text = f"the process that imports TensorFlow did not come up{within} ({describe_exit(code)})"
                raise LaunchError(f"{text}{self._tail()}", cause) from error
            raise

    def _changes(self) -> dict[str, str | None]:
        """The variables that a child sets, or with None removes, to get from the parent's environment to its own."""
        names = self._parents_environ.keys() | self.environ.keys()
        return {
            name: self.environ.get(name)
            for name in sorted(names)
            if self._parents_environ.get(name) != self.environ.get(name)
        }

    def start(self, output: IO[bytes]) -> Process:
        self.prepare()
        try:
            return self._fork(output)
        except LaunchError:
            # It was killed between two cases, which costs nothing but the time to start another.
            self.prepare()
            return self._fork(output)

    def _fork(self, output: IO[bytes]) -> Process:
        assert self._parent is not None  # prepare made it
        ours, theirs = Wire.pair()
        try:
            self._parent.wire.send({"environ": self._changes()}, [theirs.fileno(), output.fileno()])
            pid = int(self._parent.receive(_FORK_S)["pid"])
        except BaseException as error:
            ours.close()
            code = self.close()
            if isinstance(error, TimeoutError):
                text = f"the process that forks workers did not do so within {_FORK_S:g} s{self._tail()}"
                raise LaunchError(text, Cause.NOT_STARTED) from error
            if isinstance(error, Garbled | KeyError | TypeError | ValueError):
                raise LaunchError(_GARBLED, Cause.GARBLED) from error
            if isinstance(error, OSError | EOFError):
                text = f"the process that forks workers has died ({describe_exit(code)}){self._tail()}"
                raise LaunchError(text, Cause.NOT_STARTED) from error
            raise
        finally:
            theirs.close()
        return _Forked(pid, ours, self._parent)

    def close(self) -> int | None:
        """End the parent; return its exit code, None if there is none."""
        code = None if self._parent is None else self._parent.end(_CLOSE_S)
        self._parent = None
        return code

    def _tail(self) -> str:
        output = "" if self._log is None else tail(self._log, 2000)
        return f"; its output ends with\n{output}" if output else ""


class _Forked(Process):
    """A child of the warm parent, which reports when the child has ended."""

    def __init__(self, pid: int, wire: Wire, parent: Process) -> None:
        super().__init__(pid, wire, parent.wire)
        self._parent = parent
        self._code: int | None = None
        self.keeper = parent.pid
        self._pidfd: int | None = None
        # As for a child: older kernels have none.
        with contextlib.suppress(OSError, AttributeError):
            self._pidfd = os.pidfd_open(pid)

    def wait(self, seconds: float) -> int | None:
        if self._code is None:
            try:
                self._code = os.waitstatus_to_exitcode(self._parent.receive(max(seconds, 0.0))["status"])
            except TimeoutError:
                pass
            except (EOFError, KeyError, TypeError, ValueError):
                # The warm parent itself was killed, and its children with it.
                self._code = -int(signal.SIGKILL)
                how = describe_exit(self._parent.wait(1.0))
                self.abandoned = f"the process that forks workers has died ({how}), and the worker with it"
        return self._code

    def _kill(self, seconds: float) -> int | None:
        if self._pidfd is None:
            kill_session(self.pid, alive=self._code is None)
        elif self._code is None:
            # The warm parent ends what it leaves behind.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        code = self.wait(seconds)
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self.wire.close()
        return code


def tail(log: IO[bytes], size: int) -> str:
    """The last ``size`` bytes of a file. Its position, which another process shares, stays where it is."""
    end = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), size, max(end - size, 0)).decode(errors="replace").strip()


Allocator = Literal["cuda_malloc_async", "bfc"]

_FIRST_CUDA = (11, 2)
"""The first CUDA with pools for cuda_malloc_async."""


def worker_environment(environ: Mapping[str, str], device: Device, allocator: Allocator | None) -> dict[str, str]:
    """Return ``environ`` with what a worker needs: the devices it uses, and an allocator whose peak is meaningful.

    Args:
        environ: that of this process. Its ``TF_CONFIG`` is left out: Keras and TensorFlow would act on it.
        device: the device that the worker is to see, with those beside it.
        allocator: TensorFlow's allocator on a GPU; None leaves the one that ``environ`` names.
    """
    environment = {**environ, "KERAS_BACKEND": "tensorflow", "PYTHONUNBUFFERED": "1"}
    environment.pop("TF_CONFIG", None)
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if device.uuid is None or device.is_stand_in:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join([device.uuid, *device.beside])
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
    """Return the allocators to try, the best first.

    TensorFlow's default pool grows by doubling, so its peak says little about the model. ``cuda_malloc_async``, if
    driver and GPU support it, takes from the driver what is needed.

    Args:
        asked: the option.
        environ: may name one in ``TF_GPU_ALLOCATOR``, which ``auto`` keeps.
        cuda_version: the newest CUDA of the driver, such as ``"12.8"``.
    """
    if asked != "auto":
        return [asked]
    if environ.get("TF_GPU_ALLOCATOR"):
        return [None]
    if cuda_version is not None and tuple(map(int, cuda_version.split("."))) < _FIRST_CUDA:
        return ["bfc"]
    return ["cuda_malloc_async", "bfc"]
