"""Cases to one row per workload and mode."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mpscale.analysis.quality import judge_metric
from mpscale.analysis.stats import Interval, geometric_interval, paired_ratio
from mpscale.analysis.trainings import (
    MEASURED,
    Key,
    Row,
    Trainings,
    by_reason,
    common,
    of_good_trainings,
    trainings,
)
from mpscale.columns import DTYPES, STATUSES, SUMMARY
from mpscale.modes import MODES

MEMORY_IS_OF = ("gpu_allocator", "gpu_memory_method")
ENERGY_IS_OF = ("gpu_energy_method",)
"""Columns that say what a figure is of. Of two that differ in one of them there is no ratio: NVML's peak follows the
pool with one allocator and what is in use with another.
"""

SUMMARY_DTYPES: dict[str, str] = {column.name: DTYPES[column.kind] for column in SUMMARY}
"""Columns of the summary, in order."""


def summarise(cases: pd.DataFrame, not_started: Sequence[tuple[str, str, Key]] | None = None) -> pd.DataFrame:
    """One row per workload, in order of first appearance, and mode, in the order of :data:`mpscale.modes.MODES`.

    Times are in ms, memory in MiB. ``step_time_ms`` is the geometric mean of the processes' medians with its 95 %
    interval; a speed-up is the baseline's time over the mode's, paired by (seed, repeat). Memory is the largest of any
    process, energy the geometric mean of the processes. All of these are of seeds that ended well: what a lost training
    costs is of no use. ``metric_difference`` is the mean over seeds of the mode's metric less fp32's, with its 90 %
    interval (one-sided at 95 %), and ``metric_verdict`` what :func:`mpscale.analysis.quality.judge_metric` makes of it.
    Counts are sums and ``loss_scale_final``, ``steps_to_target`` and ``dispatch_share`` medians over the cases that
    know them. ``headline_baseline`` is the mode that a user would have had by default: tf32 where it was timed, else
    fp32.

    Only cases with a status of :data:`MEASURED` have figures that count; ``left_out`` says which have none.

    Args:
        cases: as :attr:`mpscale.analysis.runs.Run.cases`.
        not_started: workload, mode and process of the cases that were planned and have no row; None where the plan is
            not known.

    Raises:
        ValueError: a step time is not positive.
    """
    rows: list[Row] = []
    by_workload = _grouped(plain_rows(cases), "workload")
    for workload, members in by_workload.items():
        by_mode = _grouped(members, "mode")
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
        modes = [mode for mode in MODES if mode in by_mode] + [mode for mode in by_mode if mode not in MODES]
        for mode in modes:
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
    columns = {name: pd.Series([row.get(name) for row in rows], dtype=dtype) for name, dtype in SUMMARY_DTYPES.items()}
    return pd.DataFrame(columns)


def write_summary_csv(summary: pd.DataFrame, path: str | Path) -> None:
    """Writes the summary, an empty cell for what is unknown."""
    summary.to_csv(path, index=False, lineterminator="\n", encoding="utf-8", errors="backslashreplace")


def plain_rows(frame: pd.DataFrame) -> list[Row]:
    """The rows of a frame as dicts of plain values, None for what is unknown."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(name): value for name, value in row.items()} for row in plain.to_dict("records")]


def _grouped(rows: Iterable[Row], name: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row[name] is not None:
            groups.setdefault(row[name], []).append(row)
    return groups


def _known(rows: Iterable[Row], name: str) -> list[Any]:
    return [row[name] for row in rows if row[name] is not None]


def _over(function: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    """``function`` of the values, None where there are none: sum() and any() of nothing would claim 0."""
    return function(values) if values else None


def mostly(flags: Sequence[bool]) -> bool:
    """Whether more than half are set: a single process that was disturbed says nothing of the mode."""
    return 2 * sum(flags) > len(flags)


def _counts(group: Sequence[Row], seeds: Trainings, waiting: Sequence[Key]) -> Row:
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


def _by_process(rows: Iterable[Row]) -> dict[Key, float]:
    return {
        (case["seed"], case["repeat"]): case["step_time_ms_median"]
        for case in rows
        if case["step_time_ms_median"] is not None
    }


def _times(mode: str, good: dict[str, list[Row]], headline: str) -> Row:
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


def figures_of(cases: Iterable[Row], column: str, is_of: Sequence[str]) -> set[tuple[Any, ...]]:
    """What the figures of a column are of, over the cases that have one: values of the columns ``is_of``."""
    return {tuple(case.get(name) for name in is_of) for case in cases if case[column] is not None}


def _alike(column: str, is_of: Sequence[str], *groups: Sequence[Row]) -> bool:
    return len({kind for group in groups for kind in figures_of(group, column, is_of)}) == 1


def _memory(group: Sequence[Row], fp32: Sequence[Row]) -> Row:
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


def _energy(good: Sequence[Row], fp32: Sequence[Row]) -> Row:
    known, there = (_known(rows, "gpu_energy_j_per_step") for rows in (good, fp32))
    own, baseline = (_over(statistics.geometric_mean, joules) for joules in (known, there))
    alike = _alike("gpu_energy_j_per_step", ENERGY_IS_OF, good, fp32)
    return {
        "gpu_energy_j_per_step": own,
        "gpu_energy_processes": len(known),
        "gpu_energy_ratio": own / baseline if alike and own is not None and baseline is not None else None,
    }


def _training(group: Sequence[Row]) -> Row:
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


def _knows_overflow(case: Row) -> bool:
    return case["overflow_steps"] is not None and bool(case["attempted_steps"])


def overflow_rate(cases: Iterable[Row]) -> float | None:
    """Overflow steps over attempted steps, of the trainings that know both; None where none does."""
    known = [case for case in cases if case["status"] in MEASURED and _knows_overflow(case)]
    steps = sum(case["attempted_steps"] for case in known)
    return sum(case["overflow_steps"] for case in known) / steps if steps else None


def overflow_unknown(cases: Sequence[Row], not_started: Iterable[Key] = ()) -> dict[int, str]:
    """Seeds of whose overflow nothing is known, and why; a lost training may know it."""
    seeds = trainings(cases, not_started)
    known = {case["seed"] for case in cases if case["status"] in MEASURED and _knows_overflow(case)}
    ended = {case["seed"] for case in cases if case["status"] in MEASURED and case["repeat"] == 0}
    return {**dict.fromkeys(sorted(ended - known), "not known"), **seeds.unknown}


def _metric(group: Sequence[Row], own: Trainings, baseline: Trainings) -> Row:
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


def _quality(group: Sequence[Row], fp32: Sequence[Row], seeds: tuple[Trainings, Trainings]) -> Row:
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


def _target(group: Sequence[Row]) -> Row:
    trained = [case for case in group if case["repeat"] == 0]
    if not _known(trained, "metric_target"):
        return {}
    # One that was lost in the end has passed its target, and not reached it.
    reached = _known(of_good_trainings(trained), "steps_to_target")
    return {"target_reached": len(reached), "steps_to_target": _over(statistics.median, reached)}
