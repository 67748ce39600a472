"""A comparison of runs for programs: CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.gates import Finding
from mpscale.analysis.quantities import QUANTITIES

_COLUMNS = (
    "baseline_run", "run", "workload", "mode", "state", "state_reason", "quantity", "unit", "baseline", "value",
    "change", "low", "high", "noise_floor", "floor_runs", "detectable", "verdict", "verdict_reason",
)  # fmt: skip


def as_csv(comparisons: Sequence[Comparison]) -> str:
    """One line for each quantity of each row, shares as shares; a row that is not compared has a line of its own."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for comparison in comparisons:
        for row in comparison.rows:
            for values in _long(row) or [{}]:
                common = {"baseline_run": comparison.baseline.name, "run": comparison.other.name}
                pair = row.pair
                state = {"workload": pair.workload, "mode": pair.mode, "state": pair.state, "state_reason": pair.reason}
                writer.writerow(
                    {name: value for name, value in {**common, **state, **values}.items() if value is not None}
                )
    return text.getvalue()


def _long(row: ComparedRow) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "quantity": name,
            "unit": QUANTITIES[name].unit,
            "baseline": change.baseline,
            "value": change.other,
            **{
                key: getattr(change, key)
                for key in ("change", "low", "high", "noise_floor", "floor_runs", "detectable", "verdict")
            },
            "verdict_reason": "; ".join(dict.fromkeys(filter(None, (change.reason, change.left_out)))) or None,
        }
        for name, change in row.changes.items()
    ]
    if row.quality is not None:
        difference = row.quality.difference
        found.append(
            {
                "quantity": "metric",
                "change": difference and difference.mean,
                "low": difference and difference.low,
                "high": difference and difference.high,
                "verdict": row.quality.verdict,
                "verdict_reason": row.quality.why or None,
            }
        )
    if row.overflow_rates != (None, None):
        before, after = row.overflow_rates
        found.append({"quantity": "overflow_rate", "baseline": before, "value": after})
    return found


def as_json(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> str:
    """Everything that is known of the comparisons; null for what is not."""
    content = {
        "baseline": comparisons[0].baseline.name,
        "comparisons": [
            {
                "run": comparison.other.name,
                "same_device": comparison.same_device,
                "in_turns": comparison.in_turns,
                "floor_runs": comparison.floors.runs,
                "hardware": {"baseline": comparison.hardware[0], "run": comparison.hardware[1]},
                "differences": [dict(zip(("name", "baseline", "run"), d, strict=True)) for d in comparison.differences],
                "rows": [
                    {
                        "workload": row.pair.workload,
                        "mode": row.pair.mode,
                        "state": row.pair.state,
                        "reason": row.pair.reason,
                        "newly_failed": row.pair.newly_failed,
                        "changes": {name: asdict(change) for name, change in row.changes.items()},
                        "metric": row.quality and asdict(row.quality),
                        "overflow_rate": dict(zip(("baseline", "run"), row.overflow_rates, strict=True)),
                    }
                    for row in comparison.rows
                ],
            }
            for comparison in comparisons
        ],
        "gates": [
            {"gate": str(f.gate), "run": f.run, "row": f.row, "outcome": f.outcome, "text": f.text} for f in findings
        ],
    }
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """``value`` with null for an end of an interval that no float holds: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
