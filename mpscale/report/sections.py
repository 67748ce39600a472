"""The tables of the results of a run: summary, training and metric. They are empty if there is nothing to report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from mpscale.analysis.answer import speed_verdict
from mpscale.analysis.claim import TOO_SMALL, Doubt, doubts_of
from mpscale.analysis.quantities import Verdict
from mpscale.analysis.summary import Row, summary_of
from mpscale.analysis.trainings import have_no_metric
from mpscale.core.case import Place
from mpscale.core.columns import COLUMNS, MEASURED, SUMMARY, Over
from mpscale.core.mode import is_mixed
from mpscale.core.record import Record, grouped, modes_of, of_good_trainings, place_of, values_of
from mpscale.core.runs import Run
from mpscale.report import bars
from mpscale.report.table import (
    DASH,
    Cell,
    Heading,
    Look,
    Table,
    count,
    interval,
    large,
    look_of,
    loss_scale,
    metric,
    metric_difference,
    metric_margin,
    number,
    of_all,
    of_processes,
    of_seeds,
    plural,
    span,
)
from mpscale.report.words import DOUBTS, WORDS, metric_name

_STEP_COUNTS = {
    "attempted": "attempted_steps",
    "applied": "applied_steps",
    "skipped": "skipped_steps",
    "overflow": "overflow_steps",
    "non-finite loss": "nonfinite_loss_steps",
}
"""Columns that are summed over seeds, by their heading."""
_SUMMARY = {column.name: column for column in SUMMARY}

PLACE = tuple(Heading(name, _SUMMARY[name].help(), is_number=False) for name in ("workload", "mode"))
"""The headings of what names a row."""


def results(run: Run) -> Table:
    """Return a row per workload and mode, for terminal, report and GitHub summary. Blank columns are left out."""
    rows = summary_of(run)
    names = {row["metric_name"] for row in rows if row["metric_name"] is not None}
    final = f"final {metric_name(names.pop()) if len(names) == 1 else 'metric'}"
    all_well = all(row["ok"] == row["cases"] and not row["not_started"] for row in rows)
    slowest, largest = _largest(rows, "step_time_ms"), _largest(rows, "gpu_memory_mib")
    widest = bars.widest(row[f"speedup_{mode}"] for row in rows for mode in _BASELINES if row[f"speedup_{mode}"])

    def time(row: Row) -> Cell:
        return _with_length(
            step_time(row), row["step_time_ms"], slowest[row["workload"]], "the slowest of this workload"
        )

    def memory(row: Row) -> Cell:
        longest = largest[row["workload"]]
        return _with_length(peak_memory(row), row["gpu_memory_mib"], longest, "the largest of this workload")

    cells: dict[Heading, Callable[[Row], str]] = {
        PLACE[0]: lambda row: place_of(row)[0],
        PLACE[1]: lambda row: place_of(row)[1],
        heading("step time", "step_time_ms"): time,
        heading("speed-up over fp32", "speedup_fp32"): lambda row: _ratio(row, "fp32", widest),
        heading("speed-up over tf32", "speedup_tf32"): lambda row: _ratio(row, "tf32", widest),
        _SPEED: speed,
        heading("peak memory", "gpu_memory_mib"): memory,
        heading("overflow steps", "overflow_steps"): overflow_steps,
        heading(final, "metric_mean"): final_metric,
        QUALITY: quality,
        heading("status", "statuses", is_number=False): lambda row: DASH if all_well else statuses(row),
    }
    table = Table(list(cells), [[cell(row) for cell in cells.values()] for row in rows], _SPARE)
    return table.without_blank("speed-up over fp32", "speed-up over tf32", _SPEED, QUALITY, "status")


_BASELINES = ("fp32", "tf32")
_SPEED = Heading(
    "speed",
    "Faster or slower than what a user would have had by default (tf32 if it was timed, else fp32): the 95 % interval "
    "of the speed-up does not contain 1. No claim: something else than the mode may have decided the step time.",
    is_number=False,
)
QUALITY = Heading(
    "against fp32",
    "Whether the metric is as good as fp32's: a loss of the workload's margin or more is ruled out, in all seeds. "
    "Worse: a loss beyond the margin is shown, or a seed was lost. In CSV: metric_verdict.",
    is_number=False,
)


def heading(text: str, column: str, is_number: bool = True) -> Heading:
    """Return a heading with the help of a column of the summary."""
    return Heading(text, _SUMMARY[column].help(), is_number)


def _largest(rows: Sequence[Row], name: str) -> Mapping[str, float]:
    """The largest of the values of each workload, whatever its batch; 0 if there is nothing to compare."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["workload"], []).extend([] if row[name] is None else [row[name]])
    return {workload: max(values) if len(values) > 1 else 0.0 for workload, values in found.items()}


