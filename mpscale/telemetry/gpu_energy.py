"""Energy of the timed steps, from the GPU's counter and from the integral of its power.

The counter moves about every tenth of a second, and most power readings are means over a second, so energy over less
than ten seconds is not reported.
"""

from __future__ import annotations

import math
from itertools import pairwise

from mpscale.core.columns import Source, Topic, measured_columns
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Findings
from mpscale.telemetry.samples import Reading, Samples, known

_HEADLINE = "gpu_energy_j_per_step"
_SHORTEST_WINDOW_S = 10.0
_IDLE_S = 2.0
_FEWEST_IDLE_SAMPLES = 5
_LARGEST_GAP_S = 1.0
"""Between two readings of power, and between the two moves of the counter around an end of the window."""

_MOST_W = 10_000.0
"""More than any GPU draws: a counter that moves faster is broken."""

_ZERO_POWER = Reason(Code.IMPLAUSIBLE, "the driver reports that the GPU draws no power")
_NO_STEP = Reason(Code.NEVER_HAPPENED, "no step was applied")
_NO_CHECK = Reason(Code.NOT_IN_MODE, "the mode checks no gradient")
_NO_MORE = Reason(Code.NEVER_HAPPENED, "the GPU drew no more than before the case")


def energy_columns(
    samples: Samples, steps: int | None, applied: int | None, power_source: str | None, off: Reason | None
) -> Findings:
    """The columns on energy and power.

    Args:
        samples: of the whole case.
        steps: steps taken in the window, None if the case did not get through it.
        applied: those of them that were not skipped; None if the mode does not count them.
        power_source: what the driver's power is: instant or a mean.
        off: why energy was not measured; None if it was.
    """
    found = Findings()
    rows = samples.timed()
    if off is not None or not rows or not steps:
        ended = samples.not_at("timing-start", "energy-end", "timing-end")
        found.miss(measured_columns(Topic.ENERGY, Source.MONITOR), off or ended)
        return found
    start_s, end_s = rows[0].time_s, rows[-1].time_s
    seconds = end_s - start_s
    counter = _by_counter(samples, start_s, end_s)
    power = _by_power(samples)
    idle = _idle_power(samples)
    # A window too short for energy still has a mean power.
    mean_w = power if isinstance(power, Reason) else power / seconds
    if (known(samples.rows, "energy_j") or known(samples.rows, "power_w")) and round(seconds, 2) < _SHORTEST_WINDOW_S:
        text = f"a window of {seconds:.1f} s, and the GPU's sensors need {_SHORTEST_WINDOW_S:g}"
        counter = power = Reason(Code.WINDOW_TOO_SHORT, text)
    joules, method = (power, "power") if isinstance(counter, Reason) else (counter, "counter")
    if isinstance(joules, Reason) and isinstance(counter, Reason) and counter != joules:
        joules = counter.worded(f"{counter}; {joules}")
    found.put("gpu_energy_window_s", seconds)
    found.put("gpu_energy_steps", steps)
    found.put("gpu_energy_counter_j", counter)
    found.put("gpu_energy_power_j", power)
    found.put("gpu_idle_power_w", idle)
    no_power = samples.reasons.get(Reading.POWER) or Reason(Code.NOT_TOLD, "the driver does not report power")
    found.put("gpu_power_source", power_source or no_power)
    if isinstance(joules, Reason):
        found.miss(
            (_HEADLINE, "gpu_energy_method", "gpu_energy_j_per_applied_step", "gpu_energy_net_j_per_step"), joules
        )
        found.put("gpu_power_w_mean", joules if isinstance(mean_w, Reason) else mean_w)
        return found
    found.put(_HEADLINE, joules / steps)
    found.put("gpu_energy_method", method)
    found.put("gpu_power_w_mean", joules / seconds)
    no_applied = _NO_STEP if applied == 0 else _NO_CHECK
    found.put("gpu_energy_j_per_applied_step", joules / applied if applied else no_applied)
    net = idle if isinstance(idle, Reason) else (joules - idle * seconds) / steps
    found.put("gpu_energy_net_j_per_step", net if isinstance(net, Reason) or net > 0 else _NO_MORE)
    return found


