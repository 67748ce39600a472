"""NVML, NVIDIA's management library, through nvidia-ml-py: a value, or the reason why there is none.

With gpu.py the only place that knows nvidia-ml-py: neither its exceptions nor its handles leave the two. Any call
may block for as long as the driver does, or take the process down with it, so both run in a process of their own
(sampler.py); everybody else talks to that (driver.py).
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mpscale.core.device import Device
from mpscale.telemetry.plausible import MIB, RANGES, Doubt, Implausible, checked, checked_memory, checked_process

_LOST = 15
_ABSENT = (2, 3, 13, 25)
"""Invalid argument, not supported, no such function, a structure of another version: another way may do."""

# Numbers of nvmlReturn_t, which NVIDIA keeps stable; the messages of nvidia-ml-py ("Driver Not Loaded") name no cure.
_PLAIN_WORDS = {
    3: "this GPU does not tell",
    4: "no permission to talk to the NVIDIA driver",
    9: "the NVIDIA driver is not loaded",
    12: "no NVIDIA driver library (libnvidia-ml.so.1) on this machine",
    13: "the installed NVIDIA driver is too old for this call",
    _LOST: "the GPU is lost: it fell off the bus or was reset",
    18: "the NVIDIA driver's library and kernel module are of different versions; reload the module or reboot",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why NVML gave no value.

    Args:
        reason: in plain words.
        code: its ``nvmlReturn_t``; 0 where something else failed.
        doubt: why the answer of a call that succeeded is no measurement; None where the call failed.
    """

    reason: str
    code: int = 0
    doubt: Doubt | None = None

    @property
    def lost(self) -> bool:
        """Whether the GPU is gone."""
        return self.code == _LOST

    @property
    def absent(self) -> bool:
        """Whether the driver or the GPU does not have this call, so that an older one is worth a try."""
        return self.code in _ABSENT or (self.code == 0 and self.doubt is None)


