"""What two runs are compared by, and the verdict on each: step time, memory, energy."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mpscale.analysis.stats import Between, Interval, geometric_interval, holm, log_change, paired_log_change
from mpscale.analysis.summary import ENERGY_IS_OF, MEMORY_IS_OF, figures_of, overflow_rate, overflow_unknown
from mpscale.core.record import Record
from mpscale.core.trainings import MEASURED, Key, by_reason, of_good_trainings, trainings, without_figure

CONFIDENCE = 0.95
"""Of the intervals that are shown."""

ERROR_RATE = 0.01
"""How often a comparison of runs that do not differ may give a verdict on any of its rows, by chance."""

SINGLE_RUN = "single-run baseline"
"""One of which it is not known how much runs of its code differ."""

SAME = "same"
CANNOT_TELL = "cannot-tell"


@dataclass(frozen=True, slots=True)
class Quantity:
    """A figure of which less is better, one a process.

    Args:
        name: as gates have it.
        column: of cases.csv.
        unit: of the column.
        threshold: change from which on it matters, as a share, where nobody said otherwise.
        more: verdict where there is more of it.
        less: verdict where there is less.
        of_trainings: made from processes that trained alone: one that only times holds less in memory.
        drifts: moves with the state of the machine, which is another one in every run.
        is_of: columns that say what the figure is of; figures that differ in one of them are not compared.
    """

    name: str
    column: str
    unit: str
    threshold: float
    more: str = "more"
    less: str = "less"
    of_trainings: bool = True
    drifts: bool = False
    is_of: tuple[str, ...] = ()


QUANTITIES = {
    quantity.name: quantity
    for quantity in (
        Quantity("step_time", "step_time_ms_median", "ms", 0.05, "slower", "faster", of_trainings=False, drifts=True),
        Quantity("gpu_memory", "gpu_memory_nvml_peak_mib", "MiB", 0.03, is_of=MEMORY_IS_OF),
        Quantity("energy", "gpu_energy_j_per_step", "J", 0.10, of_trainings=False, drifts=True, is_of=ENERGY_IS_OF),
        Quantity("host_memory", "host_memory_peak_mib", "MiB", 0.20),
    )
}


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity of one row, in two runs.

    Args:
        quantity: its name.
        baseline: geometric mean over the baseline's processes, in the quantity's unit; None where there is none.
        other: likewise of the other run.
        change: other / baseline - 1.
        low: lower end of its 95 % interval, None where one process gives no spread.
        high: upper end, likewise.
        detectable: smallest change that would have got a verdict in four of five such comparisons.
        p_increase: how likely an increase like this is by chance.
        processes: of the baseline, and of the other run.
        noise_floor: by how much two runs of the same code differ at most in 19 of 20 cases, as a share; None where no
            run comes between, since processes took turns, or where moments make no difference.
        floor_runs: from how many runs that is known; 0 where it is assumed, for a single-run baseline.
        verdict: more, less (as the quantity has it), ``same``, ``cannot-tell``, or ``not-comparable``.
        reason: why it cannot be told.
        missing: processes without a figure, of the baseline and of the other run, and why; empty where all have one.
    """

    quantity: str
    baseline: float | None
    other: float | None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    p_increase: float | None = None
    processes: tuple[int, int] = (0, 0)
    noise_floor: float | None = None
    floor_runs: int | None = None
    verdict: str = CANNOT_TELL
    reason: str | None = None
    missing: tuple[str, str] = ("", "")

    @property
    def left_out(self) -> str:
        """What both sides lack, in words; empty where they lack nothing."""
        sides = zip(self.missing, self.processes, (" in the baseline", ""), strict=True)
        return "; ".join(
            f"{has} process{'' if has == 1 else 'es'}{where} {'has' if has == 1 else 'have'} a figure, not {lack}"
            for lack, has, where in sides
            if lack
        )


def figures(cases: Iterable[Record], quantity: Quantity) -> list[float]:
    """The quantity of every process that counts.

    Seeds that diverged or stalled are left out, their repeats too: their steps are not those of a training that works.
    """
    return list(by_process(cases, quantity).values())


def by_process(cases: Iterable[Record], quantity: Quantity) -> dict[tuple[int, int], float]:
    """The same by seed and repeat."""
    return {
        (case["seed"], case["repeat"]): case[quantity.column]
        for case in of_good_trainings(cases)
        if case[quantity.column] is not None and (case["repeat"] == 0 or not quantity.of_trainings)
    }


