"""Cases to one row per workload and mode."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mpscale.analysis.quality import Quality, judge
from mpscale.analysis.stats import Interval, geometric_interval, paired_ratio
from mpscale.columns import DTYPES, STATUSES, SUMMARY
from mpscale.modes import MODES

Row = dict[str, Any]
Key = tuple[int, int]

MEASURED = ("ok", "diverged", "stalled")
"""Statuses of cases that ran to the end, and whose figures therefore count."""

SUMMARY_DTYPES: dict[str, str] = {column.name: DTYPES[column.kind] for column in SUMMARY}
"""Columns of the summary, in order."""


def summarise(cases: pd.DataFrame) -> pd.DataFrame:
    """One row per workload, in order of first appearance, and mode, in the order of :data:`mpscale.modes.MODES`.

    Times are in ms, memory in MiB. ``step_time_ms`` is the geometric mean of the processes' medians with its 95 %
    interval; a speed-up is the baseline's time over the mode's, paired by (seed, repeat), of cases that ended well.
    ``metric_difference`` is the mean over seeds of the mode's metric less fp32's, with its 90 % interval (one-sided at
    95 %), and ``metric_verdict`` what :func:`mpscale.analysis.quality.judge` makes of it. Memory is the largest of any
    process, energy the geometric mean of the processes, counts are sums and ``loss_scale_final``,
    ``steps_to_target`` and ``dispatch_share`` medians over the cases that know them. ``headline_baseline`` is the mode
    that a user would have had by default: tf32 where it was timed, else fp32.

    Only cases with a status of :data:`MEASURED` count, apart from ``cases``, ``ok`` and ``statuses``.

    Args:
        cases: as :attr:`mpscale.analysis.runs.Run.cases`.

    Raises:
        ValueError: a step time is not positive.
    """
    rows: list[Row] = []
    by_workload = _grouped(plain_rows(cases), "workload")
    for workload, members in by_workload.items():
        by_mode = _grouped(members, "mode")
        measured = {mode: [c for c in group if c["status"] in MEASURED] for mode, group in by_mode.items()}
        modes = [mode for mode in MODES if mode in by_mode] + [mode for mode in by_mode if mode not in MODES]
        for mode in modes:
            row: Row = {"workload": workload, "mode": mode}
            row |= _counts(by_mode[mode])
            row |= _times(mode, measured)
            row |= _memory(measured[mode], measured.get("fp32", []))
            row |= _energy(measured[mode], measured.get("fp32", []))
            row |= _training(measured[mode])
            row |= _metric(measured[mode], measured.get("fp32", []))
            if mode != "fp32":
                row |= _quality(measured[mode], measured.get("fp32", []))
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


def first_known(rows: Iterable[Row], name: str) -> Any:
    """The value of the first row that has one."""
    return next(iter(_known(rows, name)), None)


def _counts(group: Sequence[Row]) -> Row:
    statuses = Counter(str(case["status"]) for case in group)
    return {
        "device": first_known(group, "device"),
        "jit": first_known(group, "jit"),
        "cases": len(group),
        "ok": statuses["ok"],
        "statuses": ", ".join(f"{status} {statuses[status]}" for status in STATUSES if statuses[status]),
    }


def _by_process(rows: Iterable[Row]) -> dict[Key, float]:
    return {
        (case["seed"], case["repeat"]): case["step_time_ms_median"]
        for case in rows
        if case["step_time_ms_median"] is not None
    }


def of_good_trainings(cases: Iterable[Row]) -> list[Row]:
    """The cases that ran to the end, without those of seeds that diverged or stalled.

    Such a training has a step time, but no speed worth having. That goes for its repeats too, which time the same steps
    and cannot tell by themselves.
    """
    measured = [case for case in cases if case["status"] in MEASURED]
    lost = {case["seed"] for case in measured if case["status"] != "ok"}
    return [case for case in measured if case["seed"] not in lost]


def _times(mode: str, measured: dict[str, list[Row]]) -> Row:
    times = {name: _by_process(group) for name, group in measured.items()}
    own = times[mode]
    own_ok = _by_process(of_good_trainings(measured[mode]))
    row: Row = {"processes": len(own), "headline_baseline": "tf32" if times.get("tf32") else "fp32"}
    row |= _columns("step_time_ms", geometric_interval(own.values()) if own else None)
    for name in ("fp32", "tf32"):
        baseline = times.get(name, {})
        if mode == name and own_ok:
            speedup: Interval | None = Interval(1.0, None, None, len(own_ok))
        else:
            speedup = paired_ratio(baseline, own_ok) if baseline.keys() & own_ok.keys() else None
        row |= _columns(f"speedup_{name}", speedup)
    row["dispatch_share"] = _over(statistics.median, _known(measured[mode], "dispatch_share"))
    row["dispatch_bound"] = _over(mostly, _known(measured[mode], "dispatch_bound"))
    return row


def _columns(name: str, interval: Interval | None) -> Row:
    if interval is None:
        return {}
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _memory(group: Sequence[Row], fp32: Sequence[Row]) -> Row:
    gpu = _over(max, _known(group, "gpu_memory_nvml_peak_mib"))
    baseline = _over(max, _known(fp32, "gpu_memory_nvml_peak_mib"))
    return {
        "gpu_memory_mib": gpu,
        "gpu_memory_ratio": gpu / baseline if gpu is not None and baseline else None,
        "host_memory_mib": _over(max, _known(group, "host_memory_peak_mib")),
    }


def _energy(group: Sequence[Row], fp32: Sequence[Row]) -> Row:
    own, baseline = (_over(statistics.geometric_mean, _known(rows, "gpu_energy_j_per_step")) for rows in (group, fp32))
    return {
        "gpu_energy_j_per_step": own,
        "gpu_energy_ratio": own / baseline if own is not None and baseline is not None else None,
    }


def _training(group: Sequence[Row]) -> Row:
    sums = {name: _over(sum, _known(group, name)) for name in ("overflow_steps", "attempted_steps", "skipped_steps")}
    return {
        **sums,
        "overflow_rate": overflow_rate(group),
        "seeds": len({case["seed"] for case in group if case["repeat"] == 0}),
        "loss_scale_final": _over(statistics.median, _known(group, "loss_scale_final")),
    }


def overflow_rate(cases: Iterable[Row]) -> float | None:
    """Overflow steps over attempted steps, of the trainings that know both; None where none does."""
    known = [case for case in cases if case["overflow_steps"] is not None and case["attempted_steps"]]
    steps = sum(case["attempted_steps"] for case in known)
    return sum(case["overflow_steps"] for case in known) / steps if steps else None


def _metric(group: Sequence[Row], fp32: Sequence[Row]) -> Row:
    own, baseline = metric_by_seed(group), metric_by_seed(fp32)
    values = list(own.values())
    differences = [own[seed] - baseline[seed] for seed in own if seed in baseline]
    return {
        "metric_name": first_known(group, "metric_name"),
        "metric_seeds": len(values),
        "metric_mean": _over(statistics.fmean, values),
        "metric_min": _over(min, values),
        "metric_max": _over(max, values),
        "metric_difference": _over(statistics.fmean, differences),
        "metric_pairs": len(differences),
    }


def _quality(group: Sequence[Row], fp32: Sequence[Row]) -> Row:
    found = judge_metric(fp32, group)
    if found is None:
        return {}
    return {
        "metric_difference_low": found.difference.low if found.difference else None,
        "metric_difference_high": found.difference.high if found.difference else None,
        "metric_margin": first_known(group, "metric_margin"),
        "metric_verdict": found.verdict,
        "metric_seeds_needed": found.seeds,
    }


def metric_by_seed(cases: Iterable[Row]) -> dict[int, float]:
    """The metric of every seed that has one."""
    return {case["seed"]: case["metric_value"] for case in cases if case["metric_value"] is not None}


def judge_metric(baseline: Sequence[Row], other: Sequence[Row]) -> Quality | None:
    """The verdict on the metric of ``other``, both of one workload; None where the baseline trained nothing."""
    lost, lost_there = (
        {case["seed"] for case in cases if case["status"] in ("diverged", "stalled")} for cases in (other, baseline)
    )
    before, after = metric_by_seed(baseline), metric_by_seed(other)
    shared = [seed for seed in after if seed in before and seed not in lost_there]
    if not before or not any(case["repeat"] == 0 for case in other):
        return None
    return judge(
        [after[seed] - before[seed] for seed in shared],
        first_known(other, "metric_margin"),
        bool(first_known(other, "metric_higher_is_better")),
        sorted(lost - lost_there),
    )


def _target(group: Sequence[Row]) -> Row:
    trained = [case for case in group if case["repeat"] == 0]
    if not _known(trained, "metric_target"):
        return {}
    reached = _known(trained, "steps_to_target")
    return {"target_reached": len(reached), "steps_to_target": _over(statistics.median, reached)}
