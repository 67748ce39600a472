"""The device that a run trains on, as far as it can be known without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; Slurm writes the last one for a job without GPUs."""

STAND_IN = "mpscale stand-in"
"""How the name of a GPU begins that exists in tests alone: NVML's figures are scripted, and the CPU trains."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    ``uuid`` is NVML's full UUID (``GPU-...``, or ``MIG-...`` for a MIG instance), ``compute_capability`` its
    ``(major, minor)`` and ``pci_bus_id`` NVML's; all are None on a CPU. ``memory_mib`` is the GPU's total memory, or
    the host's on a CPU. ``mig`` says that the GPU is divided into MIG instances, and ``parent_uuid`` of an instance
    which GPU it is a part of.
    """

    kind: Literal["cpu", "gpu"]
    name: str
    uuid: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_mib: float | None = None
    pci_bus_id: str | None = None
    mig: bool = False
    parent_uuid: str | None = None

    @property
    def has_tf32(self) -> bool:
        """Whether its matrix units round float32 to TF32: NVIDIA's Ampere (8.0) and newer."""
        return self.compute_capability is not None and self.compute_capability >= (8, 0)

    @property
    def is_stand_in(self) -> bool:
        """Whether it is a GPU of the tests, in whose place the CPU trains."""
        return self.kind == "gpu" and self.name.startswith(STAND_IN)

    def part_of(self, gpu: Device) -> Device:
        """This MIG instance with what it has from its GPU."""
        return dataclasses.replace(
            self,
            compute_capability=gpu.compute_capability,
            pci_bus_id=gpu.pci_bus_id,
            parent_uuid=gpu.uuid,
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Device:
        """The inverse of :meth:`to_json`."""
        capability = values.get("compute_capability")
        return cls(**{**values, "compute_capability": tuple(capability) if capability else None})


def find_device(devices: Sequence[Device], environ: Mapping[str, str], cpu: Device) -> Device:
    """The device that a run uses: the first GPU that ``CUDA_VISIBLE_DEVICES`` names, else the CPU.

    An index counts in NVML's order, that of the PCI bus: workers run with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``. Of a GPU
    that is divided into MIG instances CUDA uses the first instance, unless another is named by its UUID. Where NVML
    knows no GPU, the device is the CPU whatever the variable says.

    Args:
        devices: the GPUs there are, each followed by its MIG instances.
        environ: the environment to look in, such as ``os.environ``.
        cpu: this machine's processor, which is the device if no GPU is.

    Raises:
        ValueError: the variable names no GPU of this machine, or several; the GPU has no UUID; or it is in MIG mode and
            has no instance.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    entry = None if visible is None else visible.split(",")[0].strip()
    if entry in HIDDEN or not devices:
        return cpu
    gpus = [device for device in devices if device.parent_uuid is None]
    device = gpus[0] if entry is None else _named(entry, gpus, devices)
    if device.mig:
        device = _first_instance(device, devices)
    if device.uuid is None:
        raise ValueError(
            f"NVML gives no UUID for {device.name}, so no process can be tied to it; "
            "name another GPU in CUDA_VISIBLE_DEVICES"
        )
    return device


def _named(entry: str, gpus: Sequence[Device], devices: Sequence[Device]) -> Device:
    """What an entry of CUDA_VISIBLE_DEVICES means: an index, or a UUID of a GPU or MIG instance or how it begins."""
    if entry.isdecimal():
        matches = list(gpus[int(entry) : int(entry) + 1])
    else:
        start = entry.casefold()
        known = [device for device in devices if device.uuid and start.startswith(("gpu-", "mig-"))]
        # The whole UUID first: that of one instance may be how another's begins.
        matches = [device for device in known if str(device.uuid).casefold() == start] or [
            device for device in known if str(device.uuid).casefold().startswith(start)
        ]
    if len(matches) == 1:
        return matches[0]
    there = "; ".join(
        f"{'MIG' if device.parent_uuid else gpus.index(device)}: {device.name}, {device.uuid}" for device in devices
    )
    problem = "matches several GPUs" if matches else "matches no GPU"
    raise ValueError(f'CUDA_VISIBLE_DEVICES={entry!r} {problem}; there is {there}; "" means the CPU')


def _first_instance(gpu: Device, devices: Sequence[Device]) -> Device:
    instances = [device for device in devices if device.parent_uuid == gpu.uuid]
    if not instances:
        raise ValueError(
            f"{gpu.name} is in MIG mode and has no instance, so CUDA cannot use it; make one with nvidia-smi mig, or "
            "switch MIG off"
        )
    return instances[0]
