"""The machine of a run: its processors and memory, how busy they are, and the software that can change a figure.

Processors, memory and load are read from ``/proc``; functions return None for what the system does not report.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.core.variables import recorded
from mpscale.telemetry.cgroup import ROOT, memory_group
from mpscale.telemetry.client import Driver, SilentDriver

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
"""Processor features that decide how fast and by which kernels float16 and bfloat16 are computed."""

PACKAGES = (
    "mpscale",
    "tensorflow",
    "keras",
    "numpy",
    "nvidia-ml-py",
    "pytest-benchmark",
    "pandas",
)

_OTHER_TENSORFLOWS = ("tensorflow-cpu", "tensorflow-cpu-aws", "tf-nightly", "tf-nightly-cpu")
_GIT_TIMEOUT_S = 5.0

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_SHORTEST_S = 0.2
"""The kernel counts in hundredths of a second, so a share over less time than this is mostly rounding."""


def cpu() -> Device:
    """The processor as the device to train on."""
    return Device("cpu", str(cpu_facts()["model"]), memory_mib=memory_mib())


def cpu_facts() -> dict[str, Any]:
    """Describe the processor.

    Returns:
        ``model``, a name; ``physical_cores`` of the whole host; ``logical_cores`` that this process may use;
        ``flags``, those of :data:`PRECISION_FLAGS` that it has. None for what is unknown.
    """
    processors = _processors()
    cores = {(each.get("physical id"), each.get("core id")) for each in processors}
    first = processors[0] if processors else {}
    flags = first.get("flags")
    return {
        "model": first.get("model name") or platform.processor() or platform.machine() or "unknown CPU",
        "physical_cores": None if not cores or any(None in core for core in cores) else len(cores),
        "logical_cores": _usable_cores(),
        "flags": None if flags is None else [flag for flag in PRECISION_FLAGS if flag in flags.split()],
    }


def memory_mib() -> float | None:
    """Total memory of the host in MiB. A container's limit may be lower: see :func:`memory_limit_mib`."""
    return _mib(Path("/proc/meminfo"), "MemTotal")


def memory_limit_mib() -> float | None:
    """The limit in MiB on the memory of this process's cgroup, such as that of a container or a batch job.

    None if there is none below the memory of the host.
    """
    group, total = memory_group("self", ROOT), memory_mib()
    limit = None if group is None else group.limit_mib()
    return None if limit is None or (total is not None and limit >= total) else limit


def available_mib() -> float | None:
    """Memory in MiB that new processes can use without swapping, within the limit of a cgroup."""
    group = memory_group("self", ROOT)
    left = (_mib(Path("/proc/meminfo"), "MemAvailable"), None if group is None else group.left_mib())
    return min((mib for mib in left if mib is not None), default=None)


def peak_resident_mib(pid: int) -> float | None:
    """Largest resident memory of a process since it began to run its program (VmHWM), in MiB.

    Returns:
        None if the process has ended, or on a system without ``/proc``.
    """
    return _mib(Path(f"/proc/{pid}/status"), "VmHWM")


def load_average() -> list[float] | None:
    """Mean number of processes that ran or waited to run in the last 1, 5 and 15 minutes."""
    try:
        return list(os.getloadavg())
    except (OSError, AttributeError):
        return None


def clock_mhz() -> float | None:
    """Mean clock of the processors now."""
    clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.MULTILINE)]
    return sum(clocks) / len(clocks) if clocks and sum(clocks) > 0 else None


def is_busy(load: float | None, cores: int | None) -> bool:
    """Whether a load average over a minute, on so many usable cores, would distort step times."""
    return load is not None and cores is not None and load > cores / 2


