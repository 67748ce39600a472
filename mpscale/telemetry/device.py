"""The device that a run trains on, as far as it can be known without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from mpscale.telemetry import host

if TYPE_CHECKING:
    from mpscale.telemetry.nvml import NoNvml, Nvml

_NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; Slurm writes the last one for a job without GPUs."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    ``uuid`` is NVML's full UUID (``GPU-...``) and ``compute_capability`` its ``(major, minor)``; both are None
    on a CPU. ``memory_mib`` is the GPU's total memory, or the host's on a CPU.
    """

    kind: Literal["cpu", "gpu"]
    name: str
    uuid: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_mib: float | None = None

    @property
    def has_tf32(self) -> bool:
        """Whether its matrix units round float32 to TF32: NVIDIA's Ampere (8.0) and newer."""
        return self.compute_capability is not None and self.compute_capability >= (8, 0)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Device:
        """The inverse of :meth:`to_json`."""
        capability = values.get("compute_capability")
        return cls(**{**values, "compute_capability": tuple(capability) if capability else None})


def find_device(nvml: Nvml | NoNvml, environ: Mapping[str, str]) -> Device:
    """The device that a run uses: the first GPU that ``CUDA_VISIBLE_DEVICES`` names, else the CPU.

    An index counts in NVML's order, that of the PCI bus: workers run with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
    Where NVML knows no GPU, the device is the CPU whatever the variable says.

    Args:
        nvml: tells which GPUs there are.
        environ: the environment to look in, such as ``os.environ``.

    Raises:
        ValueError: the variable names no GPU of this machine, several, or a MIG instance; or the GPU has no UUID.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    entry = None if visible is None else visible.split(",")[0].strip()
    if entry is not None and entry.upper().startswith("MIG-"):
        raise ValueError(f'MIG is not supported yet: {_given(visible)}; name a whole GPU, or "" for the CPU')
    gpus = [] if entry in _NO_GPU else nvml.devices()
    if not gpus:
        return _cpu()
    device = gpus[0] if entry is None else _named(entry, gpus)
    if device.uuid is None:
        raise ValueError(
            f"NVML gives no UUID for {device.name}, so no process can be tied to it; "
            "name another GPU in CUDA_VISIBLE_DEVICES"
        )
    return device


def _named(entry: str, gpus: list[Device]) -> Device:
    """The one GPU that an entry of CUDA_VISIBLE_DEVICES means: an index, a UUID, or the beginning of one."""
    if entry.isdecimal():
        matches = gpus[int(entry) : int(entry) + 1]
    else:
        start = entry.casefold()
        matches = [
            gpu for gpu in gpus if gpu.uuid and start.startswith("gpu-") and gpu.uuid.casefold().startswith(start)
        ]
    if len(matches) == 1:
        return matches[0]
    there = "; ".join(f"{index}: {gpu.name}, {gpu.uuid}" for index, gpu in enumerate(gpus))
    problem = "matches several GPUs" if matches else "matches no GPU"
    raise ValueError(f'{_given(entry)} {problem}; there is {there}; "" means the CPU')


def _given(value: str | None) -> str:
    return f"CUDA_VISIBLE_DEVICES={value!r}"


def _cpu() -> Device:
    return Device("cpu", str(host.cpu_facts()["model"]), memory_mib=host.memory_mib())
