"""Conditions on a comparison that fail a build."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mpscale.analysis.change import ERROR_RATE, Change
from mpscale.analysis.compare import ComparedRow, Comparison, State
from mpscale.analysis.quantities import COSTS, Cost, Outcome
from mpscale.analysis.stats import holm
from mpscale.analysis.trainings import by_reason, have_no_metric, overflow_unknown, seeds_text
from mpscale.core.case import Place
from mpscale.core.columns import FAILED

WELL, FIRED, COULD_NOT_TELL = 0, 1, 3
"""Exit codes. 2 is bad use."""

_SHARE = r"([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})\s*(%?)"
_MOST = 100.0
"""The largest threshold, 10,000 %: a gate that can never fire is a mistake."""
_LONGEST, _MOST_GATES = 100, 1000
_GATE = re.compile(rf"\s*([a-z_]+)\s*(?:>\s*{_SHARE})?\s*")
_PLAIN = ("metric", "missing")
_RATE = "overflow_rate"


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition.

    Args:
        name: one of :data:`COSTS`, ``metric``, ``missing`` or ``overflow_rate``.
        threshold: for a cost a share of the baseline's value, for ``overflow_rate`` a share of the steps, else None.
    """

    name: str
    threshold: float | None = None

    def __str__(self) -> str:
        if self.threshold is None:
            return self.name
        return f"{self.name}>{self.threshold:g}" if self.name == _RATE else f"{self.name}>{100 * self.threshold:g}%"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a gate found in one row.

    Args:
        gate: the condition.
        row: workload and mode; None if the gate found no row to judge.
        outcome: whether it fired.
        text: the number with its interval and the baseline's number, or why the gate cannot tell.
        baseline: name of the run that was compared with.
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
        return f"{self.gate}: {where}: {self.text} (baseline {self.baseline})"


def parse_gates(texts: Iterable[str]) -> list[Gate]:
    """Parse gates such as ``step_time>5%`` or ``metric``; a text may hold several, separated by commas.

    Raises:
        ValueError: a text is not a gate; the message lists the gates.
    """
    parts = [part for text in texts for part in text.split(",")]
    if len(parts) > _MOST_GATES:
        raise ValueError(f"expected at most {_MOST_GATES} gates, not {len(parts):,}")
    gates = [_parse(part) for part in parts]
    return list(dict.fromkeys(gates))


def parse_share(text: str) -> float:
    """Parse a share such as ``5%``. A number without a unit is refused, as in a gate: 5 could be 5 % or 500 %.

    Raises:
        ValueError: the text is not a percentage above 0.
    """
    match = re.fullmatch(rf"\s*{_SHARE}\s*", text)
    if match is None or not 0 < float(match[1]) <= 100 * _MOST:
        given = text.strip()[:_LONGEST]
        raise ValueError(f"{given!r} is not a percentage above 0 and at most {100 * _MOST:g}%; write one such as 5%")
    if not match[2]:
        raise ValueError(f"{text.strip()!r} has no unit: the threshold is a percentage; write {_percent(match[1])}")
    return float(match[1]) / 100


def _percent(number: str) -> str:
    """Suggest what a number without a unit was meant to be."""
    value = float(number)
    return f"{value:g}%" if value >= 1 else f"{100 * value:g}%, or {value:g}% if you mean that"


def judge_gates(comparison: Comparison, gates: Sequence[Gate]) -> list[Finding]:
    """Judge each row of the baseline by each gate.

    New rows are skipped, except that ``metric`` reports those that lost a training as ``cannot-tell``. To rows whose
    workload has no metric, ``metric`` does not apply, except that it fires if they lost a training.

    A gate on a cost fires if the change reaches its threshold and is significant at 1 %, one-sided, over all rows
    together (Holm). If it does not fire but the 95 % interval reaches the threshold, it cannot tell.
    """
    baseline, run = comparison.baseline.name, comparison.other.name
    found = (finding for gate in gates for finding in _judge(comparison, gate))
    return [replace(finding, baseline=baseline, run=run) for finding in found]


def exit_code(findings: Sequence[Finding], strict: bool = False) -> int:
    """Return 1 if a gate fired, else 3 if one cannot tell (``strict`` makes that 1), else 0."""
    outcomes = {finding.outcome for finding in findings}
    if Outcome.FIRED in outcomes or (strict and Outcome.CANNOT_TELL in outcomes):
        return FIRED
    return COULD_NOT_TELL if Outcome.CANNOT_TELL in outcomes else WELL


