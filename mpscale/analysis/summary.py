"""One row per workload and mode, and whether a mode trains as well as fp32."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mpscale.analysis.claim import conditions, find_doubts
from mpscale.analysis.quantities import COSTS, Cost, Verdict
from mpscale.analysis.stats import (
    Interval,
    Paired,
    geometric_interval,
    paired_difference,
    paired_ratio,
    pairs_that_would_tell,
)
from mpscale.analysis.trainings import (
    NO_SUCH_ROW,
    Trainings,
    by_reason,
    has_overflow,
    have_no_metric,
    overflow_rate,
    seeds_text,
    trainings,
)
from mpscale.core.blocks import SLOWER
from mpscale.core.case import Place
from mpscale.core.columns import MEASURED, STATUSES, SUMMARY
from mpscale.core.journal import SWEPT
from mpscale.core.record import Key, Record, common, grouped, of_good_trainings, settle, to_cell, values_of
from mpscale.core.runs import Run

Row = dict[str, Any]
"""A row of the summary: a value, or None, for each of :data:`SUMMARY_COLUMNS`."""

SUMMARY_COLUMNS = tuple(column.name for column in SUMMARY)
_FLOATS = {column.name for column in SUMMARY if column.kind == "float"}
_FACTS_OF_A_METRIC = {"metric_name": "name", "metric_margin": "margin", "metric_higher_is_better": "direction"}


def summarise(records: Iterable[Record], waiting: Mapping[Place, Sequence[Key]] | None = None) -> list[Row]:
    """One row per workload, in order of first appearance, and mode, in the order of :data:`mpscale.core.mode.MODES`.

    In a sweep, there is one for each batch size and for each constant loss scale, too. The baseline of a row, fp32 or
    tf32, is always that of the same batch.

    Times are in ms, memory in MiB. ``step_time_ms`` is the geometric mean of the processes' medians with its 95 %
    interval. A speed-up is the baseline's time over the mode's, paired by seed and repeat. Memory is the maximum over
    processes, energy their geometric mean. All of these leave out lost seeds: what a lost training costs is of no use.
    ``metric_difference`` is the mean over seeds of the mode's metric minus fp32's with its 90 % interval (one-sided at
    95 %), and ``metric_verdict`` comes from :func:`judge_metric`. Counts are sums; ``loss_scale_final``,
    ``steps_to_target`` and shares are medians over the cases that have them. ``headline_baseline`` is the
    mode that a user would have had by default: tf32 if it was timed, else fp32.

    Only cases that ran to the end (:data:`MEASURED`) have figures that count; ``left_out`` names the others.

    Args:
        records: of a run.
        waiting: see :attr:`mpscale.core.runs.Run.waiting`; None if the plan is not known.

    Raises:
        ValueError: a step time is not positive.
    """
    workloads: dict[str, dict[str, _Mode]] = {}
    for (workload, mode), cases in grouped(settle(list(records))).items():
        not_started = (waiting or {}).get((workload, mode), ())
        workloads.setdefault(workload, {})[mode] = _Mode(cases, not_started, plan_known=waiting is not None)
    return [_row(mode, modes) for modes in workloads.values() for mode in modes]


class _Mode:
    """One mode of a workload: its cases, those that count, their step times and the outcome of each seed."""

    def __init__(self, cases: Sequence[Record], not_started: Sequence[Key] = (), plan_known: bool = False) -> None:
        self.cases, self.not_started = cases, not_started
        self.measured = [case for case in cases if case["status"] in MEASURED]
        self.good = of_good_trainings(cases)
        self.times = COSTS["step_time"].by_process(cases)
        self.device_times = COSTS["device_time"].by_process(cases)
        self.input_times = COSTS["step_time_with_input"].by_process(cases)
        self.conditions = conditions(self.good)
        self.seeds = trainings(cases, not_started, plan_known)


def _row(mode: str, modes: Mapping[str, _Mode]) -> Row:
    own, fp32 = modes[mode], modes.get("fp32") or _Mode([])
    timed_tf32 = "tf32" in modes and any(case["step_time_ms_median"] is not None for case in modes["tf32"].measured)
    row: Row = {name: own.cases[0][name] for name in ("workload", "mode", *SWEPT)}
    row["headline_baseline"] = "tf32" if timed_tf32 else "fp32"
    row |= _counts(own)
    row |= _times(mode, own, modes)
    # tf32 keeps the same values in memory as fp32.
    row |= _memory(own, modes.get("fp32") or modes.get("tf32") or _Mode([]))
    row |= _energy(own, fp32)
    row |= _training(own)
    row |= _metric(own, fp32)
    row |= _alike_trainings(mode, own, "fp32" if "fp32" in modes else "tf32", modes)
    if mode != "fp32":
        row |= _quality(own, fp32)
    row |= _target(own)
    return {name: row.get(name) for name in SUMMARY_COLUMNS}


@lru_cache(maxsize=8)
def summary_of(run: Run) -> Sequence[Row]:
    """The summary of a run, made once because every part of a report asks for it. Do not change it."""
    return summarise(run.records, run.waiting if run.plan_known else None)


def summary_csv(rows: Iterable[Row]) -> str:
    """The content of summary.csv; unknown cells are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        known = {name: value for name, value in row.items() if value is not None}
        plain = {name: to_cell(value) if isinstance(value, str) else value for name, value in known.items()}
        writer.writerow({name: float(value) if name in _FLOATS else value for name, value in plain.items()})
    return text.getvalue()


