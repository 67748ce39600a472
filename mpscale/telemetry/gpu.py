"""One GPU, or one MIG instance of one: what it can tell is found out once, and then read over and over.

A reading can often be asked for in several ways, of which drivers know some: the newest that answers is kept. What no
way answers has a reason and is not asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mpscale.telemetry.device import Device
from mpscale.telemetry.nvml import MIB, Failure, Nvml, ask, text

_INSTANT_POWER, _ENERGY = 186, 83
"""Field ids of NVML: power of this moment in mW, energy since the driver was loaded in mJ."""

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


def _field(number: int) -> Callable[[Any, Any], int]:
    def read(library: Any, handle: Any) -> int:
        (answer,) = library.nvmlDeviceGetFieldValues(handle, [number])
        if answer.nvmlReturn != 0:
            raise library.NVMLError(answer.nvmlReturn)
        # The union's member follows from the type: double, unsigned int, unsigned long, unsigned long long, ...
        kinds = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
        return int(getattr(answer.value, kinds[answer.valueType]))

    return read


def _call(name: str, *arguments: Any) -> Way:
    return Way(name, lambda library, handle: getattr(library, name)(handle, *arguments))


def _memory_v2(library: Any, handle: Any) -> Memory:
    answer = library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2)
    return split_memory(answer.total / MIB, answer.used / MIB, answer.free / MIB, answer.reserved / MIB)


def split_memory(total: float, used: float, free: float, reserved: float) -> Memory:
    """Memory in use without what the driver reserves.

    Drivers differ in whether ``used`` holds the reserved memory. The sum tells: the parts make up the total.
    """
    if abs(used + free - total) <= _TOLERANCE_MIB < reserved:
        return Memory(used - reserved, reserved)
    return Memory(used, reserved)


WAYS: dict[str, tuple[Way, ...]] = {
    "memory": (
        Way("nvmlDeviceGetMemoryInfo_v2", _memory_v2),
        Way("nvmlDeviceGetMemoryInfo", lambda n, h: Memory(n.nvmlDeviceGetMemoryInfo(h).used / MIB, None)),
    ),
    **{
        kind: (
            _call(f"nvmlDeviceGet{kind}RunningProcesses_v3"),
            _call(f"nvmlDeviceGet{kind}RunningProcesses_v2"),
        )
        for kind in ("Compute", "Graphics", "MPSCompute")
    },
    "energy_mj": (_call("nvmlDeviceGetTotalEnergyConsumption"), Way("field 83", _field(_ENERGY))),
    "power_mw": (Way("instant", _field(_INSTANT_POWER)), _call("nvmlDeviceGetPowerUsage")),
    "sm_clock_mhz": (_call("nvmlDeviceGetClockInfo", 1),),
    "memory_clock_mhz": (_call("nvmlDeviceGetClockInfo", 2),),
    "temperature_c": (_call("nvmlDeviceGetTemperatureV", 0), _call("nvmlDeviceGetTemperature", 0)),
    "utilization": (Way("nvmlDeviceGetUtilizationRates", lambda n, h: int(n.nvmlDeviceGetUtilizationRates(h).gpu)),),
    "event_reasons": (
        _call("nvmlDeviceGetCurrentClocksEventReasons"),
        _call("nvmlDeviceGetCurrentClocksThrottleReasons"),
    ),
    "power_limit_mw": (_call("nvmlDeviceGetEnforcedPowerLimit"), _call("nvmlDeviceGetPowerManagementLimit")),
    "ecc": (_call("nvmlDeviceGetEccMode"),),
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
        """Why a reading has no value: for good, or the last time that it was asked for."""
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
        for name, ways in WAYS.items():
            self._probe(name, ways)

    def read(self, name: str) -> Any:
        """One reading of :data:`WAYS`, in the unit of its name; None where there is none, and why is in ``reasons``."""
        way = self._chosen.get(name)
        if way is None:
            return None
        value, failure = ask(way.read, self._nvml.library, self._of(name))
        if failure is not None:
            self._note_lost(failure)
            self.reasons[name] = failure.reason
            return None
        return value

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
                continue
            known = True
            number += len(entries)
            for entry in entries:
                used = None if entry.usedGpuMemory is None else entry.usedGpuMemory / MIB
                earlier = by_pid.get(entry.pid)
                by_pid[entry.pid] = used if earlier is None else max(earlier, used or 0.0)
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
            "ecc": None if ecc is None else bool(ecc[0]),
            "persistence": None if persistence is None else bool(persistence),
        }

    def facts(self) -> dict[str, Any]:
        """What is fixed or rarely changes, for the fingerprint; None where unknown, with the reason in ``unknown``."""
        unknown: dict[str, str] = {}

        def known(fact: str, function: str, *arguments: Any) -> Any:
            value, failure = self._nvml.ask(function, self._whole, *arguments)
            if failure is not None:
                unknown[fact] = failure.reason
            return text(value)

        limits = known("power_limits_w", "nvmlDeviceGetPowerManagementLimitConstraints")
        default = known("power_limit_default_w", "nvmlDeviceGetPowerManagementDefaultLimit")
        mig = known("mig", "nvmlDeviceGetMigMode")
        found = {
            **self.device.to_json(),
            "driver": self._nvml.driver_version(),
            "cuda_driver": self._nvml.cuda_driver_version(),
            "vbios": known("vbios", "nvmlDeviceGetVbiosVersion"),
            **self.settings(),
            "power_limit_default_w": None if default is None else default / 1e3,
            "power_limits_w": None if limits is None else [limit / 1e3 for limit in limits],
            "max_sm_clock_mhz": known("max_sm_clock_mhz", "nvmlDeviceGetMaxClockInfo", 1),
            "max_memory_clock_mhz": known("max_memory_clock_mhz", "nvmlDeviceGetMaxClockInfo", 2),
            "slowdown_c": known("slowdown_c", "nvmlDeviceGetTemperatureThreshold", 1),
            "mig": None if mig is None else bool(mig[0]),
            "pcie_generation": known("pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_width": known("pcie_width", "nvmlDeviceGetCurrPcieLinkWidth"),
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
            _, failure = ask(way.read, self._nvml.library, self._of(name))
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

    def _of(self, name: str) -> Any:
        """The handle that a reading is asked of: settings are those of the whole GPU."""
        return self._whole if name in ("power_limit_mw", "ecc", "persistence") else self._handle

    def _note_lost(self, failure: Failure) -> None:
        self.lost = self.lost or failure.lost
