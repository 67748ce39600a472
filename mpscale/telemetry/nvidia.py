"""NVIDIA's GPUs, through NVML and nvidia-ml-py. No other module knows either."""

from __future__ import annotations

import importlib
import math
import re
import time
from collections.abc import Callable
from typing import Any

from mpscale.core.device import NVIDIA, Device
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.backend import Call, Gpu, GpuBackend
from mpscale.telemetry.readings import POWER_RANGE, ClockEvent, Implausible, Memory, Range, Reading

MIB = 2**20

_UPDATE = "update the NVIDIA driver"

# Numbers of nvmlReturn_t, which NVIDIA keeps stable. nvidia-ml-py's own messages ("Driver Not Loaded") name no cure.
_ERRORS = {
    2: Reason(Code.NOT_TOLD, "this GPU does not tell (invalid argument)"),
    3: Reason(Code.NOT_TOLD, "this GPU does not tell"),
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
    Code.BINDING_TOO_OLD,
    "the installed nvidia-ml-py does not know this call",
    "pip install --upgrade nvidia-ml-py",
)
_GARBLED = Reason(
    Code.GARBLED,
    "the list of processes of NVIDIA's drivers 535.43 to 535.86 is garbled",
    "update the NVIDIA driver: 535.86 is the last with this fault",
)
_MIG = Reason(Code.SHARED, "a MIG instance: NVML tells this of the whole GPU only, whose other instances share it")

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
"""A field's value older than this says nothing about now. Drivers give every new value a new timestamp."""

_TOLERANCE_MIB = 1.0
"""Parts and total of one answer differ by rounding only."""

_ALL_ONES = frozenset({-1, 2**32 - 1, 2**64 - 1})
"""NVML's "not available", as an integer of any size."""

_BYTES, _TOTAL_BYTES = Range(0, 2**50, "bytes"), Range(1, 2**50, "bytes")
_DEVICES = Range(0, 1024, "devices")
_CUDA_VERSION = Range(1000, 99_990)
_CAPABILITY, _MINOR_CAPABILITY = Range(1, 99), Range(0, 99)
_PCIE_GENERATION, _PCIE_WIDTH = Range(1, 15), Range(1, 64, "lanes")
_EVENT_BITS = Range(0, 2**16 - 1, "(bits)")
_MIG_MODE = Range(0, 1)


class _UnknownCall(Exception):
    """nvidia-ml-py has no function of that name."""


