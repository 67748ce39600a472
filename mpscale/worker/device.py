"""The device as TensorFlow and CUDA see it. All code of the worker that concerns GPUs is here."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import tensorflow as tf

from mpscale.core.case import Settings
from mpscale.core.device import Device, gpu_files_of
from mpscale.core.mode import Mode
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.worker.cluster import cluster_of, replicas_here

_SUCCESS = 0  # what a call to CUDA returns


class AllocatorPeak:
    """Peak memory of TensorFlow's allocator: so far, in a window of the process, and in all of it.

    Args:
        device: of the case.
        gpus: how many it uses; the peak is the largest of any of them.
    """

    def __init__(self, device: Device, gpus: int = 1) -> None:
        self._device, self._gpus = device, [f"GPU:{number}" for number in range(gpus)]
        self._before: float | None = None
        self._windowed = False

    def so_far(self) -> Findings:
        """The peak in MiB up to now, which is when a few steps have been synchronised one by one."""
        found = Findings()
        found.put("gpu_memory_allocator_synchronised_peak_mib", self._peak())
        return found

    def begin_window(self) -> None:
        self._windowed = True
        peak = self._peak()
        if not isinstance(peak, Reason):
            self._before = peak
            for gpu in self._gpus:
                tf.config.experimental.reset_memory_stats(gpu)

    def columns(self) -> Findings:
        """The peaks in MiB. The window, if one has begun, ends here."""
        whole, timed = "gpu_memory_allocator_peak_mib", "gpu_memory_allocator_timed_peak_mib"
        found = Findings()
        peak = self._peak()
        if isinstance(peak, Reason):
            found.miss((whole, timed), peak)
        else:
            found.values[whole] = max(peak, self._before or 0.0)
            if self._windowed:
                found.values[timed] = peak
            else:
                found.miss([timed], Reason(Code.NOT_ASKED_FOR, "timing was off"))
        return found

    def _peak(self) -> float | Reason:
        if self._device.kind != "gpu":
            return Reason(Code.NO_GPU, "TensorFlow's CPU allocator keeps no statistics")
        if self._device.is_stand_in:
            return Reason(Code.NO_GPU, "the CPU trained in place of the stand-in")
        try:
            peak = max(float(tf.config.experimental.get_memory_info(gpu)["peak"]) for gpu in self._gpus)
        except (ValueError, tf.errors.OpError) as error:
            return Reason(Code.ALLOCATOR_SILENT, f"TensorFlow's allocator keeps no statistics: {error}")
        # A process that has trained has held memory, so an allocator that reports 0 does not count.
        return peak / 2**20 or Reason(Code.ALLOCATOR_SILENT, "TensorFlow's allocator reports a peak of 0 bytes")


def held_by_this_process(process: Path = Path("/proc/self")) -> Reason | None:
    """Why a child of this process may be unable to use a GPU; None if this process holds nothing of one.

    CUDA does not survive a fork, and cannot be used without its library and a device file. Only Linux shows which
    files a process has mapped and opened.
    """
    try:
        found = gpu_files_of(process)
    except OSError as error:
        return Reason(Code.FORK_UNSAFE, f"this system does not show whether a process holds a GPU ({error})")
    if not found:
        return None
    return Reason(
        Code.FORK_UNSAFE,
        f"something that is imported with TensorFlow has touched the GPU ({', '.join(found[:3])})",
        "remove what does so, such as a sitecustomize.py, a .pth file or a plug-in of TensorFlow",
    )


def require(device: Device) -> None:
    """Check that TensorFlow can use the device, without touching it.

    Raises:
        RuntimeError: the device is a GPU and TensorFlow sees none.
    """
    if device.kind == "gpu" and not device.is_stand_in and not tf.config.list_physical_devices("GPU"):
        raise RuntimeError(
            f"this machine has a GPU ({device.name}), but TensorFlow {tf.__version__} cannot use it; install the CUDA "
            "libraries with pip install 'tensorflow[and-cuda]', or set CUDA_VISIBLE_DEVICES=-1 to measure the CPU"
        )


def touch(device: Device, mode: Mode, settings: Settings) -> Findings:
    """Set up the device that this process was started for; return the columns that describe the setup.

    Raises:
        RuntimeError: TensorFlow uses another GPU than the one that is monitored, or sees fewer than this process has
            replicas.
        ValueError, PeerLost: as of :func:`mpscale.worker.cluster.cluster_of`.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    set_arithmetic(mode)
    on_gpu = device.kind == "gpu"
    if settings.strategy != "none" and (not on_gpu or device.is_stand_in):
        # Logical devices, which share the cores and the memory of the CPU; TensorFlow must not have touched it yet.
        cpu, number = tf.config.list_physical_devices("CPU")[0], replicas_here(settings)
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * number)
    elif settings.strategy == "multiworker":
        # Its strategy uses all that it sees.
        tf.config.set_visible_devices(_enough(gpus, replicas_here(settings)), "GPU")
    found = Findings()
    if device.has_tf32:
        found.values["tf32"] = tf.config.experimental.tensor_float_32_execution_enabled()
    else:
        found.miss(["tf32"], Reason(Code.UNSUPPORTED, f"{device.name} has no TF32"))
    if on_gpu:
        found.values["gpu_allocator"] = os.environ.get("TF_GPU_ALLOCATOR") or "bfc"
    else:
        found.miss(["gpu_allocator"], Reason(Code.NO_GPU, "no GPU"))
    cluster_of(settings)  # before TensorFlow touches a device
    tf.constant(0.0).numpy()
    problem = mismatch(device.uuid, device.pci_bus_id) if on_gpu and not device.is_stand_in else None
    if problem is not None:
        raise RuntimeError(f"{problem}; set CUDA_VISIBLE_DEVICES to the UUID of one GPU")
    return found


