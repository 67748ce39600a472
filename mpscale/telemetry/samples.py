"""What was seen of a GPU during one case, as a file of samples: written by the sampler, read for the columns.

The file is CSV. A row holds what was read at one time; a reading that was not taken then, or had no value, is empty.
One that was asked for in vain is named in ``failed``.
Rows that would repeat the last one are left out, and counted in the next (``looks``, ``gap_s``). A line
``# reading: reason`` says why a reading has no value. The watch adds ``# silent: reason`` where the sampler itself did
not live to the end, and ``# late: phase ...`` for phases whose sample the worker did not wait for.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from mpscale.core.wire import Phase

CALM_FROM, CALM_UNTIL = Phase.TIMING_START, Phase.TIMING_END
"""Phases between which the sampler looks seldom, so as not to disturb what is timed."""

CALM_S = 0.5
"""From one look to the next meanwhile."""

START = "the start"
SILENT, LATE = "silent", "late"

MOST_FAILED = 0.1
"""Share of readings that may have failed where the others stand for all: in a median, a mean, a share."""


@dataclass(slots=True)
class Sample:
    """One row.

    Args:
        time_s: seconds since the process was started.
        phase: what the worker had just reached, where it waited for this sample; else empty.
        looks: how often memory was looked at since the last row, this time included.
        gap_s: the longest time between two of these looks.
        listed: whether the worker or a descendant is in the driver's list of processes; None where there is no list.
        process_memory_mib: memory of worker and descendants together, None where it is not told.
        device_memory_mib: memory in use on the whole GPU, without what the driver reserves where that is known.
        reserved_memory_mib: what the driver reserves.
        processes: how many compute processes the driver lists.
        other_pids: those of them that are not the worker's, where the list can be read.
        graphics_pids: processes that only draw, likewise not the worker's.
        energy_j: energy counter.
        power_w: power.
        sm_clock_mhz: clock of the multiprocessors.
        memory_clock_mhz: clock of the memory.
        temperature_c: temperature of the GPU.
        utilization: share of the last fraction of a second in which a kernel ran, in percent.
        event_reasons: bits that say why clocks are not higher.
        failed: readings (:data:`READINGS`) that were asked for and had no value.
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
    event_reasons: int | None = None
    failed: tuple[str, ...] = ()


READINGS = {
    "memory": "device_memory_mib",
    "processes": "processes",
    "Graphics": "graphics_pids",
    "energy_mj": "energy_j",
    "power_mw": "power_w",
    "sm_clock_mhz": "sm_clock_mhz",
    "memory_clock_mhz": "memory_clock_mhz",
    "temperature_c": "temperature_c",
    "utilization": "utilization",
    "event_reasons": "event_reasons",
}
"""What is asked of the driver, with the column that its value is in."""

FIELDS = tuple(f.name for f in dataclasses.fields(Sample))


def _pids(text: str) -> tuple[int, ...]:
    return tuple(int(pid) for pid in text.split()) if text != "none" else ()


_PARSE: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(FIELDS, float),
    "phase": str,
    "looks": int,
    "processes": int,
    "listed": lambda text: text == "1",
    "other_pids": _pids,
    "graphics_pids": _pids,
    "event_reasons": lambda text: int(text, 16),
    "failed": lambda text: tuple(text.split()),
}


