"""What became of the training of each seed: the one place that says which are lost, and of which nothing is known.

A training is lost if it ran to its end and is worth nothing: it diverged, it stalled, or it ended without a finite
metric. That is a result, and a bad one. One whose process died (oom, timeout, crashed and so on) or was never started
is unknown: no result, good or bad. Neither may vanish from a verdict: what is left are the survivors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpscale.core.columns import FAILED
from mpscale.core.record import Record

Row = dict[str, Any]
Key = tuple[int, int]
"""Seed and repeat: a process of a workload and mode."""

LOST = ("diverged", "stalled")
MEASURED = ("ok", *LOST)
"""Statuses of cases that ran to the end."""

NOT_STARTED = "planned, but not started"
NO_SUCH_ROW = "no such row"

_OF_A_METRIC = ("metric_name", "metric_margin", "metric_higher_is_better", "metric_target")


def settle(records: Sequence[Record]) -> list[Record]:
    """The same records, with status ``diverged`` for a training that is called ``ok`` and ended without a metric.

    Records of mpscale before this was a status of its own, and tables from elsewhere, have such trainings: NaN and
    infinity are empty cells there. A table in which nothing is said of any metric is left as it is.
    """
    trained = [record for record in records if record["repeat"] == 0]
    with_metric = {record["workload"] for record in trained if record["metric_value"] is not None}

    def settled(record: Record) -> Record:
        if record["status"] != "ok" or record["repeat"] != 0 or record["metric_value"] is not None:
            return record
        why = record.unavailable.get("metric_value")
        told = why is not None or any(record[name] is not None for name in _OF_A_METRIC)
        if not told and record["workload"] not in with_metric:
            return record
        found = Record.from_json(record.to_json())
        reason = f"trained to the end, and has no {record['metric_name'] or 'metric'}{f': {why}' if why else ''}"
        found.update({"status": "diverged", "status_reason": reason})
        return found

    return [settled(record) for record in records]


@dataclass(frozen=True, slots=True)
class Trainings:
    """The trainings of one workload and mode, by seed.

    Args:
        metric: the final metric of those that have one, lost ones among them.
        lost: those that diverged, stalled or ended without a metric, with their status.
        unknown: those that did not end, with their status, or :data:`NOT_STARTED`.
        plan_known: whether a seed that is in none of these was not to be trained. Else it may have been, as far as a
            cases.csv by itself can tell.
    """

    metric: Mapping[int, float]
    lost: Mapping[int, str]
    unknown: Mapping[int, str]
    plan_known: bool = False

    @property
    def seeds(self) -> set[int]:
        """All that were trained, or should have been."""
        return {*self.metric, *self.lost, *self.unknown}


def trainings(cases: Iterable[Record], not_started: Iterable[Key] = (), plan_known: bool = False) -> Trainings:
    """What became of each seed, by its case of repeat 0. One that the device cannot run is no training.

    Args:
        cases: of one workload and mode, from records that :func:`settle` has seen.
        not_started: processes that were planned and have no case.
        plan_known: see :class:`Trainings`.
    """
    trained = [case for case in cases if case["repeat"] == 0]
    unknown = {case["seed"]: str(case["status"]) for case in trained if case["status"] in FAILED}
    unknown |= {seed: NOT_STARTED for seed, repeat in not_started if repeat == 0}
    ended = [case for case in trained if case["status"] in MEASURED]
    return Trainings(
        {case["seed"]: case["metric_value"] for case in ended if case["metric_value"] is not None},
        {case["seed"]: str(case["status"]) for case in ended if case["status"] in LOST},
        unknown,
        plan_known,
    )


def of_good_trainings(cases: Iterable[Record]) -> list[Record]:
    """The cases that ran to the end, without those of seeds that were lost.

    A lost training has a step time, but no speed worth having. That goes for its repeats too, which time the same steps
    and cannot tell by themselves.
    """
    measured = [case for case in cases if case["status"] in MEASURED]
    lost = {case["seed"] for case in measured if case["status"] in LOST}
    return [case for case in measured if case["seed"] not in lost]


def without_figure(
    cases: Sequence[Record], column: str, not_started: Iterable[Key] = (), only_trained: bool = False
) -> dict[Key, str]:
    """Processes that should have a figure and have none, and why; without those of lost seeds.

    Args:
        cases: of one workload and mode.
        column: of the figure.
        not_started: processes that were planned and have no case.
        only_trained: look at the processes that trained alone.
    """
    lost = {case["seed"] for case in cases if case["status"] in LOST}
    found = {
        (case["seed"], case["repeat"]): str(case["status"]) if case["status"] in FAILED else _why_empty(case, column)
        for case in cases
        if case["seed"] not in lost
        and (case["status"] in FAILED or (case["status"] in MEASURED and case[column] is None))
    }
    found |= {(seed, repeat): NOT_STARTED for seed, repeat in not_started if seed not in lost}
    return {key: why for key, why in found.items() if key[1] == 0 or not only_trained}


def _why_empty(case: Record, column: str) -> str:
    return str(case.unavailable.get(column) or "not known")


def common(cases: Iterable[Record], column: str) -> Any:
    """What all cases that know it have in ``column``; None where none does, or they do not agree."""
    known = dict.fromkeys(case[column] for case in cases if case[column] is not None)
    return next(iter(known)) if len(known) == 1 else None


def by_reason(reasons: Mapping[int, str] | Mapping[Key, str]) -> str:
    """``seed 3: oom; seeds 4, 5: planned, but not started``, and ``seed 0 repeat 2: timeout``; empty without any."""
    found: dict[str, list[str]] = {}
    repeats = []
    for key, why in sorted(reasons.items()):
        seed, repeat = key if isinstance(key, tuple) else (key, 0)
        if repeat:
            repeats.append(f"seed {seed} repeat {repeat}: {why}")
        else:
            found.setdefault(why, []).append(str(seed))
    parts = [f"{seeds_text(seeds)}: {why}" for why, seeds in found.items()]
    return "; ".join([*parts, *repeats])


def seeds_text(seeds: Iterable[Any]) -> str:
    """``seed 3``, ``seeds 3, 4``."""
    listed = [str(seed) for seed in seeds]
    return f"seed{'' if len(listed) == 1 else 's'} {', '.join(listed)}"
