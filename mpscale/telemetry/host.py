"""The host's processor and memory, read from ``/proc``; None for what this system does not tell."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

PRECISION_FLAGS = (
    "f16c",
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
)
"""Processor features that decide how fast, and by which kernels, float16 and bfloat16 are computed."""


def peak_resident_mib(pid: int) -> float | None:
    """Largest resident memory of a process since it began to run its program (VmHWM), in MiB.

    Returns:
        None when the process has ended, or on a system without ``/proc``.
    """
    return _kib_field(Path(f"/proc/{pid}/status"), "VmHWM")


def memory_mib() -> float | None:
    """Total memory of the host in MiB. The limit of a container may be lower."""
    return _kib_field(Path("/proc/meminfo"), "MemTotal")


def load_average() -> list[float] | None:
    """Mean number of processes that ran or waited to run in the last 1, 5 and 15 minutes."""
    try:
        return list(os.getloadavg())
    except (OSError, AttributeError):
        return None


def cpu_facts() -> dict[str, Any]:
    """What is known of the processor.

    Returns:
        ``model``, a name; ``physical_cores`` of the whole host; ``logical_cores`` that this process may use;
        ``flags``, those of :data:`PRECISION_FLAGS` that it has. None for what is unknown.
    """
    processors = _processors()
    first = processors[0] if processors else {}
    flags = first.get("flags")
    return {
        "model": first.get("model name") or platform.processor() or platform.machine() or "unknown CPU",
        "physical_cores": _physical_cores(processors),
        "logical_cores": _usable_cores(),
        "flags": None if flags is None else [flag for flag in PRECISION_FLAGS if flag in flags.split()],
    }


def _processors() -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo, one a logical core."""
    blocks = _read(Path("/proc/cpuinfo")).strip().split("\n\n")
    return [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in blocks
        if block
    ]


def _physical_cores(processors: list[dict[str, str]]) -> int | None:
    cores = {(p.get("physical id"), p.get("core id")) for p in processors}
    if not cores or any(None in core for core in cores):
        return None
    return len(cores)


def _usable_cores() -> int | None:
    # A container or taskset may allow fewer cores than the host has. macOS has no such call.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _kib_field(path: Path, field: str) -> float | None:
    """A line like ``VmHWM:   1234 kB``, in MiB; a process that has ended keeps a file without that line."""
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
