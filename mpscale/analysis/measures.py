"""What runs can be followed by over time, and how each is made from the cases of a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mpscale.analysis.quantities import QUANTITIES, values
from mpscale.analysis.stats import Interval, geometric_interval
from mpscale.analysis.summary import overflow_rate, overflow_unknown
from mpscale.analysis.trainings import (
    MEASURED,
    Key,
    Row,
    by_reason,
    of_good_trainings,
    trainings,
    without_figure,
)

BASELINE = "fp32"
"""Of speed-ups."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a history is of.

    Args:
        name: as the command line has it.
        title: in words.
        unit: of its values; empty for a share of 1, and for a metric, which has its own.
        column: of cases.csv; its entry in ``unavailable`` says why there is none.
        spread: what ``low`` and ``high`` of a point are: the 95 % t interval over processes on logarithms, or the
            smallest and the largest seed.
    """

    name: str
    title: str
    unit: str
    column: str
    spread: Literal["interval", "range"] = "interval"


def _compared(name: str, title: str) -> Measure:
    return Measure(name, title, QUANTITIES[name].unit, QUANTITIES[name].column)


MEASURES = {
    measure.name: measure
    for measure in (
        _compared("step_time", "step time"),
        _compared("gpu_memory", "GPU memory"),
        _compared("energy", "energy a step"),
        _compared("host_memory", "host memory"),
        Measure("metric", "final metric", "", "metric_value", "range"),
        Measure("overflow_rate", "overflow rate", "", "overflow_steps", "range"),
        # Always over the same baseline: a headline that changes from fp32 to tf32 would look like a loss.
        Measure("speedup", f"speed-up over {BASELINE}", "x", "step_time_ms_median"),
    )
}


def sample_of(measure: Measure, cases: Sequence[Row], baseline: Sequence[Row]) -> list[float]:
    """One value a process, a pair of processes, or a seed."""
    if measure.name in QUANTITIES:
        return values(cases, QUANTITIES[measure.name])
    if measure.name == "metric":
        return list(trainings(cases).metric.values())
    if measure.name == "overflow_rate":
        return [rate for case in cases if (rate := overflow_rate([case])) is not None]
    # As the summary pairs them, so that both give the same speed-up.
    own, other = (
        {(case["seed"], case["repeat"]): case[measure.column] for case in side if case[measure.column] is not None}
        for side in (of_good_trainings(cases), of_good_trainings(baseline))
    )
    return [other[key] / own[key] for key in own if key in other]


def estimate(measure: Measure, sample: list[float], cases: Sequence[Row]) -> Interval:
    if measure.spread == "interval":
        return geometric_interval(sample)
    mean = statistics.fmean(sample)
    if measure.name == "overflow_rate":
        rate = overflow_rate(cases)
        mean = mean if rate is None else rate
    low, high = (min(sample), max(sample)) if len(sample) > 1 else (None, None)
    return Interval(mean, low, high, len(sample))


def left_out(
    measure: Measure, cases: Sequence[Row], baseline: Sequence[Row], not_started: Sequence[Key] = ()
) -> str | None:
    """Which seeds or processes should be in the value and are not, and why; None where all are in.

    Args:
        measure: of what.
        cases: of one workload and mode.
        baseline: those of :data:`BASELINE`.
        not_started: processes that were planned and have no case.
    """
    if measure.name == "overflow_rate":
        return by_reason(overflow_unknown(cases, not_started)) or None
    seeds = trainings(cases, not_started)
    # A lost training has no cost that counts, and a metric that does.
    lacking = [by_reason({**seeds.lost, **({} if measure.name != "metric" else seeds.unknown)})]
    if measure.name != "metric":
        only_trained = measure.name in QUANTITIES and QUANTITIES[measure.name].of_trainings
        lacking.append(by_reason(without_figure(cases, measure.column, not_started, only_trained)))
    if measure.name == "speedup":
        lacking += [f"{BASELINE}'s {text}" for text in lost_or_without(baseline, measure.column) if text]
    return "; ".join(filter(None, lacking)) or None


def lost_or_without(cases: Sequence[Row], column: str) -> tuple[str, str]:
    """Seeds that were lost, and processes without a figure, in words; empty where there are none."""
    return by_reason(trainings(cases).lost), by_reason(without_figure(cases, column))


def why_unknown(measure: Measure, cases: Sequence[Row], baseline: Sequence[Row]) -> str:
    for case in cases:
        reasons = case["unavailable"]
        if case["status"] in MEASURED and isinstance(reasons, dict) and reasons.get(measure.column):
            return str(reasons[measure.column])
    if why := failure(cases):
        return why
    if measure.name == "speedup":
        why = failure(baseline)
        return f"{BASELINE}: {why}" if why else f"no {BASELINE} beside it"
    return "no case has it"


def failure(cases: Sequence[Row], leave_out: Sequence[str] = ()) -> str | None:
    found = [case for case in cases if case["status"] not in ("ok", *leave_out)]
    return next((f"{case['status']}: {case['status_reason'] or 'no reason was given'}" for case in found), None)