def _over(function: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """``function`` of the values; None if there are none, because the sum of nothing would claim 0."""
    return function(values) if values else None


def _counts(own: _Mode) -> Row:
    statuses = Counter(str(case["status"]) for case in own.cases)
    return {
        "device": common(own.cases, "device"),
        "jit": common(own.cases, "jit"),
        "cases": len(own.cases),
        "ok": statuses["ok"],
        "statuses": ", ".join(f"{status} {statuses[status]}" for status in STATUSES if statuses[status]),
        "not_started": len(own.not_started),
        "seeds_planned": len(own.seeds.seeds | {case["seed"] for case in own.cases if case["repeat"] == 0}),
        "left_out": by_reason({**own.seeds.lost, **own.seeds.unknown}) or None,
    }


def _times(mode: str, own: _Mode, modes: Mapping[str, _Mode]) -> Row:
    row: Row = {"processes": len(own.times)}
    row |= _columns("step_time_ms", geometric_interval(own.times.values()) if own.times else None)
    for name in ("fp32", "tf32"):
        baseline = modes[name] if name in modes else _Mode([])
        row |= _speedup(f"speedup_{name}", own.times, baseline.times, mode == name)
        row |= _speedup(f"speedup_device_{name}", own.device_times, baseline.device_times, mode == name)
        row |= _speedup(f"speedup_with_input_{name}", own.input_times, baseline.input_times, mode == name)
        if mode != name and (pairs := row[f"speedup_{name}_pairs"]):
            doubts = find_doubts(own.conditions, baseline.conditions, pairs)
            row[f"speedup_{name}_doubts"] = " ".join(doubts) or None
    row |= own.conditions
    row["device_busy_ms_per_step"] = _over(statistics.median, values_of(own.good, "device_busy_ms_per_step"))
    row |= _arithmetic(own)
    row["step_time_ms_with_input"] = _over(statistics.geometric_mean, list(own.input_times.values()))
    row["two_level_processes"] = len(values_of(own.good, SLOWER))
    return row


def _arithmetic(own: _Mode) -> Row:
    """Geometric means, as of step times. There is no share if that of a process is implausible."""
    row: Row = {name: common(own.good, name) for name in ("flops_per_step", "tflops_peak")}
    for suffix in ("", "_while_busy"):
        rates = values_of(own.good, f"tflops{suffix}")
        row[f"tflops{suffix}"] = _over(statistics.geometric_mean, rates)
        shares = values_of(own.good, f"peak_share{suffix}")
        row[f"peak_share{suffix}"] = _over(statistics.geometric_mean, shares) if len(shares) == len(rates) else None
    return row


def _speedup(name: str, own: Mapping[Key, float], baseline: Mapping[Key, float], same: bool) -> Row:
    """The ratio of a baseline's times to a mode's; ``same`` says whether the two are one mode."""
    found: Interval | None
    if same and own:
        found = Interval(1.0, None, None, len(own))
    else:
        found = paired_ratio(baseline, own) if baseline.keys() & own.keys() else None
    return {**_columns(name, found), f"{name}_pairs": found.n if found else 0}


def _columns(name: str, interval: Interval | None) -> Row:
    if interval is None:
        return {}
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _alike(cost: Cost, own: _Mode, fp32: _Mode) -> bool:
    """Whether the same thing was measured for both, without which a ratio has no meaning."""
    return len(cost.kinds(own.good) | cost.kinds(fp32.good)) == 1


def _memory(own: _Mode, float32: _Mode) -> Row:
    gpu, there = (values_of(mode.good, "gpu_memory_nvml_peak_mib") for mode in (own, float32))
    # A process that ran out of memory needed more than any figure here.
    valid = gpu and there and not any(case["status"] == "oom" for case in (*own.cases, *float32.cases))
    return {
        "gpu_memory_mib": _over(max, gpu),
        "gpu_memory_processes": len(gpu),
        "gpu_memory_ratio": max(gpu) / max(there) if valid and _alike(COSTS["gpu_memory"], own, float32) else None,
        "host_memory_mib": _over(max, values_of(own.good, "host_memory_peak_mib")),
    }


def _energy(own: _Mode, fp32: _Mode) -> Row:
    ours, theirs = (values_of(mode.good, "gpu_energy_j_per_step") for mode in (own, fp32))
    mean, baseline = (_over(statistics.geometric_mean, joules) for joules in (ours, theirs))
    valid = mean is not None and baseline is not None and _alike(COSTS["energy"], own, fp32)
    return {
        "gpu_energy_j_per_step": mean,
        "gpu_energy_processes": len(ours),
        "gpu_energy_ratio": mean / baseline if valid else None,
    }


def _training(own: _Mode) -> Row:
    checked = [case for case in own.measured if has_overflow(case)]
    return {
        "overflow_steps": _over(sum, values_of(checked, "overflow_steps")),
        # Over the same trainings, so that the rate is the quotient of the two.
        "attempted_steps": _over(sum, values_of(checked or own.measured, "attempted_steps")),
        "skipped_steps": _over(sum, values_of(checked, "skipped_steps")),
        "overflow_rate": overflow_rate(checked),
        "overflow_seeds": len(checked),
        "seeds": len({case["seed"] for case in own.measured if case["repeat"] == 0}),
        "loss_scale_final": _over(statistics.median, values_of(own.measured, "loss_scale_final")),
    }


def _metric(own: _Mode, fp32: _Mode) -> Row:
    metric, baseline = own.seeds.metric, fp32.seeds.metric
    values = list(metric.values())
    differences = [metric[seed] - baseline[seed] for seed in metric if seed in baseline]
    name = common(own.measured, "metric_name")
    if name is None and any(case["metric_name"] is not None for case in own.measured):
        values, differences = [], []  # several metrics have no common mean
    return {
        "synthetic_inputs": common(own.cases, "synthetic_inputs"),
        "has_metric": common(own.cases, "has_metric"),
        "metric_name": name,
        "metric_seeds": len(values),
        "metric_mean": _over(statistics.fmean, values),
        "metric_min": _over(min, values),
        "metric_max": _over(max, values),
        "metric_difference": _over(statistics.fmean, differences),
        "metric_pairs": len(differences),
    }


def _alike_trainings(mode: str, own: _Mode, baseline: str, modes: Mapping[str, _Mode]) -> Row:
    """Whether the trainings drew the same random numbers and saw the same batches as the baseline's, where known."""

    def alike(column: str) -> bool | None:
        sides = [
            {case.key: case[column] for case in side.measured if case["repeat"] == 0 and case[column] is not None}
            for side in (own, modes[baseline])
        ]
        pairs = sides[0].keys() & sides[1].keys()
        return all(sides[0][key] == sides[1][key] for key in pairs) if pairs else None

    if mode == baseline or baseline not in modes:
        return {}
    fed = any(case["input_passes"] is not None for case in own.measured)
    return {"same_draws": alike("random_draws"), "same_batches": alike("data_order_digest") if fed else None}


def _quality(own: _Mode, fp32: _Mode) -> Row:
    found = judge_metric(fp32.cases, own.cases, (fp32.seeds, own.seeds))
    if found is None:
        return {}
    return {
        "metric_difference": found.difference.mean if found.difference else None,
        "metric_difference_low": found.difference.low if found.difference else None,
        "metric_difference_high": found.difference.high if found.difference else None,
        "metric_pairs": found.difference.n if found.difference else 0,
        "metric_margin": common(own.cases, "metric_margin"),
        "metric_higher_is_better": common(own.cases, "metric_higher_is_better"),
        "metric_verdict": found.verdict,
        "metric_reason": found.reason,
        "metric_left_out": found.left_out,
        "metric_seeds_needed": found.seeds,
    }


def _target(own: _Mode) -> Row:
    trained = [case for case in own.measured if case["repeat"] == 0]
    if not values_of(trained, "metric_target"):
        return {}
    # A training that was lost in the end may have passed its target, but did not reach it for good.
    reached = values_of(of_good_trainings(trained), "steps_to_target")
    return {"target_reached": len(reached), "steps_to_target": _over(statistics.median, reached)}


@dataclass(frozen=True, slots=True)
class Quality:
    """A metric against its baseline's.

    Args:
        verdict: ``NON_INFERIOR`` if a loss of the margin or more is ruled out, one-sided at 95 %, and no outcome of a
            seed is unknown that could contradict it. ``WORSE`` if the estimated loss exceeds the margin and a gain is
            ruled out, or if a seed was lost. Else ``INCONCLUSIVE``.
        difference: metric minus that of the baseline, in its own unit and direction, with its 90 % interval; None if
            no seed has both.
        seeds: how many seeds would be needed for a verdict; None if there is one, or if the number is unknown.
        reason: why, if the numbers do not show it.
        left_out: which seeds are not in the difference, and why; None if all are.
    """

    verdict: Verdict
    difference: Paired | None
    seeds: int | None = None
    reason: str | None = None
    left_out: str | None = None

    @property
    def why(self) -> str:
        """Reason and what was left out, on one line; may be empty."""
        return "; ".join(filter(None, (self.reason, self.left_out)))


def judge_metric(
    baseline: Sequence[Record], other: Sequence[Record], seeds: tuple[Trainings, Trainings]
) -> Quality | None:
    """Whether the metric of ``other`` is as good as the baseline's; None if one of the two was never meant to train.

    A workload without a metric gets no verdict either, unless a seed was lost: then it is ``WORSE``.

    This tests for non-inferiority, seed by seed. A difference that is not significant does not show that there is none:
    three seeds hide a loss of two points. So the question is whether a loss of more than the workload's margin can be
    ruled out. Piaggio et al., "Reporting of noninferiority and equivalence randomized trials", JAMA 2012;308:2594.

    It is ruled out over all seeds or not at all: if the seed that ran out of memory had been trained, it might have
    been the bad one. Fleming, "Addressing missing data in clinical trials", Annals of Internal Medicine 2011;154:113:
    data that are missing for a reason bias the rest.

    Args:
        baseline: cases of one workload and mode.
        other: the cases to judge.
        seeds: the outcomes of the trainings of both.
    """
    before, after = seeds
    if not before.seeds or not after.seeds:
        return None
    # A seed that is lost in the baseline as well is not the other's fault.
    lost = sorted(after.lost.keys() - before.lost.keys())
    if have_no_metric((*baseline, *other)):
        return judge([], None, None, lost) if lost else None
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
        difference = paired_difference(differences) if differences else None
        found = Quality(Verdict.INCONCLUSIVE, difference, reason=disagreement)
    else:
        margin, better = (common(with_metric[1], name) for name in ("metric_margin", "metric_higher_is_better"))
        found = judge(differences, margin, better, lost, unknown)
    if not left_out:
        return found
    total = len(before.seeds | after.seeds)
    return replace(found, left_out=f"{len(pairs)} of {total} seed{'' if total == 1 else 's'}; {by_reason(left_out)}")


def judge(
    differences: Sequence[float],
    margin: float | None,
    higher_is_better: bool | None,
    lost: Sequence[int] = (),
    unknown: Sequence[int] = (),
) -> Quality:
    """The verdict on a metric.

    Args:
        differences: metric minus that of the baseline, one per seed.
        margin: how much worse still counts as equal, in units of the metric; None if the workload has none.
        higher_is_better: the metric's direction; None if unknown.
        lost: seeds that diverged, stalled or ended without a metric although they did not in the baseline.
        unknown: seeds that might have ended in any way.
    """
    difference = paired_difference(differences) if differences else None

    def inconclusive(reason: str) -> Quality:
        return Quality(Verdict.INCONCLUSIVE, difference, reason=reason)

    if lost:
        how = "the training diverged, stalled or ended without a metric"
        return Quality(Verdict.WORSE, difference, reason=f"lost {seeds_text(lost)}: {how}")
    if difference is None:
        return inconclusive("no seed has a metric under both")
    if margin is None:
        return inconclusive("the workload has no margin")
    if higher_is_better is None:
        return inconclusive("it is not known whether a higher metric is better")
    better = paired_difference([value if higher_is_better else -value for value in differences])
    if better.low is None or better.high is None:
        return inconclusive("one seed gives no spread")
    if better.low > -margin:
        if unknown:
            known = len(differences)
            return inconclusive(
                f"a loss is ruled out over {known} seeds, but the outcome of {seeds_text(unknown)} is unknown"
            )
        return Quality(Verdict.NON_INFERIOR, difference)
    if better.high < 0.0 and better.mean < -margin:
        return Quality(Verdict.WORSE, difference)
    return Quality(Verdict.INCONCLUSIVE, difference, pairs_that_would_tell(better, margin))


def _unknown(before: Trainings, after: Trainings) -> set[int]:
    """Seeds that lack an outcome on one side although they should have one, or may have had one."""
    found = {*before.unknown, *after.unknown}
    for side, theirs in ((before, after), (after, before)):
        if not side.plan_known:
            found |= theirs.seeds - side.seeds
    return found


def _left_out(before: Trainings, after: Trainings, pairs: Sequence[int]) -> dict[int, str]:
    """Seeds that are not a pair, with the reason."""
    found = {}
    for seed in (before.seeds | after.seeds) - set(pairs):
        there, here = _outcome(before, seed), _outcome(after, seed)
        if there == here:
            found[seed] = f"{here} in both"
        else:
            found[seed] = ", ".join(filter(None, (here, there and f"{there} in the baseline")))
    return found


def _outcome(side: Trainings, seed: int) -> str | None:
    """Why one side does not have a seed, None if it does."""
    if seed in side.lost or seed in side.unknown:
        return side.lost.get(seed) or side.unknown[seed]
    return None if seed in {*side.metric, *side.unscored} else "not planned" if side.plan_known else NO_SUCH_ROW


def _names_differ(with_metric: Sequence[Sequence[Record]]) -> bool:
    """Whether the cases have different metrics, whose values cannot be subtracted."""
    return len({case["metric_name"] for cases in with_metric for case in cases} - {None}) > 1


def _disagreement(with_metric: Sequence[Sequence[Record]]) -> str | None:
    """A fact about the metric on which the cases disagree, which rules out a verdict; None if there is none."""
    for column, what in _FACTS_OF_A_METRIC.items():
        said = dict.fromkeys(case[column] for cases in with_metric for case in cases if case[column] is not None)
        if len(said) > 1:
            return f"the cases do not agree on the metric's {what}: {', '.join(map(str, said))}"
        lacking = [case["seed"] for case in with_metric[1] if case[column] is None]
        if said and 0 < len(lacking) < len(with_metric[1]):
            return f"the metric's {what} is unknown for {seeds_text(lacking)}"
    return None