def _with_length(written: str, value: float | None, longest: float, of: str) -> Cell:
    return Cell(written, bar=None if value is None else bars.length(value, longest, of))


def _ratio(row: Row, baseline: str, widest: float) -> Cell:
    ratio, low, high = (row[f"speedup_{baseline}{end}"] for end in ("", "_low", "_high"))
    if ratio is None:
        return Cell(DASH, "unknown")
    written = interval(ratio, low, high, "x")
    bar = None if row["mode"] == baseline else bars.ratio(ratio, None if low is None else (low, high), widest)
    # The column beside it says why a ratio is no claim.
    return Cell(f"({written})", "weak", bar) if doubts_of(row, baseline) else Cell(written, bar=bar)


def speed(row: Row) -> Cell:
    """Say if a mode is faster or slower than its headline baseline, or why nothing can be claimed."""
    baseline, verdict = row["headline_baseline"], speed_verdict(row)
    if verdict is None:
        is_timed_baseline = row["mode"] == baseline and row["step_time_ms"] is not None
        return Cell("baseline") if is_timed_baseline else Cell(DASH, "unknown")
    if doubts := doubts_of(row, baseline):
        return Cell(f"no claim: {', '.join(DOUBTS[doubt] for doubt in doubts)}", "weak")
    if verdict is Verdict.CANNOT_TELL:
        return Cell(WORDS[verdict], "unknown")
    return Cell(f"{WORDS[verdict]} than {baseline}", "good" if verdict is Verdict.FASTER else "bad")


def quality(row: Row) -> Cell:
    """Say if the metric of a mode is as good as that of fp32."""
    verdict = row["metric_verdict"]
    return Cell(DASH if verdict is None else WORDS[verdict], _LOOKS.get(verdict, ""))


_LOOKS: Mapping[Verdict | None, Look] = {
    Verdict.NON_INFERIOR: "good",
    Verdict.WORSE: "bad",
    Verdict.INCONCLUSIVE: "unknown",
    None: "unknown",
}


_SPARE = ("peak memory", "overflow steps", "step time")
"""Columns that a narrow terminal leaves out."""


def step_time(row: Row) -> str:
    """Write the step time with its interval over processes."""
    return interval(row["step_time_ms"], row["step_time_ms_low"], row["step_time_ms_high"], " ms")


def speedup(row: Row, baseline: str) -> Cell:
    """Write the speed-up over ``baseline`` with its interval over pairs; if it is no claim, in parentheses with why."""
    low, high = row[f"speedup_{baseline}_low"], row[f"speedup_{baseline}_high"]
    written, doubts = interval(row[f"speedup_{baseline}"], low, high, "x"), doubts_of(row, baseline)
    return Cell(f"({written}: {', '.join(DOUBTS[doubt] for doubt in doubts)})", "weak") if doubts else Cell(written)


TOO_SMALL_CURE = (
    "this model and batch are too small to show what a mode does; use a larger batch, or --mp-steps-per-call"
)
ONE_PAIR_CURE = "use more seeds, or --mp-repeats"


def doubts_note(rows: Sequence[Row]) -> str:
    """Explain the parentheses that :func:`speedup` puts around ratios of these rows; empty if there are none."""
    found = {doubt for row in rows for baseline in ("fp32", "tf32") for doubt in doubts_of(row, baseline)}
    if not found:
        return ""
    told = "; ".join(f"{DOUBTS[doubt]}: {doubt.text}" for doubt in Doubt if doubt in found)
    cures = [TOO_SMALL_CURE] if found & TOO_SMALL else []
    cures += [f"for more pairs, {ONE_PAIR_CURE}"] if Doubt.ONE_PAIR in found else []
    cure = "".join(f" {text[0].upper()}{text[1:]}." for text in cures)
    return f"A speed-up in parentheses is no claim about the mode, because of the row or its baseline ({told}).{cure}"


