"""Starts the process of a case: as a fork of a warm parent, or as a fresh interpreter."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mpscale.core.device import Device
from mpscale.core.process import Child, Process, kill_session
from mpscale.core.reason import Reason
from mpscale.core.wire import Wire

# -P: a file in the working directory must not stand in for a module of the same name.
_WORKER = (sys.executable, "-P", "-m", "mpscale.worker.__main__")
_IMPORT_S = 180.0
_FORK_S = 30.0
_CLOSE_S = 5.0


class LaunchError(RuntimeError):
    """The process that runs cases could not be started."""


class UnsafeFork(LaunchError):
    """A child of the warm parent might not be able to use the GPU."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text)
        self.reason = reason


class Launcher:
    """Starts workers: each a new interpreter.

    Args:
        environ: the whole environment of the workers.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = dict(environ)
        """That of the next worker. It may be replaced between two cases."""

    def prepare(self) -> None:
        """Do once what would otherwise count as time of the first case.

        Raises:
            LaunchError: it could not be done.
        """

    def start(self, log: Path) -> Process:
        """Start a worker, whose standard output and error go to the file ``log``.

        Raises:
            LaunchError: the process that starts workers failed.
            OSError: the worker could not be started.
        """
        return self._child("--wire", log, "wb")

    def close(self) -> None:
        """End whatever outlives a case."""

    def _child(self, option: str, log: Path, open_as: Literal["ab", "wb"]) -> Child:
        with log.open(open_as) as output:
            ends = Wire.pair()
            return Child([*_WORKER, option, str(ends[1].fileno())], self._environ_of(option), output, ends=ends)

    def _environ_of(self, option: str) -> Mapping[str, str]:
        return self.environ


class ForkLauncher(Launcher):
    """Has a warm parent fork a child for each case. The parent is started when it is needed, and again if it has died.

    The parent sees no GPU. Each child sets what differs in its own environment before it does anything else, which is
    early enough: TensorFlow and CUDA read their variables when they first touch a device.

    Args:
        environ: the whole environment of the children.
        log: where the parent's own output goes.
        on_gpu: whether the children use a GPU, so that the parent must not hold one.
    """

    def __init__(self, environ: Mapping[str, str], log: Path, on_gpu: bool) -> None:
        super().__init__(environ)
        self._log, self._on_gpu = log, on_gpu
        self._parent: Child | None = None
        self._parents_environ: dict[str, str] = {}

    def prepare(self) -> None:
        """Start the parent, which takes as long as importing TensorFlow does.

        Raises:
            LaunchError: it did not come up.
            UnsafeFork: it holds a GPU, or nothing shows that it does not.
        """
        if self._parent is not None and self._parent.wait(0.0) is None:
            return
        self.close()
        try:
            self._parents_environ = {**self.environ, "CUDA_VISIBLE_DEVICES": "-1"}
            self._parent = self._child("--serve", self._log, "ab")
            held = self._parent.receive(_IMPORT_S).get("held")
            if held is not None and self._on_gpu:
                raise UnsafeFork(Reason.from_json(held))
        except BaseException as error:
            # Also on an interrupt: a half-started parent would answer the next case out of turn.
            self.close()
            if isinstance(error, OSError | EOFError):
                raise LaunchError(f"the process that imports TensorFlow did not come up{self._tail()}") from error
            raise

    def _environ_of(self, option: str) -> Mapping[str, str]:
        return self._parents_environ

    def _changes(self) -> dict[str, str | None]:
        """The variables that a child sets, or with None removes, to get from the parent's environment to its own."""
        names = self._parents_environ.keys() | self.environ.keys()
        return {
            name: self.environ.get(name)
            for name in sorted(names)
            if self._parents_environ.get(name) != self.environ.get(name)
        }

    def start(self, log: Path) -> Process:
        self.prepare()
        assert self._parent is not None  # prepare made it
        ours, theirs = Wire.pair()
        try:
            with log.open("wb") as output:
                self._parent.wire.send({"environ": self._changes()}, [theirs.fileno(), output.fileno()])
            pid = int(self._parent.receive(_FORK_S)["pid"])
        except BaseException as error:
            ours.close()
            self.close()
            if isinstance(error, TimeoutError):
                raise LaunchError(f"the warm parent did not fork within {_FORK_S:g} s{self._tail()}") from error
            if isinstance(error, OSError | EOFError | KeyError):
                raise LaunchError(f"the warm parent died: {error}{self._tail()}") from error
            raise
        finally:
            theirs.close()
        return _Forked(pid, ours, self._parent)

    def close(self) -> None:
        if self._parent is not None:
            self._parent.end(_CLOSE_S)
        self._parent = None

    def _tail(self) -> str:
        output = self._log.read_text(errors="replace") if self._log.exists() else ""
        return f"; its output ends with\n{output[-2000:]}"


class _Forked(Process):
    """A child of the warm parent, which reports when the child has ended."""

    def __init__(self, pid: int, wire: Wire, parent: Child) -> None:
        super().__init__(pid, wire, parent.wire)
        self._parent = parent
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        if self._code is None:
            try:
                self._code = os.waitstatus_to_exitcode(self._parent.receive(max(seconds, 0.0))["status"])
            except TimeoutError:
                pass
            except EOFError:
                # The warm parent itself was killed, and its children with it.
                self._code = -int(signal.SIGKILL)
        return self._code

    def _kill(self, seconds: float) -> int | None:
        kill_session(self.pid, alive=self._code is None)
        self.wire.close()
        return self.wait(seconds)


Allocator = Literal["cuda_malloc_async", "bfc"]

_FIRST_CUDA = (11, 2)
"""The first CUDA with pools for cuda_malloc_async."""


def worker_environment(environ: Mapping[str, str], device: Device, allocator: Allocator | None) -> dict[str, str]:
    """Return ``environ`` with what a worker needs: one visible device, and an allocator whose peak is meaningful.

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
