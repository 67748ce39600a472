"""A stand-in for NVIDIA's driver library, to test NVML without a GPU.

:func:`build` compiles a ``libnvidia-ml.so.1`` that the real nvidia-ml-py loads like the driver's own, in any process
that has its folder on ``LD_LIBRARY_PATH``. It answers from a text file, the script, that ``MPSCALE_STAND_IN_NVML``
names; :class:`Script` writes one. The library looks at the file on every call and reads it again when it has changed,
so a test can change the GPU under a running program. Without a script no driver is loaded (9).

A script has one entry per line; ``#`` begins a comment. Times are seconds of CLOCK_MONOTONIC since ``epoch``. What a
script does not mention is not supported (3), except for the defaults given here. A TIMELINE is one value, or
``t:value`` pairs with rising t; each value holds from its t on, and the first one holds before that, too. A value is a
number (hexadecimal after 0x), ``-`` for unknown (the call returns 3), or ``n/a`` (the call succeeds and answers with
all bits one). A wrong line makes every call return 999, and standard error names it.

For the whole library:

==================================================  =================================================================
``epoch SECONDS``                                   start of all times
``driver 570.86.15``, ``cuda 12080``                versions
``init_error CODE``                                 what nvmlInit returns
``fail SYMBOL CODE [after N] [for M]``              the call returns CODE, from its N+1st call on, M times. Counted by
                                                    process and symbol. nvidia-ml-py asks for a list of processes twice
                                                    if there are any: how many, and which
``latency SYMBOL SECONDS [after N] [for M]``        the call sleeps before it answers
``crash SYMBOL [after N] [for M]``                  the call ends the process with SIGSEGV
``entry_bytes 32``                                  entries of the process lists, third version, have 32 bytes instead
                                                    of 24, as in drivers 535.43 to 535.86
``offset_pid K``                                    all processes are listed under their id + K, as seen from another
                                                    PID namespace
==================================================  =================================================================

Then each ``device N``, from 0, followed by its lines:

==================================================  =================================================================
``name``, ``uuid``, ``pci``, ``vbios``              the rest of the line
``capability 8 0``
``memory_mib``, ``reserved_mib`` TIMELINE           total, and kept by the driver (default 0)
``used_mib TIMELINE``                               used by others than the processes listed below, which are added
``v1_used includes_reserved``                       or ``excludes_reserved``: what ``used`` of nvmlDeviceGetMemoryInfo
                                                    counts (by default includes, as drivers since 510 do); free is
                                                    always total - reserved - used by anybody
``v2_used excludes_reserved``                       the same for nvmlDeviceGetMemoryInfo_v2 (by default excludes)
``process compute PID TIMELINE``                    or ``graphics`` or ``mps``, the list. MiB; ``-`` is not listed;
                                                    ``n/a(300)`` and ``0(300)`` are listed as unknown and as 0 while
                                                    300 MiB are used. A process in several lists counts once. PID need
                                                    not exist. ``@worker``: see below
``power_w TIMELINE``                                also that of the fields 185 and 186 unless ``power_average_w`` and
                                                    ``power_instant_w`` are given
``power_limit_w TIMELINE``                          enforced and management limit
``power_limits_w MIN DEFAULT MAX``
``energy -``                                        no energy counter. Otherwise it is energy_start_j (default 1000)
                                                    plus the integral of power_w since the epoch, up to the last
                                                    multiple of energy_tick (default 0.1 s). It is computed from the
                                                    current timeline: to keep what was counted, append to it
``energy_start_j``, ``energy_tick`` TIMELINE
``field_type TIMELINE``                             the type that fields give for their value (nvmlValueType_t)
``field_stamp_s TIMELINE``                          the timestamp that fields give; by default, now
``temperature_c``, ``slowdown_c`` TIMELINE          now, and the threshold
``sm_clock_mhz``, ``mem_clock_mhz`` TIMELINE        the graphics clock is that of the SMs
``max_sm_clock_mhz``, ``max_mem_clock_mhz``         TIMELINE
``utilization TIMELINE``                            per cent of the time that the GPU was busy
``event_reasons TIMELINE``                          bits
``ecc``, ``persistence``, ``mig`` TIMELINE          0 or 1 (mig: default 0); pending is the same as current
``pstate``, ``pcie_generation``, ``pcie_width``     TIMELINE
``lost AT``                                         from this time on every call with this device returns 15
==================================================  =================================================================

``mig_device N`` after a device, from 0, begins an instance of it, which has ``name``, ``uuid``, the lines of memory and
processes, ``gi N``, ``ci N`` (default 0) and ``multiprocessors N``. Everything else returns 3, and the
memory of its processes is not added to that of the device.

``@worker`` is the process that trains: a descendant of the calling process's parent, other than the caller, whose
command line holds ``mpscale.worker.__main__`` and which has a thread named ``tf_...``, as TensorFlow starts with its
context. It is listed from then on, and the times of its timeline begin when the calling process first sees it so.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VARIABLE = "MPSCALE_STAND_IN_NVML"
UUID = "GPU-5b0c4a1e-0000-1111-2222-333344445555"
NAME = "mpscale stand-in A100"
WHOLE = -1
"""Stands for the device itself instead of a MIG instance's index."""

