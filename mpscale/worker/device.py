"""The device as TensorFlow has it: made ready, held against the GPU that NVML watches, asked for its allocator's peak.

The one place in the process of a case that knows of GPUs.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import tensorflow as tf

from mpscale.core.device import Device
from mpscale.core.mode import Mode

MIB = 2**20
BFC = "bfc"


class AllocatorPeak:
    """Peak of TensorFlow's allocator, in the whole process and in a window of it.

    Args:
        device: where the process trains.
    """

    def __init__(self, device: Device) -> None:
        self._reason = None
        if device.kind != "gpu":
            self._reason = "TensorFlow's CPU allocator keeps no statistics"
        elif device.is_stand_in:
            self._reason = "the CPU trained in place of the stand-in"
        self._before: float | None = None

    def begin_window(self) -> None:
        """From now on counts as the window."""
        self._before, _ = self._peak()
        if self._before is not None:
            tf.config.experimental.reset_memory_stats("GPU:0")

    def columns(self, windowed: bool) -> tuple[dict[str, Any], dict[str, str]]:
        """{column: MiB} and {column: reason}.

        Args:
            windowed: whether there was a window.
        """
        whole, timed = "gpu_memory_allocator_peak_mib", "gpu_memory_allocator_timed_peak_mib"
        peak, reason = self._peak()
        if peak is None:
            return {}, dict.fromkeys((whole, timed), str(reason))
        if not windowed:
            return {whole: peak}, {timed: "timing was off"}
        return {whole: max(peak, self._before or 0.0), timed: peak}, {}

    def _peak(self) -> tuple[float | None, str | None]:
        if self._reason is not None:
            return None, self._reason
        try:
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
            # A process that has trained holds memory: 0 is what an allocator says that does not count.
            return (peak / MIB, None) if peak else (None, "TensorFlow's allocator says that it never held any memory")
        except (ValueError, tf.errors.OpError) as error:
            return None, f"TensorFlow's allocator keeps no statistics: {error}"


def require(device: Device) -> None:
    """Checks that TensorFlow can use the device, without touching it.

    Raises:
        RuntimeError: it is a GPU and TensorFlow sees none.
    """
    if device.kind == "gpu" and not device.is_stand_in and not tf.config.list_physical_devices("GPU"):
        raise RuntimeError(
            f"{device.name} is there but TensorFlow {tf.__version__} sees no GPU; "
            "install its CUDA libraries with pip install 'tensorflow[and-cuda]', or hide the GPU with "
            "CUDA_VISIBLE_DEVICES=-1 to measure the CPU"
        )


def touch(device: Device, mode: Mode) -> tuple[dict[str, Any], dict[str, str]]:
    """Makes the device ready.

    Args:
        device: the one that this process was started for.
        mode: says which arithmetic is allowed.

    Returns:
        {column: value} and {column: reason} of what it was set to.

    Raises:
        RuntimeError: TensorFlow uses another GPU than the one that NVML watches.
    """
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    set_arithmetic(mode)
    values: dict[str, Any] = {}
    missed: dict[str, str] = {}
    if device.has_tf32:
        values["tf32"] = tf.config.experimental.tensor_float_32_execution_enabled()
    else:
        missed["tf32"] = f"{device.name} has no TF32"
    if device.kind == "gpu":
        values["gpu_allocator"] = os.environ.get("TF_GPU_ALLOCATOR") or BFC
    else:
        missed["gpu_allocator"] = "no GPU"
    tf.constant(0.0).numpy()
    problem = None
    if device.kind == "gpu" and not device.is_stand_in:
        problem = mismatch(device.uuid, device.pci_bus_id)
    if problem is not None:
        raise RuntimeError(f"{problem}; name one GPU by its UUID in CUDA_VISIBLE_DEVICES")
    return values, missed


def set_arithmetic(mode: Mode) -> None:
    """Tells TensorFlow what it may do about precision by itself.

    Before anything is traced: a function keeps the settings that it was traced under.
    """
    tf.config.experimental.enable_tensor_float_32_execution(mode.tf32)
    if mode.graph_rewrite:
        tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})


# Which GPU CUDA has made visible to this process, asked of CUDA's own driver library. NVML and CUDA number GPUs each
# in their own way. A process is told its GPU by UUID, and this is how it checks that it got that one, before a figure
# of one GPU passes for another's.

_SUCCESS = 0


def first_device() -> tuple[str | None, str | None]:
    """UUID (32 hexadecimal digits) and PCI bus id of CUDA's first device; None for what it does not tell."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device = ctypes.c_int()
        if cuda.cuInit(0) != _SUCCESS or cuda.cuDeviceGet(ctypes.byref(device), 0) != _SUCCESS:
            return None, None
    except (OSError, AttributeError):
        return None, None
    return _uuid(cuda, device), _pci_bus_id(cuda, device)


def mismatch(uuid: str | None, pci_bus_id: str | None) -> str | None:
    """Why CUDA's first device is not the GPU that NVML knows by ``uuid``; None if it is, or cannot be told.

    Args:
        uuid: NVML's, of a GPU or of a MIG instance.
        pci_bus_id: NVML's.
    """
    cuda_uuid, cuda_bus = first_device()
    if uuid and cuda_uuid:
        same = uuid.split("-", 1)[-1].replace("-", "").casefold() == cuda_uuid
        return None if same else f"CUDA uses the GPU with UUID {cuda_uuid}, and NVML watches {uuid}"
    if pci_bus_id and cuda_bus:
        same = _bus(pci_bus_id) == _bus(cuda_bus)
        return None if same else f"CUDA uses the GPU at PCI bus {cuda_bus}, and NVML watches that at {pci_bus_id}"
    return None


def _uuid(cuda: ctypes.CDLL, device: ctypes.c_int) -> str | None:
    raw = (ctypes.c_ubyte * 16)()
    # The second version tells the UUID of a MIG instance where the first tells its GPU's.
    for name in ("cuDeviceGetUuid_v2", "cuDeviceGetUuid"):
        function = getattr(cuda, name, None)
        if function is not None and function(raw, device) == _SUCCESS:
            return bytes(raw).hex()
    return None


def _pci_bus_id(cuda: ctypes.CDLL, device: ctypes.c_int) -> str | None:
    text = ctypes.create_string_buffer(32)
    function = getattr(cuda, "cuDeviceGetPCIBusId", None)
    if function is None or function(text, len(text), device) != _SUCCESS:
        return None
    return text.value.decode(errors="replace")


def _bus(bus_id: str) -> tuple[int, ...]:
    """NVML writes the domain with eight digits, CUDA with four."""
    domain, bus, rest = bus_id.split(":")
    slot, _, function = rest.partition(".")
    return tuple(int(part or "0", 16) for part in (domain, bus, slot, function))
