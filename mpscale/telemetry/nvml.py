"""NVML, NVIDIA's management library, through nvidia-ml-py: a value, or the reason why there is none.

With gpu.py the only place that knows nvidia-ml-py: neither its exceptions nor its handles leave the two. Any call
may block for as long as the driver does, or take the process down with it, so both run in a process of their own
(sampler.py); everybody else talks to that (driver.py).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpscale.telemetry.device import Device
from mpscale.telemetry.plausible import MIB, Doubt, Implausible, checked

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
