"""The session's side of the GPU monitor, with a time limit on every answer.

A driver call that hangs or crashes its process therefore costs figures but never a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpscale.core.device import VENDORS, Device, Vendor
from mpscale.core.processes.process import Child, describe_exit
from mpscale.core.processes.wire import Garbled, Wire
from mpscale.core.reason import Code, Reason

# Without persistence mode the driver wakes every GPU for the first call, which takes seconds each.
_DESCRIBE_S = 60.0
_START_S = 10.0
_MARK_S = 0.2
_STOP_S = 1.0
_KILL_S = 1.0
_MOST_STARTS = 3


class SilentDriver(Exception):
    """There is no driver, it does not answer, or the GPU monitor has died; see ``reason``."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.text)
        self.reason = reason


class Driver:
    """A driver that has answered. Make one with :func:`open_driver`.

    ``devices`` are its GPUs, each followed by its MIG instances; ``driver_version`` is like ``"570.86.15"``;
    ``cuda_version``, like ``"12.8"``, is the newest CUDA that the driver supports. Use it from one thread only.

    Args:
        environ: the environment of the GPU monitor; None for this process's.

    Raises:
        SilentDriver: the driver does not answer.
    """

    driver_version: str | None = None
    cuda_version: str | None = None

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = environ
        self._monitor: Child | None = None
        self._starts = 0
        self._sent = self._answered = 0
        self._trouble = Reason(Code.MONITOR_DIED, "the GPU monitor has not been started")
        """Why the last monitor is gone."""
        self.devices: list[Device] = []
        self.reason: Reason | None = None
        """Why there is no GPU to watch; None if the driver works."""
        described = self._ask("describe", _DESCRIBE_S)
        if described["reason"] is not None:
            self.reason = Reason.from_json(described["reason"])
            return
        self.driver_version, self.cuda_version = described["driver"], described["cuda_driver"]
        self.devices = [Device.from_json(device) for device in described["devices"]]

    def another(self) -> Driver:
        """Return the same driver with a monitor of its own, to watch another GPU at the same time. Never raises."""
        return open_driver(self._environ)

    def facts(self, device: Device) -> dict[str, Any]:
        """Return the ``facts`` of a GPU, the ``ways`` its readings are taken, and ``reasons`` why some are not.

        Raises:
            SilentDriver: the driver does not answer.
        """
        answer = self._ask("facts", _START_S, device=device.to_json())
        return {**answer, "reasons": {name: Reason.from_json(why) for name, why in answer["reasons"].items()}}

    def look(self, device: Device) -> dict[str, Any]:
        """Return a GPU's present temperature, event reasons, processes and memory in use; None for what is unknown.

        Raises:
            SilentDriver: the driver does not answer.
        """
        return self._ask("look", _START_S, device=device.to_json())

    def start(self, device: Device, pid: int, file: Path, epoch: float, keeper: int | None = None) -> dict[str, Any]:
        """Begin to watch a process; return the GPU's ``settings``, the ``ways`` of readings, whether it is ``lost``.

        Args:
            device: the GPU.
            pid: the process.
            file: where samples go.
            epoch: when the process was started, on the monotonic clock.
            keeper: its parent, if that has no other children than this process and what it leaves behind.

        Raises:
            SilentDriver: the driver does not answer.
        """
        order = {"device": device.to_json(), "pid": pid, "file": str(file), "epoch": epoch, "keeper": keeper}
        return self._ask("start", _START_S, **order)

    def mark(self, phase: str) -> bool:
        """Take a sample now. Returns once it is taken, or after 0.2 s if the driver does not answer.

        Args:
            phase: what the process has just reached.

        Returns:
            Whether it was taken in time. If the monitor still owes an earlier answer, this does not wait.
        """
        if self._monitor is None:
            return False
        try:
            if self._answered < self._sent:
                self._answer(0.0)
            behind = self._answered < self._sent
            self._order("mark", phase=phase)
            return self._answer(0.0 if behind else _MARK_S) is not None
        except SilentDriver:
            return False

    def stop(self) -> dict[str, Any]:
        """End the watch, within two seconds whatever the driver does; return what :meth:`start` does.

        Raises:
            SilentDriver: the driver does not answer. The monitor is ended, and the next case gets another.
        """
        if self._monitor is None:
            raise SilentDriver(self._trouble)
        return self._ask("stop", _STOP_S)

    @property
    def pid(self) -> int | None:
        """Of the GPU monitor, None if it has ended."""
        return None if self._monitor is None else self._monitor.pid

    def close(self) -> None:
        """End the GPU monitor."""
        if self._monitor is not None:
            self._monitor.end(_KILL_S, _KILL_S)
        self._monitor = None

    def _start_monitor(self) -> Child:
        if self._starts >= _MOST_STARTS:
            raise SilentDriver(_died(f"was lost {_MOST_STARTS} times in this run and is not started again"))
        self._starts += 1
        self._sent = self._answered = 0
        ends = Wire.pair()
        # -P: a file in the working directory must not stand in for a module of the same name.
        command = [sys.executable, "-P", "-m", "mpscale.telemetry.__main__", str(ends[1].fileno())]
        return Child(command, self._environ, ends=ends)

    def _ask(self, order: str, seconds: float, **fields: Any) -> dict[str, Any]:
        if self._monitor is None:
            self._monitor = self._start_monitor()
        self._order(order, **fields)
        answer = self._answer(seconds)
        if answer is None:
            text = f"the GPU driver did not answer within {seconds:g} s"
            self._trouble = Reason(Code.DRIVER_SILENT, text, "see whether nvidia-smi answers; if not, reboot")
            self.close()
            raise SilentDriver(self._trouble)
        return answer

    def _order(self, order: str, **fields: Any) -> None:
        assert self._monitor is not None  # callers have looked
        self._sent += 1
        self._monitor.send({"id": self._sent, "do": order, **fields})

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the answer to the last order, None if it does not come in time.

        Raises:
            SilentDriver: the monitor has died.
        """
        assert self._monitor is not None  # callers have looked
        deadline = time.monotonic() + seconds
        while True:
            try:
                answer = self._monitor.receive(max(deadline - time.monotonic(), 0.0))
                number = answer["id"]
                if not isinstance(number, int) or number > self._sent:
                    raise Garbled("not an answer")
            except TimeoutError:
                return None
            except (Garbled, KeyError):
                self._trouble = _died("got something other than answers on its connection, and was ended")
                self.close()
                raise SilentDriver(self._trouble) from None
            except EOFError:
                code = self._monitor.end(_KILL_S, _KILL_S)
                self._monitor = None
                was = "was " if code is not None and code < 0 else ""
                self._trouble = _died(f"{was}{describe_exit(code)}")
                raise SilentDriver(self._trouble) from None
            self._answered = number
            if self._answered == self._sent:
                return answer


class NoDriver(Driver):
    """Takes the place of a driver that cannot be used; ``reason`` is why."""

    def __init__(self, reason: Reason) -> None:
        self.reason, self.devices = reason, []
        self._monitor, self._trouble = None, reason

    def another(self) -> Driver:
        return NoDriver(self._trouble)

    def _ask(self, order: str, seconds: float, **fields: Any) -> dict[str, Any]:
        raise SilentDriver(self._trouble)


def open_driver(environ: Mapping[str, str] | None = None) -> Driver:
    """Return the driver, or a :class:`NoDriver` with the reason why there is none. Never raises.

    Args:
        environ: the environment to look in; None for this process's.
    """
    if environ is None and not any(map(_has_library, VENDORS.values())):
        return NoDriver(next(iter(VENDORS.values())).no_library)
    try:
        driver = Driver(environ)
    except SilentDriver as error:
        return NoDriver(error.reason)
    except OSError as error:
        return NoDriver(_died(f"cannot be started: {error}"))
    if driver.reason is None:
        return driver
    driver.close()
    return NoDriver(driver.reason)


def _died(how: str) -> Reason:
    cure = "see whether nvidia-smi works; if not, reinstall the NVIDIA driver"
    return Reason(Code.MONITOR_DIED, f"the process that asks the GPU driver {how}", cure)


def _has_library(vendor: Vendor) -> bool:
    """Whether the driver's library exists, so that a monitor is worth starting; it may still be broken."""
    try:
        ctypes.CDLL(vendor.library)
    except OSError:
        # Where the dynamic linker looks: the variable, its default folders, and its cache.
        folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), "/lib64", "/usr/lib64", "/lib", "/usr/lib"]
        if any(folder and Path(folder, vendor.library).exists() for folder in folders):
            return True
        with contextlib.suppress(OSError):
            return vendor.library.encode() in Path("/etc/ld.so.cache").read_bytes()
        return False
    return True
