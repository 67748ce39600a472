"""The device that a run trains on, as far as it is known without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mpscale.core.reason import Code, Reason

_GPU_FILES = ("/dev/nvidia", "/dev/dxg")
"""Beginnings of the names of a GPU's device files; the second one is that of WSL2."""


def gpu_files_of(process: Path) -> list[str]:
    """Return the GPU's library and device files that a process has mapped or opened, given its folder in /proc.

    CUDA cannot be used without them. A process that has only looked for a GPU may have some, too.

    Raises:
        OSError: this system does not show that.
    """
    mapped = {line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/" in line}
    opened = set()
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one by which the folder is read
            opened.add(str(descriptor.readlink()))
    libraries = {path for path in mapped if path.rpartition("/")[2].startswith("libcuda.so")}
    return sorted(libraries | {path for path in mapped | opened if path.startswith(_GPU_FILES)})


STAND_IN = "mpscale stand-in"
"""Prefix of the names of simulated GPUs in tests: the driver's figures are scripted, and the CPU trains."""


@dataclass(frozen=True, slots=True)
class Vendor:
    """A maker of GPUs: what must be known before the driver is called, or without a driver.

    Args:
        name: as in messages.
        backend: the module that talks to the driver; it has a function ``open_backend``.
        library: file name of the driver's management library.
        visible: the environment variable that selects or hides GPUs.
        hiding: first entries of that variable that hide every GPU.
        cure: what to do if the library is missing.
    """

    name: str
    backend: str
    library: str
    visible: str
    hiding: tuple[str, ...]
    cure: str

    @property
    def no_library(self) -> Reason:
        """The reason for no figures if the library cannot be found."""
        return Reason(Code.NO_LIBRARY, f"no {self.name} driver library ({self.library}) on this machine", self.cure)

    def selected(self, environ: Mapping[str, str]) -> str | None:
        """The first GPU that the variable names, None if it is not set."""
        value = environ.get(self.visible)
        return None if value is None else value.split(",")[0].strip()

    def hides(self, environ: Mapping[str, str]) -> bool:
        """Whether the variable hides every GPU."""
        return self.selected(environ) in self.hiding


_MOST_DIGITS = 9
"""Of the index of a GPU."""

NVIDIA = Vendor(
    name="NVIDIA",
    backend="mpscale.telemetry.nvidia",
    library="libnvidia-ml.so.1",
    visible="CUDA_VISIBLE_DEVICES",
    hiding=("", "-1", "NoDevFiles"),  # Slurm writes the last one for a job without GPUs.
    cure="install the driver's library libnvidia-ml.so.1; start a container with --gpus all and "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
)

VENDORS = {vendor.name: vendor for vendor in (NVIDIA,)}
"""Every vendor whose GPUs can be watched. A new one needs an entry here and its backend module."""


@dataclass(frozen=True, slots=True)
class Device:
    """A CPU or GPU.

    ``uuid`` is the driver's full UUID (``GPU-...``, or ``MIG-...`` for a MIG instance), ``compute_capability`` CUDA's
    ``(major, minor)``; they and ``pci_bus_id`` are None on a CPU. ``memory_mib`` is the total memory of the GPU, or of
    the host on a CPU. ``mig`` is set for a GPU that is divided into MIG instances; for an instance, ``parent_uuid``
    names its GPU. ``vendor`` is a key of :data:`VENDORS`, None on a CPU. ``beside`` are the UUIDs of further GPUs of
    the same kind that a case uses at the same time (:func:`find_replicas`).
    """

    kind: Literal["cpu", "gpu"]
    name: str
    uuid: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_mib: float | None = None
    pci_bus_id: str | None = None
    mig: bool = False
    parent_uuid: str | None = None
    vendor: str | None = None
    beside: tuple[str, ...] = ()

    @property
    def has_tf32(self) -> bool:
        """Whether its matrix units round float32 to TF32: NVIDIA's Ampere (8.0) and newer."""
        return self.compute_capability is not None and self.compute_capability >= (8, 0)

    @property
    def has_float8(self) -> bool:
        """Whether XLA has products of float8 for it: NVIDIA's Ada (8.9), Hopper and newer (XLA's gemm_rewriter.cc)."""
        return self.compute_capability is not None and self.compute_capability >= (8, 9)

    @property
    def is_stand_in(self) -> bool:
        """Whether it is a simulated GPU of the tests; the CPU trains in its place."""
        return self.kind == "gpu" and self.name.startswith(STAND_IN)

    def part_of(self, gpu: Device) -> Device:
        """Return this MIG instance with the properties that it shares with its GPU."""
        return dataclasses.replace(
            self,
            compute_capability=gpu.compute_capability,
            pci_bus_id=gpu.pci_bus_id,
            parent_uuid=gpu.uuid,
            vendor=gpu.vendor,
        )

    def apart(self, known: Sequence[Device]) -> list[Device]:
        """Return this device and those beside it, each alone.

        Args:
            known: the devices that the driver lists. One that it does not list has no address of the bus.
        """
        listed = {each.uuid: each for each in known}
        others = [listed.get(uuid) or dataclasses.replace(self, uuid=uuid, pci_bus_id=None) for uuid in self.beside]
        return [dataclasses.replace(each, beside=()) for each in (self, *others)]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "beside": list(self.beside)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Device:
        """The inverse of :meth:`to_json`."""
        capability = values.get("compute_capability")
        return cls(
            **{
                **values,
                "compute_capability": tuple(capability) if capability else None,
                "beside": tuple(values.get("beside", ())),
            }
        )


class NoSuchDevice(ValueError):
    """The environment selects no usable GPU: ``text`` says what is wrong, ``cure`` what to do about it."""

    def __init__(self, text: str, cure: str) -> None:
        super().__init__(f"{text}; {cure}")
        self.reason = Reason(Code.NO_DEVICE, text, cure)


def vendor_of(devices: Sequence[Device]) -> Vendor:
    """The vendor of the first device; NVIDIA if there is no device, or if its vendor is unknown."""
    return VENDORS.get(devices[0].vendor or "", NVIDIA) if devices else NVIDIA


def find_device(devices: Sequence[Device], environ: Mapping[str, str], cpu: Device) -> Device:
    """Return the device that a run uses: the first GPU selected by the vendor's variable, else the CPU.

    An index refers to the driver's order, which is that of the PCI bus: workers run with
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID``. CUDA uses the first instance of a GPU in MIG mode, unless another is named by its
    UUID. If the driver lists no GPU, the device is the CPU, whatever the variable is.

    Args:
        devices: the GPUs, each followed by its MIG instances.
        environ: the environment to look in, such as ``os.environ``.
        cpu: this machine's processor.

    Raises:
        NoSuchDevice: the variable matches no GPU or several; the GPU has no UUID; or it is in MIG mode and has no
            instance.
    """
    vendor = vendor_of(devices)
    if not devices or vendor.hides(environ):
        return cpu
    entry = vendor.selected(environ)
    gpus = [device for device in devices if device.parent_uuid is None]
    device = gpus[0] if entry is None else _named(entry, gpus, devices, vendor)
    if device.mig:
        instances = [each for each in devices if each.parent_uuid == device.uuid]
        if not instances:
            raise NoSuchDevice(
                f"{device.name} is in MIG mode and has no instance, so CUDA cannot use it",
                "make one with nvidia-smi mig, or switch MIG off",
            )
        device = instances[0]
    if device.uuid is None:
        raise NoSuchDevice(
            f"the driver reports no UUID for {device.name}, so no process can be tied to it",
            f"name another GPU in {vendor.visible}",
        )
    return device


def find_replicas(
    devices: Sequence[Device], environ: Mapping[str, str], cpu: Device, wanted: int | None
) -> tuple[Device, int]:
    """Return the device of a run whose cases use several at the same time, and how many of them.

    Args:
        devices: the GPUs, as in :func:`find_device`.
        environ: the environment to look in.
        cpu: this machine's processor.
        wanted: how many; None for all GPUs that the variable leaves.

    Raises:
        NoSuchDevice: as there; or there are too few GPUs, they differ in kind, or one is an instance of MIG.
    """
    first = find_device(devices, environ, cpu)
    if first.kind == "cpu":
        if wanted is None:
            raise NoSuchDevice(
                "this machine has no GPU to use, and a CPU is one device", "say how many replicas share it"
            )
        return first, wanted
    vendor, gpus = vendor_of(devices), [device for device in devices if device.parent_uuid is None]
    entries = environ.get(vendor.visible)
    found = gpus
    if entries is not None:
        found = [_named(entry.strip(), gpus, devices, vendor) for entry in entries.split(",")]
    number = wanted or len(found)
    if number > len(found):
        raise NoSuchDevice(
            f"{number} replicas need as many GPUs, and {vendor.visible} leaves {len(found)}", "ask for fewer replicas"
        )
    used = found[:number]
    if any(device.mig or device.parent_uuid for device in used):
        raise NoSuchDevice("one of the GPUs is divided into MIG instances", "name whole GPUs for replicas")
    uuids = [device.uuid for device in used if device.uuid is not None]
    if len(set(uuids)) < number:
        raise NoSuchDevice("a GPU is named twice, or has no UUID", f"name different GPUs in {vendor.visible}")
    if len({device.name for device in used}) > 1:
        raise NoSuchDevice(
            f"the GPUs differ: {', '.join(dict.fromkeys(device.name for device in used))}",
            f"name GPUs of one kind in {vendor.visible}: the replicas would wait for the slowest",
        )
    return dataclasses.replace(first, beside=tuple(uuids[1:])), number


def _named(entry: str, gpus: Sequence[Device], devices: Sequence[Device], vendor: Vendor) -> Device:
    """The device for an entry of the variable: an index, or a UUID of a GPU or MIG instance or a prefix of one."""
    if entry.isascii() and entry.isdecimal() and len(entry) <= _MOST_DIGITS:
        matches = list(gpus[int(entry) : int(entry) + 1])
    else:
        start = entry.casefold()
        known = [device for device in devices if device.uuid and start.startswith(("gpu-", "mig-"))]
        # Whole UUIDs first: one instance's may be a prefix of another's.
        matches = [device for device in known if str(device.uuid).casefold() == start] or [
            device for device in known if str(device.uuid).casefold().startswith(start)
        ]
    if len(matches) == 1:
        return matches[0]
    there = "; ".join(
        f"{'MIG' if device.parent_uuid else gpus.index(device)}: {device.name}, {device.uuid}" for device in devices
    )
    problem = "matches several GPUs" if matches else "matches no GPU"
    raise NoSuchDevice(f"{vendor.visible}={entry!r:.200} {problem}", f'name one of them, or "" for the CPU: {there}')
