"""Samples of a GPU during one case: a file of JSON lines, written by the monitor and read to compute the columns.

A line ``{"time_s": ..., ...}`` is a :class:`Sample`; fields that were not read are left out, and readings that
failed are named in ``failed``. A sample that would repeat the previous one is left out and counted in the
next (``looks``, ``gap_s``). A line ``{"reasons": {reading: reason}}`` explains readings without a value. At the end,
``{"silent": reason}`` explains why the monitor did not survive, and ``{"late": [phase, ...]}`` names phases that the
worker left before their sample was taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from mpscale.core.files.reading import MOST_SAMPLES, SAMPLES, RunError, check_text, lines_of, parse_json, unpack
from mpscale.core.reason import Code, Reason

CALM_FROM, CALM_UNTIL = "timing-start", "timing-end"
"""Phases between which the monitor looks rarely, so as not to disturb the timing."""

CALM_S = 0.5
"""Time between two looks then."""

START = "the start"

MOST_FAILED = 0.1
"""Largest share of failed readings in a median, mean or share."""


class Reading(StrEnum):
    """A quantity of a GPU that is read repeatedly. The value is the name of its field in a sample, if it has one."""

    MEMORY = "device_memory_mib"
    RESERVED_MEMORY = "reserved_memory_mib"
    """Never read by itself: comes with MEMORY if the driver reports it."""
    PROCESSES = "processes"
    GRAPHICS_PROCESSES = "graphics_pids"
    SERVICE_PROCESSES = "service_processes"
    """Processes that compute through a service that shares the GPU, such as CUDA's MPS."""
    ENERGY = "energy_j"
    POWER = "power_w"
    SM_CLOCK = "sm_clock_mhz"
    MEMORY_CLOCK = "memory_clock_mhz"
    TEMPERATURE = "temperature_c"
    UTILIZATION = "utilization"
    CLOCK_EVENTS = "clock_events"
    POWER_LIMIT = "power_limit_w"
    ECC = "ecc"
    PERSISTENCE = "persistence"


class ClockEvent(StrEnum):
    """A reason why a GPU's clocks are not higher, in the order in which reports name them."""

    IDLE = "idle"
    APPLICATION_CLOCKS = "application clocks setting"
    POWER_CAP = "software power cap"
    """Not counted as throttling: under full load a GPU often runs at its power limit, in every run."""
    HARDWARE_SLOWDOWN = "hardware slowdown"
    SYNC_BOOST = "sync boost"
    SOFTWARE_THERMAL = "software thermal slowdown"
    HARDWARE_THERMAL = "hardware thermal slowdown"
    POWER_BRAKE = "hardware power brake"
    DISPLAY_CLOCKS = "display clock setting"


THROTTLING = frozenset(
    {ClockEvent.HARDWARE_SLOWDOWN, ClockEvent.SOFTWARE_THERMAL, ClockEvent.HARDWARE_THERMAL, ClockEvent.POWER_BRAKE}
)
"""Events that make step times unusable."""