class NoNvml:
    """Stands in where NVML cannot be used: no device, no value, always the same reason.

    Args:
        reason: why not, in plain words.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Nvml:
    """An initialised NVML. :func:`open_nvml` makes one; no method raises.

    Args:
        library: the module ``pynvml`` of nvidia-ml-py, after ``nvmlInit``.
        count: how many GPUs it found.
    """

    def __init__(self, library: Any, count: int) -> None:
        self.library = library
        self._count = count

    def devices(self) -> list[Device]:
        """The GPUs in NVML's order, which is that of the PCI bus, each followed by its MIG instances.

        A GPU that does not answer keeps its place, so that indices hold; its ``uuid`` is then None.
        """
        found: list[Device] = []
        for index in range(self._count):
            handle, failure = self.ask("nvmlDeviceGetHandleByIndex", index)
            if failure is not None:
                found.append(Device("gpu", f"GPU {index}, which does not answer ({failure.reason})"))
                continue
            gpu = self._device(handle, f"unnamed GPU {index}")
            found.append(gpu)
            if gpu.mig:
                found += self._instances(handle, gpu)
        return found

    def driver_version(self) -> str | None:
        """The version of the NVIDIA driver, like ``"570.86.15"``; None if unknown."""
        return text(self.ask("nvmlSystemGetDriverVersion")[0]) or None

    def cuda_driver_version(self) -> str | None:
        """The newest CUDA that the driver supports, like ``"12.8"``; None if unknown."""
        number, _ = self.fact("cuda_version", "nvmlSystemGetCudaDriverVersion")
        return f"{number // 1000}.{number % 1000 // 10}" if number else None

    @property
    def process_entries_fit(self) -> bool:
        """Whether the driver's list of processes has the layout that nvidia-ml-py reads.

        Drivers 535.43 to 535.86 wrote entries of 32 bytes where 24 are read, so that all but the first are garbage.
        """
        match = re.match(r"(\d+)\.(\d+)", self.driver_version() or "")
        return match is None or not (535, 43) <= (int(match[1]), int(match[2])) <= (535, 86)

    def close(self) -> None:
        """Shuts NVML down. No other method may be called afterwards."""
        self.ask("nvmlShutdown")

    def ask(self, function: str, *arguments: Any, **named: Any) -> tuple[Any, Failure | None]:
        """The answer of a function of nvidia-ml-py and None, or None and why there is none."""
        return ask(getattr(self.library, function, None), *arguments, **named)

    def fact(self, name: str, function: str, *arguments: Any) -> tuple[Any, Failure | None]:
        """The same for a number of :data:`mpscale.telemetry.plausible.RANGES`, where it can be true."""
        value, failure = self.ask(function, *arguments)
        return (value, failure) if failure is not None else ask(checked, name, value)

    def _device(self, handle: Any, fallback: str, parent: Device | None = None) -> Device:
        capability, _ = (None, None) if parent else self.ask("nvmlDeviceGetCudaComputeCapability", handle)
        if capability:
            capability, _ = ask(_checked_capability, *capability)
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle)[0]
        total = ask(checked, "total_bytes", memory.total)[0] if memory else None
        pci = None if parent else self.ask("nvmlDeviceGetPciInfo", handle)[0]
        mode = None if parent else self.ask("nvmlDeviceGetMigMode", handle)[0]
        return Device(
            kind="gpu",
            name=text(self.ask("nvmlDeviceGetName", handle)[0]) or fallback,
            uuid=text(self.ask("nvmlDeviceGetUUID", handle)[0]) or None,
            compute_capability=capability,
            memory_mib=None if total is None else total / MIB,
            pci_bus_id=text(pci.busId) if pci else None,
            mig=bool(mode and mode[0] == 1),
        )

    def _instances(self, handle: Any, gpu: Device) -> list[Device]:
        """The MIG instances of a GPU: each has memory of its own, and the rest from the GPU that it is a part of."""
        count, failure = self.fact("devices", "nvmlDeviceGetMaxMigDeviceCount", handle)
        found = []
        for index in range(count if failure is None else 0):
            instance, failure = self.ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if failure is not None:  # a place that no instance takes
                continue
            device = self._device(instance, f"MIG instance {index} of {gpu.name}", parent=gpu)
            found.append(device.part_of(gpu))
        return found


def open_nvml() -> Nvml | NoNvml:
    """NVML where it works, else a stand-in that knows why not. Never raises."""
    try:
        library: Any = importlib.import_module("pynvml")
    except Exception as error:  # a broken installation may fail in any way
        return NoNvml(f"nvidia-ml-py cannot be imported ({error})")
    _, failure = ask(getattr(library, "nvmlInit", None))
    if failure is not None:
        return NoNvml(failure.reason)
    count, failure = ask(lambda: checked("devices", library.nvmlDeviceGetCount()))
    if failure is not None:
        ask(library.nvmlShutdown)
        return NoNvml(failure.reason)
    return Nvml(library, int(count))


def ask(function: Callable[..., Any] | None, *arguments: Any, **named: Any) -> tuple[Any, Failure | None]:
    """The answer of ``function`` and None, or None and why there is none."""
    if function is None:
        return None, Failure("the installed nvidia-ml-py does not know this call")
    try:
        return function(*arguments, **named), None
    except Implausible as error:
        return None, Failure(str(error), doubt=error.doubt)
    except Exception as error:
        # NVMLLibraryMismatchError is no NVMLError, and ctypes raises its own kinds on a library that does not fit.
        # Telemetry must never end a run, so every kind becomes a reason.
        code = getattr(error, "value", 0)
        code = code if isinstance(code, int) else 0
        return None, Failure(_PLAIN_WORDS.get(code) or f"NVML failed: {type(error).__name__}: {error}", code)


def text(value: Any) -> str | None:
    """A string of nvidia-ml-py, which older versions give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _checked_capability(major: int, minor: int) -> tuple[int, int]:
    return int(checked("compute_capability", major)), int(checked("minor_capability", minor))


# One GPU, or one MIG instance of one: what it can tell is found out once, and then read over and over. A reading can
# often be asked for in several ways, of which drivers know some: the newest that answers is kept. What no way answers
# has a reason and is not asked for again.

_INSTANT_POWER, _ENERGY = 186, 83
"""Field ids of NVML: power of this moment in mW, energy since the driver was loaded in mJ."""

_STALE_S = 1.0
"""A value older than this says nothing of the moment. Drivers stamp every answer anew."""

_POWER_EXCESS = 3
"""Power of a moment may exceed the limit, which holds on the mean; not by this factor."""

_TOLERANCE_MIB = 1.0
"""Figures of one answer that belong together differ by rounding alone."""


