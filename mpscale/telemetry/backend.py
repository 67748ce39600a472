"""The interface to GPUs of all vendors. A vendor is a module with ``open_backend``, named in ``core.device.VENDORS``.

A call to a driver may hang or crash its process, so only the monitor (``__main__.py``) uses this. Methods that may fail
return a value or a :class:`~mpscale.core.reason.Reason` and never raise.

A call may also succeed with an answer that is not a measurement: 0 for something that is never 0 on a running GPU, or a
number that no GPU can have.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpscale.core.device import VENDORS, Device, Vendor
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.samples import Reading

ABSENT = (Code.NOT_TOLD, Code.DRIVER_TOO_OLD, Code.BINDING_TOO_OLD, Code.BINDING_BROKEN)
"""Codes for calls that the driver or the GPU does not have. Any other failure may be temporary, so the call is kept."""

_LISTS = (Reading.PROCESSES, Reading.GRAPHICS_PROCESSES, Reading.SERVICE_PROCESSES)

_POWER_EXCESS = 3
"""Momentary power may exceed the power limit, which applies to the mean, but not by this factor."""


class Implausible(Exception):
    """A call succeeded, but its answer is not a measurement. The message says why not."""


class Range(NamedTuple):
    """The smallest and the largest plausible answer. Wide on purpose: it rejects garbage but no future GPU."""

    least: float
    most: float
    unit: str = ""

    def checked(self, value: Any) -> Any:
        """Return ``value`` if it can be a measurement.

        Raises:
            Implausible: it cannot.
        """
        answer = f"the driver answers {value} {self.unit}".strip()
        if value is None or not math.isfinite(value) or value == 0 < self.least:
            raise Implausible(f"{answer}, which is not a measurement")
        if not self.least <= value <= self.most:
            raise Implausible(f"{answer}; only {self.least:g} to {self.most:g} is plausible")
        return value


_CLOCK, _POWER = Range(1, 100_000, "MHz"), Range(0.001, 10_000, "W")
_SWITCH = Range(0, 1, "(0 is off, 1 is on)")

RANGES = {
    Reading.ENERGY: Range(0.001, 2**62 / 1e3, "J"),
    Reading.POWER: _POWER,
    Reading.SM_CLOCK: _CLOCK,
    Reading.MEMORY_CLOCK: _CLOCK,
    Reading.TEMPERATURE: Range(1, 150, "°C"),
    Reading.UTILIZATION: Range(0, 100, "%"),
    Reading.POWER_LIMIT: _POWER,
    Reading.ECC: _SWITCH,
    Reading.PERSISTENCE: _SWITCH,
}
"""For the readings that are numbers. Vendors check the parts of the others."""


class Memory(NamedTuple):
    """Memory of a GPU in MiB; ``used_mib`` excludes ``reserved_mib``, which the driver keeps for itself.

    If the driver does not report reserved memory, ``reserved_mib`` is None and ``used_mib`` may include it.
    """

    used_mib: float
    reserved_mib: float | None


class Processes(NamedTuple):
    """Processes on a GPU: MiB by process id, None for a process whose memory is unknown.

    ``number`` is valid even if the entries cannot be read; ``by_pid`` is then the reason.
    """

    number: int
    by_pid: dict[int, float | None] | Reason


class Call(NamedTuple):
    """One way to take a reading.

    Args:
        name: as shown to users.
        take: returns the value in the reading's unit: a number, :class:`Memory`, a list of ``(pid, MiB or None)`` for
            a list of processes, or a tuple of :class:`~mpscale.telemetry.samples.ClockEvent`.
    """

    name: str
    take: Callable[[], Any]


class GpuBackend(ABC):
    """An opened driver."""

    vendor: Vendor
    count: int
    """How many GPUs it has found."""

    @abstractmethod
    def devices(self) -> list[Device]:
        """The GPUs in the order of the PCI bus, each followed by its instances if it is divided.

        A GPU that does not answer keeps its place, so that indices hold; its ``uuid`` is then None.
        """

    @abstractmethod
    def driver_version(self) -> str | None:
        """The version of the driver, None if unknown."""

    @abstractmethod
    def runtime_version(self) -> str | None:
        """The newest version of the vendor's runtime (CUDA) that the driver supports, None if unknown."""

    @abstractmethod
    def gpu(self, device: Device) -> Gpu:
        """Open one of the devices."""

    @abstractmethod
    def explain(self, error: Exception) -> Reason:
        """The reason for an exception of the driver's library."""

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any | Reason:
        """Return the answer of ``function``, or the reason why it has none."""
        try:
            return function(*arguments)
        except Implausible as error:
            return Reason(Code.IMPLAUSIBLE, str(error))
        except Exception as error:  # libraries that do not fit fail in any way, and telemetry must never end a run
            return self.explain(error)


