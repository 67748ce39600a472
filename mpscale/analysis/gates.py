"""Conditions that fail a build: on a comparison with a baseline, or on the figures of a run alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from mpscale.analysis.change import ERROR_RATE, Change
from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.gate import METRIC, MISSING, Gate, parse_gates, parse_share
from mpscale.analysis.limits import RunRow, judge_limit, rows_of
from mpscale.analysis.pairs import State
from mpscale.analysis.quantities import COSTS, Cost, Outcome
from mpscale.analysis.stats import holm
from mpscale.analysis.trainings import by_reason, have_no_metric, seeds_text
from mpscale.core.case import Place
from mpscale.core.columns import FAILED
from mpscale.core.runs import Run

__all__ = ["Finding", "Gate", "exit_code", "judge_alone", "judge_gates", "parse_gates", "parse_share"]

WELL, FIRED, COULD_NOT_TELL = 0, 1, 3
"""Exit codes. 2 is bad use."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a gate found in one row.

    Args:
        gate: the condition.
        row: workload and mode; None if the gate found no row to judge.
        outcome: whether it fired.
        text: the number with its interval and the baseline's number, or why the gate cannot tell.
        baseline: name of the run that was compared with; empty if the gate needs none.
        run: name of the run that was judged.
    """

    gate: Gate
    row: Place | None
    outcome: Outcome
    text: str
    baseline: str = ""
    run: str = ""

    def __str__(self) -> str:
        where = " ".join(self.row) if self.row else "no row"
        against = f" (baseline {self.baseline})" if self.baseline else ""
        return f"{self.gate}: {where}: {self.text}{against}"


def judge_gates(
    comparison: Comparison, gates: Sequence[Gate], anew: Mapping[Place, int] = MappingProxyType({})
) -> list[Finding]:
    """Judge the rows that each gate covers: a change in those of the baseline, a limit in those of the run.

    By a change, new rows are skipped, except that ``metric`` reports those that lost a training as ``cannot-tell``. To
    rows whose workload has no metric, ``metric`` does not apply, except that it fires if they lost a training.

    A gate on the change of a cost fires if the change reaches its threshold and is significant at 1 %, one-sided, over
    all rows together (Holm). If it does not fire but the 95 % interval reaches the threshold, it cannot tell. Limits:
    :func:`mpscale.analysis.limits.judge_limit`.

    Args:
        comparison: of a run with its baseline.
        gates: the conditions.
        anew: rows that were measured again, see :func:`mpscale.analysis.compare.compare`.
    """
    baseline, run = comparison.baseline.name, comparison.other.name
    changed = {row.pair.place for row in comparison.rows if row.pair.versions}
    own = rows_of(comparison.other, anew)
    gone = [row for row in comparison.rows if not row.pair.other and _is_judged(row)]
    before = {row.pair.place: _rate_before(row) for row in comparison.rows}
    found = []
    for gate in gates:
        if gate.needs_baseline:
            found += [replace(each, baseline=baseline) for each in _judge(comparison, gate)]
        else:
            found += _judge_alone(own, gate, before, gone)
    return [replace(each, run=run, text=_beside(each, changed)) for each in found]


def judge_alone(run: Run, gates: Sequence[Gate], anew: Mapping[Place, int] = MappingProxyType({})) -> list[Finding]:
    """Judge the figures of a run by the gates that need no baseline; see :func:`judge_gates`."""
    rows = rows_of(run, anew)
    found = [each for gate in gates if not gate.needs_baseline for each in _judge_alone(rows, gate)]
    return [replace(each, run=run.name) for each in found]


def exit_code(findings: Sequence[Finding], strict: bool = False) -> int:
    """Return 1 if a gate fired, else 3 if one cannot tell (``strict`` makes that 1), else 0."""
    outcomes = {finding.outcome for finding in findings}
    if Outcome.FIRED in outcomes or (strict and Outcome.CANNOT_TELL in outcomes):
        return FIRED
    return COULD_NOT_TELL if Outcome.CANNOT_TELL in outcomes else WELL


def _judge_alone(
    rows: Sequence[RunRow],
    gate: Gate,
    overflow_before: Mapping[Place, str] = MappingProxyType({}),
    gone: Sequence[ComparedRow] = (),
) -> list[Finding]:
    judged = judge_limit([row for row in rows if gate.covers(row.place)], gate, overflow_before)
    found = [Finding(gate, place, outcome, text) for place, outcome, text in judged]
    there = {row.place for row in rows}
    for row in gone:
        had = judge_limit([RunRow(row.pair.place, row.pair.baseline)], gate)
        if had and gate.covers(row.pair.place) and row.pair.place not in there:
            found.append(_finding(row, gate, Outcome.CANNOT_TELL, _why_not(row)))
    if all(one.outcome is Outcome.NOT_APPLICABLE for one in found):
        # A limit to which nothing is held has not passed.
        found.append(_nothing(gate, "of the run has such a figure"))
    return found


def _rate_before(row: ComparedRow) -> str:
    before = row.overflow_rates[0]
    return f", {'an unknown share' if before is None else f'{before:.4g}'} in the baseline"


def _beside(finding: Finding, changed: Collection[Place]) -> str:
    """The text of a finding; it says if the model changed, so that nobody takes that for a change of the software."""
    told = finding.row in changed and finding.gate.name != MISSING
    return f"{finding.text}; the model changed" if told else finding.text


def _judge(comparison: Comparison, gate: Gate) -> list[Finding]:
    covered = [row for row in comparison.rows if gate.covers(row.pair.place)]
    rows = [row for row in covered if _is_judged(row)]
    if gate.name in COSTS:
        return _cost(rows, gate, COSTS[gate.name])
    if gate.name == METRIC:
        judged = [row for row in covered if _is_trained(row)]
        return [_metric(row, gate) for row in judged] or [_nothing(gate, "of the baseline has a metric")]
    return [_missing(row, gate) for row in rows] or [_nothing(gate, "of the baseline was measured")]


def _is_judged(row: ComparedRow) -> bool:
    """Whether the baseline has the row: it was measured, or should have been and failed."""
    return row.pair.state is not State.NEW or any(case["status"] in FAILED for case in row.pair.baseline)


def _is_trained(row: ComparedRow) -> bool:
    """Whether one of the runs trains the row; a row that is new counts only if it lost a training."""
    before, after = row.pair.seeds
    return bool(before.seeds or after.seeds) if _is_judged(row) else bool(after.lost)


def _cost(rows: Sequence[ComparedRow], gate: Gate, cost: Cost) -> list[Finding]:
    rows = [row for row in rows if _should_have(row, cost)]
    if not rows:
        return [_nothing(gate, f"of the baseline has {cost.column}")]
    changes = [row.changes.get(cost.name) for row in rows]
    p_values = holm([None if change is None else change.p_increase for change in changes])
    judged = zip(rows, changes, p_values, strict=True)
    return [_change(row, gate, cost, change, p_value) for row, change, p_value in judged]


def _should_have(row: ComparedRow, cost: Cost) -> bool:
    """Whether one of the runs has the cost in this row, or would have it if the row had not failed."""
    cases = [*row.pair.baseline, *row.pair.other]
    return any(case[cost.column] is not None or case["status"] in FAILED for case in cases)


def _change(row: ComparedRow, gate: Gate, cost: Cost, change: Change | None, p_value: float | None) -> Finding:
    threshold = gate.threshold
    if change is None:
        return _finding(row, gate, Outcome.CANNOT_TELL, _why_not(row))
    if change.change is None:
        return _finding(row, gate, Outcome.CANNOT_TELL, str(change.reason))
    numbers = (
        f"{change.change:+.1%} ({change.baseline:.4g} to {change.other:.4g} {cost.unit}, "
        f"{change.processes[0]} and {change.processes[1]} processes)"
    )
    if p_value is None or change.low is None or change.high is None:
        return _finding(row, gate, Outcome.CANNOT_TELL, f"{numbers}: {change.reason}")
    numbers = f"{numbers}, 95 % interval {change.low:+.1%} to {change.high:+.1%}, p = {p_value:.2g} over all rows"
    if change.change >= threshold and p_value <= ERROR_RATE:
        return _finding(row, gate, Outcome.FIRED, numbers)
    if change.high >= threshold:
        seen = f"; a change of {change.detectable:.1%} would have been detected" if change.detectable else ""
        return _finding(row, gate, Outcome.CANNOT_TELL, numbers + seen)
    if change.left_out:
        # A process that timed out or ran out of memory did not do well.
        return _finding(row, gate, Outcome.CANNOT_TELL, f"{numbers}; {change.left_out}")
    return _finding(row, gate, Outcome.PASSED, numbers)


def _metric(row: ComparedRow, gate: Gate) -> Finding:
    quality = row.quality
    if quality is None and have_no_metric((*row.pair.baseline, *row.pair.other)):
        return _finding(row, gate, Outcome.NOT_APPLICABLE, "the workload has no metric")
    if row.pair.state is not State.PAIRED or quality is None:
        lost = row.pair.seeds[1].lost
        return _finding(row, gate, Outcome.CANNOT_TELL, _why_not(row) + (f"; {by_reason(lost)}" if lost else ""))
    found = quality.difference
    text = quality.why
    if found is not None:
        ends = "" if found.low is None else f" (90 % interval {found.low:+.4g} to {found.high:+.4g})"
        text = f"{found.mean:+.4g}{ends} over {found.n} seed{'' if found.n == 1 else 's'}{text and f': {text}'}"
    if quality.seeds is not None:
        text += f"; {quality.seeds} seeds would decide"
    return _finding(row, gate, quality.verdict.outcome, f"{quality.verdict}: {text}")


def _missing(row: ComparedRow, gate: Gate) -> Finding:
    if row.pair.state is State.NEW:
        return _finding(row, gate, Outcome.PASSED, _why_not(row))
    if row.pair.state is not State.PAIRED:
        return _finding(row, gate, Outcome.FIRED, _why_not(row))
    failed = row.pair.newly_failed
    if failed:
        return _finding(row, gate, Outcome.FIRED, f"failed here but not in the baseline: {', '.join(failed)}")
    number = len(row.pair.other)
    text = row.pair.reason or f"{number} case{'' if number == 1 else 's'}"
    before, after = row.pair.seeds
    fewer = sorted(before.seeds - after.seeds)
    if fewer:
        why = "were not planned" if after.plan_known else "have no row and may not have been planned"
        text += f"; the baseline's {seeds_text(fewer)} {why}"
    return _finding(row, gate, Outcome.CANNOT_TELL if fewer and not after.plan_known else Outcome.PASSED, text)


def _finding(row: ComparedRow, gate: Gate, outcome: Outcome, text: str) -> Finding:
    return Finding(gate, (row.pair.workload, row.pair.mode), outcome, text)


def _nothing(gate: Gate, what: str) -> Finding:
    return Finding(gate, None, Outcome.CANNOT_TELL, f"no row{f' that fits {gate.rows}' if gate.rows else ''} {what}")


def _why_not(row: ComparedRow) -> str:
    if row.pair.state is State.PAIRED:
        return row.pair.reason or "unknown for the run"
    return f"{row.pair.state}: {row.pair.reason}"
