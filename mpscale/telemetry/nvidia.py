"""NVIDIA's GPUs, through NVML and nvidia-ml-py. No other module uses either."""

from __future__ import annotations

import importlib
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from mpscale.core.device import NVIDIA, Device
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.backend import RANGES, Call, Gpu, GpuBackend, Implausible, Memory, Range
from mpscale.telemetry.samples import ClockEvent, Reading

_MIB = 2**20

_UPDATE = "update the NVIDIA driver"

# Numbers of nvmlReturn_t, which NVIDIA keeps stable. nvidia-ml-py's own messages ("Driver Not Loaded") name no cure.
_ERRORS = {
    2: Reason(Code.NOT_TOLD, "this GPU does not report this (invalid argument)"),
    3: Reason(Code.NOT_TOLD, "this GPU does not report this"),
    4: Reason(
        Code.NO_PERMISSION,
        "no permission to talk to the NVIDIA driver",
        "give this user access to /dev/nvidiactl and /dev/nvidia0; start a container with --gpus all",
    ),
    9: Reason(
        Code.DRIVER_NOT_LOADED,
        "the NVIDIA driver is not loaded",
        "load the driver with modprobe nvidia; nvidia-smi then shows the GPU",
    ),
    12: NVIDIA.no_library,
    13: Reason(Code.DRIVER_TOO_OLD, "the installed NVIDIA driver is too old for this call", _UPDATE),
    15: Reason(
        Code.GPU_LOST,
        "the GPU is lost: it fell off the bus or was reset",
        "reset the GPU with nvidia-smi --gpu-reset, or reboot",
    ),
    18: Reason(
        Code.DRIVER_MISMATCH,
        "the NVIDIA driver's library and kernel module are of different versions",
        "reboot, or reload the driver's kernel module",
    ),
    25: Reason(Code.DRIVER_TOO_OLD, "the installed NVIDIA driver has an older version of this structure", _UPDATE),
}
_UNKNOWN_CALL = Reason(
    Code.BINDING_TOO_OLD, "the installed nvidia-ml-py does not have this call", "pip install --upgrade nvidia-ml-py"
)
_GARBLED = Reason(
    Code.GARBLED,
    "the list of processes of NVIDIA's drivers 535.43 to 535.86 is garbled",
    "update the NVIDIA driver: 535.86 is the last with this fault",
)
_MIG = Reason(Code.SHARED, "a MIG instance: NVML reports this only for the whole GPU, which other instances share")

_OF_THE_WHOLE_GPU = (
    Reading.ENERGY,
    Reading.POWER,
    Reading.SM_CLOCK,
    Reading.MEMORY_CLOCK,
    Reading.TEMPERATURE,
    Reading.UTILIZATION,
    Reading.CLOCK_EVENTS,
)

_EVENTS = {
    0x1: ClockEvent.IDLE,
    0x2: ClockEvent.APPLICATION_CLOCKS,
    0x4: ClockEvent.POWER_CAP,
    0x8: ClockEvent.HARDWARE_SLOWDOWN,
    0x10: ClockEvent.SYNC_BOOST,
    0x20: ClockEvent.SOFTWARE_THERMAL,
    0x40: ClockEvent.HARDWARE_THERMAL,
    0x80: ClockEvent.POWER_BRAKE,
    0x100: ClockEvent.DISPLAY_CLOCKS,
}
"""Bits of nvmlClocksEventReasons in nvml.h."""

_LIMITS = "nvmlDeviceGetPowerManagementLimitConstraints"

_INSTANT_POWER, _ENERGY = 186, 83
"""Field ids: momentary power in mW, energy since the driver was loaded in mJ."""

_KINDS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Members of the union that holds a field's value, by its type (nvmlValueType_t)."""

_STALE_S = 1.0
"""A field's value older than this is not a reading of now. Drivers give every new value a new timestamp."""

_TOLERANCE_MIB = 1.0
"""Parts and total of one answer differ by rounding only."""

