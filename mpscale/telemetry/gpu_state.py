"""The state of a GPU while it was measured, and whether figures taken in that state may be used."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mpscale.core.reason import Reason
from mpscale.core.record import Findings
from mpscale.telemetry.samples import THROTTLING, ClockEvent, Reading, Sample, Samples, known

_SUSTAINED_SHARE = 0.05
_CLOCK_DROP = 0.10
_FEWEST_CLOCKS = 8
_TOLERATED_S = 0.5
"""How long a reading may fail within a maximum: these change slowly and are read every 100 ms."""

_MEDIANS = {
    "gpu_sm_clock_mhz_median": Reading.SM_CLOCK,
    "gpu_memory_clock_mhz_median": Reading.MEMORY_CLOCK,
    "gpu_utilization_median": Reading.UTILIZATION,
}
_CAPPED = frozenset({ClockEvent.POWER_CAP})
_SETTINGS = {"power_limit_w": "the power limit (W)", "ecc": "ECC", "persistence": "persistence mode"}


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why figures must not be used, and whether running the case again may help."""

    reason: str
    passes: bool


def state_columns(samples: Samples) -> Findings:
    """The columns on the GPU's state, all but temperature and processes over the timed window."""
    found = Findings()
    rows = samples.timed()

    def put(column: str, reading: Reading, value: Any, spoilt: Reason | None) -> None:
        """Put a value, unless too many of the readings that it is computed from failed."""
        if value is None:
            found.put(column, samples.reasons.get(reading, samples.not_at()))
        else:
            found.put(column, value if spoilt is None else spoilt)

    def put_timed(column: str, reading: Reading, value: Any, spoilt: Reason | None = None) -> None:
        if rows:
            put(column, reading, value, samples.why_few(reading, rows) or spoilt)
        else:
            ended = samples.not_at("timing-start", "energy-end", "timing-end")
            found.put(column, samples.reasons.get(reading, ended.worded(f"nothing was timed, or {ended}")))

    def put_most(column: str, reading: Reading, value: float | None, words: str) -> None:
        """Put a maximum over the whole case."""
        whole = (samples.rows[0].time_s, samples.rows[-1].time_s) if samples.rows else (0.0, 0.0)
        unseen = samples.unseen(reading, *whole, _TOLERATED_S)
        put(column, reading, value, unseen and unseen.worded(f"{unseen}; {words} until then"))

    hottest = max(known(samples.rows, "temperature_c"), default=None)
    put_most("gpu_temperature_c_max", Reading.TEMPERATURE, hottest, f"{hottest or 0:g} °C was the most")
    for column, reading in _MEDIANS.items():
        values = known(rows, reading)
        put_timed(column, reading, statistics.median(values) if values else None)
    events = _events(rows)
    # The union of all events is complete or worthless, like a maximum.
    unseen = samples.unseen(Reading.CLOCK_EVENTS, rows[0].time_s, rows[-1].time_s, _TOLERATED_S) if rows else None
    seen = (", ".join(_seen(events)) or "none") if events else None
    put_timed("gpu_event_reasons", Reading.CLOCK_EVENTS, seen, unseen)
    put_timed("gpu_throttled_share", Reading.CLOCK_EVENTS, _share(events, THROTTLING))
    put_timed("gpu_power_capped_share", Reading.CLOCK_EVENTS, _share(events, _CAPPED))
    others = samples.other_processes()
    number = None if others is None else len(others)
    put_most("gpu_other_processes", Reading.PROCESSES, number, f"{number} were seen")
    drawing = known(samples.rows, "graphics_pids")
    number = len({pid for pids in drawing for pid in pids}) if drawing else None
    put_most("gpu_graphics_processes", Reading.GRAPHICS_PROCESSES, number, f"{number} were seen")
    return found


def suspicions(
    samples: Samples,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]],
    first_settings: Mapping[str, Any],
    slowdown_c: float | None,
) -> list[Suspicion]:
    """Why the figures of a case must not be used; empty if they may be used.

    Args:
        samples: of the whole case.
        settings: the GPU's settings before and after it.
        first_settings: those before the first case of the run.
        slowdown_c: the temperature at which the GPU slows down, None if unknown.
    """
    rows = samples.timed()
    found = [_throttled(rows, slowdown_c), _clock_drop(rows), _others(samples)]
    return [*filter(None, found), *_changed(settings, first_settings)]


def _events(rows: list[Sample]) -> list[frozenset[str]]:
    return [frozenset(events) for events in known(rows, "clock_events")]


def _seen(events: list[frozenset[str]], among: frozenset[ClockEvent] = frozenset(ClockEvent)) -> list[ClockEvent]:
    """The clock events that any of the samples has."""
    return [event for event in ClockEvent if event in among and any(event in each for each in events)]


def _share(events: list[frozenset[str]], among: frozenset[ClockEvent]) -> float | None:
    return sum(bool(each & among) for each in events) / len(events) if events else None


def _throttled(rows: list[Sample], slowdown_c: float | None) -> Suspicion | None:
    events = _events(rows)
    share = _share(events, THROTTLING) or 0.0
    in_a_row = any(a & THROTTLING and b & THROTTLING for a, b in pairwise(events))
    if share >= _SUSTAINED_SHARE and in_a_row:
        seen = ", ".join(_seen(events, THROTTLING))
        return Suspicion(f"the GPU was throttled in {share:.0%} of the timed window ({seen})", True)
    hottest = max(known(rows, "temperature_c"), default=None)
    if hottest is not None and slowdown_c is not None and hottest >= slowdown_c:
        return Suspicion(f"the GPU reached {hottest:.0f} °C and slows down from {slowdown_c:.0f} °C on", True)
    return None


def _clock_drop(rows: list[Sample]) -> Suspicion | None:
    """A clock that falls while steps are timed; normal for a GPU at its power limit."""
    clocks = known(rows, "sm_clock_mhz")
    if len(clocks) < _FEWEST_CLOCKS or _share(_events(rows), _CAPPED):
        return None
    quarter = len(clocks) // 4
    first, last = statistics.fmean(clocks[:quarter]), statistics.fmean(clocks[-quarter:])
    if last >= (1 - _CLOCK_DROP) * first:
        return None
    return Suspicion(f"the clock fell from {first:.0f} to {last:.0f} MHz while steps were timed", True)


def _others(samples: Samples) -> Suspicion | None:
    others = samples.other_processes()
    if not others:
        return None
    whose = f"other processes computed on the GPU (process ids {', '.join(map(str, others))})"
    return Suspicion(f"{whose}: its memory and energy are theirs too", True)


def _changed(
    settings: tuple[Mapping[str, Any], Mapping[str, Any]], first_settings: Mapping[str, Any]
) -> list[Suspicion]:
    def shown(value: Any) -> str:
        return ("off", "on")[value] if isinstance(value, bool) else f"{value:g}"

    before, after = settings
    found = []
    for name, first in first_settings.items():
        for now, when in ((before.get(name), "since the first case"), (after.get(name), "during the case")):
            if None not in (first, now) and now != first:
                found.append(Suspicion(f"{_SETTINGS[name]} was changed {when}: {shown(first)} to {shown(now)}", False))
                break
    return found
