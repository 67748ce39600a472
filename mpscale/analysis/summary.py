"""Cases to one row per workload and mode."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from mpscale.analysis.stats import (
    Interval,
    Paired,
    geometric_interval,
    paired_difference,
    paired_ratio,
    pairs_that_would_tell,
)
from mpscale.core.columns import STATUSES, SUMMARY
from mpscale.core.record import Record, grouped
from mpscale.core.runs import Run
from mpscale.core.trainings import (
    MEASURED,
    NO_SUCH_ROW,
    Key,
    Trainings,
    by_reason,
    common,
    of_good_trainings,
    seeds_text,
    settle,
    trainings,
)

MEMORY_IS_OF = ("gpu_allocator", "gpu_memory_method")
ENERGY_IS_OF = ("gpu_energy_method",)
"""Columns that say what a figure is of. Of two that differ in one of them there is no ratio: NVML's peak follows the
pool with one allocator and what is in use with another.
"""

Row = dict[str, Any]
"""A row of the summary: a value, or None, for each of :data:`SUMMARY_COLUMNS`."""

SUMMARY_COLUMNS = tuple(column.name for column in SUMMARY)


def summarise(records: Iterable[Record], not_started: Sequence[tuple[str, str, Key]] | None = None) -> list[Row]:
    """One row per workload, in order of first appearance, and mode, in the order of :data:`mpscale.core.mode.MODES`.

    Times are in ms, memory in MiB. ``step_time_ms`` is the geometric mean of the processes' medians with its 95 %
    interval; a speed-up is the baseline's time over the mode's, paired by (seed, repeat). Memory is the largest of any
    process, energy the geometric mean of the processes. All of these are of seeds that ended well: what a lost training
    costs is of no use. ``metric_difference`` is the mean over seeds of the mode's metric less fp32's, with its 90 %
    interval (one-sided at 95 %), and ``metric_verdict`` what :func:`mpscale.analysis.summary.judge_metric` makes of it.
    Counts are sums and ``loss_scale_final``, ``steps_to_target`` and ``dispatch_share`` medians over the cases that
    know them. ``headline_baseline`` is the mode that a user would have had by default: tf32 where it was timed, else
    fp32.

    Only cases with a status of :data:`MEASURED` have figures that count; ``left_out`` says which have none.

    Args:
        records: of a run.
        not_started: workload, mode and process of the cases that were planned and have no row; None where the plan is
            not known.

    Raises:
        ValueError: a step time is not positive.
    """
    rows: list[Row] = []
    by_workload: dict[str, dict[str, list[Record]]] = {}
    for (workload, mode), group in grouped(settle(list(records))).items():
        by_workload.setdefault(workload, {})[mode] = group
    for workload, by_mode in by_workload.items():
        measured = {mode: [c for c in group if c["status"] in MEASURED] for mode, group in by_mode.items()}
        good = {mode: of_good_trainings(group) for mode, group in by_mode.items()}
        waiting = {
            mode: [key for name, its_mode, key in not_started or () if (name, its_mode) == (workload, mode)]
            for mode in by_mode
        }
        seeds = {
            mode: trainings(group, waiting[mode], plan_known=not_started is not None) for mode, group in by_mode.items()
        }
        nothing = Trainings({}, {}, {})
        for mode in by_mode:
            row: Row = {"workload": workload, "mode": mode}
            row |= _counts(by_mode[mode], seeds[mode], waiting[mode])
            row |= _times(mode, good, headline="tf32" if _by_process(measured.get("tf32", [])) else "fp32")
            row |= _memory(by_mode[mode], by_mode.get("fp32", []))
            row |= _energy(good[mode], good.get("fp32", []))
            row |= _training(measured[mode])
            row |= _metric(measured[mode], seeds[mode], seeds.get("fp32", nothing))
            if mode != "fp32":
                row |= _quality(by_mode[mode], by_mode.get("fp32", []), (seeds.get("fp32", nothing), seeds[mode]))
            row |= _target(measured[mode])
            rows.append(row)
    return [{name: row.get(name) for name in SUMMARY_COLUMNS} for row in rows]


@lru_cache(maxsize=8)
def summary_of(run: Run) -> Sequence[Row]:
    """The summary of a run; made once, as every part of a report asks for it. Not to be changed."""
    return summarise(run.records, run.places_not_started if run.plan_known else None)


def summary_csv(rows: Iterable[Row]) -> str:
    """The content of summary.csv: an empty cell for what is unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def _known(rows: Iterable[Record], name: str) -> list[Any]:
    return [row[name] for row in rows if row[name] is not None]