@dataclass(slots=True)
class Sample:
    """What was read at one time. The fields named like a :class:`Reading` hold its value.

    Args:
        time_s: seconds since the worker was started.
        phase: what the worker had just reached, if it waited for this sample; else empty.
        looks: how often memory was looked at since the previous sample, this time included.
        gap_s: the longest time between two of these looks.
        listed: whether the worker or a descendant is in the driver's list of processes; None if there is no list.
        process_memory_mib: memory of worker and descendants together.
        device_memory_mib: memory in use on the whole GPU, without what the driver reserves if that is known.
        reserved_memory_mib: what the driver reserves.
        processes: number of compute processes in the driver's list.
        other_pids: those of them that are not the worker's, if the list can be read.
        graphics_pids: processes that only draw and are not the worker's.
        energy_j: energy counter.
        power_w: power.
        sm_clock_mhz: clock of the multiprocessors.
        memory_clock_mhz: clock of the memory.
        temperature_c: temperature of the GPU.
        utilization: share of the last fraction of a second in which a kernel ran, in percent.
        clock_events: names of the reasons why clocks are not higher.
        failed: readings that were tried and had no value.
    """

    time_s: float
    phase: str = ""
    looks: int = 1
    gap_s: float = 0.0
    listed: bool | None = None
    process_memory_mib: float | None = None
    device_memory_mib: float | None = None
    reserved_memory_mib: float | None = None
    processes: int | None = None
    other_pids: tuple[int, ...] | None = None
    graphics_pids: tuple[int, ...] | None = None
    energy_j: float | None = None
    power_w: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    utilization: float | None = None
    clock_events: tuple[str, ...] | None = None
    failed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to thousandths; fields with their default are left out."""
        return {
            name: round(value, 3) if isinstance(value, float) else value
            for name, default in _DEFAULTS.items()
            if (value := getattr(self, name)) != default
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sample:
        """The inverse of :meth:`to_json`. Fields of a newer version are dropped.

        Raises:
            ValueError: a value is of another type, or beyond anything that can be read.
        """
        known: dict[str, Any] = {}
        for name, value in values.items():
            if name not in _DEFAULTS:
                continue
            parts = value if isinstance(value, list) else [value]
            types, is_many = _TYPES[name]
            if isinstance(value, list) != is_many or not all(type(part) in types for part in parts):
                if value is None and _DEFAULTS[name] is None and name != "time_s":
                    continue
                raise ValueError(f"{name} of a sample is {value!r:.40}")
            if any(isinstance(part, float | int) and not abs(part) <= _LARGEST for part in parts):
                raise ValueError(f"{name} of a sample is {value!r:.40}")
            known[name] = tuple(value) if is_many else value
        return cls(**known)


_DEFAULTS: dict[str, Any] = {f.name: None if f.default is MISSING else f.default for f in fields(Sample)}
_TYPES: dict[str, tuple[tuple[type, ...], bool]] = {
    f.name: (
        tuple(kind for kind in (str, bool, int, float) if kind.__name__ in str(f.type))
        + ((int,) if "float" in str(f.type) else ()),
        "tuple" in str(f.type),
    )
    for f in fields(Sample)
}
"""The types of each field, and whether it has several values."""
_LARGEST = 1e15
"""More than any second, MiB, joule, watt or id of a process."""


class SampleFile:
    """Writes samples as they come, replacing an existing file. What was flushed survives a crash of the writer."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8")
        self._explained: dict[str, Reason] = {}

    def write(self, sample: Sample) -> None:
        """Write a sample."""
        self._file.write(line_of(sample.to_json()))

    def explain(self, reasons: Mapping[str, Reason]) -> None:
        """Write the reasons that are new."""
        new = {reading: reason for reading, reason in reasons.items() if self._explained.get(reading) != reason}
        if new:
            self._explained |= new
            self._file.write(line_of({"reasons": {reading: reason.to_json() for reading, reason in new.items()}}))

    def flush(self) -> None:
        """Flush to disk."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def line_of(values: Mapping[str, Any]) -> str:
    """One line of the file."""
    return json.dumps(values, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which a reading failed, from the last value before it (or the first try) to the first value after it.

    ``to_s`` is infinite if no value followed. ``phase`` is what the worker had reached when the gap began.
    """

    from_s: float
    to_s: float
    phase: str

    def __str__(self) -> str:
        if math.isinf(self.to_s):
            return f"from {self.phase} to the end"
        return f"for {self.to_s - self.from_s:.2g} s from {self.phase} on"


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a case in order of time.

    Args:
        rows: the samples.
        reasons: why readings have no value.
        silent: why the last samples are missing; None if they are there.
        late: phases that the worker had left before their sample was taken.
    """

    rows: list[Sample] = field(default_factory=list)
    reasons: dict[str, Reason] = field(default_factory=dict)
    silent: Reason | None = None
    late: tuple[str, ...] = ()

    def at(self, phase: str) -> Sample | None:
        """The sample that was taken when ``phase`` was reached; None also if it came late."""
        if phase in self.late:
            return None
        return next((row for row in self.rows if row.phase == phase), None)

    def not_at(self, *phases: str) -> Reason:
        """Why there is no sample at one of these phases."""
        for phase in phases:
            if phase in self.late:
                text = f"the driver was late: the case went on before it had answered at {phase}"
                return Reason(Code.DRIVER_SILENT, text)
        return self.silent or Reason(Code.NOT_REACHED, "the case ended before that")

    def timed(self) -> list[Sample]:
        """The samples of the timed steps, including those that were added to measure energy; none without both ends."""
        # Steps go on until the later of these phases: if its sample came late, the other cannot replace it.
        last = "energy-end" if any(row.phase == "energy-end" for row in self.rows) else "timing-end"
        start, end = self.at("timing-start"), self.at(last)
        if start is None or end is None:
            return []
        return [row for row in self.rows if start.time_s <= row.time_s <= end.time_s]

    def often(self) -> list[tuple[Sample, float]]:
        """The samples taken while the monitor looks often, each with the seconds since the previous one."""
        found, calm = [], False
        for before, row in pairwise(self.rows):
            calm = before.phase == CALM_FROM or (calm and before.phase != CALM_UNTIL)
            if not calm:
                found.append((row, row.time_s - before.time_s))
        return found

    def alone(self) -> bool:
        """Whether only the case can have used the GPU, according to the driver's list of processes.

        In a container the list shows the worker under another id, so a single process that appears after the case has
        begun is taken for the worker.
        """
        idle = self.at("idle")
        at_idle = idle.processes if idle is not None else 0
        most = max((row.processes or 0 for row in self.rows), default=0)
        if any(row.listed for row in self.rows) and not (idle is not None and idle.listed):
            return not any(row.other_pids for row in self.rows)
        return not at_idle and most <= 1 and len(self._other_pids()) <= 1

    def other_processes(self) -> list[int] | None:
        """Ids of compute processes that are not the case's, None if no list of processes can be read."""
        if not known(self.rows, "other_pids"):
            return None
        # The one process there is the case itself, under another id.
        return [] if self.alone() else sorted(self._other_pids())

    def _other_pids(self) -> set[int]:
        return {pid for row in self.rows for pid in row.other_pids or ()}

    def gaps(self, reading: Reading, failed: Callable[[Sample], bool] | None = None) -> list[Gap]:
        """When a reading failed.

        Args:
            reading: one that samples have.
            failed: whether it failed in a sample; by default, whether it is in the sample's ``failed``.
        """
        found: list[Gap] = []
        known_s: float | None = None
        # These two are read at every look, but looks that would repeat the previous sample are left out.
        often = reading in (Reading.MEMORY, Reading.PROCESSES)
        open_gap: Gap | None = None
        phase = START
        for row in self.rows:
            # A sample at a phase is taken when the phase is reached, so what fails in it began before.
            if failed(row) if failed is not None else reading in row.failed:
                since_s = row.time_s if known_s is None else known_s
                since_s = max(since_s, row.time_s - row.gap_s) if often else since_s
                open_gap = open_gap or Gap(since_s, math.inf, phase)
            elif getattr(row, reading) is not None:
                if open_gap is not None:
                    found.append(replace(open_gap, to_s=row.time_s))
                known_s, open_gap = row.time_s, None
            phase = row.phase or phase
        return found if open_gap is None else [*found, open_gap]

    def unseen(
        self,
        reading: Reading,
        first_s: float,
        last_s: float,
        tolerated_s: float,
        failed: Callable[[Sample], bool] | None = None,
    ) -> Reason | None:
        """Why the largest sample between two times may not be the true maximum; None if it is.

        Args:
            reading: one that samples have.
            first_s: start of that time.
            last_s: its end.
            tolerated_s: how long it may fail at a time; :data:`CALM_S` longer while the monitor looks rarely.
            failed: as in :meth:`gaps`.
        """
        if self.silent is not None and not (self.rows and last_s < self.rows[-1].time_s):
            return self.silent
        for gap in self.gaps(reading, failed):
            seconds = min(gap.to_s, last_s) - max(gap.from_s, first_s)
            if seconds > tolerated_s + (CALM_S if self._calm_at(gap.from_s) else 0.0):
                return self.too_few(reading, f"the driver gave no value {gap}")
        return None

    def why_few(self, reading: Reading, rows: Sequence[Sample]) -> Reason | None:
        """Why the values of a reading do not represent ``rows``: too many failed. None if they do."""
        failed = sum(reading in row.failed for row in rows)
        looks = failed + len(known(rows, reading))
        if failed <= MOST_FAILED * looks:
            return None
        return self.too_few(reading, f"the driver gave no value in {failed} of {looks} looks")

    def too_few(self, reading: Reading, text: str, otherwise: str = "no reason given") -> Reason:
        """The reason for a figure without enough samples, including why the reading failed."""
        why = self.reasons.get(reading)
        return Reason(Code.TOO_FEW_SAMPLES, f"{text} ({why or otherwise})", why.cure if why else None)

    def _calm_at(self, time_s: float) -> bool:
        """Whether the monitor was looking rarely at that time."""
        phases = [row.phase for row in self.rows if row.phase in (CALM_FROM, CALM_UNTIL) and row.time_s <= time_s]
        return phases[-1:] == [CALM_FROM]