def _cell(name: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if name == "failed":
        return " ".join(value)
    if name.endswith("_pids"):
        return " ".join(map(str, value)) or "none"
    if name == "event_reasons":
        return f"0x{value:x}"
    return (
        f"{value:.3f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else str(int(value) if name != "phase" else value)
    )


class SampleFile:
    """Writes samples as they come: what is on disk stays, whatever becomes of the writer.

    Args:
        path: made anew.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(FIELDS)
        self._told: dict[str, str] = {}

    def write(self, sample: Sample) -> None:
        """Adds a row."""
        self._rows.writerow([_cell(name, getattr(sample, name)) for name in FIELDS])

    def tell(self, reasons: Mapping[str, str]) -> None:
        """Adds reasons that were not told before."""
        for reading, reason in reasons.items():
            if self._told.get(reading) != reason:
                self._told[reading] = reason
                self._file.write(f"# {reading}: {' '.join(reason.split())}\n")

    def flush(self) -> None:
        """Puts on disk what was written."""
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which a reading failed: from the last value before it to the first one after it.

    Args:
        from_s: when it was last known, or first asked for.
        to_s: when it was known again; infinite where it never was.
        phase: what the worker had reached when it began.
    """

    from_s: float
    to_s: float
    phase: str

    @property
    def words(self) -> str:
        """How long and since when."""
        if math.isinf(self.to_s):
            return f"from {self.phase} to the end"
        return f"for {self.to_s - self.from_s:.2g} s from {self.phase} on"


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a case in the order of time, and why readings have no value: {reading: reason}."""

    rows: list[Sample] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def silent(self) -> str | None:
        """Why there are no samples of the end of the case, None where there are."""
        return self.reasons.get(SILENT)

    @property
    def late(self) -> list[str]:
        """Phases that the worker had left when their sample was taken."""
        return self.reasons.get(LATE, "").split()

    def reached(self, phase: str) -> bool:
        """Whether the worker got there, whenever the sample was taken."""
        return any(row.phase == phase for row in self.rows)

    def not_at(self, *phases: str) -> str:
        """Why there is no sample at one of these phases."""
        late = [phase for phase in phases if phase in self.late]
        if late:
            return f"NVML was late: the case went on before it had answered at {late[0]}"
        return f"{self.silent or 'the case ended before that'}"

    def at(self, phase: str) -> Sample | None:
        """The sample that was taken when ``phase`` was reached; None also where it came late."""
        if phase in self.late:
            return None
        return next((row for row in self.rows if row.phase == phase), None)

    def until(self, phase: str) -> list[Sample]:
        """The samples before and at ``phase``, none if it was not reached."""
        end = self.at(phase)
        return [] if end is None else [row for row in self.rows if row.time_s <= end.time_s]

    def after(self, phase: str) -> list[Sample]:
        """The samples after ``phase``, none if it was not reached."""
        start = self.at(phase)
        return [] if start is None else [row for row in self.rows if row.time_s > start.time_s]

    def between(self, first: Sample, last: Sample) -> list[Sample]:
        """The samples from one to another, both included."""
        return [row for row in self.rows if first.time_s <= row.time_s <= last.time_s]

    def often(self) -> list[tuple[Sample, float]]:
        """The samples of the time in which the sampler looks often, each with the seconds since the one before."""
        found, calm = [], False
        for before, row in pairwise(self.rows):
            calm = before.phase == CALM_FROM or (calm and before.phase != CALM_UNTIL)
            if not calm:
                found.append((row, row.time_s - before.time_s))
        return found

    def gaps(self, reading: str, failed: Callable[[Sample], bool] | None = None) -> list[Gap]:
        """When a reading of :data:`READINGS` failed.

        Args:
            reading: which.
            failed: whether it did in a sample; by default, whether it is in the sample's ``failed``.
        """
        column = READINGS[reading]
        found: list[Gap] = []
        known_s: float | None = None
        # These are looked at each time, and rows that would repeat the last one are left out.
        often = reading in ("memory", "processes")
        begun: tuple[float, str] | None = None
        phase = START
        for row in self.rows:
            # A sample at a phase is taken when that is reached: what fails in it began before.
            if failed(row) if failed is not None else reading in row.failed:
                since_s = row.time_s if known_s is None else known_s
                begun = begun or (max(since_s, row.time_s - row.gap_s) if often else since_s, phase)
            elif getattr(row, column) is not None:
                if begun is not None:
                    found.append(Gap(begun[0], row.time_s, begun[1]))
                known_s, begun = row.time_s, None
            phase = row.phase or phase
        if begun is not None:
            found.append(Gap(begun[0], math.inf, begun[1]))
        return found

    def calm_at(self, time_s: float) -> bool:
        """Whether the sampler looked seldom from that time on."""
        phases = [row.phase for row in self.rows if row.phase in (CALM_FROM, CALM_UNTIL) and row.time_s <= time_s]
        return phases[-1:] == [CALM_FROM]

    def unseen(
        self,
        reading: str,
        first_s: float,
        last_s: float,
        tolerated_s: float,
        failed: Callable[[Sample], bool] | None = None,
    ) -> str | None:
        """Why the largest value between two times is not the largest there was; None where it is.

        Args:
            reading: of :data:`READINGS`.
            first_s: from when on it counts.
            last_s: until when.
            tolerated_s: how long it may fail at a time; longer by :data:`CALM_S` where the sampler looks seldom.
            failed: as in :meth:`gaps`.
        """
        if self.silent is not None and not (self.rows and last_s < self.rows[-1].time_s):
            return self.silent
        for gap in self.gaps(reading, failed):
            seconds = min(gap.to_s, last_s) - max(gap.from_s, first_s)
            if seconds > tolerated_s + (CALM_S if self.calm_at(gap.from_s) else 0.0):
                return f"NVML failed to tell {gap.words} ({self.reasons.get(reading, 'no reason given')})"
        return None

    def why_few(self, reading: str, rows: Sequence[Sample]) -> str | None:
        """Why the values of a reading do not stand for all of ``rows``: too many failed. None where they do."""
        failed = sum(reading in row.failed for row in rows)
        asked = failed + sum(getattr(row, READINGS[reading]) is not None for row in rows)
        if not failed or failed <= MOST_FAILED * asked:
            return None
        return f"NVML failed to tell in {failed} of {asked} looks ({self.reasons.get(reading, 'no reason given')})"

    def known(self, reading: str) -> list[float]:
        """The values of a reading that were seen."""
        return [value for row in self.rows if (value := getattr(row, reading)) is not None]


def read_samples(lines: Iterable[str]) -> Samples:
    """Reads a file of samples; a last line that was cut off is ignored.

    Args:
        lines: of the file, line ends included.

    Raises:
        ValueError: it is no file of samples.
    """
    rows: list[Sample] = []
    reasons: dict[str, str] = {}
    header: list[str] | None = None
    for line in lines:
        if not line.endswith("\n"):
            break
        if line.startswith("# "):
            reading, _, reason = line[2:].strip().partition(": ")
            reasons[reading] = reason
            continue
        (cells,) = csv.reader([line])
        if header is None:
            header = cells
            if header[0] != FIELDS[0]:
                raise ValueError(f"no file of GPU samples: it begins with {line.strip()[:40]!r}")
            continue
        known = {name: cell for name, cell in zip(header, cells, strict=False) if name in _PARSE and cell != ""}
        rows.append(Sample(**{name: _PARSE[name](cell) for name, cell in known.items()}))
    return Samples(rows, reasons)
