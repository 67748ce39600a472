"""Whether the modes of a seed train the same: a difference between them must come from the precision alone."""

from __future__ import annotations

import json
import math
from typing import Any

from mpscale.core.case import Case
from mpscale.core.columns import MAY_DIFFER, MEASURED
from mpscale.core.record import Record

_COMPARED = {
    "initial_weights_digest": "initial weights",
    "first_batches_digest": "first batches of the pipeline",
    "data_order_digest": "order of the data",
    "data_digest": "data",
    "model_digest": "model",
    "optimizer_config": "optimizer",
    "loss_inputs": "labels or outputs",
    "loss_probe": "loss",
    "step_operations": "operations in the train step",
    "process_settings": "settings of the process",
    "workload_digest": "workload digest",
}
"""What is compared, by column. The workload digest depends on the others, and is named only if they are equal."""

_OF_PASSES = ("first_batches_digest", "data_order_digest")
_OF_FIRST_BATCH = ("loss_inputs", "loss_probe")
"""What a pipeline may be allowed to change from pass to pass, and figures of its first batch; the report says so."""

_SAME_LOSS = 1e-4
"""The largest relative difference between sums of the same loss that are taken in different orders."""


class SameStart:
    """Compares what each case of a group trained with what the first one did.

    The modes of a seed must train the same: a difference between them has to come from the precision alone.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, int, int], dict[str, tuple[str, Any]]] = {}
        self._before: dict[str, set[str]] = {}
        """The workload digests of a run before it was stopped, by workload."""

    def take(self, record: Record) -> None:
        """Note what a case trained with that ran before the run was stopped."""
        self._compare((record.place[0], *record.key), record.place[1], record)
        if record["workload_digest"] is not None and record["status"] in MEASURED:
            self._before.setdefault(record.place[0], set()).add(record["workload_digest"])

    def forget(self, group: tuple[str, int, int]) -> None:
        """Forget what a group trained with: its cases run again, compiled in another way."""
        self._first.pop(group, None)

    def difference(self, case: Case, record: Record) -> str | None:
        """Return how the training of ``case`` differs from that of an earlier mode of its group; None if it does not.

        A case that died early is judged by what it had by then. In a resumed run, return also how its workload differs
        from what it was before.
        """
        digest, before = record["workload_digest"], self._before.get(case.place[0], set())
        # Several digests: the workload depends on the seed.
        if digest is not None and len(before) == 1 and digest not in before:
            return (
                f"not the workload that the run began with: its digest is {digest}, and was {before.copy().pop()} "
                "before the run was stopped. Restore the workload, or make a new run"
            )
        differing = self._compare(case.group, case.place[1], record)
        if not differing:
            return None
        told = {mode: ", ".join(texts.values()) for mode, texts in differing.items()}
        text = "; ".join(f"not the same training as {mode}: other {texts}" for mode, texts in told.items())
        if record["input_passes"] is not None and any(texts.keys() & set(_OF_PASSES) for texts in differing.values()):
            return (
                f"{text}. The pipeline gave other batches in each process: make it, and everything random in it, in a "
                "function (Pipeline(train=function)), with seeds, or allow it with Pipeline(..., deterministic=False)"
            )
        return f"{text}. Modes may only differ in precision: the workload must not ask for the mode or its policy"

    def _compare(self, group: tuple[str, int, int], mode: str, record: Record) -> dict[str, dict[str, str]]:
        """Return what differs from earlier modes of the group, in words by mode and column."""
        first = self._first.setdefault(group, {})
        differing: dict[str, dict[str, str]] = {}
        skipped = (*_OF_PASSES, *_OF_FIRST_BATCH) if record["input_passes"] in MAY_DIFFER else ()
        for name, what in _COMPARED.items():
            value = record[name]
            if name in skipped:
                continue
            if value is None or (name == "workload_digest" and differing):
                continue
            other_mode, other = first.setdefault(name, (mode, value))
            if not _equal(value, other):
                text = f"{what} ({_contrast(name, value, other, other_mode)})"
                differing.setdefault(other_mode, {})[name] = text
        return differing


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=_SAME_LOSS, abs_tol=1e-6)
    return bool(value == other)


def _contrast(name: str, value: Any, other: Any, mode: str) -> str:
    """Describe briefly how two values of a column differ."""
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