def known(rows: Iterable[Sample], name: str) -> list[Any]:
    """The known values of a field."""
    return [value for row in rows if (value := getattr(row, name)) is not None]


def read_samples(lines: Iterable[str]) -> Samples:
    """Read a file of samples; a last line that was cut off is ignored.

    Args:
        lines: of the file, line ends included.

    Raises:
        ValueError: it is not a file of samples.
    """
    try:
        return _read_samples(lines)
    except TypeError as error:
        raise ValueError(f"not a file of GPU samples: {error}") from error


def read_sample_file(path: Path) -> Samples:
    """Read the samples that a run has kept, which were compressed with gzip.

    Raises:
        RunError: there is no such file, or it cannot be read as that.
    """
    content = unpack(path, SAMPLES)
    check_text(path, content)
    if content.count(b"\n") > MOST_SAMPLES:
        raise RunError(f"{path}: has more than {MOST_SAMPLES:,} samples, and so many are not read")
    try:
        return read_samples(lines_of(path, content))
    except ValueError as error:
        raise RunError(f"{path}: {error!s:.200}") from error


def _read_samples(lines: Iterable[str]) -> Samples:
    rows: list[Sample] = []
    reasons: dict[str, Reason] = {}
    silent: Reason | None = None
    late: tuple[str, ...] = ()
    for line in lines:
        if not line.endswith("\n"):
            break
        match parse_json(line):
            case {"time_s": float() | int()} as values:
                rows.append(Sample.from_json(values))
            case {"reasons": dict(found)}:
                reasons |= {reading: Reason.from_json(reason) for reading, reason in found.items()}
            case {"silent": reason}:
                silent = Reason.from_json(reason)
            case {"late": [*phases]}:
                late = tuple(str(phase) for phase in phases)
            case _:
                raise ValueError(f"not a file of GPU samples: {line.strip()[:40]!r}")
    if silent is not None:
        # What was asked of a driver that has stopped answering is not late: it never came.
        taken = {row.phase for row in rows}
        late = tuple(phase for phase in late if phase in taken)
    return Samples(rows, reasons, silent, late)