def _enough(gpus: list[Any], replicas: int) -> list[Any]:
    """The GPUs of this process's replicas."""
    if len(gpus) < replicas:
        raise RuntimeError(
            f"{replicas} replicas of this worker need as many GPUs, and TensorFlow sees {len(gpus)}; show it more of "
            "them, or ask for fewer replicas"
        )
    return gpus[:replicas]


def set_arithmetic(mode: Mode) -> None:
    """Allow TensorFlow what the mode allows: TF32, and the rewrite of graphs to float16.

    Call this before anything is traced, since a function keeps the settings under which it was traced.
    """
    tf.config.experimental.enable_tensor_float_32_execution(mode.tf32)
    if mode.graph_rewrite:
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})


def mismatch(uuid: str | None, pci_bus_id: str | None) -> str | None:
    """Why CUDA's first device is not the GPU that is monitored; None if it is, or if CUDA does not identify it.

    CUDA and the driver number GPUs differently: without this check, figures of one GPU could be reported for another.
    ``uuid``, of a GPU or a MIG instance, and ``pci_bus_id`` are the driver's.
    """
    cuda_uuid, cuda_bus = _first_device()
    if uuid and cuda_uuid:
        same = uuid.split("-", 1)[-1].replace("-", "").casefold() == cuda_uuid
        return None if same else f"CUDA uses the GPU with UUID {cuda_uuid}, but mpscale monitors {uuid}"
    if pci_bus_id and cuda_bus:
        same = _bus(pci_bus_id) == _bus(cuda_bus)
        return None if same else f"CUDA uses the GPU at PCI bus {cuda_bus}, but mpscale monitors that at {pci_bus_id}"
    return None


def _first_device() -> tuple[str | None, str | None]:
    """UUID (32 hexadecimal digits) and PCI bus id of CUDA's first device; None for what CUDA does not report."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device = ctypes.c_int()
        if cuda.cuInit(0) != _SUCCESS or cuda.cuDeviceGet(ctypes.byref(device), 0) != _SUCCESS:
            return None, None
    except (OSError, AttributeError):
        return None, None

    def succeeds(name: str, *arguments: Any) -> bool:
        function = getattr(cuda, name, None)
        return function is not None and function(*arguments) == _SUCCESS

    raw, text = (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(32)
    # For a MIG instance, the second version returns its own UUID and the first that of its GPU.
    has_uuid = succeeds("cuDeviceGetUuid_v2", raw, device) or succeeds("cuDeviceGetUuid", raw, device)
    has_bus_id = succeeds("cuDeviceGetPCIBusId", text, len(text), device)
    return bytes(raw).hex() if has_uuid else None, text.value.decode(errors="replace") if has_bus_id else None


def _bus(bus_id: str) -> tuple[int, ...]:
    """A bus id as numbers. The driver writes the domain with eight digits, CUDA with four."""
    domain, bus, rest = bus_id.split(":")
    slot, _, function = rest.partition(".")
    return tuple(int(part or "0", 16) for part in (domain, bus, slot, function))
