"""The host's processor and memory, read from ``/proc``; None for what this system does not tell."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscale.core.device import Device
from mpscale.core.record import Findings
from mpscale.core.wire import Phase

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


def cpu() -> Device:
    """The processor as the device that is trained on."""
    return Device("cpu", str(cpu_facts()["model"]), memory_mib=memory_mib())


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


# What else the host's processors did while a case was timed: other processes, the hypervisor, the clock. From
# ``/proc``; where it is missing, every column has that as its reason.

COLUMNS = ("host_load", "host_other_cpu_share", "host_steal_share", "host_clock_mhz")

BUSY_SHARE = 0.1
"""Share of the processors' time in other hands from which on a machine counts as busy."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_SHORTEST_S = 0.2
"""The kernel counts in hundredths of a second: over less than this a share is mostly rounding."""


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds that all processors together have spent since the host started, and one process of them.

    Args:
        busy_s: working, for whomever.
        steal_s: wanting to work while the hypervisor gave the processor to another machine.
        total_s: in all, idle included.
        own_s: working for one process and the children that it has waited for.
    """

    busy_s: float
    steal_s: float
    total_s: float
    own_s: float


def cpu_times(pid: int) -> CpuTimes | None:
    """The times now; None where the process has ended, or without ``/proc``.

    Args:
        pid: the process whose own time is told.
    """
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user and nice already (proc_stat(5)).
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) / _TICKS_PER_S for field in first[:8])
    busy = user + nice + system + irq + softirq
    own = sum(int(field) for field in fields[11:15]) / _TICKS_PER_S  # utime, stime, and those of children
    return CpuTimes(busy, steal, busy + idle + iowait + steal, own)


def clock_mhz() -> float | None:
    """Mean clock of the processors now; None where the host does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return None
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.MULTILINE)]
    return sum(clocks) / len(clocks) if clocks and sum(clocks) > 0 else None


class HostNoise:
    """Takes what is needed at the phases of one case.

    Args:
        pid: the worker.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._load = load_average()
        self._start: CpuTimes | None = None
        self._end: CpuTimes | None = None
        self._clock: float | None = None

    def mark(self, phase: str) -> None:
        """Looks where the timed window begins and ends.

        Args:
            phase: what the worker has just reached.
        """
        if phase == Phase.TIMING_START:
            self._start = cpu_times(self._pid)
        elif phase == Phase.TIMING_END:
            self._end = cpu_times(self._pid)
            self._clock = clock_mhz()

    def columns(self) -> Findings:
        """The columns of :data:`COLUMNS`."""
        found = Findings()
        found.put("host_load", self._load and self._load[0], "the system has no load average")
        found.put("host_clock_mhz", self._clock, "nothing was timed, or the host does not tell")
        start, end = self._start, self._end
        total = end.total_s - start.total_s if start is not None and end is not None else 0.0
        reason = "nothing was timed" if start is None or end is None else f"timed for less than {_SHORTEST_S:g} s"
        if start is None or end is None or total < _SHORTEST_S * (os.cpu_count() or 1):
            found.miss(("host_other_cpu_share", "host_steal_share"), reason)
            return found
        other = (end.busy_s - start.busy_s) - (end.own_s - start.own_s)
        found.values["host_other_cpu_share"] = min(max(other / total, 0.0), 1.0)
        found.values["host_steal_share"] = min(max((end.steal_s - start.steal_s) / total, 0.0), 1.0)
        return found


def is_busy(load: float | None, cores: int | None) -> bool:
    """Whether a machine has so much to do already that step times measured on it would not be its own.

    Args:
        load: its load average over a minute.
        cores: those that can be used.
    """
    return load is not None and cores is not None and load > cores / 2


def busy_words() -> str | None:
    """What to say of this machine where it has so much to do already; None where it has not."""
    average, cores = load_average(), cpu_facts()["logical_cores"]
    if average is None or not is_busy(average[0], cores):
        return None
    usable = f"{cores} usable core{'' if cores == 1 else 's'}"
    load = f"the load average is {average[0]:.1f} on {usable}"
    return f"{load}: other work makes step times longer and their intervals wider"
