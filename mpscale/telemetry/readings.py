"""What a GPU can tell, whoever made it: readings with their units and plausible ranges, and reasons for low clocks.

A driver's call may succeed and still tell nothing: it answers 0 where no running GPU can have 0, or a number that no
GPU can have. Such an answer is not a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from mpscale.core.reason import Code, Reason


class Implausible(Exception):
    """A call succeeded, but its answer is not a measurement.

    Args:
        text: why not.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.reason = Reason(Code.IMPLAUSIBLE, text)


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest and the largest plausible answer. Wide on purpose: a range catches garbage, not future GPUs."""

    least: float
    most: float
    unit: str = ""

    def checked(self, value: Any) -> Any:
        """Return ``value`` if it can be a measurement.

        Raises:
            Implausible: it cannot.
        """
        answer = f"the driver answers {value} {self.unit}".strip()
        if value is None or not math.isfinite(value) or value == 0 < self.least:
            raise Implausible(f"{answer}, which is no measurement")
        if not self.least <= value <= self.most:
            raise Implausible(f"{answer}; only {self.least:g} to {self.most:g} is plausible")
        return value


_MIB = Range(0, 2**30, "MiB")
_CLOCK = Range(1, 100_000, "MHz")
POWER_RANGE = Range(0.001, 10_000, "W")
_SWITCH = Range(0, 1, "(0 is off, 1 is on)")


class Reading(StrEnum):
    """A quantity that can be read again and again. The value is the name of its field in a sample, if it has one."""

    range: Range | None
    """Of a number; None for memory, lists of processes and clock events, whose backend checks their parts."""

    def __new__(cls, name: str, range: Range | None = None) -> Reading:
        """Attach the range to the name."""
        reading = str.__new__(cls, name)
        reading._value_ = name
        reading.range = range
        return reading

    MEMORY = "device_memory_mib"
    """:class:`Memory`."""
    RESERVED_MEMORY = "reserved_memory_mib"
    """Never read by itself: comes with the memory if the driver tells the two apart."""
    PROCESSES = "processes"
    """Processes that compute, as list of ``(pid, MiB or None)``; so are the next two."""
    GRAPHICS_PROCESSES = "graphics_pids"
    SERVICE_PROCESSES = "service_processes"
    """Processes that compute through a service that shares the GPU, such as CUDA's MPS."""
    ENERGY = "energy_j", Range(0.001, 2**62 / 1e3, "J")
    """Energy counter."""
    POWER = "power_w", POWER_RANGE
    SM_CLOCK = "sm_clock_mhz", _CLOCK
    MEMORY_CLOCK = "memory_clock_mhz", _CLOCK
    TEMPERATURE = "temperature_c", Range(1, 150, "°C")
    UTILIZATION = "utilization", Range(0, 100, "%")
    CLOCK_EVENTS = "clock_events"
    """Tuple of :class:`ClockEvent`."""
    POWER_LIMIT = "power_limit_w", POWER_RANGE
    ECC = "ecc", _SWITCH
    PERSISTENCE = "persistence", _SWITCH


class ClockEvent(StrEnum):
    """A reason for which a GPU's clocks are not higher, in the order in which reports name them."""

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
    {
        ClockEvent.HARDWARE_SLOWDOWN,
        ClockEvent.SOFTWARE_THERMAL,
        ClockEvent.HARDWARE_THERMAL,
        ClockEvent.POWER_BRAKE,
    }
)
"""Events that make step times unusable."""


class Memory(NamedTuple):
    """Memory of a GPU in MiB; ``used_mib`` excludes ``reserved_mib``, which the driver keeps for itself.

    If the driver does not tell the two apart, ``reserved_mib`` is None and ``used_mib`` may include it.
    """

    used_mib: float
    reserved_mib: float | None


class Processes(NamedTuple):
    """Processes on a GPU: MiB by process id, None for a process whose memory the driver does not tell.

    ``number`` is right even if the entries cannot be read; ``by_pid`` is then the reason.
    """

    number: int
    by_pid: dict[int, float | None] | Reason
