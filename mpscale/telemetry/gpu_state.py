"""The state that a GPU was in while it was measured, and whether figures taken in it may be used."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mpscale.telemetry.findings import Findings
from mpscale.telemetry.gpu_energy import timed_window
from mpscale.telemetry.gpu_memory import alone
from mpscale.telemetry.samples import Sample, Samples

EVENT_REASONS = {
    0x1: "idle",
    0x2: "application clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
}
"""Bits of NVML's clock event reasons (nvmlClocksEventReasons in nvml.h)."""

THROTTLED = 0x8 | 0x20 | 0x40 | 0x80
POWER_CAP = 0x4
"""Not counted as throttling: a GPU under full load often runs at its power limit, and does so in every run."""

SUSTAINED_SHARE = 0.05
CLOCK_DROP = 0.10
_FEWEST_CLOCKS = 8
_TOLERATED_S = 0.5
"""How long a reading may fail in a figure that is the most of all: these change slowly, and are read every 100 ms."""

COLUMNS = (
    "gpu_temperature_c_max",
    "gpu_sm_clock_mhz_median",
    "gpu_memory_clock_mhz_median",
    "gpu_utilization_median",
    "gpu_event_reasons",
    "gpu_throttled_share",
    "gpu_power_capped_share",
    "gpu_other_processes",
    "gpu_graphics_processes",
)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why figures must not be used, and whether they may come out well if the case is run again."""

    reason: str
    passes: bool


def state_columns(samples: Samples) -> Findings:
    """What is known of the GPU's state: in the timed window, but for the processes."""
    found = Findings()
    rows = _timed(samples)
    timed = samples.not_at("timing-start", "energy-end", "timing-end")
    whole = (samples.rows[0].time_s, samples.rows[-1].time_s) if samples.rows else (0.0, 0.0)

    def put(column: str, reading: str, value: Any, spoilt: str | None) -> None:
        """A value, unless too many of the readings that it is made from have failed."""
        reason = samples.reasons.get(reading, samples.not_at())
        found.put(column, None if spoilt else value, spoilt if spoilt and value is not None else reason)

    def put_timed(column: str, reading: str, value: Any, spoilt: str | None = None) -> None:
        if rows:
            put(column, reading, value, samples.why_few(reading, rows) or spoilt)
        else:
            found.put(column, None, samples.reasons.get(reading, f"nothing was timed, or {timed}"))

    hottest = max(samples.known("temperature_c"), default=None)
    unseen = samples.unseen("temperature_c", *whole, _TOLERATED_S)
    known = "" if hottest is None else f"; {hottest:g} °C was the most until then"
    put("gpu_temperature_c_max", "temperature_c", hottest, unseen and unseen + known)
    for column, reading in (
        ("gpu_sm_clock_mhz_median", "sm_clock_mhz"),
        ("gpu_memory_clock_mhz_median", "memory_clock_mhz"),
        ("gpu_utilization_median", "utilization"),
    ):
        values = [value for row in rows if (value := getattr(row, reading)) is not None]
        put_timed(column, reading, statistics.median(values) if values else None)
    bits = [row.event_reasons for row in rows if row.event_reasons is not None]
    together = 0
    for each in bits:
        together |= each
    names = [name for bit, name in EVENT_REASONS.items() if together & bit]
    # The bits of all samples together are complete or nothing, like a largest value.
    unseen = samples.unseen("event_reasons", rows[0].time_s, rows[-1].time_s, _TOLERATED_S) if rows else None
    put_timed("gpu_event_reasons", "event_reasons", (", ".join(names) or "none") if bits else None, unseen)
    put_timed("gpu_throttled_share", "event_reasons", _share(bits, THROTTLED))
    put_timed("gpu_power_capped_share", "event_reasons", _share(bits, POWER_CAP))
    others = foreign(samples)
    number = None if others is None else len(others)
    unseen = samples.unseen("processes", *whole, _TOLERATED_S)
    put("gpu_other_processes", "processes", number, unseen and f"{unseen}; {number} were seen until then")
    drawing = [row.graphics_pids for row in samples.rows if row.graphics_pids is not None]
    number = len({pid for pids in drawing for pid in pids}) if drawing else None
    unseen = samples.unseen("Graphics", *whole, _TOLERATED_S)
    put("gpu_graphics_processes", "Graphics", number, unseen and f"{unseen}; {number} were seen until then")
    return found


