"""NVIDIA's driver as the rest of mpscale sees it: through the sampler's process, with a limit on every wait.

A call to NVML that never returns, or that brings its process down, then costs figures and never a run.
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

from mpscale.core.device import Device

# Without persistence mode the driver wakes every GPU for the first call, which takes seconds each.
_DESCRIBE_S = 60.0
_START_S = 10.0
_MARK_S = 0.2
_STOP_S = 1.0
_KILL_S = 1.0
_MOST_STARTS = 3
_NO_LIBRARY = "no NVIDIA driver library (libnvidia-ml.so.1) on this machine"


class SilentDriver(Exception):
    """NVML does not answer, or its process has died. The message says which."""


class NoDriver:
    """Stands in where there is no driver to talk to.

    Args:
        reason: why not, in plain words.
    """

    driver_version: str | None = None
    cuda_version: str | None = None

    def __init__(self, reason: str) -> None:
        self.reason: str | None = reason
        self.devices: list[Device] = []

    def close(self) -> None:
        """Nothing to close."""


class Driver:
    """A driver that has answered. :func:`open_driver` makes one.

    ``devices`` are its GPUs, each followed by its MIG instances; ``driver_version`` is like ``"570.86.15"`` and
    ``cuda_version``, the newest CUDA that it supports, like ``"12.8"``. To be used from one thread.

    Args:
        environ: the environment of the sampler's process; None takes this process's.

    Raises:
        SilentDriver: NVML does not answer.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._sent = self._answered = 0
        self._pending = b""
        self.trouble: str | None = None
        """What became of the last process that was lost."""
        described = self._describe()
        self.reason: str | None = described["reason"]
        self.driver_version: str | None = described.get("driver")
        self.cuda_version: str | None = described.get("cuda_driver")
        self.devices = [Device.from_json(device) for device in described.get("devices", ())]

    def facts(self, device: Device) -> dict[str, Any]:
        """``facts`` of a GPU, the ``ways`` in which its readings are taken, and ``reasons`` why some are not.

        Raises:
            SilentDriver: NVML does not answer.
        """
        return self._ask("facts", _START_S, device=device.to_json())

    def look(self, device: Device) -> dict[str, Any]:
        """What a GPU is like now: temperature, event reasons, processes, memory in use; None for what is unknown.

        Raises:
            SilentDriver: NVML does not answer.
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
            SilentDriver: NVML does not answer.
        """
        return self._ask("start", _START_S, device=device.to_json(), pid=pid, file=str(file), epoch=epoch)

    def mark(self, phase: str) -> bool:
        """Takes a sample now; returns once it is taken, or after 0.2 s where NVML does not answer.

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
        """Ends the watch, within two seconds whatever NVML does; the GPU's ``settings`` and whether it is ``lost``.

        Raises:
            SilentDriver: NVML does not answer; its process is ended, and the next case gets another.
        """
        if self._process is None:
            raise SilentDriver(self.trouble or "NVML's process has ended")
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
            raise SilentDriver(f"NVML's process was lost {_MOST_STARTS} times in this run, and is not started again")
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
            self.trouble = f"NVML did not answer within {seconds:g} s"
            self.close()
            raise SilentDriver(self.trouble)
        return answer

    def _send(self, order: str, **fields: Any) -> None:
        if self._process is None or self._process.stdin is None:
            raise SilentDriver("NVML's process has ended")
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
        self.trouble = f"NVML's process ended with exit code {code}"
        if code is not None and code < 0:
            names = {number.value: number.name for number in signal.Signals}
            self.trouble = f"NVML's process was killed by {names.get(-code, f'signal {-code}')}"
        return SilentDriver(self.trouble)


def open_driver(environ: Mapping[str, str] | None = None) -> Driver | NoDriver:
    """The driver where NVML works, else a stand-in that knows why not. Never raises.

    Args:
        environ: the environment to look in; None takes this process's.
    """
    if environ is None and not _has_library():
        return NoDriver(_NO_LIBRARY)
    try:
        driver = Driver(environ)
    except (SilentDriver, OSError) as error:
        return NoDriver(str(error))
    if driver.reason is None:
        return driver
    driver.close()
    return NoDriver(driver.reason)


def _has_library() -> bool:
    """Whether the library can be loaded at all: on a machine without a driver this saves a process."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        # One that is there and broken is for the sampler's process to find out and to name.
        return "cannot open shared object file: No such file" not in str(error)
    return True
