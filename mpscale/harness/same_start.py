"""Holds the modes of a seed to the same training: a difference between them has to come from the precision alone."""

from __future__ import annotations

import json
import math
from typing import Any

from mpscale.harness.case import Case
from mpscale.records import Record

_COMPARED = {
    "initial_weights_digest": "initial weights",
    "data_order_digest": "order of the data",
    "data_digest": "data",
    "model_digest": "model",
    "optimizer_config": "optimizer",
    "loss_inputs": "labels or outputs",
    "loss_probe": "loss",
    "step_operations": "operations in the train step",
    "process_settings": "settings of the process",
}
"""What is compared, by column. Told one by one, so that a reason can name the part."""

_LAST = {"workload_digest": "workload digest"}
"""Made of the others: named where they do not show what differs."""

_SAME_LOSS = 1e-4
"""By how much, relatively, sums of one loss may differ that are taken in another order."""


class SameStart:
    """Remembers what the first case of each group trained and compares the others with it."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, int, int], dict[str, tuple[str, Any]]] = {}

    def difference(self, case: Case, record: Record) -> str | None:
        """What ``case`` trained that an earlier mode of its group did not; None where all is equal.

        A case that died early is judged by what it had until then.
        """
        first = self._first.setdefault(case.group, {})
        differing: dict[str, list[str]] = {}
        for columns in (_COMPARED, _LAST):
            if differing:
                break
            for name, what in columns.items():
                value = record[name]
                if value is None:
                    continue
                mode, other = first.setdefault(name, (case.mode, value))
                if not _equal(value, other):
                    differing.setdefault(mode, []).append(f"{what} ({_apart(name, value, other, mode)})")
        if not differing:
            return None
        said = "; ".join(
            f"not the same training as {mode}: other {', '.join(all_)}" for mode, all_ in differing.items()
        )
        return (
            f"{said}. Modes may differ in their precision alone: the workload must not ask for the mode or its policy"
        )


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=_SAME_LOSS, abs_tol=1e-6)
    return bool(value == other)


def _apart(name: str, value: Any, other: Any, mode: str) -> str:
    """What differs between two values of a column, in few words."""
    if name == "optimizer_config":
        ours, theirs = json.loads(value), json.loads(other)
    elif name == "step_operations":
        ours, theirs = (dict(part.split(" ") for part in text.split(", ")) for text in (value, other))
    elif isinstance(value, float):
        return f"{value:.6g} on the same labels and outputs, {mode} had {other:.6g}"
    else:
        return f"{value}, {mode} had {other}"
    keys = [key for key in sorted(ours | theirs) if ours.get(key) != theirs.get(key)]
    return ", ".join(f"{key} {ours.get(key, 'none')}, {mode} had {theirs.get(key, 'none')}" for key in keys)