class Gpu(ABC):
    """One GPU, or one instance of a divided one.

    A reading can often be taken in several ways, not all of which a driver supports: the first that works is kept.

    Args:
        backend: the opened driver.
        device: which GPU; one with a UUID.
        calls: the ways to take each reading, newest first, or why it is not taken.
        largest_power_limit_w: the highest power limit that can be set; None if unknown.
        garbled: why the driver's process lists cannot be read; None if they can.
    """

    no_reserved = Reason(Code.NOT_TOLD, "the driver does not report reserved memory")

    def __init__(
        self,
        backend: GpuBackend,
        device: Device,
        calls: Mapping[Reading, Sequence[Call] | Reason],
        largest_power_limit_w: float | None = None,
        garbled: Reason | None = None,
    ) -> None:
        self.backend, self.device = backend, device
        self.lost = False
        self.ways: dict[str, str] = {}
        """The call that works, by reading."""
        self.reasons: dict[str, Reason] = {}
        """Why a reading has no value, for good or the last time it was taken. Deleted once it has one."""
        self._chosen: dict[Reading, Call] = {}
        self._garbled = garbled
        self._most_w = None if largest_power_limit_w is None else _POWER_EXCESS * largest_power_limit_w
        unknown = Reason(Code.NOT_TOLD, f"{backend.vendor.name}'s driver does not report this")
        for reading in Reading:
            if reading is Reading.RESERVED_MEMORY:
                continue  # comes with the memory
            ways = calls.get(reading, unknown)
            if isinstance(ways, Reason):
                self._note(reading, ways)
            else:
                self._probe(reading, ways)

    @abstractmethod
    def vendor_facts(self) -> dict[str, Any | Reason]:
        """Fixed properties by name. ``slowdown_c``, the temperature at which it slows down, is used if it is there."""

    def read(self, reading: Reading) -> Any | Reason:
        """Take a reading, in its unit; the reason if it has no value."""
        call = self._chosen.get(reading)
        if call is None:
            return self.reasons[reading]
        value = self._take(reading, call)
        if isinstance(value, Reason) and value.code is not Code.GPU_LOST:
            # A failure that lasts a moment must not leave a gap.
            value = self._take(reading, call)
        if isinstance(value, Reason):
            self._note(reading, value)
        else:
            self._keep(reading, call, value)
        return value

    def asks(self, reading: Reading) -> bool:
        """Whether there is a call for the reading, so a missing value means that it failed."""
        return reading in self._chosen

    def processes(self, lists: Iterable[Reading]) -> Processes | Reason:
        """The processes on the GPU.

        Args:
            lists: which of the driver's lists. A process in several of them has the same memory in each.
        """
        entries: list[tuple[int, float | None]] = []
        missing: list[Reason] = []
        answers = 0
        for reading in lists:
            answer = self.read(reading)
            if not isinstance(answer, Reason):
                answers += 1
                entries += answer
            elif reading in self.ways:
                # This list usually works. The others alone would look like all processes.
                return answer
            else:
                missing.append(answer)
        if not answers:
            return missing[0]
        if self._garbled is not None:
            return Processes(len(entries), self._garbled)
        by_pid: dict[int, float | None] = {}
        for pid, mib in entries:
            by_pid[pid] = max((each for each in (mib, by_pid.get(pid)) if each is not None), default=None)
        return Processes(len(by_pid), by_pid)

    def settings(self) -> dict[str, Any]:
        """Settings that affect figures and that an administrator may change between cases; None if unknown."""
        found: dict[str, Any] = {}
        for reading in (Reading.POWER_LIMIT, Reading.ECC, Reading.PERSISTENCE):
            value = self.read(reading)
            known = bool(value) if RANGES[reading] is _SWITCH else value
            found[reading] = None if isinstance(value, Reason) else known
        return found

    def facts(self) -> dict[str, Any]:
        """Fixed or rarely changed properties, for run.json; None if unknown, with the reason in ``unknown``."""
        settings = self.settings()
        found = {name: self.reasons.get(name, value) for name, value in settings.items()} | self.vendor_facts()
        unknown = {name: value.to_json() for name, value in found.items() if isinstance(value, Reason)}
        return {
            **self.device.to_json(),
            "driver": self.backend.driver_version(),
            "cuda_driver": self.backend.runtime_version(),
            **{name: None if name in unknown else value for name, value in found.items()},
            "unknown": unknown,
        }

    def how(self) -> tuple[dict[str, str], dict[str, Reason]]:
        """The call that each reading is taken by, and the reasons for those that are not taken."""
        if self._garbled is None:
            return dict(self.ways), dict(self.reasons)
        readable = {name: way for name, way in self.ways.items() if name not in _LISTS}
        return readable, self.reasons | dict.fromkeys(map(str, _LISTS), self._garbled)

    def _probe(self, reading: Reading, ways: Sequence[Call]) -> None:
        doubtful: Call | None = None
        for call in ways:
            value = self._take(reading, call)
            if not isinstance(value, Reason):
                self._chosen[reading] = call
                self._keep(reading, call, value)
                return
            self._note(reading, value)
            if value.code not in ABSENT and doubtful is None:
                doubtful = call
        if doubtful is not None:
            # The call exists and may have failed only this once, so it is tried again.
            self._chosen[reading] = doubtful

    def _take(self, reading: Reading, call: Call) -> Any | Reason:
        def take() -> Any:
            value = call.take()
            if reading in RANGES:
                RANGES[reading].checked(value)
            if reading is Reading.POWER and self._most_w is not None and value > self._most_w:
                raise Implausible(f"the driver answers {value:g} W, far above the GPU's largest power limit")
            return value

        return self.backend.ask(take)

    def _keep(self, reading: Reading, call: Call, value: Any) -> None:
        self.ways.setdefault(reading, call.name)
        self.reasons.pop(reading, None)
        if isinstance(value, Memory):
            if value.reserved_mib is not None:
                self.ways.setdefault(Reading.RESERVED_MEMORY, call.name)
                self.reasons.pop(Reading.RESERVED_MEMORY, None)
            elif Reading.RESERVED_MEMORY not in self.ways:
                self.reasons[Reading.RESERVED_MEMORY] = self.no_reserved

    def _note(self, reading: Reading, reason: Reason) -> None:
        self.lost = self.lost or reason.code is Code.GPU_LOST
        self.reasons[reading] = reason
        if reading is Reading.MEMORY:
            self.reasons[Reading.RESERVED_MEMORY] = reason


def open_backend() -> GpuBackend | Reason:
    """Open the first driver that works and has a GPU, else one without a GPU, else return why none works."""
    opened: list[GpuBackend | Reason] = []
    for vendor in VENDORS.values():
        backend: GpuBackend | Reason = importlib.import_module(vendor.backend).open_backend()
        if not isinstance(backend, Reason) and backend.count:
            return backend
        opened.append(backend)
    return next((backend for backend in opened if not isinstance(backend, Reason)), opened[0])