def suspicions(
    samples: Samples,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]],
    first_settings: Mapping[str, Any],
    slowdown_c: float | None,
) -> list[Suspicion]:
    """Why the figures of a case must not be used; empty where nothing speaks against them.

    Args:
        samples: of the whole case.
        settings: the GPU's settings before and after it.
        first_settings: those before the first case of the run.
        slowdown_c: the temperature at which the GPU slows down, None where unknown.
    """
    rows = _timed(samples)
    return [
        *_throttled(rows, slowdown_c),
        *_clock_drop(rows),
        *_foreign(samples),
        *_changed(settings, first_settings),
    ]


def foreign(samples: Samples) -> list[int] | None:
    """Process ids of compute processes that are not the case's, None where no list of processes can be read."""
    rows = [row for row in samples.rows if row.other_pids is not None]
    if not rows:
        return None
    pids = {pid for row in rows for pid in row.other_pids or ()}
    # Under another number, the one process that is there is the case itself.
    return [] if alone(samples) else sorted(pids)


def _timed(samples: Samples) -> list[Sample]:
    window = timed_window(samples)
    return samples.between(*window) if window else []


def _share(bits: list[int], mask: int) -> float | None:
    return sum(bool(each & mask) for each in bits) / len(bits) if bits else None


def _throttled(rows: list[Sample], slowdown_c: float | None) -> list[Suspicion]:
    bits = [row.event_reasons for row in rows if row.event_reasons is not None]
    share = _share(bits, THROTTLED) or 0.0
    in_a_row = any(a & THROTTLED and b & THROTTLED for a, b in pairwise(bits))
    if share >= SUSTAINED_SHARE and in_a_row:
        seen = [name for bit, name in EVENT_REASONS.items() if bit & THROTTLED and any(each & bit for each in bits)]
        return [Suspicion(f"the GPU was throttled in {share:.0%} of the timed window ({', '.join(seen)})", True)]
    hottest = max((row.temperature_c for row in rows if row.temperature_c is not None), default=None)
    if hottest is not None and slowdown_c is not None and hottest >= slowdown_c:
        return [Suspicion(f"the GPU reached {hottest:.0f} °C, and slows down from {slowdown_c:.0f} °C on", True)]
    return []


def _clock_drop(rows: list[Sample]) -> list[Suspicion]:
    """A clock that falls while steps are timed; at the power limit that is how the GPU always runs."""
    clocks = [row.sm_clock_mhz for row in rows if row.sm_clock_mhz is not None]
    if len(clocks) < _FEWEST_CLOCKS or (_share([row.event_reasons or 0 for row in rows], POWER_CAP) or 0.0) > 0:
        return []
    quarter = len(clocks) // 4
    first, last = statistics.fmean(clocks[:quarter]), statistics.fmean(clocks[-quarter:])
    if last >= (1 - CLOCK_DROP) * first:
        return []
    return [Suspicion(f"the clock fell from {first:.0f} to {last:.0f} MHz while steps were timed", True)]


def _foreign(samples: Samples) -> list[Suspicion]:
    others = foreign(samples)
    if not others:
        return []
    named = ", ".join(map(str, others))
    return [
        Suspicion(
            f"other processes computed on the GPU (process ids {named}): its memory and energy are theirs too", True
        )
    ]


def _changed(
    settings: tuple[Mapping[str, Any], Mapping[str, Any]], first_settings: Mapping[str, Any]
) -> list[Suspicion]:
    before, after = settings
    found = []
    for name, first in first_settings.items():
        for now, when in ((before.get(name), "since the first case"), (after.get(name), "during the case")):
            if None not in (first, now) and now != first:
                found.append(Suspicion(f"{_SETTINGS[name]} was changed {when}: {_said(first)} to {_said(now)}", False))
                break
    return found


_SETTINGS = {"power_limit_w": "the power limit (W)", "ecc": "ECC", "persistence": "persistence mode"}


def _said(value: Any) -> str:
    return {True: "on", False: "off"}.get(value) if isinstance(value, bool) else f"{value:g}"  # type: ignore[return-value]