def busy_words() -> str | None:
    """A warning if this machine is busy already; None if it is not."""
    average, cores = load_average(), _usable_cores()
    if average is None or not is_busy(average[0], cores):
        return None
    usable = f"{cores} usable core{'' if cores == 1 else 's'}"
    load = f"the load average is {average[0]:.1f} on {usable}"
    return f"{load}: other work makes step times longer and their intervals wider"


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds that all processors together have spent since the host started, and the share of some processes.

    Args:
        busy_s: working for any process.
        steal_s: ready to work while the hypervisor gave the processor to another machine.
        total_s: in all, idle time included.
        own_s: working for these processes and the children that they have waited for.
    """

    busy_s: float
    steal_s: float
    total_s: float
    own_s: float


def cpu_times(*pids: int) -> CpuTimes | None:
    """The times now, ``own_s`` of the processes ``pids``; None if one of them has ended, or without ``/proc``."""
    first = _read("/proc/stat").partition("\n")[0].split()[1:]
    each = [_read(f"/proc/{pid}/stat").rpartition(")")[2].split() for pid in pids]
    if not first or not all(each):
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are in user and nice already (proc_stat(5)).
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) / _TICKS_PER_S for field in first[:8])
    busy = user + nice + system + irq + softirq
    # utime, stime, and those of children
    own = sum(int(field) for fields in each for field in fields[11:15]) / _TICKS_PER_S
    return CpuTimes(busy, steal, busy + idle + iowait + steal, own)


class HostNoise:
    """Measures how busy the host was with other work while a case was timed.

    Args:
        pids: the workers of the case.
    """

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._load = load_average()
        self._start: CpuTimes | None = None
        self._end: CpuTimes | None = None
        self._clock: float | None = None

    def mark(self, phase: str) -> None:
        """Read the times if ``phase``, which the worker has just reached, begins or ends the timed window."""
        if phase == "timing-start":
            self._start = cpu_times(*self._pids)
        elif phase == "timing-end":
            self._end = cpu_times(*self._pids)
            self._clock = clock_mhz()

    def columns(self) -> Findings:
        """The columns on the noise of the host."""
        found = Findings()
        no_load = Reason(Code.HOST_SILENT, "the system has no load average")
        found.put("host_load", self._load[0] if self._load else no_load)
        no_clock = Reason(Code.HOST_SILENT, "nothing was timed, or the host does not report its clock")
        found.put("host_clock_mhz", no_clock if self._clock is None else self._clock)
        start, end = self._start, self._end
        shares = ("host_other_cpu_share", "host_steal_share")
        if start is None or end is None:
            found.miss(shares, Reason(Code.NOT_REACHED, "nothing was timed, or the system has no /proc"))
        elif (total_s := end.total_s - start.total_s) < _SHORTEST_S * (os.cpu_count() or 1):
            found.miss(shares, Reason(Code.WINDOW_TOO_SHORT, f"timed for less than {_SHORTEST_S:g} s"))
        else:
            other_s = (end.busy_s - start.busy_s) - (end.own_s - start.own_s)
            found.put("host_other_cpu_share", min(max(other_s / total_s, 0.0), 1.0))
            found.put("host_steal_share", min(max((end.steal_s - start.steal_s) / total_s, 0.0), 1.0))
        return found


def environment(device: Device, driver: Driver, project_dir: Path) -> dict[str, Any]:
    """The software and the machine, for ``run.json``: plain values, None for what is unknown.

    Reports get published, so host names, paths and other environment variables are left out.

    Args:
        device: where the run trains.
        driver: of the GPU.
        project_dir: a directory in the git repository whose commit is recorded.
    """
    return {
        "packages": packages(),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": platform.platform(),
        "kernel": platform.release(),
        "libc": " ".join(filter(None, platform.libc_ver())) or None,
        "cpu": cpu_facts(),
        "memory_mib": memory_mib(),
        "memory_limit_mib": memory_limit_mib(),
        "load_average_at_start": load_average(),
        "device": device.to_json(),
        "nvml": "works" if driver.reason is None else str(driver.reason),
        "nvidia_driver": driver.driver_version,
        "cuda_driver": driver.cuda_version,
        "gpu": _gpu(device, driver),
        "git": _git(project_dir),
        "variables": recorded(os.environ),
    }


def run_slug(device: Device) -> str:
    """The device's name as part of a folder's name: at most 40 lower-case letters, digits and single dashes."""
    without_marks = re.sub(r"\((?:r|tm|c)\)", " ", device.name.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", without_marks).strip("-")
    return slug[:40].rstrip("-") or device.kind


def packages() -> dict[str, str | None]:
    """Versions of :data:`PACKAGES`, None for those that are not installed, and of all of NVIDIA's packages.

    TensorFlow is distributed under several names; the installed one is added.
    """
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for distribution in metadata.distributions():
        # A broken installation may have no name. Of two with the same name, the first is the one that is imported.
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        wanted = name in versions or name in _OTHER_TENSORFLOWS or name.startswith("nvidia-")
        if wanted and versions.get(name) is None:
            versions[name] = distribution.version
    return versions


def _gpu(device: Device, driver: Driver) -> dict[str, Any] | None:
    """The GPU's facts, how its readings are taken and why some are not; None on a CPU."""
    if device.kind != "gpu":
        return None
    try:
        known = driver.facts(device)
    except SilentDriver as error:
        return {"reason": str(error)}
    # run.json has these in other places.
    elsewhere = {*device.to_json(), "driver", "cuda_driver"} - {"mig"}
    return {
        "facts": {name: value for name, value in known["facts"].items() if name not in elsewhere},
        "ways": known["ways"],
        "reasons": {reading: reason.to_json() for reading, reason in known["reasons"].items()},
    }


def _git(directory: Path) -> dict[str, Any] | None:
    """The commit, whether any file differs from it or is new, and a digest of these changes.

    The digest covers only the names of new files. None without git or outside a repository.
    """
    changes = _run_git(directory, "status", "--porcelain")
    if changes is None:
        return None
    found: dict[str, Any] = {"commit": _run_git(directory, "rev-parse", "--verify", "HEAD"), "dirty": changes != ""}
    if changes:
        difference = _run_git(directory, "diff", "--binary", "HEAD") or ""
        found["changes_digest"] = hashlib.sha256(f"{changes}\n{difference}".encode()).hexdigest()[:16]
    return found


def _run_git(directory: Path, *arguments: str) -> str | None:
    # Inside a git hook, GIT_DIR and related variables point to another repository than the directory's. Without
    # optional locks, reading the status does not disturb a commit made at the same time.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            env={**variables, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processors() -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo, one per logical core."""
    blocks = _read("/proc/cpuinfo").strip().split("\n\n")
    return [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in blocks
        if block
    ]


def _usable_cores() -> int | None:
    # A container or taskset may allow fewer cores than the host has. macOS has no such call.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _mib(path: Path, field: str) -> float | None:
    """A line like ``VmHWM:   1234 kB``, in MiB. The file of a process that has ended lacks that line."""
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    return None


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
