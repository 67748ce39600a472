"""NVML, NVIDIA's management library, through nvidia-ml-py: a value, or the reason why there is none.

Nothing of nvidia-ml-py leaves this file: neither its exceptions, nor its handles, nor its sizes in bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mpscale.telemetry.device import Device

_MIB = 2**20

# Numbers of nvmlReturn_t, which NVIDIA keeps stable; the messages of nvidia-ml-py ("Driver Not Loaded") name no cure.
_PLAIN_WORDS = {
    4: "no permission to talk to the NVIDIA driver",
    9: "the NVIDIA driver is not loaded",
    12: "no NVIDIA driver library (libnvidia-ml.so.1) on this machine",
    13: "the installed NVIDIA driver is too old for this call",
    15: "the GPU is lost: it fell off the bus or was reset",
    18: "the NVIDIA driver's library and kernel module are of different versions; reload the module or reboot",
}


class NoNvml:
    """Stands in where NVML cannot be used: no device, no value, always the same reason.

    Args:
        reason: why not, in plain words.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def devices(self) -> list[Device]:
        """No GPU is known."""
        return []

    def process_memory_mib(self, uuid: str, pid: int) -> tuple[float | None, str | None]:
        """No value, and the reason."""
        return None, self.reason

    def driver_version(self) -> str | None:
        """Unknown."""
        return None

    def cuda_driver_version(self) -> str | None:
        """Unknown."""
        return None

    def close(self) -> None:
        """Nothing to close."""


class Nvml:
    """An initialised NVML. :func:`open_nvml` makes one.

    No method raises, but any may block for as long as the driver does: do not call one beside a measurement,
    except from a thread that may be abandoned.

    Args:
        library: the module ``pynvml`` of nvidia-ml-py, after ``nvmlInit``.
        count: how many GPUs it found.
    """

    def __init__(self, library: Any, count: int) -> None:
        self._library = library
        self._count = count
        self._handles: dict[str, Any] = {}

    def devices(self) -> list[Device]:
        """The GPUs in NVML's order, which is that of the PCI bus.

        A GPU that does not answer keeps its place, so that indices hold; its ``uuid`` is then None.
        """
        return [self._device(index) for index in range(self._count)]

    def process_memory_mib(self, uuid: str, pid: int) -> tuple[float | None, str | None]:
        """GPU memory that one process uses now.

        Args:
            uuid: NVML's full UUID of the GPU.
            pid: process id as this process sees it.

        Returns:
            MiB and None, or None and the reason.
        """
        handle, reason = self._handle(uuid)
        if handle is None:
            return None, reason
        listed: list[Any] = []
        for kind in ("Compute", "Graphics"):
            processes, reason = self._processes(kind, handle)
            if processes is None:
                return None, f"NVML gives no list of processes: {reason}"
            listed += [process for process in processes if process.pid == pid]
        if not listed:
            return None, (
                f"NVML lists no process {pid} on this GPU: it holds no GPU memory, or this runs in a container "
                "with a PID namespace of its own and NVML numbers processes as the host does"
            )
        # A process of both kinds is in both lists with the same figure, so the sum would count it twice.
        used = max(process.usedGpuMemory or 0 for process in listed)
        if used == 0:
            return None, f"NVML lists process {pid} but not its memory, as under WSL2 and in some containers"
        return used / _MIB, None

    def driver_version(self) -> str | None:
        """The version of the NVIDIA driver, like ``"570.86.15"``; None if unknown."""
        return _text(self._ask("nvmlSystemGetDriverVersion")[0])

    def cuda_driver_version(self) -> str | None:
        """The newest CUDA that the driver supports, like ``"12.8"``; None if unknown."""
        number = self._ask("nvmlSystemGetCudaDriverVersion")[0]
        return f"{number // 1000}.{number % 1000 // 10}" if number else None

    def close(self) -> None:
        """Shuts NVML down. No other method may be called afterwards."""
        self._handles.clear()
        self._ask("nvmlShutdown")

    def _device(self, index: int) -> Device:
        handle, reason = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return Device("gpu", f"GPU {index}, which does not answer ({reason})")
        uuid = _text(self._ask("nvmlDeviceGetUUID", handle)[0])
        if uuid:
            self._handles[uuid] = handle
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", handle)[0]
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)[0]
        return Device(
            kind="gpu",
            name=_text(self._ask("nvmlDeviceGetName", handle)[0]) or f"unnamed GPU {index}",
            uuid=uuid,
            compute_capability=(int(capability[0]), int(capability[1])) if capability else None,
            memory_mib=memory.total / _MIB if memory else None,
        )

    def _handle(self, uuid: str) -> tuple[Any, str | None]:
        if uuid not in self._handles:
            handle, reason = self._ask("nvmlDeviceGetHandleByUUID", uuid)
            if handle is None:
                return None, f"NVML does not find GPU {uuid}: {reason}"
            self._handles[uuid] = handle
        return self._handles[uuid], None

    def _processes(self, kind: str, handle: Any) -> tuple[Any, str | None]:
        processes, reason = self._ask(f"nvmlDeviceGet{kind}RunningProcesses_v3", handle)
        if processes is None:  # drivers before 510 have only the second version
            processes, _ = self._ask(f"nvmlDeviceGet{kind}RunningProcesses_v2", handle)
        return processes, reason

    def _ask(self, function: str, *arguments: Any) -> tuple[Any, str | None]:
        return _ask(getattr(self._library, function, None), *arguments)


def open_nvml() -> Nvml | NoNvml:
    """NVML where it works, else a stand-in that knows why not. Never raises."""
    try:
        library: Any = importlib.import_module("pynvml")
    except Exception as error:  # a broken installation may fail in any way
        return NoNvml(f"nvidia-ml-py cannot be imported ({error})")
    _, reason = _ask(getattr(library, "nvmlInit", None))
    if reason is not None:
        return NoNvml(reason)
    count, reason = _ask(library.nvmlDeviceGetCount)
    if reason is not None:
        _ask(library.nvmlShutdown)
        return NoNvml(reason)
    return Nvml(library, int(count))


def _ask(function: Callable[..., Any] | None, *arguments: Any) -> tuple[Any, str | None]:
    """The answer and None, or None and the reason in plain words."""
    if function is None:
        return None, "the installed nvidia-ml-py does not know this call"
    try:
        return function(*arguments), None
    except Exception as error:
        # NVMLLibraryMismatchError is no NVMLError, and ctypes raises its own kinds on a library that does not fit.
        # Telemetry must never end a run, so every kind becomes a reason.
        known = _PLAIN_WORDS.get(getattr(error, "value", 0))
        return None, known or f"NVML failed: {type(error).__name__}: {error}"


def _text(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
