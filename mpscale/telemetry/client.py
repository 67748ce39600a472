"""The GPU's driver as the rest of mpscale sees it: through the monitor's process, with a limit on every wait.

A call to the driver that never returns, or that takes its process down, then costs figures and never a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpscale.core.device import VENDORS, Device, Vendor
from mpscale.core.reason import Code, Reason

# Without persistence mode the driver wakes every GPU for the first call, which takes seconds each.
_DESCRIBE_S = 60.0
_START_S = 10.0
_MARK_S = 0.2
_STOP_S = 1.0
_KILL_S = 1.0
_MOST_STARTS = 3
_SEE = "see whether nvidia-smi answers; if not, reboot"
_NEW = "see whether nvidia-smi works; if not, reinstall the NVIDIA driver"


class SilentDriver(Exception):
    """The driver does not answer, or the monitor has died.

    Args:
        reason: which.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class NoDriver:
    """Stands in if there is no driver to talk to.

    Args:
        reason: why not.
    """

    driver_version: str | None = None
    cuda_version: str | None = None

    def __init__(self, reason: Reason) -> None:
        self.reason: Reason | None = reason
        self.devices: list[Device] = []

    def close(self) -> None:
        """Nothing to close."""


class Driver:
    """A driver that has answered. :func:`open_driver` makes one.

    ``devices`` are its GPUs, each followed by its MIG instances; ``driver_version`` is like ``"570.86.15"`` and
    ``cuda_version``, the newest CUDA that it supports, like ``"12.8"``. To be used from one thread.

    Args:
        environ: the environment of the monitor; None takes this process's.

    Raises:
        SilentDriver: the driver does not answer.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._sent = self._answered = 0
        self._pending = b""
        self.trouble: Reason | None = None
        """What became of the last process that was lost."""
        described = self._describe()
        reason = described["reason"]
        self.reason: Reason | None = None if reason is None else Reason.from_json(reason)
        self.driver_version: str | None = described.get("driver")
        self.cuda_version: str | None = described.get("cuda_driver")
        self.devices = [Device.from_json(device) for device in described.get("devices", ())]

    def facts(self, device: Device) -> dict[str, Any]:
        """``facts`` of a GPU, the ``ways`` in which its readings are taken, and ``reasons`` why some are not.

        Raises:
            SilentDriver: the driver does not answer.
        """
        told = self._ask("facts", _START_S, device=device.to_json())
        return {**told, "reasons": {name: Reason.from_json(reason) for name, reason in told["reasons"].items()}}

    def look(self, device: Device) -> dict[str, Any]:
        """The state of a GPU now: temperature, clock events, processes, memory in use; None for what is unknown.

        Raises:
            SilentDriver: the driver does not answer.
        """
        return self._ask("look", _START_S, device=device.to_json())

    def start(self, device: Device, pid: int, file: Path, epoch: float) -> dict[str, Any]:
        """Begins to watch a process; its GPU's ``settings``, the ``ways`` of readings, and whether it is ``lost``.

        Args:
            device: the GPU.
            pid: the process.
            file: where samples go.
            epoch: when the process was started, of the monotonic clock.

        Raises:
            SilentDriver: the driver does not answer.
        """
        return self._ask("start", _START_S, device=device.to_json(), pid=pid, file=str(file), epoch=epoch)

    def mark(self, phase: str) -> bool:
        """Takes a sample now; returns once it is taken, or after 0.2 s if the driver does not answer.

        Args:
            phase: what the process has just reached.

        Returns:
            Whether it was taken in time. One that still owes an answer is not waited for again.
        """
        if self._process is None:
            return False
        try:
            if self._answered < self._sent:
                self._drain(0.0)
            behind = self._answered < self._sent
            self._send("mark", phase=phase)
            self._drain(0.0 if behind else _MARK_S)
        except SilentDriver:
            return False
        return self._answered == self._sent

    def stop(self) -> dict[str, Any]:
        """End the watch, within two seconds whatever the driver does; the ``settings``, and whether it is ``lost``.

        Raises:
            SilentDriver: the driver does not answer; its process is ended, and the next case gets another.
        """
        if self._process is None:
            raise SilentDriver(self.trouble or _ended("has ended"))
        return self._ask("stop", _STOP_S)

    @property
    def pid(self) -> int | None:
        """Of the sampler's process, None where it has ended."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)
            return
        process.kill()
        # Not waited for without end: a process inside a hanging driver cannot even be killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)

    def _describe(self) -> dict[str, Any]:
        self._begin()
        return self._ask("describe", _DESCRIBE_S)

    def _begin(self) -> None:
        if self._starts >= _MOST_STARTS:
            raise SilentDriver(_ended(f"was lost {_MOST_STARTS} times in this run, and is not started again"))
        self._starts += 1
        self._sent = self._answered = 0
        self._pending = b""
        # -P: a file in the working directory must not stand in for a module of the same name.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mpscale.telemetry.__main__"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=None if self._environ is None else dict(self._environ),
            start_new_session=True,
        )

    def _ask(self, order: str, seconds: float, **fields: Any) -> dict[str, Any]:
        if self._process is None:
            self._begin()
        self._send(order, **fields)
        answer = self._drain(seconds)
        if answer is None:
            self.trouble = Reason(Code.DRIVER_SILENT, f"the GPU driver did not answer within {seconds:g} s", _SEE)
            self.close()
            raise SilentDriver(self.trouble)
        return answer

    def _send(self, order: str, **fields: Any) -> None:
        if self._process is None or self._process.stdin is None:
            raise SilentDriver(_ended("has ended"))
        try:
            self._process.stdin.write(json.dumps({"id": self._sent + 1, "do": order, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None
        self._sent += 1

    def _drain(self, seconds: float) -> dict[str, Any] | None:
        """Reads answers until the last order's is there, for at most so long; None if it is not.

        Raises:
            SilentDriver: the process has died.
        """
        deadline = time.monotonic() + seconds
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout
        while True:
            while b"\n" in self._pending:
                line, _, self._pending = self._pending.partition(b"\n")
                answer: dict[str, Any] = json.loads(line)
                self._answered = answer["id"]
                if self._answered == self._sent:
                    return answer
            readable, _, _ = select.select([stream], [], [], max(deadline - time.monotonic(), 0.0))
            if not readable:
                return None
            chunk = stream.read1(65536)  # type: ignore[attr-defined]
            if not chunk:
                raise self._death()
            self._pending += chunk

    def _death(self) -> SilentDriver:
        process = self._process
        code = None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_KILL_S)
        self.close()
        self.trouble = _ended(f"ended with exit code {code}")
        if code is not None and code < 0:
            names = {number.value: number.name for number in signal.Signals}
            self.trouble = _ended(f"was killed by {names.get(-code, f'signal {-code}')}")
        return SilentDriver(self.trouble)


def _ended(how: str) -> Reason:
    return Reason(Code.MONITOR_DIED, f"the process that asks the GPU driver {how}", _NEW)


def open_driver(environ: Mapping[str, str] | None = None) -> Driver | NoDriver:
    """Return the driver if it works, else a stand-in that knows why not. Never raises.

    Args:
        environ: the environment to look in; None takes this process's.
    """
    if environ is None and not any(map(_has_library, VENDORS.values())):
        return NoDriver(next(iter(VENDORS.values())).no_library)
    try:
        driver = Driver(environ)
    except SilentDriver as error:
        return NoDriver(error.reason)
    except OSError as error:
        return NoDriver(_ended(f"cannot be started: {error}"))
    if driver.reason is None:
        return driver
    driver.close()
    return NoDriver(driver.reason)


def _has_library(vendor: Vendor) -> bool:
    """Whether the library can be loaded at all: on a machine without a driver this saves a process."""
    try:
        ctypes.CDLL(vendor.library)
    except OSError as error:
        # A broken library is for the monitor to find and to name.
        return "cannot open shared object file: No such file" not in str(error)
    return True
