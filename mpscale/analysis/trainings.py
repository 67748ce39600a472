"""The outcome of the training of each seed: good, lost or unknown.

A training is lost if it ran to the end without a usable result: it diverged, stalled, or ended without a finite metric.
That is a bad outcome. A training whose process died (oom, timeout, crashed and so on) or never started is unknown: it
has no outcome, good or bad. A verdict must account for both, or it is a verdict on the survivors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpscale.core.columns import FAILED, LOST, MEASURED
from mpscale.core.record import Key, Record

NOT_STARTED = "planned, but not started"
NO_SUCH_ROW = "no such row"


@dataclass(frozen=True, slots=True)
class Trainings:
    """The trainings of one workload and mode, by seed.

    Args:
        metric: the final metric of those that have one, including lost ones.
        lost: the status of those that diverged, stalled or ended without a metric.
        unknown: the status of those that did not end, or :data:`NOT_STARTED`.
        unscored: those that ended well in a workload without a metric.
        plan_known: whether seeds that appear nowhere here were not planned. A cases.csv does not show the plan.
    """

    metric: Mapping[int, float]
    lost: Mapping[int, str]
    unknown: Mapping[int, str]
    unscored: frozenset[int] = frozenset()
    plan_known: bool = False

    @property
    def seeds(self) -> set[int]:
        """All seeds that were or should have been trained."""
        return {*self.metric, *self.lost, *self.unknown, *self.unscored}


def trainings(cases: Iterable[Record], not_started: Iterable[Key] = (), plan_known: bool = False) -> Trainings:
    """The outcome of each seed, from its case of repeat 0. Modes that the device cannot run train nothing.

    Args:
        cases: of one workload and mode, after :func:`mpscale.core.record.settle`.
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
        frozenset(case["seed"] for case in ended if case["status"] not in LOST and case["has_metric"] is False),
        plan_known,
    )


def have_no_metric(cases: Iterable[Record]) -> bool:
    """Whether the workload of these cases has no metric; False also if that is not known."""
    return any(case["has_metric"] is False for case in cases)


def without_figure(
    cases: Sequence[Record], column: str, not_started: Iterable[Key] = (), only_trained: bool = False
) -> dict[Key, str]:
    """Processes that lack a figure, with the reason. Lost seeds are left out.

    Args:
        cases: of one workload and mode.
        column: of the figure.
        not_started: processes that were planned and have no case.
        only_trained: look only at processes that trained.
    """
    lost = {case["seed"] for case in cases if case["status"] in LOST}
    found = {
        case.key: str(case["status"]) if case["status"] in FAILED else str(case.why_empty(column) or "not known")
        for case in cases
        if (case["status"] in FAILED or (case["status"] in MEASURED and case[column] is None))
        and case["seed"] not in lost
    }
    found |= {(seed, repeat): NOT_STARTED for seed, repeat in not_started if seed not in lost}
    return {key: why for key, why in found.items() if key[1] == 0 or not only_trained}


def overflow_rate(cases: Iterable[Record]) -> float | None:
    """Overflow steps over attempted steps of the trainings that have both; None if none has."""
    known = [case for case in cases if has_overflow(case)]
    steps = sum(case["attempted_steps"] for case in known)
    return sum(case["overflow_steps"] for case in known) / steps if steps else None


def overflow_unknown(cases: Sequence[Record], not_started: Iterable[Key] = ()) -> dict[int, str]:
    """Seeds whose overflow is unknown, with the reason. Lost trainings may have it."""
    known = {case["seed"] for case in cases if has_overflow(case)}
    ended = {case["seed"] for case in cases if case["status"] in MEASURED and case["repeat"] == 0}
    return {**dict.fromkeys(sorted(ended - known), "not known"), **trainings(cases, not_started).unknown}


def has_overflow(case: Record) -> bool:
    """Whether a case ran to the end and counted the steps that overflowed."""
    return case["status"] in MEASURED and case["overflow_steps"] is not None and bool(case["attempted_steps"])


def by_reason(reasons: Mapping[int, str] | Mapping[Key, str]) -> str:
    """``seed 3: oom; seeds 4, 5: planned, but not started; seed 0 repeat 2: timeout``; empty if there are none."""
    seeds: dict[str, list[int]] = defaultdict(list)
    repeats = []
    for key, why in sorted(reasons.items()):
        seed, repeat = key if isinstance(key, tuple) else (key, 0)
        if repeat:
            repeats.append(f"seed {seed} repeat {repeat}: {why}")
        else:
            seeds[why].append(seed)
    return "; ".join([*(f"{seeds_text(which)}: {why}" for why, which in seeds.items()), *repeats])


def seeds_text(seeds: Iterable[Any]) -> str:
    """``seed 3``, ``seeds 3, 4``."""
    listed = [str(seed) for seed in seeds]
    return f"seed{'' if len(listed) == 1 else 's'} {', '.join(listed)}"