_HERE = Path(__file__).parent
_HEADER = (_HERE / "stand_in.h").read_text()
_TABLES = _HEADER.partition("#define VALUES(X)")
CALLS = frozenset(re.findall(r"X\((\w+)\)", _TABLES[0]))
"""The symbols that can fail by a script and be left out of a build."""
_TIMELINES = frozenset(re.findall(r"^    X\((\w+)\)", _TABLES[2], re.MULTILINE))
_TEXTS = frozenset({"name", "uuid", "pci", "vbios", "capability", "power_limits_w", "v1_used", "v2_used"})
_GENERAL = frozenset({"driver", "cuda", "init_error", "entry_bytes", "offset_pid"})

_DEVICE = {
    "name": NAME,
    "pci": "00000000:07:00.0",
    "capability": (8, 0),
    "vbios": "92.00.45.00.03",
    "memory_mib": 40960,
    "reserved_mib": 500,
    "used_mib": 450,
    "power_w": 60,
    "power_limit_w": 400,
    "power_limits_w": (100, 400, 400),
    "temperature_c": 35,
    "slowdown_c": 92,
    "sm_clock_mhz": 1410,
    "mem_clock_mhz": 1215,
    "max_sm_clock_mhz": 1410,
    "max_mem_clock_mhz": 1215,
    "utilization": 0,
    "event_reasons": 0,
    "ecc": 1,
    "persistence": 1,
    "pstate": 0,
    "pcie_generation": 4,
    "pcie_width": 16,
}
_INSTANCE = {
    "name": f"{NAME} MIG 1g.5gb",
    "memory_mib": 4864,
    "reserved_mib": 60,
    "used_mib": 12,
    "multiprocessors": 14,
}

Value = str | float | tuple[float, ...] | None
"""The value of a line: text as written, one or more numbers, or None if unknown."""


def build(folder: Path, without: Iterable[str] = ()) -> Path:
    """Compile the library.

    Args:
        folder: for the library; created if it does not exist.
        without: symbols that the library lacks, as those of older drivers do.

    Returns:
        The folder, for ``LD_LIBRARY_PATH``.
    """
    hidden = [_known(symbol, CALLS) for symbol in without]
    folder.mkdir(parents=True, exist_ok=True)
    versions = folder / "symbols.map"
    versions.write_text("{ global: nvml*; local: " + "".join(f"{symbol}; " for symbol in hidden) + "*; };\n")
    name = "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{name}"]
    command += [f"-Wl,--version-script={versions}", "-o", str(folder / name)]
    subprocess.run([*command, *map(str, sorted(_HERE.glob("*.c"))), "-lm"], check=True)
    return folder


