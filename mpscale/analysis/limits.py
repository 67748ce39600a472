"""Gates on the figures of a run alone, such as ``step_time<=12ms`` or ``speedup>=1.5``: they need no baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mpscale.analysis.compare import since
from mpscale.analysis.gate import ACCURACY, METRIC, RATE, SPEEDUP, Gate
from mpscale.analysis.quantities import BASELINE, COSTS, QUANTITIES, Cost, Outcome, Speedup, failure, why_unknown
from mpscale.analysis.stats import Interval, geometric_interval, paired_difference
from mpscale.analysis.trainings import (
    NO_SUCH_ROW,
    by_reason,
    have_no_metric,
    overflow_rate,
    overflow_unknown,
    trainings,
    without_figure,
)
from mpscale.core.case import Place
from mpscale.core.columns import FAILED
from mpscale.core.mode import MODES
from mpscale.core.record import Key, Record, common, grouped, of_good_trainings
from mpscale.core.runs import Run

Judged = tuple[Place, Outcome, str]
"""A row, what became of it, and the figure with its interval, or why it is unknown."""


@dataclass(frozen=True, slots=True)
class RunRow:
    """A row of one run.

    Args:
        place: workload and mode.
        cases: of the row.
        baseline: those of fp32 of the same workload and batch.
        not_started: processes that were planned but not started.
        first: first repeat whose times count, if the row was measured again.
    """

    place: Place
    cases: Sequence[Record]
    baseline: Sequence[Record] = ()
    not_started: Sequence[Key] = ()
    first: int = 0

    @property
    def lacks(self) -> bool:
        """Whether a case failed or was never started, so that a figure may be missing."""
        return bool(self.not_started) or any(case["status"] in FAILED for case in self.cases)


def rows_of(run: Run, anew: Mapping[Place, int] = MappingProxyType({})) -> list[RunRow]:
    """The rows of a run, also those of which no case was started.

    Args:
        run: the run.
        anew: rows that were measured again, see :func:`mpscale.analysis.compare.compare`.
    """
    table = grouped(run.records)
    return [
        RunRow(
            place,
            table.get(place, ()),
            table.get((place[0], BASELINE), ()),
            run.waiting.get(place, ()),
            anew.get(place, 0),
        )
        for place in dict.fromkeys([*table, *run.waiting])
    ]


def judge_limit(
    rows: Sequence[RunRow], gate: Gate, overflow_before: Mapping[Place, str] = MappingProxyType({})
) -> list[Judged]:
    """Judge each row by a limit; empty if no row has the quantity or should have it.

    If there is an interval, it decides: the gate fires if all of it is beyond the limit, passes if none of it is, and
    else cannot tell. Without an interval, as of a single process, the figure itself decides. A figure that is unknown,
    or that lacks processes or seeds which might have been worse, never passes.

    Args:
        rows: that the gate covers.
        gate: one that needs no baseline.
        overflow_before: what to add to the overflow rate of a row.
    """
    if gate.name in COSTS:
        found = [_cost(row, gate, COSTS[gate.name]) for row in rows if _should_have(row, COSTS[gate.name].column)]
    elif gate.name == SPEEDUP:
        timed = [row for row in rows if row.place[1] != BASELINE and _should_have(row, "step_time_ms_median")]
        found = [_speedup(row, gate) for row in timed]
    elif gate.name == RATE:
        found = [
            _overflow_rate(row, gate, overflow_before.get(row.place, ""))
            for row in rows
            if overflow_rate(row.cases) is not None or (row.lacks and _checks_gradients(row))
        ]
    else:
        found = list(_metric(rows, gate))
    return found


def _should_have(row: RunRow, column: str) -> bool:
    """Whether a row has a figure, or would have it if nothing had failed."""
    return row.lacks or any(case[column] is not None for case in row.cases)


def _checks_gradients(row: RunRow) -> bool:
    mode = MODES.get(row.place[1].partition(" @")[0])
    return mode is None or mode.sees_overflow


def _cost(row: RunRow, gate: Gate, cost: Cost) -> Judged:
    cases = since(row.cases, row.first, cost)
    values = cost.sample(cases)
    if not values:
        return row.place, Outcome.CANNOT_TELL, _unknown(row, cost.name)
    if len(kinds := cost.kinds(of_good_trainings(cases))) > 1:
        said = " and ".join(sorted(", ".join(str(value or "unknown") for value in kind) for kind in kinds))
        return row.place, Outcome.CANNOT_TELL, f"figures of different things ({' and '.join(cost.is_of)}: {said})"
    # A peak does not vary by chance as times do: the largest is what a GPU must have, and what reports show.
    found = geometric_interval(values) if cost.drifts else Interval(max(values), None, None, len(values))
    without = by_reason(without_figure(cases, cost.column, row.not_started, cost.of_trainings))
    what = "processes" if cost.drifts or len(values) == 1 else "processes, the largest"
    return _judged(row, gate, found, cost.unit, what, False, without)


def _speedup(row: RunRow, gate: Gate) -> Judged:
    quantity = QUANTITIES[SPEEDUP]
    assert isinstance(quantity, Speedup)
    values = quantity.sample(row.cases, row.baseline)
    if not values:
        return row.place, Outcome.CANNOT_TELL, _unknown(row, SPEEDUP)
    found = geometric_interval(values)
    without = [by_reason(without_figure(row.cases, quantity.column, row.not_started))]
    without += [f"{BASELINE}'s {text}" for text in [by_reason(without_figure(row.baseline, quantity.column))] if text]
    doubts = quantity.doubts(row.cases, row.baseline)
    lacking = "; ".join(filter(None, [*without, doubts]))
    place, outcome, text = _judged(row, gate, found, "x", "pairs", True, lacking)
    # A ratio that is no claim about the mode neither passes nor fires.
    return place, Outcome.CANNOT_TELL if doubts else outcome, text


def _metric(rows: Sequence[RunRow], gate: Gate) -> Iterator[Judged]:
    """The metric over seeds. A lost seed is a bad result, as in every verdict on a metric."""
    rows = [row for row in rows if trainings(row.cases, row.not_started).seeds]
    directions = {common(row.cases, "metric_higher_is_better") for row in rows} - {None}
    for row in rows:
        name, higher = (common(row.cases, column) for column in ("metric_name", "metric_higher_is_better"))
        seeds = trainings(row.cases, row.not_started)
        lost = by_reason(seeds.lost)
        if have_no_metric(row.cases) or (gate.name == ACCURACY and name not in (None, ACCURACY)):
            yield row.place, Outcome.NOT_APPLICABLE, f"the workload has no {gate.name}"
            continue
        if lost:
            yield row.place, Outcome.FIRED, f"a training was lost: {lost}"
            continue
        values = list(seeds.metric.values())
        if not values or higher is None:
            why = _unknown(row, METRIC) if not values else "it is not known whether a higher metric is better"
            yield row.place, Outcome.CANNOT_TELL, why
            continue
        if gate.name == METRIC and len(directions) > 1:
            # `metric>=0.95` asks for an accuracy; what it says about an error, nobody knows.
            why = (
                f"for some workloads a higher metric is better, for others a lower one; write {METRIC}[{row.place[0]}]"
            )
            yield row.place, Outcome.CANNOT_TELL, why
            continue
        mean = paired_difference(values, 0.95)
        found = Interval(mean.mean, mean.low, mean.high, mean.n)
        place, outcome, text = _judged(row, gate, found, "", "seeds", bool(higher), by_reason(seeds.unknown))
        yield place, outcome, f"{name} {text}" if gate.name == METRIC and name else text


def _overflow_rate(row: RunRow, gate: Gate, before: str) -> Judged:
    rate = overflow_rate(row.cases)
    if rate is None:
        return row.place, Outcome.CANNOT_TELL, _unknown(row, RATE)
    text = f"{rate:.4g} of the steps overflowed{before}"
    unknown = overflow_unknown(row.cases, row.not_started)
    if unknown:
        text += f"; unknown for {by_reason(unknown)}"
    if not gate.holds(rate, higher_is_better=False):
        return row.place, Outcome.FIRED, text
    return row.place, Outcome.CANNOT_TELL if unknown else Outcome.PASSED, text


def _judged(
    row: RunRow, gate: Gate, found: Interval, unit: str, what: str, higher_is_better: bool, lacking: str
) -> Judged:
    """Place a figure and its interval against the limit.

    Args:
        row: the row.
        gate: has the limit.
        found: the figure.
        unit: of the figure.
        what: what it is over, in the plural.
        higher_is_better: which direction is worse.
        lacking: what is missing from the figure; empty if nothing is.
    """
    ends = "" if found.low is None or found.high is None else f", 95 % interval {found.low:.4g} to {found.high:.4g}"
    space = "" if unit in ("", "x") else " "
    over = {"processes": "process", "pairs": "pair", "seeds": "seed"}.get(what, what) if found.n == 1 else what
    text = f"{found.estimate:.4g}{space}{unit} ({found.n} {over}{ends})"
    low, high = (found.estimate if end is None else end for end in (found.low, found.high))
    worst, best = (low, high) if higher_is_better else (high, low)
    lacks = f"; {lacking}" if lacking else ""
    if not gate.holds(best, higher_is_better):
        return row.place, Outcome.FIRED, text + lacks
    if not gate.holds(worst, higher_is_better):
        return (
            row.place,
            Outcome.CANNOT_TELL,
            f"{text}: the limit is in the interval, and more {what} would narrow it{lacks}",
        )
    return row.place, Outcome.CANNOT_TELL if lacking else Outcome.PASSED, text + lacks


def _unknown(row: RunRow, quantity: str) -> str:
    if not row.cases:
        return by_reason(dict.fromkeys(row.not_started, "planned, but not started")) or NO_SUCH_ROW
    found = why_unknown(QUANTITIES[quantity], row.cases, row.baseline)
    return f"unknown: {failure(row.cases) or found}"