def measure_change(
    baseline: Sequence[Record],
    other: Sequence[Record],
    quantity: Quantity,
    tries: int = 1,
    between: Between | None = None,
    pairs: tuple[float, float] | None = None,
    not_started: tuple[Sequence[Key], Sequence[Key]] = ((), ()),
) -> Change | None:
    """How ``quantity`` changed, without a verdict yet; None where neither side has it.

    Args:
        baseline: cases of one row.
        other: cases of the same row in the other run.
        quantity: what is compared.
        tries: rows that will be judged together, for what each of them could show.
        between: how much runs of the same code differ.
        pairs: variance of the logarithms of pairs, with its degrees of freedom, where the processes of both ran in
            turns, so that those of one seed and repeat are a pair.
        not_started: processes of both that were planned and have no case.
    """
    sides = [by_process(cases, quantity) for cases in (baseline, other)]
    before, after = (list(side.values()) for side in sides)
    if not before and not after:
        return None
    means = Change(
        quantity.name,
        statistics.geometric_mean(before) if before else None,
        statistics.geometric_mean(after) if after else None,
        processes=(len(before), len(after)),
        missing=(
            by_reason(without_figure(baseline, quantity.column, not_started[0], quantity.of_trainings)),
            by_reason(without_figure(other, quantity.column, not_started[1], quantity.of_trainings)),
        ),
    )
    if not before or not after:
        cases = other if before else baseline
        why = next((reason for case in cases if (reason := _reason(case, quantity.column))), "no case has it")
        side = "the run" if before else "the baseline"
        return replace(means, reason=f"not known of {side}: {why}")
    kinds = {kind for cases in (baseline, other) for kind in _kinds(cases, quantity)}
    if len(kinds) > 1:
        said = " and ".join(sorted(", ".join(str(value or "unknown") for value in kind) for kind in kinds))
        return replace(means, reason=f"figures of different things ({' and '.join(quantity.is_of)}: {said})")
    if pairs is None:
        found = log_change(before, after, between)
    else:
        found = paired_log_change(sides[0], sides[1], *pairs)
    interval = found.interval(CONFIDENCE)
    reason = None if interval else "one process gives no spread: measure at least two on each side"
    floor = between if pairs is None else None
    low, high = interval or (None, None)
    return replace(
        means,
        change=found.change,
        low=low,
        high=high,
        detectable=found.detectable(1 - ERROR_RATE / tries),
        p_increase=found.p_increase(),
        noise_floor=None if floor is None else floor.limit,
        floor_runs=None if floor is None else floor.runs,
        reason=reason,
    )


def with_verdicts(changes: Sequence[Change], threshold: float | None = None) -> list[Change]:
    """The same changes with verdicts, found together: chance has as many tries as there are rows.

    More (or less): the change is at least the threshold, and told from none at 1 % over all rows together, by Holm's
    adjustment. Same: the whole interval lies within the threshold either way. Else it cannot be told. Nor can it where
    nothing speaks against less or same but a process without a figure: the one that timed out was the slowest.

    Args:
        changes: of one quantity.
        threshold: change from which on it matters, as a share; the quantity's own where there is none.
    """
    told = [(place, p) for place, change in enumerate(changes) if (p := change.p_increase) is not None]
    adjusted = dict(zip([place for place, _ in told], holm([2 * min(p, 1 - p) for _, p in told]), strict=True))
    return [_judged(change, adjusted.get(place), threshold) for place, change in enumerate(changes)]


def _judged(change: Change, p_value: float | None, threshold: float | None) -> Change:
    quantity = QUANTITIES[change.quantity]
    above = quantity.threshold if threshold is None else threshold
    below = 1 / (1 + above) - 1
    if p_value is None or change.change is None or change.low is None or change.high is None:
        return change
    told = p_value <= ERROR_RATE and not below < change.change < above
    if told and change.change > 0:
        return replace(change, verdict=quantity.more)
    if told or (below < change.low and change.high < above):
        if change.left_out:
            return replace(change, reason=change.left_out)
        return replace(change, verdict=quantity.less if told else SAME)
    single = f"; {SINGLE_RUN}" if change.floor_runs == 0 else ""
    return replace(change, reason=f"too noisy for {above:.0%}{single}")


def _kinds(cases: Sequence[Record], quantity: Quantity) -> set[tuple[Any, ...]]:
    """What the figures of the processes that count are of."""
    counted = by_process(cases, quantity)
    own = [case for case in of_good_trainings(cases) if (case["seed"], case["repeat"]) in counted]
    return figures_of(own, quantity.column, quantity.is_of)


def _reason(case: Record, column: str) -> str | None:
    reason = case.unavailable.get(column)
    return None if reason is None else str(reason)


# What runs can be followed by over time, and how each is made from the cases of a run.

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


def sample_of(measure: Measure, cases: Sequence[Record], baseline: Sequence[Record]) -> list[float]:
    """One value a process, a pair of processes, or a seed."""
    if measure.name in QUANTITIES:
        return figures(cases, QUANTITIES[measure.name])
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


def estimate(measure: Measure, sample: list[float], cases: Sequence[Record]) -> Interval:
    if measure.spread == "interval":
        return geometric_interval(sample)
    mean = statistics.fmean(sample)
    if measure.name == "overflow_rate":
        rate = overflow_rate(cases)
        mean = mean if rate is None else rate
    low, high = (min(sample), max(sample)) if len(sample) > 1 else (None, None)
    return Interval(mean, low, high, len(sample))


def left_out(
    measure: Measure, cases: Sequence[Record], baseline: Sequence[Record], not_started: Sequence[Key] = ()
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


def lost_or_without(cases: Sequence[Record], column: str) -> tuple[str, str]:
    """Seeds that were lost, and processes without a figure, in words; empty where there are none."""
    return by_reason(trainings(cases).lost), by_reason(without_figure(cases, column))


def why_unknown(measure: Measure, cases: Sequence[Record], baseline: Sequence[Record]) -> str:
    for case in cases:
        reason = case.unavailable.get(measure.column)
        if case["status"] in MEASURED and reason:
            return str(reason)
    if why := failure(cases):
        return why
    if measure.name == "speedup":
        why = failure(baseline)
        return f"{BASELINE}: {why}" if why else f"no {BASELINE} beside it"
    return "no case has it"


def failure(cases: Sequence[Record], leave_out: Sequence[str] = ()) -> str | None:
    found = [case for case in cases if case["status"] not in ("ok", *leave_out)]
    return next((f"{case['status']}: {case['status_reason'] or 'no reason was given'}" for case in found), None)
