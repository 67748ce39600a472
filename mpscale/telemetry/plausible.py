"""Which answers of NVML are measurements: the one place that knows its values for "not available", and each range.

A call may succeed and still tell nothing. Then it answers with all bits one (4,294,967,295 mW, or -1 °C where the type
has a sign), with 0 where no GPU that runs can have 0, or with a number that no GPU can have. None of them is a figure.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, NamedTuple

MIB = 2**20


class Doubt(Enum):
    """Why an answer is no measurement."""

    NOT_AVAILABLE = "NVML's value for not available"
    ZERO = "zero, where none can be"
    OUT_OF_RANGE = "outside of what a GPU can have"
    INCONSISTENT = "parts that do not make up the whole"
    UNKNOWN_TYPE = "of a type that is not known"
    STALE = "one that was given before"


class Implausible(ValueError):
    """A call succeeded, and its answer is no measurement.

    Args:
        doubt: why not.
        words: the same in plain words.
    """

    def __init__(self, doubt: Doubt, words: str) -> None:
        super().__init__(words)
        self.doubt = doubt


class Range(NamedTuple):
    """The smallest and the largest answer that can be true, and their unit."""

    least: float
    most: float
    unit: str


_CLOCK = Range(1, 100_000, "MHz")
_CELSIUS = Range(1, 150, "°C")
_POWER = Range(1, 10e6, "mW")
_MODE = Range(0, 1, "(0 is off, 1 is on)")
_BYTES = Range(0, 2**50, "bytes")

RANGES = {
    "energy_mj": Range(1, 2**62, "mJ"),
    "power_mw": _POWER,
    "power_limit_mw": _POWER,
    "sm_clock_mhz": _CLOCK,
    "memory_clock_mhz": _CLOCK,
    "temperature_c": _CELSIUS,
    "slowdown_c": _CELSIUS,
    "utilization": Range(0, 100, "%"),
    "event_reasons": Range(0, 2**16 - 1, "(bits)"),
    "ecc": _MODE,
    "persistence": _MODE,
    "mig": _MODE,
    "total_bytes": Range(1, 2**50, "bytes"),
    "bytes": _BYTES,
    "pcie_generation": Range(1, 15, ""),
    "pcie_width": Range(1, 64, "lanes"),
    "compute_capability": Range(1, 99, ""),
    "minor_capability": Range(0, 99, ""),
    "cuda_version": Range(1000, 99_990, ""),
    "devices": Range(0, 1024, "devices"),
}
"""By reading or fact. Wide on purpose: a range is to catch garbage, and no GPU that is to come."""

_ALL_ONES = frozenset({-1, 2**32 - 1, 2**64 - 1})


def checked(name: str, value: Any) -> Any:
    """``value`` again, where it can be a measurement.

    Args:
        name: of :data:`RANGES`.
        value: a number, in the range's unit.

    Raises:
        Implausible: it cannot.
    """
    least, most, unit = RANGES[name]
    if value is None or value in _ALL_ONES or not math.isfinite(value):
        raise Implausible(Doubt.NOT_AVAILABLE, f"NVML answers {value}, which is its value for 'not available'")
    said = f"{value} {unit}".strip()
    if value == 0 < least:
        raise Implausible(Doubt.ZERO, f"NVML answers {said}, which is no measurement")
    if not least <= value <= most:
        raise Implausible(Doubt.OUT_OF_RANGE, f"NVML answers {said}; only {least:g} to {most:g} can be true")
    return value


def checked_memory(total: int, used: int, *parts: int) -> None:
    """Checks the memory of one answer.

    Args:
        total: bytes there are.
        used: bytes in use.
        parts: other bytes of the total.

    Raises:
        Implausible: it cannot be so.
    """
    checked("total_bytes", total)
    for part in (used, *parts):
        if checked("bytes", part) > total:
            words = f"NVML answers {part} bytes of memory, of {total} in all"
            raise Implausible(Doubt.INCONSISTENT, words)


def checked_process(used: int | None, total_mib: float | None) -> float | None:
    """MiB that one process uses, None where its entry does not tell.

    Args:
        used: bytes, as in the driver's list of processes.
        total_mib: the GPU's memory, None where unknown.
    """
    try:
        mib = float(checked("bytes", used)) / MIB
    except Implausible:
        return None
    # 0 comes from containers: a process that is listed holds a context, and that is never empty.
    return mib if mib > 0 and (total_mib is None or mib <= total_mib) else None
