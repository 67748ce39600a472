"""Which GPU CUDA has made visible to this process, asked of CUDA's own driver library.

NVML and CUDA number GPUs each in their own way. A process is told its GPU by UUID, and this is how it checks that it
got that one, before a figure of one GPU passes for another's.
"""

from __future__ import annotations

import ctypes

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