def _parse(text: str) -> Gate:
    match = _GATE.fullmatch(text) if len(text) <= _LONGEST else None
    examples = f"{', '.join(f'{name}>5%' for name in COSTS)}, {_RATE}>0.01, {', '.join(_PLAIN)}"
    if match is None:
        raise ValueError(f"{text.strip()[:_LONGEST]!r} is not a gate; the gates are {examples}")
    name, number, percent = match.groups()
    if name not in (*COSTS, *_PLAIN, _RATE):
        close = difflib.get_close_matches(name, (*COSTS, *_PLAIN, _RATE), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name!r} is not a gate{hint}; the gates are {examples}")
    if name in _PLAIN:
        if number is not None:
            raise ValueError(f"{text.strip()!r}: {name} takes no threshold; write {name}")
        return Gate(name)
    if number is None:
        raise ValueError(f"{text.strip()!r} lacks a threshold; write {name}>{'0.01' if name == _RATE else '5%'}")
    threshold = float(number) / 100 if percent else float(number)
    if name in COSTS and not percent:
        raise ValueError(f"{text.strip()!r}: the threshold is a percentage; write {name}>{_percent(number)}")
    if name in COSTS and threshold > _MOST:
        raise ValueError(f"{text.strip()!r}: a threshold is at most {100 * _MOST:g}%: such a gate would never fire")
    if name == _RATE and threshold > 1:
        raise ValueError(f"{text.strip()!r}: a rate is at most 1; write {_RATE}>0.01 or {_RATE}>1%")
    return Gate(name, threshold)


def _judge(comparison: Comparison, gate: Gate) -> list[Finding]:
    rows = [row for row in comparison.rows if _is_judged(row)]
    if gate.name in COSTS:
        return _cost(rows, gate, COSTS[gate.name])
    if gate.name == "metric":
        judged = [row for row in comparison.rows if _is_trained(row)]
        return [_metric(row, gate) for row in judged] or [_nothing(gate, "has a metric")]
    if gate.name == _RATE:
        rated = [row for row in rows if row.overflow_rates != (None, None)]
        return [_overflow_rate(row, gate) for row in rated] or [_nothing(gate, "checks a gradient")]
    return [_missing(row, gate) for row in rows] or [_nothing(gate, "was measured")]


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
        return [_nothing(gate, f"has {cost.column}")]
    changes = [row.changes.get(cost.name) for row in rows]
    p_values = holm([None if change is None else change.p_increase for change in changes])
    judged = zip(rows, changes, p_values, strict=True)
    return [_change(row, gate, cost, change, p_value) for row, change, p_value in judged]


def _should_have(row: ComparedRow, cost: Cost) -> bool:
    """Whether one of the runs has the cost in this row, or would have it if the row had not failed."""
    cases = [*row.pair.baseline, *row.pair.other]
    return any(case[cost.column] is not None or case["status"] in FAILED for case in cases)


def _change(row: ComparedRow, gate: Gate, cost: Cost, change: Change | None, p_value: float | None) -> Finding:
    threshold = gate.threshold or 0.0
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


def _overflow_rate(row: ComparedRow, gate: Gate) -> Finding:
    before, after = row.overflow_rates
    if row.pair.state is not State.PAIRED or after is None:
        return _finding(row, gate, Outcome.CANNOT_TELL, _why_not(row))
    there = "an unknown share" if before is None else f"{before:.4g}"
    text = f"{after:.4g} of the steps overflowed, {there} in the baseline"
    unknown = overflow_unknown(row.pair.other, row.pair.not_started[1])
    if unknown:
        text += f"; unknown for {by_reason(unknown)}"
    if after > (gate.threshold or 0.0):
        return _finding(row, gate, Outcome.FIRED, text)
    return _finding(row, gate, Outcome.CANNOT_TELL if unknown else Outcome.PASSED, text)


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
    return Finding(gate, None, Outcome.CANNOT_TELL, f"no row of the baseline {what}")


def _why_not(row: ComparedRow) -> str:
    if row.pair.state is State.PAIRED:
        return row.pair.reason or "unknown for the run"
    return f"{row.pair.state}: {row.pair.reason}"