def _over(function: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """``function`` of the values, None where there are none: sum() and any() of nothing would claim 0."""
    return function(values) if values else None


def mostly(flags: Sequence[bool]) -> bool:
    """Whether more than half are set: a single process that was disturbed says nothing of the mode."""
    return 2 * sum(flags) > len(flags)


def _counts(group: Sequence[Record], seeds: Trainings, waiting: Sequence[Key]) -> Row:
    statuses = Counter(str(case["status"]) for case in group)
    left_out = {**seeds.lost, **seeds.unknown}
    return {
        "device": common(group, "device"),
        "jit": common(group, "jit"),
        "cases": len(group),
        "ok": statuses["ok"],
        "statuses": ", ".join(f"{status} {statuses[status]}" for status in STATUSES if statuses[status]),
        "not_started": len(waiting),
        "seeds_planned": len(seeds.seeds | {case["seed"] for case in group if case["repeat"] == 0}),
        "left_out": by_reason(left_out) or None,
    }


def _by_process(rows: Iterable[Record]) -> dict[Key, float]:
    return {
        (case["seed"], case["repeat"]): case["step_time_ms_median"]
        for case in rows
        if case["step_time_ms_median"] is not None
    }


def _times(mode: str, good: dict[str, list[Record]], headline: str) -> Row:
    times = {name: _by_process(group) for name, group in good.items()}
    own = times[mode]
    row: Row = {"processes": len(own), "headline_baseline": headline}
    row |= _columns("step_time_ms", geometric_interval(own.values()) if own else None)
    for name in ("fp32", "tf32"):
        baseline = times.get(name, {})
        if mode == name and own:
            speedup: Interval | None = Interval(1.0, None, None, len(own))
        else:
            speedup = paired_ratio(baseline, own) if baseline.keys() & own.keys() else None
        row |= _columns(f"speedup_{name}", speedup)
        row[f"speedup_{name}_pairs"] = speedup.n if speedup else 0
    row["dispatch_share"] = _over(statistics.median, _known(good[mode], "dispatch_share"))
    row["dispatch_bound"] = _over(mostly, _known(good[mode], "dispatch_bound"))
    return row


def _columns(name: str, interval: Interval | None) -> Row:
    if interval is None:
        return {}
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def figures_of(cases: Iterable[Record], column: str, is_of: Sequence[str]) -> set[tuple[Any, ...]]:
    """What the figures of a column are of, over the cases that have one: values of the columns ``is_of``."""
    return {tuple(case[name] for name in is_of) for case in cases if case[column] is not None}


def _alike(column: str, is_of: Sequence[str], *groups: Sequence[Record]) -> bool:
    return len({kind for group in groups for kind in figures_of(group, column, is_of)}) == 1


def _memory(group: Sequence[Record], fp32: Sequence[Record]) -> Row:
    own, baseline = of_good_trainings(group), of_good_trainings(fp32)
    gpu, there = (_known(cases, "gpu_memory_nvml_peak_mib") for cases in (own, baseline))
    # A process that ran out of memory needed more than any figure that is known here.
    told = gpu and there and not any(case["status"] == "oom" for case in (*group, *fp32))
    alike = _alike("gpu_memory_nvml_peak_mib", MEMORY_IS_OF, own, baseline)
    return {
        "gpu_memory_mib": _over(max, gpu),
        "gpu_memory_processes": len(gpu),
        "gpu_memory_ratio": max(gpu) / max(there) if told and alike else None,
        "host_memory_mib": _over(max, _known(own, "host_memory_peak_mib")),
    }


def _energy(good: Sequence[Record], fp32: Sequence[Record]) -> Row:
    known, there = (_known(rows, "gpu_energy_j_per_step") for rows in (good, fp32))
    own, baseline = (_over(statistics.geometric_mean, joules) for joules in (known, there))
    alike = _alike("gpu_energy_j_per_step", ENERGY_IS_OF, good, fp32)
    return {
        "gpu_energy_j_per_step": own,
        "gpu_energy_processes": len(known),
        "gpu_energy_ratio": own / baseline if alike and own is not None and baseline is not None else None,
    }


def _training(group: Sequence[Record]) -> Row:
    checked = [case for case in group if _knows_overflow(case)]
    return {
        "overflow_steps": _over(sum, _known(checked, "overflow_steps")),
        # Of the same trainings, so that the one is so many of the other.
        "attempted_steps": _over(sum, _known(checked or group, "attempted_steps")),
        "skipped_steps": _over(sum, _known(checked, "skipped_steps")),
        "overflow_rate": overflow_rate(group),
        "overflow_seeds": len(checked),
        "seeds": len({case["seed"] for case in group if case["repeat"] == 0}),
        "loss_scale_final": _over(statistics.median, _known(group, "loss_scale_final")),
    }


def _knows_overflow(case: Record) -> bool:
    return case["overflow_steps"] is not None and bool(case["attempted_steps"])


def overflow_rate(cases: Iterable[Record]) -> float | None:
    """Overflow steps over attempted steps, of the trainings that know both; None where none does."""
    known = [case for case in cases if case["status"] in MEASURED and _knows_overflow(case)]
    steps = sum(case["attempted_steps"] for case in known)
    return sum(case["overflow_steps"] for case in known) / steps if steps else None


def overflow_unknown(cases: Sequence[Record], not_started: Iterable[Key] = ()) -> dict[int, str]:
    """Seeds of whose overflow nothing is known, and why; a lost training may know it."""
    seeds = trainings(cases, not_started)
    known = {case["seed"] for case in cases if case["status"] in MEASURED and _knows_overflow(case)}
    ended = {case["seed"] for case in cases if case["status"] in MEASURED and case["repeat"] == 0}
    return {**dict.fromkeys(sorted(ended - known), "not known"), **seeds.unknown}


def _metric(group: Sequence[Record], own: Trainings, baseline: Trainings) -> Row:
    values = list(own.metric.values())
    differences = [own.metric[seed] - baseline.metric[seed] for seed in own.metric if seed in baseline.metric]
    name = common(group, "metric_name")
    if name is None and any(case["metric_name"] is not None for case in group):
        values, differences = [], []  # of several metrics, which have no mean
    return {
        "metric_name": name,
        "metric_seeds": len(values),
        "metric_mean": _over(statistics.fmean, values),
        "metric_min": _over(min, values),
        "metric_max": _over(max, values),
        "metric_difference": _over(statistics.fmean, differences),
        "metric_pairs": len(differences),
    }


def _quality(group: Sequence[Record], fp32: Sequence[Record], seeds: tuple[Trainings, Trainings]) -> Row:
    found = judge_metric(fp32, group, seeds)
    if found is None:
        return {}
    return {
        "metric_difference": found.difference.mean if found.difference else None,
        "metric_difference_low": found.difference.low if found.difference else None,
        "metric_difference_high": found.difference.high if found.difference else None,
        "metric_pairs": found.difference.n if found.difference else 0,
        "metric_margin": common(group, "metric_margin"),
        "metric_higher_is_better": common(group, "metric_higher_is_better"),
        "metric_verdict": found.verdict,
        "metric_reason": found.reason,
        "metric_left_out": found.left_out,
        "metric_seeds_needed": found.seeds,
    }


def _target(group: Sequence[Record]) -> Row:
    trained = [case for case in group if case["repeat"] == 0]
    if not _known(trained, "metric_target"):
        return {}
    # One that was lost in the end has passed its target, and not reached it.
    reached = _known(of_good_trainings(trained), "steps_to_target")
    return {"target_reached": len(reached), "steps_to_target": _over(statistics.median, reached)}


# Whether a training is as good as its baseline: non-inferiority of the metric, seed by seed. A difference that is not
# significant is no evidence that there is none: three seeds hide a loss of two points. So the question is the other
# way round: can a loss of more than the workload's margin be ruled out? Piaggio et al., "Reporting of noninferiority
# and equivalence randomized trials", JAMA 2012;308:2594. Who looks at the survivors alone finds what they wish: had
# the seed that ran out of memory been trained, it might have been the bad one. So a loss is ruled out over all seeds
# or not at all. Fleming, "Addressing missing data in clinical trials", Annals of Internal Medicine 2011;154:113: what
# is missing for a reason biases what is left.

Verdict = Literal["non-inferior", "worse", "inconclusive"]

_SAID_OF_A_METRIC = {"metric_name": "name", "metric_margin": "margin", "metric_higher_is_better": "direction"}
_LOST_HOW = "the training diverged, stalled or ended without a metric"


@dataclass(frozen=True, slots=True)
class Quality:
    """A metric against its baseline's.

    Args:
        verdict: ``non-inferior``: a loss of the margin or more is ruled out, one-sided at 95 %. ``worse``: no loss is
            ruled out and it is estimated beyond the margin; or a seed was lost. Else, or where a seed is not known
            that could speak against it, ``inconclusive``.
        difference: metric less that of the baseline, in its own unit and direction, with its 90 % interval; None
            where no seed has both.
        seeds: how many would tell, None where they told already or that is not known.
        reason: why the verdict is what it is, where the numbers do not show it.
        left_out: which seeds are not in the difference, and why; None where all are.
    """

    verdict: Verdict
    difference: Paired | None
    seeds: int | None = None
    reason: str | None = None
    left_out: str | None = None

    @property
    def why(self) -> str:
        """Reason and what was left out, in one line; empty where there is neither."""
        return "; ".join(filter(None, (self.reason, self.left_out)))


def judge(
    differences: Sequence[float],
    margin: float | None,
    higher_is_better: bool | None,
    lost: Sequence[int] = (),
    unknown: Sequence[int] = (),
) -> Quality:
    """The verdict on a metric.

    Args:
        differences: metric less that of the baseline, one a seed.
        margin: how much worse still counts as equal, in units of the metric; None where nobody said.
        higher_is_better: the metric's direction; None where it is not known.
        lost: seeds that diverged, stalled or ended without a metric although they did not in the baseline.
        unknown: seeds of which it is not known how they would have ended.
    """
    difference = paired_difference(differences) if differences else None
    if lost:
        return Quality("worse", difference, reason=f"lost {seeds_text(lost)}: {_LOST_HOW}")
    if difference is None:
        return Quality("inconclusive", None, reason="no seed has a metric under both")
    if margin is None:
        return Quality("inconclusive", difference, reason="the workload has no margin")
    if higher_is_better is None:
        return Quality("inconclusive", difference, reason="it is not known which way the metric is better")
    better = paired_difference([value if higher_is_better else -value for value in differences])
    if better.low is None or better.high is None:
        return Quality("inconclusive", difference, reason="one seed gives no spread")
    if better.low > -margin:
        if unknown:
            reason = f"a loss is ruled out over {len(differences)} seeds, and nothing is known of {seeds_text(unknown)}"
            return Quality("inconclusive", difference, reason=reason)
        return Quality("non-inferior", difference)
    if better.high < 0.0 and better.mean < -margin:
        return Quality("worse", difference)
    return Quality("inconclusive", difference, pairs_that_would_tell(better, margin))


def judge_metric(
    baseline: Sequence[Record], other: Sequence[Record], seeds: tuple[Trainings, Trainings]
) -> Quality | None:
    """The verdict on the metric of ``other``; None where one of the two was never to be trained.

    Args:
        baseline: its cases of one workload and mode.
        other: likewise.
        seeds: what became of the trainings of both.
    """
    before, after = seeds
    if not before.seeds or not after.seeds:
        return None
    # A seed that is lost in the baseline as well is no fault of the other's.
    lost = sorted(after.lost.keys() - before.lost.keys())
    pairs = [seed for seed in sorted(after.metric) if seed in before.metric and seed not in before.lost]
    left_out = _left_out(before, after, pairs)
    unknown = sorted(_unknown(before, after) - before.lost.keys())
    with_metric = [
        [case for case in cases if case["repeat"] == 0 and case["seed"] in side.metric]
        for cases, side in zip((baseline, other), seeds, strict=True)
    ]
    differences = [] if _names_differ(with_metric) else [after.metric[seed] - before.metric[seed] for seed in pairs]
    disagreement = _disagreement(with_metric)
    if disagreement is not None and not lost:
        found = Quality("inconclusive", paired_difference(differences) if differences else None, reason=disagreement)
    else:
        margin, better = (common(with_metric[1], name) for name in ("metric_margin", "metric_higher_is_better"))
        found = judge(differences, margin, better, lost, unknown)
    if not left_out:
        return found
    total = len(before.seeds | after.seeds)
    return replace(found, left_out=f"{len(pairs)} of {total} seeds; {by_reason(left_out)}")


def _unknown(before: Trainings, after: Trainings) -> set[int]:
    """Seeds whose training has no outcome on one of the sides although it should have one, or may have had one."""
    found = {*before.unknown, *after.unknown}
    for side, theirs in ((before, after), (after, before)):
        if not side.plan_known:
            found |= theirs.seeds - side.seeds
    return found


def _left_out(before: Trainings, after: Trainings, pairs: Sequence[int]) -> dict[int, str]:
    """Seeds that are no pair, and why."""
    found = {}
    for seed in (before.seeds | after.seeds) - set(pairs):
        there, here = _outcome(before, seed), _outcome(after, seed)
        if there == here:
            found[seed] = f"{here} in both"
        else:
            parts = [here] if here else []
            found[seed] = ", ".join(parts + ([f"{there} in the baseline"] if there else []))
    return found


def _outcome(side: Trainings, seed: int) -> str | None:
    """Why a seed is not to be had from a side, None where it is."""
    if seed in side.lost or seed in side.unknown:
        return side.lost.get(seed) or side.unknown[seed]
    return None if seed in side.metric else "not planned" if side.plan_known else NO_SUCH_ROW


def _names_differ(with_metric: Sequence[Sequence[Record]]) -> bool:
    """Whether the cases of the two sides are of several metrics, between which there is no difference to take."""
    return len({case["metric_name"] for cases in with_metric for case in cases} - {None}) > 1


def _disagreement(with_metric: Sequence[Sequence[Record]]) -> str | None:
    """What the cases of the two sides say differently of one and the same metric, so that no verdict is to be had."""
    for column, what in _SAID_OF_A_METRIC.items():
        said = dict.fromkeys(case[column] for cases in with_metric for case in cases if case[column] is not None)
        if len(said) > 1:
            return f"the cases do not agree on the metric's {what}: {', '.join(map(str, said))}"
        lacking = [case["seed"] for case in with_metric[1] if case[column] is None]
        if said and 0 < len(lacking) < len(with_metric[1]):
            return f"the metric's {what} is not known of {seeds_text(lacking)}"
    return None
