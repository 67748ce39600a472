"""The one face of every vendor's GPUs. A vendor is a module with ``open_backend``, named in ``core.device.VENDORS``.

A call to a driver may block as long as the driver does or take its process down, so only the monitor
(``__main__.py``) uses this. What may fail returns a value or a :class:`~mpscale.core.reason.Reason`, and never raises.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mpscale.core.device import VENDORS, Device, Vendor
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.readings import Implausible, Memory, Processes, Reading

ABSENT = (Code.NOT_TOLD, Code.DRIVER_TOO_OLD, Code.BINDING_TOO_OLD, Code.BINDING_BROKEN)
"""Codes of a call that the driver or the GPU does not have. Any other failure may pass, so the call is kept."""

_LISTS = (Reading.PROCESSES, Reading.GRAPHICS_PROCESSES, Reading.SERVICE_PROCESSES)
_SETTINGS = (Reading.POWER_LIMIT, Reading.ECC, Reading.PERSISTENCE)

_POWER_EXCESS = 3
"""Momentary power may exceed the power limit, which holds for the mean, but not by this factor."""


class Call(NamedTuple):
    """One way to take a reading: its name for people, and a function that returns the value in the reading's unit."""

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

    @abstractmethod
    def close(self) -> None:
        """Release the driver. No other method may be called afterwards."""

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any | Reason:
        """Return the answer of ``function``, or the reason why it has none."""
        try:
            return function(*arguments)
        except Implausible as error:
            return error.reason
        except Exception as error:  # libraries that do not fit fail in any way, and telemetry must never end a run
            return self.explain(error)


class Gpu(ABC):
    """One GPU, or one instance of a divided one.

    Each reading can often be taken in several ways, of which a driver knows some: the first that answers is kept.

    Args:
        backend: the opened driver.
        device: which GPU; one with a UUID.
        calls: the ways to take each reading, newest first.
        withheld: readings that are not tried, with the reason.
        largest_power_limit_w: the highest power limit that can be set; None if unknown.
        garbled: why the driver's process lists cannot be read; None if they can.
    """

    not_apart = Reason(Code.NOT_TOLD, "the driver does not tell reserved memory apart")

    def __init__(
        self,
        backend: GpuBackend,
        device: Device,
        calls: Mapping[Reading, Sequence[Call]],
        withheld: Mapping[Reading, Reason],
        largest_power_limit_w: float | None = None,
        garbled: Reason | None = None,
    ) -> None:
        self.backend, self.device = backend, device
        self.lost = False
        self.ways: dict[str, str] = {}
        """The call that answers, by reading."""
        self.reasons: dict[str, Reason] = {}
        """Why a reading has no value, for good or the last time it was taken. Deleted once it has one."""
        self._chosen: dict[Reading, Call] = {}
        self._garbled = garbled
        self._most_w = None if largest_power_limit_w is None else _POWER_EXCESS * largest_power_limit_w
        for reading in Reading:
            if reading in withheld:
                self._note(reading, withheld[reading])
            elif reading in calls:
                self._probe(reading, calls[reading])
            elif reading is not Reading.RESERVED_MEMORY:  # which comes with the memory
                self._note(reading, Reason(Code.NOT_TOLD, f"{backend.vendor.name}'s driver does not tell this"))

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
        """Whether there is a call for the reading, so that one without a value has failed."""
        return reading in self._chosen

    def processes(self, lists: Iterable[Reading]) -> Processes | Reason:
        """The processes on the GPU.

        Args:
            lists: which of the driver's lists. A process in several of them is in each with the same memory.
        """
        by_pid: dict[int, float | None] = {}
        number = 0
        missing: list[Reason] = []
        answered = False
        for reading in lists:
            entries = self.read(reading)
            if isinstance(entries, Reason):
                if reading in self.ways:
                    # This list usually answers. The others alone would pass for all processes.
                    return entries
                missing.append(entries)
                continue
            answered = True
            number += len(entries)
            for pid, mib in entries:
                by_pid[pid] = max((each for each in (mib, by_pid.get(pid)) if each is not None), default=None)
        if not answered:
            return missing[0]
        return Processes(number, self._garbled) if self._garbled else Processes(len(by_pid), by_pid)

    def settings(self) -> dict[str, Any]:
        """Settings that an administrator may change between two cases and that move figures; None if unknown."""
        values = {reading: self.read(reading) for reading in _SETTINGS}
        return {
            str(reading): None
            if isinstance(value, Reason)
            else value
            if reading is Reading.POWER_LIMIT
            else bool(value)
            for reading, value in values.items()
        }

    def facts(self) -> dict[str, Any]:
        """Fixed or rarely changed properties, for the fingerprint; None if unknown, with the reason in ``unknown``."""
        settings, own = self.settings(), self.vendor_facts()
        reasons = {name: self.reasons[name] for name in settings if name in self.reasons}
        reasons |= {name: value for name, value in own.items() if isinstance(value, Reason)}
        return {
            **self.device.to_json(),
            "driver": self.backend.driver_version(),
            "cuda_driver": self.backend.runtime_version(),
            **settings,
            **{name: None if name in reasons else value for name, value in own.items()},
            "unknown": {name: reason.to_json() for name, reason in reasons.items()},
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
            # The call exists and failed this once, as far as is known: it is tried again.
            self._chosen[reading] = doubtful

    def _take(self, reading: Reading, call: Call) -> Any | Reason:
        def take() -> Any:
            value = call.take()
            if reading.range is not None:
                reading.range.checked(value)
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
                self.reasons[Reading.RESERVED_MEMORY] = self.not_apart

    def _note(self, reading: Reading, reason: Reason) -> None:
        self.lost = self.lost or reason.code is Code.GPU_LOST
        self.reasons[reading] = reason
        if reading is Reading.MEMORY:
            self.reasons[Reading.RESERVED_MEMORY] = reason


def open_backend() -> GpuBackend | Reason:
    """The first vendor's driver that works and has a GPU, else one without a GPU, else why none works."""
    opened: list[GpuBackend | Reason] = []
    for vendor in VENDORS.values():
        backend: GpuBackend | Reason = importlib.import_module(vendor.backend).open_backend()
        if not isinstance(backend, Reason) and backend.count:
            return backend
        opened.append(backend)
    return next((backend for backend in opened if not isinstance(backend, Reason)), opened[0])