def peak_memory(row: Row) -> str:
    """Write the peak memory of the GPU; without one that of the host, marked, because the two cannot be compared."""
    if row["gpu_memory_mib"] is not None:
        return large(row["gpu_memory_mib"], "MiB") + of_processes(row["gpu_memory_processes"], row)
    return DASH if row["host_memory_mib"] is None else f"{large(row['host_memory_mib'], 'MiB')} (host)"


def overflow_steps(row: Row) -> str:
    """Write overflow steps out of attempted steps."""
    if row["overflow_steps"] is None:
        return DASH
    return f"{count(row['overflow_steps'])}/{count(row['attempted_steps'])}{of_seeds(row['overflow_seeds'], row)}"


def final_metric(row: Row) -> str:
    """Write the mean of the metric over seeds, and its range if seeds differ; or that the workload has none."""
    if row["has_metric"] is False:
        return "none: synthetic inputs" if row["synthetic_inputs"] else "none"
    name = row["metric_name"]
    mean = metric(row["metric_mean"], name)
    ends = span([metric(row["metric_min"], name), metric(row["metric_max"], name)])
    written = mean if ends == mean else f"{mean} ({ends})"
    return written if row["metric_mean"] is None else written + of_seeds(row["metric_seeds"], row)


def statuses(row: Row) -> str:
    """Count the cases by status, including those that were not started."""
    waiting = f"not started {row['not_started']}" if row["not_started"] else ""
    return ", ".join(filter(None, (row["statuses"], waiting)))


def metric_why(row: Row) -> str:
    """Return the reason for the verdict on the metric, and the seeds that it leaves out; may be empty."""
    return "; ".join(filter(None, (row["metric_reason"], row["metric_left_out"])))


@lru_cache(maxsize=8)
def by_place(run: Run) -> Mapping[Place, Sequence[Record]]:
    """The cases of a run by workload and mode, as tables name them. Do not change them: they are made once."""
    return grouped(run.records)


@lru_cache(maxsize=32)
def measured(run: Run, trained: bool = False, good: bool = False) -> Sequence[tuple[str, str, list[Record]]]:
    """Cases whose figures count, by workload and mode as tables name them, in the order of the summary.

    Args:
        run: the run.
        trained: only cases that trained to the end.
        good: only cases of seeds that were not lost, which the costs of a mode are computed from.
    """
    found = []
    for (workload, mode), group in by_place(run).items():
        records = of_good_trainings(group) if good else [case for case in group if case["status"] in MEASURED]
        records = [case for case in records if case["repeat"] == 0] if trained else records
        if records:
            found.append((workload, mode, records))
    return found


def overflow(run: Run) -> Table:
    """Show applied and skipped steps and the loss scale over the seeds of each mixed mode."""
    rows = []
    for workload, mode, records in measured(run, trained=True):
        if not is_mixed(records[0]["mode"]) or not values_of(records, "attempted_steps"):
            continue
        initial, final = _scales(records, "loss_scale_initial"), _scales(records, "loss_scale_final")
        first, last = values_of(records, "first_overflow_step"), values_of(records, "last_overflow_step")
        lowest, highest = values_of(records, "loss_scale_min"), values_of(records, "loss_scale_max")
        rows.append(
            [
                workload,
                mode,
                *(_total(records, name) for name in _STEP_COUNTS.values()),
                count(max(values_of(records, "longest_skip_run"), default=None)),
                span([count(min(first, default=None)), count(max(last, default=None))]),
                DASH if initial == final == DASH else f"{initial} -> {final}",
                span([loss_scale(min(lowest, default=None)), loss_scale(max(highest, default=None))]),
            ]
        )
    headings = [
        *(Heading(text, COLUMNS[name].help(Over.SUM)) for text, name in _STEP_COUNTS.items()),
        Heading("longest skip run", COLUMNS["longest_skip_run"].help(Over.MAX)),
        Heading("first to last overflow", "The first and the last step of any process with a non-finite gradient."),
        Heading(
            "loss scale, first -> last step", "The loss scale of the first step and of the last, over the processes."
        ),
        Heading("min to max", "The smallest and the largest loss scale of any step of any process."),
    ]
    return Table([*PLACE, *headings], rows).without_blank()


def _total(records: Sequence[Record], name: str) -> str:
    known = values_of(records, name)
    return count(sum(known)) + of_all(len(known), len(records), "seed") if known else DASH


def _scales(records: Sequence[Record], name: str) -> str:
    return span([loss_scale(value) for value in sorted(values_of(records, name))])