_ALL_ONES = frozenset({-1, 2**32 - 1, 2**64 - 1})
"""NVML's "not available", as an integer of any size."""

_BYTES, _TOTAL_BYTES = Range(0, 2**50, "bytes"), Range(1, 2**50, "bytes")
_DEVICES = Range(0, 1024, "devices")
_CUDA_VERSION = Range(1000, 99_990)
_EVENT_BITS = Range(0, 2**16 - 1, "(bits)")


def open_backend() -> Nvidia | Reason:
    """Open NVML, or return why it does not work. Never raises."""
    try:
        library: Any = importlib.import_module("pynvml")
    except Exception as error:  # a broken installation may fail in any way
        return Reason(
            Code.BINDING_BROKEN,
            f"nvidia-ml-py cannot be imported ({error})",
            "pip install --force-reinstall nvidia-ml-py",
        )
    backend = Nvidia(library)
    failure = backend.ask(backend.call, "nvmlInit")
    if isinstance(failure, Reason):
        return failure
    count = backend.ask(backend.number, _DEVICES, "nvmlDeviceGetCount")
    if isinstance(count, Reason):
        backend.ask(backend.call, "nvmlShutdown")
        return count
    backend.count = int(count)
    return backend


class Nvidia(GpuBackend):
    """An initialised NVML.

    Args:
        library: nvidia-ml-py's module ``pynvml``.
        count: how many GPUs it found.
    """

    vendor = NVIDIA

    def __init__(self, library: Any, count: int = 0) -> None:
        self.library, self.count = library, count

    def call(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Call a function of nvidia-ml-py."""
        return getattr(self.library, name)(*arguments, **named)

    def number(self, plausible: Range, name: str, *arguments: Any) -> Any:
        """Call a function that returns a number.

        Raises:
            Implausible: the number cannot be true.
        """
        return plausible.checked(available(self.call(name, *arguments)))

    def explain(self, error: Exception) -> Reason:
        """The reason for an exception of nvidia-ml-py."""
        if isinstance(error, AttributeError):
            return _UNKNOWN_CALL
        # NVMLLibraryMismatchError is not an NVMLError, and ctypes raises errors of its own for an unsuitable library.
        number = getattr(error, "value", 0)
        number = number if isinstance(number, int) else 0
        unnamed = Code.OTHER if number else Code.BINDING_BROKEN
        return _ERRORS.get(number) or Reason(unnamed, f"NVML failed: {type(error).__name__}: {error}")

    def devices(self) -> list[Device]:
        """The GPUs, each followed by its MIG instances."""
        found: list[Device] = []
        for index in range(self.count):
            handle = self.ask(self.call, "nvmlDeviceGetHandleByIndex", index)
            if isinstance(handle, Reason):
                name = f"GPU {index}, which does not answer ({handle})"
                found.append(Device("gpu", name, vendor=NVIDIA.name))
                continue
            gpu = self._device(handle, f"unnamed GPU {index}")
            found.append(gpu)
            if gpu.mig:
                found += self._instances(handle, gpu)
        return found

    def driver_version(self) -> str | None:
        """The version of the driver, like ``"570.86.15"``."""
        return self._known("nvmlSystemGetDriverVersion") or None

    def runtime_version(self) -> str | None:
        """The newest CUDA that the driver supports, like ``"12.8"``."""
        number = self.ask(self.number, _CUDA_VERSION, "nvmlSystemGetCudaDriverVersion")
        return None if isinstance(number, Reason) else f"{number // 1000}.{number % 1000 // 10}"

    def gpu(self, device: Device) -> NvidiaGpu:
        """Open a GPU or a MIG instance."""
        return NvidiaGpu(self, device)

    def garbled(self) -> Reason | None:
        """Why process lists cannot be read: some drivers write entries of 32 bytes, and nvidia-ml-py reads 24."""
        match = re.match(r"(\d+)\.(\d+)", self.driver_version() or "")
        return _GARBLED if match and (535, 43) <= (int(match[1]), int(match[2])) <= (535, 86) else None

    def _known(self, name: str, *arguments: Any) -> Any:
        value = self.ask(self.call, name, *arguments)
        return None if isinstance(value, Reason) else text(value)

    def _device(self, handle: Any, fallback: str, instance: bool = False) -> Device:
        total = self.ask(lambda: _TOTAL_BYTES.checked(available(self.call("nvmlDeviceGetMemoryInfo", handle).total)))
        capability = pci = mode = None
        if not instance:
            capability = self.ask(lambda: _capability(*self.call("nvmlDeviceGetCudaComputeCapability", handle)))
            pci = self._known("nvmlDeviceGetPciInfo", handle)
            mode = self._known("nvmlDeviceGetMigMode", handle)
        return Device(
            kind="gpu",
            name=self._known("nvmlDeviceGetName", handle) or fallback,
            uuid=self._known("nvmlDeviceGetUUID", handle) or None,
            compute_capability=None if isinstance(capability, Reason) else capability,
            memory_mib=None if isinstance(total, Reason) else total / _MIB,
            pci_bus_id=text(pci.busId) if pci else None,
            mig=bool(mode and mode[0] == 1),
            vendor=NVIDIA.name,
        )

    def _instances(self, handle: Any, gpu: Device) -> list[Device]:
        """The MIG instances of a GPU: each has its own memory and shares everything else."""
        count = self.ask(self.number, _DEVICES, "nvmlDeviceGetMaxMigDeviceCount", handle)
        found = []
        for index in range(0 if isinstance(count, Reason) else count):
            instance = self.ask(self.call, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if not isinstance(instance, Reason):  # otherwise there is no instance at this index
                device = self._device(instance, f"MIG instance {index} of {gpu.name}", instance=True)
                found.append(device.part_of(gpu))
        return found


class NvidiaGpu(Gpu):
    """A GPU or a MIG instance. ``device`` has a UUID."""

    no_reserved = Reason(
        Code.DRIVER_TOO_OLD, "the installed NVIDIA driver is too old to report reserved memory", _UPDATE
    )

    def __init__(self, nvml: Nvidia, device: Device) -> None:
        self._nvml = nvml
        handle = nvml.ask(nvml.call, "nvmlDeviceGetHandleByUUID", device.uuid)
        self._whole = handle
        if device.parent_uuid is not None:
            self._whole = nvml.ask(nvml.call, "nvmlDeviceGetHandleByUUID", device.parent_uuid)
        if isinstance(handle, Reason):
            reason = handle.worded(f"NVML cannot find GPU {device.uuid}: {handle}")
            super().__init__(nvml, device, dict.fromkeys(Reading, reason))
            return
        calls: dict[Reading, Sequence[Call] | Reason] = {**_calls(nvml, handle, self._whole, device.memory_mib)}
        if device.parent_uuid is not None:
            calls |= dict.fromkeys(_OF_THE_WHOLE_GPU, _MIG)
        most = nvml.ask(lambda: _watts(nvml.call(_LIMITS, self._whole)[1]))
        super().__init__(nvml, device, calls, None if isinstance(most, Reason) else most, nvml.garbled())

    def vendor_facts(self) -> dict[str, Any | Reason]:
        """VBIOS, limits and link of the whole GPU."""

        def fact(read: Callable[[Any], Any], name: str, *arguments: Any) -> Any | Reason:
            if isinstance(self._whole, Reason):
                return self._whole
            return self._nvml.ask(lambda: read(self._nvml.call(name, self._whole, *arguments)))

        def within(plausible: Range) -> Callable[[Any], Any]:
            return lambda value: plausible.checked(available(value))

        mig_mode = within(Range(0, 1))
        return {
            "vbios": fact(text, "nvmlDeviceGetVbiosVersion"),
            "power_limit_default_w": fact(_watts, "nvmlDeviceGetPowerManagementDefaultLimit"),
            "power_limits_w": fact(lambda limits: [_watts(limit) for limit in limits], _LIMITS),
            "max_sm_clock_mhz": fact(within(RANGES[Reading.SM_CLOCK]), "nvmlDeviceGetMaxClockInfo", 1),
            "max_memory_clock_mhz": fact(within(RANGES[Reading.MEMORY_CLOCK]), "nvmlDeviceGetMaxClockInfo", 2),
            "slowdown_c": fact(within(RANGES[Reading.TEMPERATURE]), "nvmlDeviceGetTemperatureThreshold", 1),
            "mig": fact(lambda modes: bool(mig_mode(modes[0])), "nvmlDeviceGetMigMode"),
            "pcie_generation": fact(within(Range(1, 15)), "nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_width": fact(within(Range(1, 64, "lanes")), "nvmlDeviceGetCurrPcieLinkWidth"),
        }


def _calls(nvml: Nvidia, handle: Any, whole: Any, memory_mib: float | None) -> dict[Reading, tuple[Call, ...]]:
    """The ways to take each reading of ``handle``, newest first; ``whole`` is its GPU, which settings belong to."""

    def call(
        name: str, *arguments: Any, of: Any = handle, read: Callable[[Any], Any] = available, shown: str | None = None
    ) -> Call:
        return Call(shown or name, lambda: read(nvml.call(name, of, *arguments)))

    def entries(answer: Any) -> list[tuple[int, float | None]]:
        return [(entry.pid, process_memory(entry.usedGpuMemory, memory_mib)) for entry in answer]

    def listed(kind: str) -> tuple[Call, Call]:
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        return call(f"{name}_v3", read=entries), call(f"{name}_v2", read=entries)

    def memory_v1(answer: Any) -> Memory:
        check_memory(answer.total, answer.used, answer.free)
        return Memory(answer.used / _MIB, None)

    def memory_v2() -> Memory:
        answer = nvml.call("nvmlDeviceGetMemoryInfo", handle, version=nvml.library.nvmlMemory_v2)
        check_memory(answer.total, answer.used, answer.free, answer.reserved)
        return split_memory(answer.total / _MIB, answer.used / _MIB, answer.free / _MIB, answer.reserved / _MIB)

    def field(name: str, number: int) -> Call:
        value = Field(nvml, handle, number)
        return Call(name, lambda: _thousandth(value()))

    return {
        Reading.MEMORY: (
            Call("nvmlDeviceGetMemoryInfo_v2", memory_v2),
            call("nvmlDeviceGetMemoryInfo", read=memory_v1),
        ),
        Reading.PROCESSES: listed("Compute"),
        Reading.GRAPHICS_PROCESSES: listed("Graphics"),
        Reading.SERVICE_PROCESSES: listed("MPSCompute"),
        Reading.ENERGY: (
            call("nvmlDeviceGetTotalEnergyConsumption", read=_thousandth, shown="counter"),
            field("counter (field 83)", _ENERGY),
        ),
        Reading.POWER: (
            field("instant", _INSTANT_POWER),
            call("nvmlDeviceGetPowerUsage", read=_thousandth, shown="mean of up to a second"),
        ),
        Reading.SM_CLOCK: (call("nvmlDeviceGetClockInfo", 1),),
        Reading.MEMORY_CLOCK: (call("nvmlDeviceGetClockInfo", 2),),
        Reading.TEMPERATURE: (call("nvmlDeviceGetTemperatureV", 0), call("nvmlDeviceGetTemperature", 0)),
        Reading.UTILIZATION: (call("nvmlDeviceGetUtilizationRates", read=lambda rates: int(available(rates.gpu))),),
        Reading.CLOCK_EVENTS: (
            call("nvmlDeviceGetCurrentClocksEventReasons", read=_events),
            call("nvmlDeviceGetCurrentClocksThrottleReasons", read=_events),
        ),
        Reading.POWER_LIMIT: (
            call("nvmlDeviceGetEnforcedPowerLimit", of=whole, read=_thousandth),
            call("nvmlDeviceGetPowerManagementLimit", of=whole, read=_thousandth),
        ),
        Reading.ECC: (call("nvmlDeviceGetEccMode", of=whole, read=lambda modes: available(modes[0])),),
        Reading.PERSISTENCE: (call("nvmlDeviceGetPersistenceMode", of=whole),),
    }


class Field:
    """Reads the field with the id ``number`` of a GPU."""

    def __init__(self, nvml: Nvidia, handle: Any, number: int) -> None:
        self._nvml, self._handle, self._number = nvml, handle, number
        self._stamp: int | None = None
        self._since_s = 0.0

    def __call__(self) -> float:
        """The value now.

        Raises:
            Implausible: the answer is not a current measurement.
        """
        (answer,) = self._nvml.call("nvmlDeviceGetFieldValues", self._handle, [self._number])
        if answer.nvmlReturn != 0:
            raise self._nvml.library.NVMLError(answer.nvmlReturn)
        if not 0 <= answer.valueType < len(_KINDS):
            raise Implausible(f"NVML answers field {self._number} with a value of the unknown type {answer.valueType}")
        now_s = time.monotonic()
        if answer.timestamp != self._stamp:
            self._stamp, self._since_s = answer.timestamp, now_s
        elif answer.timestamp and now_s - self._since_s > _STALE_S:
            raise Implausible(f"NVML repeats a value of field {self._number} that is {now_s - self._since_s:.1f} s old")
        kind = _KINDS[answer.valueType]
        value: float = getattr(answer.value, kind)
        # All ones in a short look like a plausible number of milliwatts.
        return -1 if kind == "usVal" and value == 2**16 - 1 else value


def available(value: Any) -> Any:
    """Return a number of NVML.

    Raises:
        Implausible: it is NVML's value for "not available".
    """
    if value is None or value in _ALL_ONES or not math.isfinite(value):
        raise Implausible(f"NVML answers {value}, which is its value for 'not available'")
    return value


def text(value: Any) -> Any:
    """Return a string of nvidia-ml-py, which older versions return as bytes, and anything else as it is."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def check_memory(total: int, *parts: int) -> None:
    """Check the numbers of bytes in one answer: each of ``parts`` is a part of ``total``.

    Raises:
        Implausible: they are not.
    """
    _TOTAL_BYTES.checked(available(total))
    for part in parts:
        if _BYTES.checked(available(part)) > total:
            raise Implausible(f"NVML answers {part} bytes of memory, of {total} in all")


def split_memory(total: float, used: float, free: float, reserved: float) -> Memory:
    """Memory in use without what the driver reserves.

    Drivers differ in whether ``used`` includes reserved memory. The sum shows which: the parts add up to the total.

    Raises:
        Implausible: ``used`` includes reserved memory, but more is reserved than used.
    """
    if abs(used + free - total) <= _TOLERANCE_MIB < reserved:
        if used < reserved:
            raise Implausible(f"NVML answers {reserved:.0f} MiB reserved of {used:.0f} MiB in use")
        return Memory(used - reserved, reserved)
    return Memory(used, reserved)


def process_memory(used: int | None, total_mib: float | None) -> float | None:
    """Memory of one process in MiB, None if ``used``, the bytes in the driver's list, is not a measurement."""
    try:
        mib = float(_BYTES.checked(available(used))) / _MIB
    except Implausible:
        return None
    # In containers the list shows 0, but a listed process has a context, which is never empty.
    return mib if mib > 0 and (total_mib is None or mib <= total_mib) else None


def _events(bits: Any) -> tuple[ClockEvent, ...]:
    bits = _EVENT_BITS.checked(available(bits))
    return tuple(event for bit, event in _EVENTS.items() if bits & bit)


def _thousandth(value: Any) -> float:
    """Convert mW or mJ to W or J."""
    return float(available(value)) / 1e3


def _watts(milliwatts: Any) -> Any:
    return RANGES[Reading.POWER].checked(_thousandth(milliwatts))


def _capability(major: int, minor: int) -> tuple[int, int]:
    return Range(1, 99).checked(available(major)), Range(0, 99).checked(available(minor))
