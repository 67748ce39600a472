"""The environment that workers are started in: one visible device, and an allocator whose peak means something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mpscale.telemetry.device import Device

Allocator = Literal["cuda_malloc_async", "bfc"]

_FIRST_CUDA = (11, 2)
"""The first CUDA with pools for cuda_malloc_async."""


def worker_environment(environ: Mapping[str, str], device: Device, allocator: Allocator | None) -> dict[str, str]:
    """``environ`` with what a worker needs.

    Args:
        environ: that of this process.
        device: the one device that the worker is to see.
        allocator: TensorFlow's allocator on a GPU; None leaves the one that ``environ`` names.
    """
    environment = {**environ, "KERAS_BACKEND": "tensorflow", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if device.uuid is None or device.is_stand_in:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = device.uuid
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if device.kind == "gpu" and allocator == "cuda_malloc_async":
        environment["TF_GPU_ALLOCATOR"] = allocator
    elif allocator is not None:
        # TensorFlow's own pool; it grows as it must, since the worker asks for that.
        environment.pop("TF_GPU_ALLOCATOR", None)
    return environment


def allocators(
    asked: Literal["auto", "cuda_malloc_async", "bfc"], environ: Mapping[str, str], cuda_version: str | None
) -> list[Allocator | None]:
    """The allocators to try, the best first.

    TensorFlow's default pool grows by doubling, so its peak says little about the model; ``cuda_malloc_async`` takes
    from the driver what is needed, where driver and GPU have it.

    Args:
        asked: the option.
        environ: may name one in ``TF_GPU_ALLOCATOR``, which ``auto`` leaves as it is.
        cuda_version: the newest CUDA of the driver, such as ``"12.8"``.
    """
    if asked != "auto":
        return [asked]
    if environ.get("TF_GPU_ALLOCATOR"):
        return [None]
    if cuda_version is not None and tuple(map(int, cuda_version.split("."))) < _FIRST_CUDA:
        return ["bfc"]
    return ["cuda_malloc_async", "bfc"]