def by_seed(run: Run) -> Table:
    """Show the metric of every seed in every mode, or its status."""
    trained = [record for record in run.records if record["repeat"] == 0 and record["status"] != "unsupported"]
    modes = modes_of(trained)
    names = {record["workload"]: record["metric_name"] for record in trained if record["metric_name"] is not None}
    found: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for record in sorted(trained, key=lambda record: record["seed"]):
        name = metric_name(names.get(record["workload"]))
        ended = record["status"] in MEASURED

        def put(label: str, written: str, record: Record = record) -> None:
            workload, mode = record.place
            found.setdefault((workload, label), {}).setdefault(record["seed"], {})[mode] = written

        if ended and record["metric_value"] is not None:
            put(name, metric(record["metric_value"], record["metric_name"]))
        elif record["status"] != "ok":
            # A gap would look like a seed that was not planned.
            put(name, str(record["status"]))
        if ended and record["published_metric_value"] is not None:
            put(f"{name}, published test set", metric(record["published_metric_value"], record["metric_name"]))
    return Table(
        ["workload", "metric", "seed", *modes],
        [
            [workload, name, count(seed), *(by_mode.get(mode, DASH) for mode in modes)]
            for (workload, name), by_seed in found.items()
            for seed, by_mode in by_seed.items()
        ],
    )


def against_fp32(run: Run) -> Table:
    """Show whether each mode trains as well as fp32, seed by seed, and how many seeds reached the workload's target."""
    rows = [
        [
            *place_of(row),
            _difference(row) if row["metric_verdict"] else DASH,
            count(row["metric_pairs"]) if row["metric_verdict"] else DASH,
            metric_margin(row["metric_margin"], row["metric_name"]),
            verdict(row),
            DASH if row["target_reached"] is None else f"{row['target_reached']} of {row['seeds_planned']}",
            count(row["steps_to_target"]),
        ]
        for row in summary_of(run)
        if row["metric_verdict"] is not None or row["target_reached"] is not None
    ]
    headings = [
        heading("difference", "metric_difference"),
        heading("seeds", "metric_pairs"),
        heading("margin", "metric_margin"),
        Heading("verdict", QUALITY.help, is_number=False),
        heading("reached the target", "target_reached"),
        heading("steps to it", "steps_to_target"),
    ]
    return Table([*PLACE, *headings], rows).without_blank()


def _difference(row: Row) -> Cell:
    """Write the difference of the metric to fp32's, with a bar that has the margin as a band."""
    value, low, high = (row[f"metric_difference{end}"] for end in ("", "_low", "_high"))
    margin, higher = row["metric_margin"], row["metric_higher_is_better"]
    bar = None
    if value is not None and margin and higher is not None:
        bar = bars.difference(value, None if low is None else (low, high), margin, higher)
    return Cell(metric_difference(value, low, high, row["metric_name"]), bar=bar)


def verdict(row: Row) -> Cell:
    """Say if the metric is as good as that of fp32, and why if the numbers do not show it."""
    needed = row["metric_seeds_needed"]
    said = quality(row) + ("" if needed is None else f" ({plural(needed, 'seed')} would decide)")
    return Cell(": ".join(filter(None, (said, metric_why(row)))), look_of(quality(row)))


def without_metric(run: Run) -> list[Table | str]:
    """Show throughput and loss of workloads without a metric, medians over their processes, and why they have none."""
    rows, synthetic = [], False
    for workload, mode, records in measured(run):
        if not have_no_metric(records):
            continue
        synthetic = synthetic or any(record["synthetic_inputs"] for record in records)
        known = {
            name: statistics.median(values) if (values := values_of(records, name)) else None
            for name in ("batch_size", "examples_per_s", "train_loss_first", "train_loss_final")
        }
        batch = None if known["batch_size"] is None else round(known["batch_size"])
        rows.append([workload, mode, count(batch), *(number(known[name], 4) for name in list(known)[1:])])
    if not rows:
        return []
    why = (
        " Synthetic inputs are drawn at random: there is nothing to learn, so no accuracy is given."
        if synthetic
        else ""
    )
    names = ("batch_size", "examples_per_s", "train_loss_first", "train_loss_final")
    texts = ("batch", "examples per second", "loss of the first step", "loss of the last steps")
    headings = [Heading(text, COLUMNS[name].help(Over.MEDIAN)) for text, name in zip(texts, names, strict=True)]
    return [
        Table([*PLACE, *headings], rows),
        f"Nothing is evaluated, and nothing is said about how well these train.{why}",
    ]