class Memory(NamedTuple):
    """Memory of a GPU in MiB; ``reserved_mib``, which the driver keeps for itself, is not in ``used_mib``.

    Where the driver does not tell the two apart, ``reserved_mib`` is None and ``used_mib`` may hold it.
    """

    used_mib: float
    reserved_mib: float | None


class Processes(NamedTuple):
    """Processes on a GPU: MiB by process id, None where the driver names the process and not its memory.

    ``number`` is right even where the entries cannot be trusted, and ``by_pid`` is then None.
    """

    number: int
    by_pid: dict[int, float | None] | None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask for a reading: its name, and a function of nvidia-ml-py's module and a handle."""

    name: str
    read: Callable[[Any, Any], Any]


_KINDS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Members of the union that holds a field's value, by its type (nvmlValueType_t)."""


class _Field:
    """Asks for the value of one field of NVML.

    Args:
        number: the field's id.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._last: tuple[Any, int, float] = (None, 0, 0.0)

    def __call__(self, library: Any, handle: Any) -> float:
        (answer,) = library.nvmlDeviceGetFieldValues(handle, [self._number])
        if answer.nvmlReturn != 0:
            raise library.NVMLError(answer.nvmlReturn)
        if not 0 <= answer.valueType < len(_KINDS):
            words = f"NVML answers field {self._number} with a value of the unknown type {answer.valueType}"
            raise Implausible(Doubt.UNKNOWN_TYPE, words)
        # The driver says when it took the value; one that it repeats is no reading of this moment.
        last_handle, last_stamp, since_s = self._last
        now_s = time.monotonic()
        if handle is not last_handle or answer.timestamp != last_stamp:
            self._last = handle, answer.timestamp, now_s
        elif answer.timestamp and now_s - since_s > _STALE_S:
            words = f"NVML repeats a value of field {self._number} that is {now_s - since_s:.1f} s old"
            raise Implausible(Doubt.STALE, words)
        kind = _KINDS[answer.valueType]
        value: float = getattr(answer.value, kind)
        # All bits of a short are a number that would do as milliwatts.
        return -1 if kind == "usVal" and value == 2**16 - 1 else value


def _call(name: str, *arguments: Any) -> Way:
    return Way(name, lambda library, handle: getattr(library, name)(handle, *arguments))


def _memory_v2(library: Any, handle: Any) -> Memory:
    answer = library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2)
    checked_memory(answer.total, answer.used, answer.free, answer.reserved)
    return split_memory(answer.total / MIB, answer.used / MIB, answer.free / MIB, answer.reserved / MIB)


def split_memory(total: float, used: float, free: float, reserved: float) -> Memory:
    """Memory in use without what the driver reserves.

    Drivers differ in whether ``used`` holds the reserved memory. The sum tells: the parts make up the total.

    Raises:
        Implausible: more is reserved than used, and held to be a part of it.
    """
    if abs(used + free - total) <= _TOLERANCE_MIB < reserved:
        if used < reserved:
            words = f"NVML answers {reserved:.0f} MiB reserved of {used:.0f} MiB in use"
            raise Implausible(Doubt.INCONSISTENT, words)
        return Memory(used - reserved, reserved)
    return Memory(used, reserved)


def _memory_v1(library: Any, handle: Any) -> Memory:
    answer = library.nvmlDeviceGetMemoryInfo(handle)
    checked_memory(answer.total, answer.used, answer.free)
    return Memory(answer.used / MIB, None)


WAYS: dict[str, tuple[Way, ...]] = {
    "memory": (
        Way("nvmlDeviceGetMemoryInfo_v2", _memory_v2),
        Way("nvmlDeviceGetMemoryInfo", _memory_v1),
    ),
    **{
        kind: (
            _call(f"nvmlDeviceGet{kind}RunningProcesses_v3"),
            _call(f"nvmlDeviceGet{kind}RunningProcesses_v2"),
        )
        for kind in ("Compute", "Graphics", "MPSCompute")
    },
    "energy_mj": (_call("nvmlDeviceGetTotalEnergyConsumption"), Way("field 83", _Field(_ENERGY))),
    "power_mw": (Way("instant", _Field(_INSTANT_POWER)), _call("nvmlDeviceGetPowerUsage")),
    "sm_clock_mhz": (_call("nvmlDeviceGetClockInfo", 1),),
    "memory_clock_mhz": (_call("nvmlDeviceGetClockInfo", 2),),
    "temperature_c": (_call("nvmlDeviceGetTemperatureV", 0), _call("nvmlDeviceGetTemperature", 0)),
    "utilization": (Way("nvmlDeviceGetUtilizationRates", lambda n, h: int(n.nvmlDeviceGetUtilizationRates(h).gpu)),),
    "event_reasons": (
        _call("nvmlDeviceGetCurrentClocksEventReasons"),
        _call("nvmlDeviceGetCurrentClocksThrottleReasons"),
    ),
    "power_limit_mw": (_call("nvmlDeviceGetEnforcedPowerLimit"), _call("nvmlDeviceGetPowerManagementLimit")),
    "ecc": (Way("nvmlDeviceGetEccMode", lambda n, h: n.nvmlDeviceGetEccMode(h)[0]),),
    "persistence": (_call("nvmlDeviceGetPersistenceMode"),),
}
"""Every reading that is taken over and over, with the ways to ask for it, the newest first."""

PROCESS_KINDS = ("Compute", "Graphics", "MPSCompute")
GARBLED = "the list of processes of NVIDIA's drivers 535.43 to 535.86 is garbled; update the driver"
_OF_THE_WHOLE_GPU = (
    "energy_mj",
    "power_mw",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "temperature_c",
    "utilization",
    "event_reasons",
)
_MIG_REASON = "a MIG instance: NVML tells this of the whole GPU only, whose other instances share it"


class Gpu:
    """What one GPU tells. No method raises; any may block.

    Args:
        nvml: the opened library.
        device: which GPU; one with a UUID.
    """

    def __init__(self, nvml: Nvml, device: Device) -> None:
        self._nvml = nvml
        self.device = device
        self.lost = False
        self.ways: dict[str, str] = {}
        """The way that answers, by reading."""
        self.reasons: dict[str, str] = {}
        """Why a reading has no value: for good, or the last time that it was asked for. Gone once it has one."""
        self._chosen: dict[str, Way] = {}
        self.entries_fit = nvml.process_entries_fit
        self._handle, failure = nvml.ask("nvmlDeviceGetHandleByUUID", device.uuid)
        self._whole = self._handle
        if device.parent_uuid is not None:
            self._whole, _ = nvml.ask("nvmlDeviceGetHandleByUUID", device.parent_uuid)
        if failure is not None:
            self._note_lost(failure)
            self.reasons = dict.fromkeys(WAYS, f"NVML does not find GPU {device.uuid}: {failure.reason}")
            return
        limits, _ = nvml.ask("nvmlDeviceGetPowerManagementLimitConstraints", self._whole)
        most, _ = ask(lambda: checked("power_limit_mw", limits[1]))
        self._most_mw = RANGES["power_mw"].most if most is None else _POWER_EXCESS * most
        for name, ways in WAYS.items():
            self._probe(name, ways)

    def read(self, name: str) -> Any:
        """One reading of :data:`WAYS`, in the unit of its name; None where there is none, and why is in ``reasons``."""
        way = self._chosen.get(name)
        if way is None:
            return None
        value, failure = self._take(name, way)
        if failure is not None and not failure.lost:
            # Once more: what fails for a moment shall leave no gap behind.
            value, failure = self._take(name, way)
        if failure is not None:
            self._note_lost(failure)
            self.reasons[name] = failure.reason
            return None
        self.ways.setdefault(name, way.name)
        self.reasons.pop(name, None)
        return value

    def asks(self, name: str) -> bool:
        """Whether there is a way to ask for a reading, so that one without a value has failed."""
        return name in self._chosen

    def processes(self, kinds: Iterable[str]) -> Processes | None:
        """The processes on the GPU, None where no list of them can be had.

        Args:
            kinds: which of the driver's lists. A process in several of them is in each with the same figure.
        """
        by_pid: dict[int, float | None] = {}
        number, known = 0, False
        for kind in kinds:
            entries = self.read(kind)
            if entries is None:
                if kind in self.ways:
                    # It answers as a rule: without it the others are a part, and would pass for the whole.
                    return None
                continue
            known = True
            number += len(entries)
            for entry in entries:
                told = [checked_process(entry.usedGpuMemory, self.device.memory_mib), by_pid.get(entry.pid)]
                by_pid[entry.pid] = max((mib for mib in told if mib is not None), default=None)
        if not known:
            return None
        return Processes(number if not self.entries_fit else len(by_pid), by_pid if self.entries_fit else None)

    def settings(self) -> dict[str, Any]:
        """What an administrator can change between two cases and would then move figures; None where unknown."""
        ecc = self.read("ecc")
        limit = self.read("power_limit_mw")
        persistence = self.read("persistence")
        return {
            "power_limit_w": None if limit is None else limit / 1e3,
            "ecc": None if ecc is None else bool(ecc),
            "persistence": None if persistence is None else bool(persistence),
        }

    def facts(self) -> dict[str, Any]:
        """What is fixed or rarely changes, for the fingerprint; None where unknown, with the reason in ``unknown``."""
        unknown: dict[str, str] = {}

        def known(fact: str, range_name: str | None, function: str, *arguments: Any) -> Any:
            value, failure = self._nvml.ask(function, self._whole, *arguments)
            if failure is None and range_name is not None:
                parts = value if isinstance(value, list | tuple) else [value]
                _, failure = ask(lambda: [checked(range_name, part) for part in parts])
            if failure is not None:
                unknown[fact] = failure.reason
                return None
            return text(value)

        limits = known("power_limits_w", "power_limit_mw", "nvmlDeviceGetPowerManagementLimitConstraints")
        default = known("power_limit_default_w", "power_limit_mw", "nvmlDeviceGetPowerManagementDefaultLimit")
        mig = known("mig", "mig", "nvmlDeviceGetMigMode")
        found = {
            **self.device.to_json(),
            "driver": self._nvml.driver_version(),
            "cuda_driver": self._nvml.cuda_driver_version(),
            "vbios": known("vbios", None, "nvmlDeviceGetVbiosVersion"),
            **self.settings(),
            "power_limit_default_w": None if default is None else default / 1e3,
            "power_limits_w": None if limits is None else [limit / 1e3 for limit in limits],
            "max_sm_clock_mhz": known("max_sm_clock_mhz", "sm_clock_mhz", "nvmlDeviceGetMaxClockInfo", 1),
            "max_memory_clock_mhz": known("max_memory_clock_mhz", "memory_clock_mhz", "nvmlDeviceGetMaxClockInfo", 2),
            "slowdown_c": known("slowdown_c", "slowdown_c", "nvmlDeviceGetTemperatureThreshold", 1),
            "mig": None if mig is None else bool(mig[0]),
            "pcie_generation": known("pcie_generation", "pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_width": known("pcie_width", "pcie_width", "nvmlDeviceGetCurrPcieLinkWidth"),
        }
        reading = {"power_limit_w": "power_limit_mw", "ecc": "ecc", "persistence": "persistence"}
        unknown |= {fact: self.reasons[name] for fact, name in reading.items() if name in self.reasons}
        return {**found, "unknown": unknown}

    def _probe(self, name: str, ways: tuple[Way, ...]) -> None:
        if self.device.parent_uuid is not None and name in _OF_THE_WHOLE_GPU:
            self.reasons[name] = _MIG_REASON
            return
        doubtful: Way | None = None
        for way in ways:
            _, failure = self._take(name, way)
            if failure is None:
                self._chosen[name] = way
                self.ways[name] = way.name
                self.reasons.pop(name, None)
                return
            self._note_lost(failure)
            self.reasons[name] = failure.reason
            if not failure.absent and doubtful is None:
                doubtful = way
        if doubtful is not None:
            # The call is there and failed this once, for all one knows: it is asked again.
            self._chosen[name] = doubtful

    def _take(self, name: str, way: Way) -> tuple[Any, Failure | None]:
        """The answer of one way to ask, where it can be true."""

        def take() -> Any:
            value = way.read(self._nvml.library, self._of(name))
            if name not in RANGES:
                return value
            checked(name, value)
            if name == "power_mw" and value > self._most_mw:
                words = f"NVML answers {value / 1e3:g} W, far above the GPU's largest power limit"
                raise Implausible(Doubt.OUT_OF_RANGE, words)
            return value

        return ask(take)

    def _of(self, name: str) -> Any:
        """The handle that a reading is asked of: settings are those of the whole GPU."""
        return self._whole if name in ("power_limit_mw", "ecc", "persistence") else self._handle

    def _note_lost(self, failure: Failure) -> None:
        self.lost = self.lost or failure.lost
