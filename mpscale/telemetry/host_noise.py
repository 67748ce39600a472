"""What else the host's processors did while a case was timed: other processes, the hypervisor, the clock.

From ``/proc``; where it is missing, every column has that as its reason.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mpscale.telemetry import host
from mpscale.telemetry.findings import Findings

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
        self._load = host.load_average()
        self._start: CpuTimes | None = None
        self._end: CpuTimes | None = None
        self._clock: float | None = None

    def mark(self, phase: str) -> None:
        """Looks where the timed window begins and ends.

        Args:
            phase: what the worker has just reached.
        """
        if phase == "timing-start":
            self._start = cpu_times(self._pid)
        elif phase == "timing-end":
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
            found.unavailable |= dict.fromkeys(("host_other_cpu_share", "host_steal_share"), reason)
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
    average, cores = host.load_average(), host.cpu_facts()["logical_cores"]
    if average is None or not is_busy(average[0], cores):
        return None
    usable = f"{cores} usable core{'' if cores == 1 else 's'}"
    load = f"the load average is {average[0]:.1f} on {usable}"
    return f"{load}: other work makes step times longer and their intervals wider"