def _by_counter(samples: Samples, start_s: float, end_s: float) -> float | Reason:
    # When the counter was first seen at each of its values; it is taken to rise evenly in between.
    points: list[tuple[float, float]] = []
    stood_s = 0.0
    for row in samples.rows:
        if row.energy_j is None:
            continue
        if points and row.energy_j < points[-1][1]:
            return Reason(Code.IMPLAUSIBLE, "the energy counter went backwards: the driver was reloaded")
        if not points or row.energy_j != points[-1][1]:
            points.append((row.time_s, row.energy_j))
        elif start_s <= row.time_s <= end_s:
            stood_s = max(stood_s, row.time_s - max(points[-1][0], start_s))
    if not points:
        return samples.reasons.get(Reading.ENERGY, Reason(Code.NOT_TOLD, "the driver has no energy counter"))
    if sum(start_s <= time_s <= end_s for time_s, _ in points) < 2:
        still = Reason(Code.IMPLAUSIBLE, "the energy counter did not move")
        return samples.why_few(Reading.ENERGY, samples.rows) or still
    if stood_s > _LARGEST_GAP_S:
        return Reason(Code.IMPLAUSIBLE, f"the energy counter stood still for {stood_s:.1f} s while steps were taken")
    (first, apart_s), (last, apart_at_end_s) = _at(points, start_s), _at(points, end_s)
    apart_s = max(apart_s, apart_at_end_s)
    if apart_s > _LARGEST_GAP_S:
        text = f"the energy counter was not read for {apart_s:.1f} s at an end of the window"
        return samples.too_few(Reading.ENERGY, text, "no look in time")
    joules = last - first
    if not 0 < joules <= _MOST_W * (end_s - start_s):
        text = f"the energy counter moved by {joules:.4g} J in {end_s - start_s:.1f} s, which no GPU draws"
        return Reason(Code.IMPLAUSIBLE, text)
    return joules


def _at(points: list[tuple[float, float]], time_s: float) -> tuple[float, float]:
    """The counter at a time, and the distance in seconds between the points from which it was interpolated.

    It lies on a straight line through its two neighbours or, at the ends, the two nearest points, which includes the
    energy used since the counter last moved.
    """
    pairs = list(pairwise(points))
    (before_s, before), (after_s, after) = next((pair for pair in pairs if time_s <= pair[1][0]), pairs[-1])
    joules = before + (after - before) * (time_s - before_s) / (after_s - before_s)
    return joules, max(after_s, time_s) - min(before_s, time_s)


def _by_power(samples: Samples) -> float | Reason:
    """Joules of the timed steps, by the trapezoidal rule."""
    rows = samples.timed()
    read = [(row.time_s, row.power_w) for row in rows if row.power_w is not None]
    if len(read) < 2 or rows[0].power_w is None or rows[-1].power_w is None:
        missing = Reason(Code.TOO_FEW_SAMPLES, "the driver gave no power at one of the window's ends")
        return samples.reasons.get(Reading.POWER, missing)
    gap = max(later - earlier for (earlier, _), (later, _) in pairwise(read))
    if gap > _LARGEST_GAP_S:
        return samples.too_few(Reading.POWER, f"power was not read for {gap:.1f} s", "no look in time")
    joules = math.fsum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(read))
    return joules if joules > 0 else _ZERO_POWER


def _idle_power(samples: Samples) -> float | Reason:
    """Mean power right before the worker touched the GPU."""
    end = samples.at("idle")
    if end is None:
        return samples.not_at("idle")
    last = [row for row in samples.rows if end.time_s - _IDLE_S <= row.time_s <= end.time_s]
    read = known(last, "power_w")
    few = samples.why_few(Reading.POWER, last)
    if few is not None:
        return few
    if len(read) < _FEWEST_IDLE_SAMPLES:
        text = f"{len(read)} readings of power before the GPU was touched"
        return samples.reasons.get(Reading.POWER, Reason(Code.TOO_FEW_SAMPLES, text))
    mean = math.fsum(read) / len(read)
    return mean if mean > 0 else _ZERO_POWER