class Script:
    """A script with one device, an idle A100. Every change is written immediately and atomically.

    Args:
        path: the file.
        general: lines for the whole library, as for :meth:`general`.
    """

    def __init__(self, path: Path, **general: Value) -> None:
        self.path = path
        self.epoch = time.monotonic()
        self._general: dict[str, Value] = {"driver": "570.86.15", "cuda": 12080}
        self._rules: list[str] = []
        self._units: dict[tuple[int, int], _Unit] = {(0, WHOLE): _Unit({**_DEVICE, "uuid": UUID})}
        self.general(**general)

    def general(self, **lines: Value) -> Script:
        """Replace lines for the whole library: ``general(driver="535.54.03", entry_bytes=32)``."""
        for key, value in lines.items():
            self._general[_known(key, _GENERAL)] = value
        return self._write()

    def device(self, **lines: Value) -> int:
        """Add a device and return its index. It differs from the first in UUID, PCI bus and what is given."""
        index = sum(mig == WHOLE for _, mig in self._units)
        uuid = f"{UUID[:-1]}{(5 + index) % 10}"
        self._units[index, WHOLE] = _Unit({**_DEVICE, "uuid": uuid, "pci": f"00000000:{7 + index:02X}:00.0"})
        self.set(index, WHOLE, **lines)
        return index

    def mig(self, device: int = 0, **lines: Value) -> int:
        """Turn MIG on, add an instance of a device and return its index."""
        index = sum(at == device for at, mig in self._units if mig != WHOLE)
        uuid = f"MIG-5b0c4a1e-0000-1111-{device:04}-{index:012}"
        self._units[device, index] = _Unit({**_INSTANCE, "uuid": uuid, "gi": 7 + index, "ci": 0})
        self._units[device, WHOLE].lines["mig"] = 1
        self.set(device, index, **lines)
        return index

    def set(self, device: int = 0, instance: int = WHOLE, **lines: Value) -> Script:
        """Replace lines of a device, or of one of its instances: ``set(power_w="0:60 5:300", energy=None)``."""
        for key, value in lines.items():
            self._units[device, instance].lines[_known(key, _TIMELINES | _TEXTS)] = value
        return self._write()

    def process(
        self, kind: str, pid: int | str, memory_mib: Value, *, device: int = 0, instance: int = WHOLE
    ) -> Script:
        """List a process, or change its entry.

        Args:
            kind: ``"compute"``, ``"graphics"`` or ``"mps"``.
            pid: its id, or ``"@worker"`` for the process that trains.
            memory_mib: a timeline.
            device: by which device.
            instance: and by which of its MIG instances.
        """
        self._units[device, instance].processes[kind, pid] = memory_mib
        return self._write()

    def no_processes(self) -> Script:
        """Remove all processes from all devices."""
        for unit in self._units.values():
            unit.processes.clear()
        return self._write()

    def fail(self, symbol: str, code: int, after: int = 0, times: int | None = None) -> Script:
        """Let a call return an error, forever or ``times`` times, from the first call or after ``after`` calls.

        Calls that a process made before this method was called count too.
        """
        return self._rule("fail", symbol, code, after, times)

    def latency(self, symbol: str, seconds: float, after: int = 0, times: int | None = None) -> Script:
        """Let a call answer late; with ``1e9`` it hangs."""
        return self._rule("latency", symbol, seconds, after, times)

    def crash(self, symbol: str, after: int = 0) -> Script:
        """Let a call take its process down."""
        return self._rule("crash", symbol, None, after, None)

    def heal(self) -> Script:
        """Undo every :meth:`fail`, :meth:`latency` and :meth:`crash`. A call that is asleep stays asleep."""
        self._rules.clear()
        return self._write()

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.monotonic() - self.epoch

    def jump_to(self, seconds: float) -> Script:
        """Move the epoch to ``seconds`` ago."""
        self.epoch = time.monotonic() - seconds
        return self._write()

    def environ(self, library: Path) -> dict[str, str]:
        """The additional variables that a process needs, with the folder that :func:`build` returned."""
        folders = [str(library), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {"LD_LIBRARY_PATH": os.pathsep.join(folders), VARIABLE: str(self.path)}

    def text(self) -> str:
        """The script, as in the file."""
        lines = [f"epoch {self.epoch:.9f}"]
        lines += [f"{key} {_written(value)}" for key, value in self._general.items()]
        lines += self._rules
        for device, mig in sorted(self._units):
            unit = self._units[device, mig]
            lines.append(f"device {device}" if mig == WHOLE else f"mig_device {mig}")
            lines += [f"{key} {_written(value)}" for key, value in unit.lines.items()]
            lines += [f"process {kind} {pid} {_written(value)}" for (kind, pid), value in unit.processes.items()]
        return "".join(f"{line}\n" for line in lines)

    def _rule(self, kind: str, symbol: str, amount: float | None, after: int, times: int | None) -> Script:
        words = [kind, _known(symbol, CALLS)]
        words += [] if amount is None else [_written(amount)]
        words += [f"after {after}"] if after else []
        words += [] if times is None else [f"for {times}"]
        self._rules.append(" ".join(words))
        return self._write()

    def _write(self) -> Script:
        # Replaced, not rewritten, because the library may read it at any moment.
        fresh = self.path.with_name(f"{self.path.name}.new")
        fresh.write_text(self.text())
        fresh.replace(self.path)
        return self


class _Unit:
    """The lines of a device or an instance."""

    def __init__(self, lines: dict[str, Any]) -> None:
        self.lines: dict[str, Value] = dict(lines)
        self.processes: dict[tuple[str, int | str], Value] = {}


def _known(name: str, names: Iterable[str]) -> str:
    if name not in set(names):
        raise ValueError(f"{name} is none of {', '.join(sorted(names))}")
    return name


def _written(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " ".join(map(_written, value))
    return value if isinstance(value, str) else repr(+value)  # the plus makes 1 of True
