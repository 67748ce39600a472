"""A comparison of runs for programs: the lines of the CSV, and what the JSON holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from mpscale.analysis.change import Change
from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.gates import Finding
from mpscale.analysis.quantities import COSTS

COLUMNS = (
    "baseline_run", "run", "workload", "mode", "state", "state_reason", "quantity", "unit", "baseline", "value",
    "change", "low", "high", "noise_floor", "floor_runs", "detectable", "verdict", "verdict_reason", "model_changes",
)  # fmt: skip
"""Columns of the CSV."""


def why(found: Change) -> str:
    """Return the reason for a verdict and what was left out, or one of them if they are the same."""
    return "; ".join(dict.fromkeys(filter(None, (found.reason, found.left_out))))


def lines(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield the lines of the CSV: one per quantity of a row, or a single one for a row that is not compared."""
    for row in comparison.rows:
        where = {
            "baseline_run": comparison.baseline.name,
            "run": comparison.other.name,
            "workload": row.pair.workload,
            "mode": row.pair.mode,
            "state": row.pair.state,
            "state_reason": row.pair.reason,
            "model_changes": row.pair.said or None,
        }
        for values in list(_quantities(row)) or [{}]:
            yield where | values


def _quantities(row: ComparedRow) -> Iterator[dict[str, Any]]:
    for name, found in row.changes.items():
        more = {"unit": COSTS[name].unit, "value": found.other, "verdict_reason": why(found) or None}
        yield asdict(found) | more
    if row.quality is not None:
        difference = row.quality.difference
        yield {
            "quantity": "metric",
            "change": difference and difference.mean,
            "low": difference and difference.low,
            "high": difference and difference.high,
            "verdict": row.quality.verdict,
            "verdict_reason": row.quality.why or None,
        }
    if row.scaling is not None:
        yield {
            "quantity": "scaling_efficiency",
            "value": row.scaling.efficiency,
            "low": row.scaling.low,
            "high": row.scaling.high,
            "verdict_reason": row.scaling.reason,
        }
    if row.overflow_rates != (None, None):
        before, after = row.overflow_rates
        yield {"quantity": "overflow_rate", "baseline": before, "value": after}


def content(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what the JSON holds.

    Args:
        comparisons: all with the same baseline; none if there are only gates that need none.
        findings: results of the gates.
    """
    return {
        "baseline": comparisons[0].baseline.name if comparisons else None,
        "baseline_name": comparisons[0].baseline.given_name if comparisons else None,
        "comparisons": [
            {
                "run": comparison.other.name,
                "name": comparison.other.given_name,
                "same_device": comparison.same_device,
                "in_turns": comparison.in_turns,
                "floor_runs": comparison.floors.runs,
                "hardware": dict(zip(("baseline", "run"), comparison.hardware, strict=True)),
                "differences": [dict(zip(("name", "baseline", "run"), d, strict=True)) for d in comparison.differences],
                "rows": [
                    {
                        "workload": row.pair.workload,
                        "mode": row.pair.mode,
                        "state": row.pair.state,
                        "reason": row.pair.reason,
                        "newly_failed": row.pair.newly_failed,
                        "model_changes": [asdict(change) for change in row.pair.versions],
                        "changes": {name: asdict(change) for name, change in row.changes.items()},
                        "metric": row.quality and asdict(row.quality),
                        "scaling": row.scaling and asdict(row.scaling),
                        "overflow_rate": dict(zip(("baseline", "run"), row.overflow_rates, strict=True)),
                    }
                    for row in comparison.rows
                ],
            }
            for comparison in comparisons
        ],
        "gates": [
            {
                "gate": str(f.gate),
                "run": f.run,
                "row": f.row,
                "outcome": f.outcome,
                "text": f.text,
                "baseline": f.baseline or None,
            }
            for f in findings
        ],
    }
