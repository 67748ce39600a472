"""What was seen of a GPU during one case, as a file of samples: written by the sampler, read for the columns.

The file is CSV. A row holds what was read at one time; a reading that was not taken then, or had no value, is empty.
Rows that would repeat the last one are left out, and counted in the next (``looks``, ``gap_s``). A line
``# reading: reason`` says why a reading has no value.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

CALM_FROM, CALM_UNTIL = "timing-start", "timing-end"
"""Phases between which the sampler looks seldom, so as not to disturb what is timed."""


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
}


def _cell(name: str, value: Any) -> str:
    if value is None or value == "":
        return ""
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
class Samples:
    """The samples of a case in the order of time, and why readings have no value: {reading: reason}."""

    rows: list[Sample] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def at(self, phase: str) -> Sample | None:
        """The sample that was taken when ``phase`` was reached."""
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
