"""The state that a GPU was in while it was measured, and whether figures taken in it may be used."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mpscale.core.reason import Reason
from mpscale.core.record import Findings
from mpscale.core.wire import Phase
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
    timed = samples.not_at(Phase.TIMING_START, Phase.ENERGY_END, Phase.TIMING_END)
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


# Energy of the timed steps: by the GPU's counter, and by the integral of its power. The counter moves in steps of
# about a tenth of a second, and most power readings are means over a second, so a window shorter than ten seconds
# says little.

HEADLINE = "gpu_energy_j_per_step"
ENERGY_COLUMNS = (
    HEADLINE,
    "gpu_energy_method",
    "gpu_energy_j_per_applied_step",
    "gpu_energy_net_j_per_step",
    "gpu_energy_counter_j",
    "gpu_energy_power_j",
    "gpu_energy_window_s",
    "gpu_energy_steps",
    "gpu_power_w_mean",
    "gpu_power_source",
    "gpu_idle_power_w",
)
SHORTEST_WINDOW_S = 10.0
IDLE_S = 2.0
_FEWEST_IDLE_SAMPLES = 5
_LARGEST_GAP_S = 1.0
"""Between two readings of power, and between the two moves of the counter around an end of the window."""

_MOST_W = 10_000.0
"""No GPU draws so much: a counter that moves faster is broken."""


def timed_window(samples: Samples) -> tuple[Sample, Sample] | None:
    """The samples at both ends of the timed steps, those included that were added for the sake of energy."""
    start = samples.at(Phase.TIMING_START)
    # Steps go on until the last of the two that was reached: where NVML was late then, the other will not do.
    end = samples.at(Phase.ENERGY_END if samples.reached(Phase.ENERGY_END) else Phase.TIMING_END)
    return (start, end) if start is not None and end is not None else None


def energy_columns(
    samples: Samples, steps: int | None, applied: int | None, power_source: str | None, off: Reason | str | None
) -> Findings:
    """The columns on energy and power.

    Args:
        samples: of the whole case.
        steps: steps taken in the window, None where the case did not get through it.
        applied: of them, those that were not skipped; None where the mode does not tell.
        power_source: what NVML's power is.
        off: why energy was not to be measured, None where it was.
    """
    found = Findings()
    window = timed_window(samples)
    if off is not None or window is None or not steps:
        ended = samples.not_at(Phase.TIMING_START, Phase.ENERGY_END, Phase.TIMING_END)
        found.miss(ENERGY_COLUMNS, off or ended)
        return found
    start, end = window
    seconds = end.time_s - start.time_s
    counter, counter_reason = _by_counter(samples, start.time_s, end.time_s)
    power, power_reason = _by_power(samples.between(start, end), samples)
    short = None
    told = samples.known("energy_j") or samples.known("power_w")
    if told and round(seconds, 2) < SHORTEST_WINDOW_S:
        short = f"a window of {seconds:.1f} s, and the GPU's sensors need {SHORTEST_WINDOW_S:g}"
    found.put("gpu_energy_window_s", seconds, "")
    found.put("gpu_energy_steps", steps, "")
    found.put("gpu_energy_counter_j", None if short else counter, short or counter_reason)
    found.put("gpu_energy_power_j", None if short else power, short or power_reason)
    joules = None if short else (counter if counter is not None else power)
    reason = short or f"{counter_reason}; {power_reason}"
    idle, idle_reason = _idle_power(samples)
    found.put("gpu_idle_power_w", idle, idle_reason)
    found.put("gpu_power_source", power_source, samples.reasons.get("power_mw", "NVML gives no power"))
    mean = joules / seconds if joules is not None else (power / seconds if power is not None else None)
    found.put("gpu_power_w_mean", mean, reason)
    found.put(HEADLINE, None if joules is None else joules / steps, reason)
    found.put("gpu_energy_method", None if joules is None else ("counter" if counter is not None else "power"), reason)
    per_applied = joules / applied if joules is not None and applied else None
    no_applied = "no step was applied" if applied == 0 else "the mode checks no gradient"
    found.put("gpu_energy_j_per_applied_step", per_applied, reason if joules is None else no_applied)
    net = None if joules is None or idle is None else (joules - idle * seconds) / steps
    if net is not None and net <= 0:
        net, idle_reason = None, "the GPU drew no more than before the case"
    found.put("gpu_energy_net_j_per_step", net, reason if joules is None else idle_reason)
    return found


def _by_counter(samples: Samples, start_s: float, end_s: float) -> tuple[float | None, str]:
    """Joules between two times, or why the counter does not tell."""
    # Where the counter moved, and when that was seen; between two such points it is taken to run evenly.
    points: list[tuple[float, float]] = []
    stood_s = 0.0
    for row in samples.rows:
        if row.energy_j is None:
            continue
        if points and row.energy_j < points[-1][1]:
            return None, "the energy counter went backwards: the driver was loaded anew"
        if not points or row.energy_j != points[-1][1]:
            points.append((row.time_s, row.energy_j))
        elif start_s <= row.time_s <= end_s:
            stood_s = max(stood_s, row.time_s - max(points[-1][0], start_s))
    if not points:
        return None, samples.reasons.get("energy_mj", "NVML gives no energy counter")
    inside = sum(start_s <= time <= end_s for time, _ in points)
    if inside < 2:
        return None, samples.why_few("energy_mj", samples.rows) or "the energy counter did not move"
    if stood_s > _LARGEST_GAP_S:
        return None, f"the energy counter stood still for {stood_s:.1f} s while steps were taken"
    ends = [_at(points, time_s) for time_s in (start_s, end_s)]
    apart_s = max(seconds for _, seconds in ends)
    if apart_s > _LARGEST_GAP_S:
        why = samples.reasons.get("energy_mj", "no look in time")
        return None, f"the energy counter was not read for {apart_s:.1f} s at an end of the window ({why})"
    joules = ends[1][0] - ends[0][0]
    if not 0 < joules <= _MOST_W * (end_s - start_s):
        return None, f"the energy counter moved by {joules:.4g} J in {end_s - start_s:.1f} s, as no GPU draws"
    return joules, ""


def _at(points: list[tuple[float, float]], time_s: float) -> tuple[float, float]:
    """The counter at a time, and how far in seconds the points lie apart that it is found by.

    It lies on a straight line through its two neighbours; at the ends, through the two that are next, so that what was
    used since the counter's last step counts, too.
    """
    pairs = list(pairwise(points))
    (before_s, before), (after_s, after) = next((pair for pair in pairs if time_s <= pair[1][0]), pairs[-1])
    joules = before + (after - before) * (time_s - before_s) / (after_s - before_s)
    return joules, max(after_s, time_s) - min(before_s, time_s)


def _by_power(rows: list[Sample], samples: Samples) -> tuple[float | None, str]:
    """Joules by the trapezoidal rule over the power readings, or why there are none."""
    read = [(row.time_s, row.power_w) for row in rows if row.power_w is not None]
    if len(read) < 2 or rows[0].power_w is None or rows[-1].power_w is None:
        return None, samples.reasons.get("power_mw", "NVML gave no power at both ends of the window")
    gap = max(later - earlier for (earlier, _), (later, _) in pairwise(read))
    if gap > _LARGEST_GAP_S:
        why = f" ({samples.reasons['power_mw']})" if "power_mw" in samples.reasons else ""
        return None, f"power was not read for {gap:.1f} s{why}"
    joules = math.fsum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(read))
    return (joules, "") if joules > 0 else (None, "NVML says that the GPU draws no power")


def _idle_power(samples: Samples) -> tuple[float | None, str]:
    """Mean power right before the worker touched the GPU."""
    before = samples.until(Phase.IDLE)
    if not before:
        return None, samples.not_at(Phase.IDLE)
    end = before[-1].time_s
    last = [row for row in before if row.time_s >= end - IDLE_S]
    read = [row.power_w for row in last if row.power_w is not None]
    few = samples.why_few("power_mw", last)
    if few:
        return None, few
    if len(read) < _FEWEST_IDLE_SAMPLES:
        return None, samples.reasons.get("power_mw", f"{len(read)} readings of power before the GPU was touched")
    mean = math.fsum(read) / len(read)
    return (mean, "") if mean > 0 else (None, "NVML says that the GPU draws no power")
