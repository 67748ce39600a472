"""The sections of a sweep: what batch and replicas do to speed, and the constant loss scale to training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from mpscale.analysis.stats import Interval, paired_ratio
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.case import scale_text
from mpscale.core.columns import COLUMNS
from mpscale.core.journal import SWEPT
from mpscale.core.record import Record, place_of, values_of
from mpscale.core.runs import Run
from mpscale.report.sections import (
    PLACE,
    QUALITY,
    final_metric,
    heading,
    measured,
    overflow_steps,
    peak_memory,
    speedup,
    statuses,
    step_time,
    verdict,
)
from mpscale.report.table import DASH, Heading, Table, count, interval, joined, metric_difference, number, share

_NOTE_ON_BATCHES = (
    "A mode is compared with fp32 of the same batch, from the same weights and with the same order of the data. All "
    "batches take the same number of steps, so a training with a larger one sees more examples: metrics of different "
    "batches do not show what a mode does. Where a speed-up still grows at the largest batch, a larger one may show "
    "more; where it is in parentheses, the batch is too small or the measurement too uncertain to show anything."
)
_EFFICIENCY = (
    "Examples per second and replica, over those of the fewest replicas of the run. The batch of a replica stays the "
    "same, so 1 means that twice the replicas take twice the examples in the same time (weak scaling). In brackets the "
    "interval, as of a speed-up."
)
_NOTE_ON_REPLICAS = (
    f"{_EFFICIENCY} All rows run under the strategy and without XLA, also those of one replica. A mode is compared "
    "with fp32 on as many replicas. More replicas see more examples in as many steps, so metrics of different numbers "
    "do not show what a mode does."
)
NOTE_ON_LOGICAL = "Replicas on a CPU share its cores: their efficiency says nothing about GPUs."
_NOTE_ON_SCALES = (
    "Every scale is compared with the same fp32 training. A scale that is too large overflows, and its steps are "
    "skipped; one that is too small lets gradients vanish, which no column counts: it shows in the metric, and in "
    "`mpscale probe`."
)


def by_batch(run: Run) -> list[Table | str]:
    """Show step time, throughput, speed-up and memory of each mode over the batch; nothing if there is one batch."""
    rows = of_batches(run)
    if not rows:
        return []
    rates = throughput(run)
    cells: dict[Heading, Callable[[Row], str]] = {
        PLACE[0]: lambda row: row["workload"],
        PLACE[1]: lambda row: place_of(row)[1],
        heading("batch", "swept_batch"): lambda row: count(row["swept_batch"]),
        heading("step time", "step_time_ms"): step_time,
        Heading("examples per second", COLUMNS["examples_per_s"].help()): lambda row: number(
            rates.get(place_of(row)), 4
        ),
        heading("speed-up over fp32", "speedup_fp32"): lambda row: speedup(row, "fp32"),
        heading("speed-up over tf32", "speedup_tf32"): lambda row: speedup(row, "tf32"),
        heading("peak memory", "gpu_memory_mib"): peak_memory,
        heading("GPU memory over fp32", "gpu_memory_ratio"): lambda row: number(row["gpu_memory_ratio"]),
        heading("status", "statuses", is_number=False): _status,
    }
    table = Table(list(cells), [[cell(row) for cell in cells.values()] for row in rows])
    return [table.without_blank("speed-up over tf32", "GPU memory over fp32", "status"), _NOTE_ON_BATCHES]


def by_replicas(run: Run) -> list[Table | str]:
    """Show throughput and scaling efficiency of each mode over the number of replicas; nothing if there is one."""
    rows = _ordered([row for row in summary_of(run) if row["swept_replicas"] is not None], "swept_replicas")
    if not rows:
        return []
    rates = throughput(run)
    cases = {(workload, mode): records for workload, mode, records in measured(run, good=True)}
    first: dict[tuple[str, int | None, str], Row] = {}
    for row in rows:
        if rates.get(place_of(row)) is not None:
            first.setdefault(_at_any_number(row), row)
    cells: dict[Heading, Callable[[Row], str]] = {
        PLACE[0]: lambda row: place_of(row)[0].rpartition(" @")[0],
        PLACE[1]: lambda row: place_of(row)[1],
        heading("replicas", "swept_replicas"): lambda row: count(row["swept_replicas"]),
        heading("step time", "step_time_ms"): step_time,
        Heading("examples per second", COLUMNS["examples_per_s"].help()): lambda row: number(
            rates.get(place_of(row)), 4
        ),
        Heading("scaling efficiency", _EFFICIENCY): lambda row: _efficiency(
            *(cases.get(place_of(each), ()) for each in (first.get(_at_any_number(row), row), row))
        ),
        heading("speed-up over fp32", "speedup_fp32"): lambda row: speedup(row, "fp32"),
        heading("status", "statuses", is_number=False): _status,
    }
    table = Table(list(cells), [[cell(row) for cell in cells.values()] for row in rows])
    on_cpu = any(row["device"] == "cpu" for row in rows)
    notes = [_NOTE_ON_REPLICAS, *([NOTE_ON_LOGICAL] if on_cpu else [])]
    return [table.without_blank("status"), " ".join(notes)]


def efficiency(few: Sequence[Record], many: Sequence[Record]) -> Interval | None:
    """Return the examples per second and replica of some processes over those of others, with its 95 % interval.

    Processes are paired by seed and repeat, as for a speed-up.

    Args:
        few: the processes of a workload, a batch per replica and a mode on the fewest replicas.
        many: the same on more.

    Returns:
        None if there is no pair.
    """
    baseline, other = (
        {one.key: one["swept_replicas"] / rate for one in cases if (rate := one["examples_per_s"]) is not None}
        for cases in (few, many)
    )
    return paired_ratio(baseline, other) if baseline.keys() & other.keys() else None


def _efficiency(few: Sequence[Record], many: Sequence[Record]) -> str:
    if few is many:
        return "1 by definition" if any(one["examples_per_s"] is not None for one in many) else DASH
    found = efficiency(few, many)
    return DASH if found is None else interval(found.estimate, found.low, found.high, "")


def _at_any_number(row: Row) -> tuple[str, int | None, str]:
    return row["workload"], row["swept_batch"], place_of(row)[1]


def by_scale(run: Run) -> list[Table | str]:
    """Show overflow and metric of each mode over its constant loss scale; nothing if there is one scale."""
    rows = [row for row in summary_of(run) if row["swept_scale"] is not None]
    if not rows:
        return []
    cells: dict[Heading, Callable[[Row], str]] = {
        PLACE[0]: lambda row: place_of(row)[0],
        PLACE[1]: lambda row: row["mode"],
        heading("loss scale", "swept_scale"): lambda row: scale_text(row["swept_scale"]),
        heading("overflow steps", "overflow_steps"): overflow_steps,
        heading("share of steps", "overflow_rate"): lambda row: share(row["overflow_rate"], 1),
        heading("final metric", "metric_mean"): final_metric,
        heading("against fp32", "metric_difference"): lambda row: metric_difference(
            row["metric_difference"], row["metric_difference_low"], row["metric_difference_high"], row["metric_name"]
        ),
        Heading("verdict", QUALITY.help, is_number=False): verdict,
        heading("status", "statuses", is_number=False): _status,
    }
    table = Table(list(cells), [[cell(row) for cell in cells.values()] for row in rows])
    return [table.without_blank("status"), _NOTE_ON_SCALES]


def of_batches(run: Run) -> Sequence[Row]:
    """Return the rows of a sweep over batches by workload and mode, with rising batch; none without such a sweep."""
    return _ordered([row for row in summary_of(run) if row["swept_batch"] is not None], "swept_batch")


def _ordered(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows by workload, batch and mode as they come, with a rising ``column``."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    modes = list(dict.fromkeys(place_of(row)[1] for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            workloads.index(row["workload"]),
            modes.index(place_of(row)[1]),
            row["swept_replicas" if column == "swept_batch" else "swept_batch"] or 0,
            row[column],
        ),
    )


def throughput(run: Run) -> Mapping[tuple[str, str], float]:
    """Return examples per second by row, the geometric mean over processes of seeds that ended well."""
    rates = {
        (workload, mode): values_of(records, "examples_per_s") for workload, mode, records in measured(run, good=True)
    }
    return {place: statistics.geometric_mean(known) for place, known in rates.items() if known}


def _status(row: Row) -> str:
    return DASH if row["ok"] == row["cases"] and not row["not_started"] else statuses(row)


def sentence(rows: Sequence[Row]) -> str:
    """Say what varies in a sweep, and what a mode is compared with; empty without a sweep."""
    batches, scales, replicas = (sorted({row[name] for row in rows} - {None}) for name in SWEPT)
    parts = []
    if batches:
        parts.append(f"batches of {joined(list(map(count, batches)))}")
    if scales:
        parts.append(f"constant loss scales of {joined(list(map(scale_text, scales)))}")
    if replicas:
        parts.append(f"{joined(list(map(count, replicas)))} replicas")
    of = " of the same batch" if batches else ""
    of += f"{' and' if of else ' of the same'} number of replicas" if replicas else ""
    return f"It is a sweep over {', and over '.join(parts)}; a mode is compared with fp32{of}." if parts else ""