def open_backend() -> Nvidia | Reason:
    """NVML if it works, else the reason. Never raises."""
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
    count = backend.ask(lambda: _DEVICES.checked(told(backend.call("nvmlDeviceGetCount"))))
    if isinstance(count, Reason):
        backend.close()
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
        function = getattr(self.library, name, None)
        if function is None:
            raise _UnknownCall(name)
        return function(*arguments, **named)

    def explain(self, error: Exception) -> Reason:
        """The reason for an exception of nvidia-ml-py."""
        if isinstance(error, _UnknownCall):
            return _UNKNOWN_CALL
        # NVMLLibraryMismatchError is no NVMLError, and ctypes raises its own kinds for a library that does not fit.
        number = getattr(error, "value", 0)
        number = number if isinstance(number, int) else 0
        text = f"NVML failed: {type(error).__name__}: {error}"
        return _ERRORS.get(number) or Reason(Code.OTHER if number else Code.BINDING_BROKEN, text)

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
        return self._text("nvmlSystemGetDriverVersion") or None

    def runtime_version(self) -> str | None:
        """The newest CUDA that the driver supports, like ``"12.8"``."""
        number = self.ask(lambda: _CUDA_VERSION.checked(told(self.call("nvmlSystemGetCudaDriverVersion"))))
        return None if isinstance(number, Reason) else f"{number // 1000}.{number % 1000 // 10}"

    def gpu(self, device: Device) -> NvidiaGpu:
        """Open a GPU or a MIG instance."""
        return NvidiaGpu(self, device)

    def close(self) -> None:
        """Shut NVML down."""
        self.ask(self.call, "nvmlShutdown")

    def garbled(self) -> Reason | None:
        """Why process lists cannot be read.

        Drivers 535.43 to 535.86 write entries of 32 bytes where nvidia-ml-py reads 24, so all but the first are
        garbage.
        """
        match = re.match(r"(\d+)\.(\d+)", self.driver_version() or "")
        return _GARBLED if match and (535, 43) <= (int(match[1]), int(match[2])) <= (535, 86) else None

    def _known(self, name: str, *arguments: Any) -> Any:
        value = self.ask(self.call, name, *arguments)
        return None if isinstance(value, Reason) else value

    def _text(self, name: str, *arguments: Any) -> str | None:
        return text(self._known(name, *arguments))

    def _device(self, handle: Any, fallback: str, instance: bool = False) -> Device:
        memory = self._known("nvmlDeviceGetMemoryInfo", handle)
        total = None if memory is None else self.ask(lambda: _TOTAL_BYTES.checked(told(memory.total)))
        capability = pci = mode = None
        if not instance:
            capability = self.ask(lambda: _capability(*self.call("nvmlDeviceGetCudaComputeCapability", handle)))
            pci = self._known("nvmlDeviceGetPciInfo", handle)
            mode = self._known("nvmlDeviceGetMigMode", handle)
        return Device(
            kind="gpu",
            name=self._text("nvmlDeviceGetName", handle) or fallback,
            uuid=self._text("nvmlDeviceGetUUID", handle) or None,
            compute_capability=None if isinstance(capability, Reason) else capability,
            memory_mib=None if total is None or isinstance(total, Reason) else total / MIB,
            pci_bus_id=text(pci.busId) if pci else None,
            mig=bool(mode and mode[0] == 1),
            vendor=NVIDIA.name,
        )

    def _instances(self, handle: Any, gpu: Device) -> list[Device]:
        """The MIG instances of a GPU: each has its own memory, and shares everything else."""
        count = self.ask(lambda: _DEVICES.checked(told(self.call("nvmlDeviceGetMaxMigDeviceCount", handle))))
        found = []
        for index in range(0 if isinstance(count, Reason) else count):
            instance = self.ask(self.call, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if not isinstance(instance, Reason):  # else a place that no instance takes
                device = self._device(instance, f"MIG instance {index} of {gpu.name}", instance=True)
                found.append(device.part_of(gpu))
        return found


class NvidiaGpu(Gpu):
    """A GPU or a MIG instance.

    Args:
        nvml: the opened library.
        device: which GPU; one with a UUID.
    """

    not_apart = Reason(
        Code.DRIVER_TOO_OLD, "the installed NVIDIA driver is too old to tell reserved memory apart", _UPDATE
    )

    def __init__(self, nvml: Nvidia, device: Device) -> None:
        self._nvml = nvml
        handle = nvml.ask(nvml.call, "nvmlDeviceGetHandleByUUID", device.uuid)
        self._whole = handle
        if device.parent_uuid is not None:
            self._whole = nvml.ask(nvml.call, "nvmlDeviceGetHandleByUUID", device.parent_uuid)
        if isinstance(handle, Reason):
            reason = handle.worded(f"NVML does not find GPU {device.uuid}: {handle}")
            super().__init__(nvml, device, {}, dict.fromkeys(Reading, reason))
            return
        most = nvml.ask(lambda: _watts(nvml.call(_LIMITS, self._whole)[1]))
        super().__init__(
            nvml,
            device,
            _calls(nvml, handle, self._whole, device.memory_mib),
            {} if device.parent_uuid is None else dict.fromkeys(_OF_THE_WHOLE_GPU, _MIG),
            None if isinstance(most, Reason) else most,
            nvml.garbled(),
        )

    def vendor_facts(self) -> dict[str, Any | Reason]:
        """VBIOS, limits and link of the whole GPU."""

        def fact(range_: Range | None, name: str, *arguments: Any, read: Callable[[Any], Any] = told) -> Any | Reason:
            def take() -> Any:
                value = read(self._nvml.call(name, self._whole, *arguments))
                return value if range_ is None else range_.checked(value)

            return self._whole if isinstance(self._whole, Reason) else self._nvml.ask(take)

        mig = fact(_MIG_MODE, "nvmlDeviceGetMigMode", read=lambda modes: told(modes[0]))
        return {
            "vbios": fact(None, "nvmlDeviceGetVbiosVersion", read=text),
            "power_limit_default_w": fact(None, "nvmlDeviceGetPowerManagementDefaultLimit", read=_watts),
            "power_limits_w": fact(None, _LIMITS, read=lambda limits: [_watts(limit) for limit in limits]),
            "max_sm_clock_mhz": fact(Reading.SM_CLOCK.range, "nvmlDeviceGetMaxClockInfo", 1),
            "max_memory_clock_mhz": fact(Reading.MEMORY_CLOCK.range, "nvmlDeviceGetMaxClockInfo", 2),
            "slowdown_c": fact(Reading.TEMPERATURE.range, "nvmlDeviceGetTemperatureThreshold", 1),
            "mig": mig if isinstance(mig, Reason) else bool(mig),
            "pcie_generation": fact(_PCIE_GENERATION, "nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_width": fact(_PCIE_WIDTH, "nvmlDeviceGetCurrPcieLinkWidth"),
        }


def _calls(nvml: Nvidia, handle: Any, whole: Any, memory_mib: float | None) -> dict[Reading, tuple[Call, ...]]:
    """The ways to take each reading, newest first.

    Args:
        nvml: the opened library.
        handle: the GPU or MIG instance.
        whole: the GPU, which settings belong to.
        memory_mib: the total memory, None if unknown.
    """

    def call(
        name: str, *arguments: Any, of: Any = handle, read: Callable[[Any], Any] = told, shown: str | None = None
    ) -> Call:
        return Call(shown or name, lambda: read(nvml.call(name, of, *arguments)))

    def listed(kind: str) -> tuple[Call, Call]:
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        new, old = (
            call(name + version, read=lambda entries: _entries(entries, memory_mib)) for version in ("_v3", "_v2")
        )
        return new, old

    def memory_v2() -> Memory:
        answer = nvml.call("nvmlDeviceGetMemoryInfo", handle, version=nvml.library.nvmlMemory_v2)
        check_memory(answer.total, answer.used, answer.free, answer.reserved)
        return split_memory(answer.total / MIB, answer.used / MIB, answer.free / MIB, answer.reserved / MIB)

    def field(number: int) -> Callable[[], float]:
        read = Field(nvml, handle, number)
        return lambda: _thousandth(read())

    return {
        Reading.MEMORY: (
            Call("nvmlDeviceGetMemoryInfo_v2", memory_v2),
            call("nvmlDeviceGetMemoryInfo", read=_memory_v1),
        ),
        Reading.PROCESSES: listed("Compute"),
        Reading.GRAPHICS_PROCESSES: listed("Graphics"),
        Reading.SERVICE_PROCESSES: listed("MPSCompute"),
        Reading.ENERGY: (
            call("nvmlDeviceGetTotalEnergyConsumption", read=_thousandth, shown="counter"),
            Call("counter (field 83)", field(_ENERGY)),
        ),
        Reading.POWER: (
            Call("instant", field(_INSTANT_POWER)),
            call("nvmlDeviceGetPowerUsage", read=_thousandth, shown="mean of up to a second"),
        ),
        Reading.SM_CLOCK: (call("nvmlDeviceGetClockInfo", 1),),
        Reading.MEMORY_CLOCK: (call("nvmlDeviceGetClockInfo", 2),),
        Reading.TEMPERATURE: (call("nvmlDeviceGetTemperatureV", 0), call("nvmlDeviceGetTemperature", 0)),
        Reading.UTILIZATION: (call("nvmlDeviceGetUtilizationRates", read=lambda rates: int(told(rates.gpu))),),
        Reading.CLOCK_EVENTS: (
            call("nvmlDeviceGetCurrentClocksEventReasons", read=_events),
            call("nvmlDeviceGetCurrentClocksThrottleReasons", read=_events),
        ),
        Reading.POWER_LIMIT: (
            call("nvmlDeviceGetEnforcedPowerLimit", of=whole, read=_thousandth),
            call("nvmlDeviceGetPowerManagementLimit", of=whole, read=_thousandth),
        ),
        Reading.ECC: (call("nvmlDeviceGetEccMode", of=whole, read=lambda modes: told(modes[0])),),
        Reading.PERSISTENCE: (call("nvmlDeviceGetPersistenceMode", of=whole),),
    }


class Field:
    """Reads one field of a GPU.

    Args:
        nvml: the opened library.
        handle: the GPU.
        number: the field's id.
    """

    def __init__(self, nvml: Nvidia, handle: Any, number: int) -> None:
        self._nvml, self._handle, self._number = nvml, handle, number
        self._stamp: int | None = None
        self._since_s = 0.0

    def __call__(self) -> float:
        """The value now.

        Raises:
            Implausible: the answer is no measurement of this moment.
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
        # All ones of a short would pass for a number of milliwatts.
        return -1 if kind == "usVal" and value == 2**16 - 1 else value


def told(value: Any) -> Any:
    """Return a number of NVML.

    Raises:
        Implausible: it is NVML's value for "not available".
    """
    if value is None or value in _ALL_ONES or not math.isfinite(value):
        raise Implausible(f"NVML answers {value}, which is its value for 'not available'")
    return value


def text(value: Any) -> str | None:
    """A string of nvidia-ml-py, which older versions return as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def check_memory(total: int, used: int, *parts: int) -> None:
    """Check the memory of one answer.

    Args:
        total: bytes in all.
        used: bytes in use.
        parts: other bytes of the total.

    Raises:
        Implausible: it cannot be so.
    """
    _TOTAL_BYTES.checked(told(total))
    for part in (used, *parts):
        if _BYTES.checked(told(part)) > total:
            raise Implausible(f"NVML answers {part} bytes of memory, of {total} in all")


def split_memory(total: float, used: float, free: float, reserved: float) -> Memory:
    """Memory in use without what the driver reserves.

    Drivers differ in whether ``used`` includes reserved memory. The sum tells: the parts make up the total.

    Raises:
        Implausible: more is reserved than used, though used includes it.
    """
    if abs(used + free - total) <= _TOLERANCE_MIB < reserved:
        if used < reserved:
            raise Implausible(f"NVML answers {reserved:.0f} MiB reserved of {used:.0f} MiB in use")
        return Memory(used - reserved, reserved)
    return Memory(used, reserved)


def process_memory(used: int | None, total_mib: float | None) -> float | None:
    """Memory of one process in MiB, None if its entry does not tell.

    Args:
        used: bytes, from the driver's list of processes.
        total_mib: the GPU's memory, None if unknown.
    """
    try:
        mib = float(_BYTES.checked(told(used))) / MIB
    except Implausible:
        return None
    # Containers are told 0: a listed process holds a context, which is never empty.
    return mib if mib > 0 and (total_mib is None or mib <= total_mib) else None


def _entries(entries: Any, total_mib: float | None) -> list[tuple[int, float | None]]:
    return [(entry.pid, process_memory(entry.usedGpuMemory, total_mib)) for entry in entries]


def _memory_v1(answer: Any) -> Memory:
    check_memory(answer.total, answer.used, answer.free)
    return Memory(answer.used / MIB, None)


def _events(bits: Any) -> tuple[ClockEvent, ...]:
    bits = _EVENT_BITS.checked(told(bits))
    return tuple(event for bit, event in _EVENTS.items() if bits & bit)


def _thousandth(value: Any) -> float:
    """Milliwatts or millijoules in W or J."""
    return float(told(value)) / 1e3


def _watts(milliwatts: Any) -> Any:
    return POWER_RANGE.checked(_thousandth(milliwatts))


def _capability(major: int, minor: int) -> tuple[int, int]:
    return int(_CAPABILITY.checked(told(major))), int(_MINOR_CAPABILITY.checked(told(minor)))
