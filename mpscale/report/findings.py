"""The findings of a run in words: a paragraph on the run, and a line for each workload."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

from mpscale.analysis.answer import is_input_bound, speed_verdict
from mpscale.analysis.claim import Doubt, busy_share, doubts_of
from mpscale.analysis.quantities import Verdict
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.mode import is_mixed
from mpscale.core.record import place_of
from mpscale.core.runs import Run
from mpscale.report import costs, lint, merged, missing, sweep
from mpscale.report.about import device_kind, device_name
from mpscale.report.sections import metric_why, statuses
from mpscale.report.table import (
    escape,
    joined,
    metric_change,
    number,
    of_processes,
    plural,
    share,
)
from mpscale.report.words import WORDS, metric_name

_NAMED = 5
"""Most rows or cases that a sentence names; more are counted."""


def findings(run: Run) -> str:
    """Describe the run in a paragraph, and the mixed modes of each workload in a line of a list."""
    rows = summary_of(run)
    by_workload = _groups((row for row in rows if is_mixed(row["mode"])), lambda row: place_of(row)[0])
    told = len(_bad(rows)) <= _NAMED
    lines = [f"- **{escape(name)}**: {_workload(group, rows, told)}." for name, group in by_workload.items()]
    return "\n\n".join([_overview(run, rows), *(["\n".join(lines)] if lines else [])])


def _overview(run: Run, rows: Sequence[Row]) -> str:
    kind, name = device_kind(run), device_name(run)
    where = (f" on {escape(name)}" if name else "") + (f" ({kind.upper()})" if kind else "")
    numbers = {record["replicas"] for record in run.records} - {None}
    where += f", by {numbers.pop()} replicas" if len(numbers) == 1 and numbers != {1} else ""
    machines = max((record["machines"] or 1 for record in run.records), default=1)
    where += f" on {machines} machines" if machines > 1 else ""
    if not rows:
        return f"No case was started{where}, so there is nothing to report."
    workloads = list(dict.fromkeys(escape(row["workload"]) for row in rows))
    modes = list(dict.fromkeys(escape(row["mode"]) for row in rows))
    swept = sweep.sentence(rows)
    sentences = [f"{joined(workloads)} {'was' if len(workloads) == 1 else 'were'} run in {joined(modes)}{where}."]
    sentences += [swept] if swept else []
    sentences.append(_ending(run, rows))
    if run.not_started:
        left = len(run.not_started)
        sentences.append(f"{plural(left, 'planned case')} {'was' if left == 1 else 'were'} not started.")
    if not run.finished:
        sentences.append("The run was stopped or is still going on: this is what there is so far.")
    sentences += map(escape, filter(None, [missing.lacks(run), *missing.interruptions(run), *merged.sentences(run)]))
    sentences += _no_metric(rows)
    sentences += map(escape, lint.sentences(run))
    if jumped := sum(row["two_level_processes"] for row in rows):
        whose = plural(jumped, "process")
        sentences.append(f"The step time of {whose} jumped between two levels (see Timing quality).")
    sentences += _refused_by_xla(run)
    if costs.without_xla(run):
        sentences.append(
            "Steps were not compiled with XLA, which on a GPU can change more than the mode does (see Timing quality)."
        )
    if kind == "cpu":
        sentences.append("It ran on a CPU: the speeds below say nothing about a GPU.")
    return " ".join(sentences)


def _ending(run: Run, rows: Sequence[Row]) -> str:
    """Say how the cases ended, and which modes are worse than fp32: a run that lost a mode did not simply end well."""
    ok, cases = sum(row["ok"] for row in rows), len(run.records)
    if ok == cases:
        were = "was" if cases == 1 else "were"
        started = "" if run.finished and not run.not_started else f" that {were} started"
        said = f"{'The case' if cases == 1 else f'All {cases} cases'}{started} ran to the end"
    else:
        bad = _bad(rows)
        where = "see Cases that did not end well"
        if len(bad) <= _NAMED:
            where = "; ".join(f"{_place(row)}: {row['statuses']}" for row in bad)
        said = f"{cases - ok} of {plural(cases, 'case')} did not end well ({where})"
    worse = [row for row in rows if row["metric_verdict"] is Verdict.WORSE]
    if not worse:
        return f"{said}."
    verb = "is" if len(worse) == 1 else "are"
    if len(worse) > _NAMED:
        return f"{said}; {plural(len(worse), 'row')} {verb} {WORDS[Verdict.WORSE]}."
    by_workload = _groups(worse, lambda row: place_of(row)[0])
    named = [f"{_modes(group)} on {escape(workload)}" for workload, group in by_workload.items()]
    return f"{said}; {joined(named)} {verb} {WORDS[Verdict.WORSE]}."


def _bad(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["ok"] != row["cases"]]


def _place(row: Row) -> str:
    workload, mode = place_of(row)
    return f"{escape(mode)} on {escape(workload)}"


def _no_metric(rows: Sequence[Row]) -> Iterator[str]:
    """Say which workloads have no metric, and why."""
    without = [row for row in rows if row["has_metric"] is False]
    for synthetic, why in (
        (True, "synthetic inputs, so no accuracy is given"),
        (False, "no metric, so nothing was evaluated"),
    ):
        names = list(dict.fromkeys(escape(row["workload"]) for row in without if row["synthetic_inputs"] is synthetic))
        if names:
            yield f"{joined(names)} {'has' if len(names) == 1 else 'have'} {why}."


def _refused_by_xla(run: Run) -> Iterator[str]:
    """Say which workloads ran without XLA because it refused one of their cases, and what it refused."""
    refused = [record for record in run.records if record["xla_refused"] is not None and record["jit"] is False]
    for why, records in _groups(refused, lambda record: record["xla_refused"]).items():
        names = list(dict.fromkeys(escape(record["workload"]) for record in records))
        yield f"{joined(names)} ran without XLA in all modes, because it cannot compile {escape(why)}."
    slow = {record["mode"] for record in refused if record["device"] == "cpu" and record["policy"] == "mixed_float16"}
    if slow:
        yield "On a CPU, float16 without XLA can take a hundred times as long, whatever a GPU makes of it."


def _workload(group: Sequence[Row], rows: Sequence[Row], told: bool) -> str:
    """Say what the modes of a workload do.

    Args:
        group: their rows.
        rows: all rows of the run.
        told: whether the paragraph above has already said which cases did not end well.
    """
    parts = ["; ".join(_speed(group, rows)), "; ".join(_input(group)), *_quality(group)]
    parts += [*_draws(group), *_overflow(group), *_memory(group), *_cases(group, told)]
    first, *others = [part for part in parts if part] or ["nothing was measured"]
    # What comes first may begin with the name of a mode.
    return ". ".join([first, *(f"{part[:1].upper()}{part[1:]}" for part in others)])


_Key = TypeVar("_Key", bound=Hashable)
_One = TypeVar("_One")


def _groups(rows: Iterable[_One], key: Callable[[_One], _Key]) -> dict[_Key, list[_One]]:
    """The rows by key, in the order in which keys come first."""
    found: dict[_Key, list[_One]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _modes(rows: Sequence[Row], note: Callable[[Row], str] = lambda row: "") -> str:
    """Name the modes of rows, each with a note in parentheses if there is one."""
    notes = [note(row) for row in rows]
    names = [escape(place_of(row)[1]) for row in rows]
    return joined([f"{name} ({note})" if note else name for name, note in zip(names, notes, strict=True)])


def _are(rows: Sequence[Row]) -> str:
    return "is" if len(rows) == 1 else "are"


def _speed(group: Sequence[Row], rows: Sequence[Row]) -> Iterator[str]:
    """Say which modes are faster or slower, and of which nothing can be claimed, and why."""
    timed = [row for row in group if row["step_time_ms"] is not None]
    # Seeds that were lost may have been timed all the same.
    if lost := [row for row in group if row["step_time_ms"] is None and row["seeds"] and not row["ok"]]:
        yield f"no training in {_modes(lost)} ended well, so no step time counts"
    alone = [row for row in timed if row[f"speedup_{row['headline_baseline']}"] is None]
    for baseline, some in _groups(alone, lambda row: row["headline_baseline"]).items():
        beside = any(place_of(other) == (place_of(some[0])[0], baseline) for other in rows)
        why = f"with no {baseline}{' that ended well' if beside else ''} to compare with"
        times = _modes(some, lambda row: f"{number(row['step_time_ms'])} ms per step")
        yield f"{times}, {why}"
    compared = [row for row in timed if row[f"speedup_{row['headline_baseline']}"] is not None]
    groups = _groups(
        compared,
        lambda row: (row["headline_baseline"], speed_verdict(row), tuple(doubts_of(row, row["headline_baseline"]))),
    )
    for (baseline, verdict, doubts), some in groups.items():
        if doubts:
            other = next((row for row in rows if place_of(row) == (place_of(some[0])[0], baseline)), some[0])
            yield f"no claim about the speed of {_modes(some)}: {_why(some, other, doubts)}"
        elif verdict is Verdict.CANNOT_TELL:
            yield f"no difference in speed is shown for {_modes(some, _pairs)}"
        elif verdict is not None:
            names = _modes(some, _pairs)
            ratios = _range([row[f"speedup_{baseline}"] for row in some])
            yield f"{names} {_are(some)} {WORDS[verdict]} than {baseline} ({ratios} times the speed)"
        if doubts and (profiled := [row for row in some if row[f"speedup_device_{baseline}"] is not None]):
            ratios = _range([row[f"speedup_device_{baseline}"] for row in profiled])
            yield f"by GPU time alone {_modes(profiled)} {_are(profiled)} {ratios} times the speed of {baseline}"


def _input(group: Sequence[Row]) -> Iterator[str]:
    """Say what the modes gain with the input pipeline, and how long the device waits for it."""
    fed = [row for row in group if None not in (row["step_time_ms_with_input"], row["input_wait_share"])]
    for baseline, some in _groups(fed, lambda row: row["headline_baseline"]).items():
        waits = _range([100 * row["input_wait_share"] for row in some], 0)
        said = f"the device waits for input {waits} % of a step in {_modes(some)}"
        yield said
        claimed = [row for row in some if row[f"speedup_with_input_{baseline}"] and not doubts_of(row, baseline)]
        if claimed:
            ratios = _range([row[f"speedup_with_input_{baseline}"] for row in claimed])
            yield f"with that wait, training in {_modes(claimed)} is {ratios} times as fast as in {baseline}"
        if bound := [row for row in some if is_input_bound(row)]:
            yield f"{_modes(bound)} {_are(bound)} input-bound: mixed precision cannot help until the pipeline is faster"


def _pairs(row: Row) -> str:
    return of_processes(row[f"speedup_{row['headline_baseline']}_pairs"], row).strip(" ()")


def _range(values: Sequence[float], decimals: int = 2) -> str:
    low, high = f"{min(values):.{decimals}f}", f"{max(values):.{decimals}f}"
    return low if low == high else f"{low} to {high}"


def _why(rows: Sequence[Row], baseline: Row, doubts: Sequence[Doubt]) -> str:
    """Say why nothing is said about the speed of modes, with the figures of the row to which it applies most."""
    sides = [*rows, baseline]
    reasons = []
    if Doubt.IDLE in doubts:
        least, of = min((known, one["mode"]) for one in sides if (known := busy_share(one)) is not None)
        reasons.append(f"the GPU was busy {share(least)} of a step{_of(of, rows)}")
    elif Doubt.DISPATCH in doubts:
        most, of = max((one["dispatch_share"] or 0.0, one["mode"]) for one in sides if one["dispatch_bound"])
        reasons.append(f"dispatch in Python and TensorFlow took {share(most)} of a step{_of(of, rows)}")
    if Doubt.BUSY in doubts:
        busiest = max(one["host_other_cpu_share"] or 0.0 for one in sides)
        reasons.append(f"other processes took {share(busiest)} of the machine's CPU time")
    if Doubt.ONE_PAIR in doubts:
        reasons.append("there is only one pair of processes")
    return joined(reasons)


def _of(mode: str, rows: Sequence[Row]) -> str:
    return "" if [row["mode"] for row in rows] == [mode] else f" of {escape(mode)}"


def _quality(group: Sequence[Row]) -> Iterator[str]:
    """Say which modes train as well as fp32, which do not, and of which that is unknown."""
    judged = [row for row in group if row["metric_verdict"] is not None]
    if not judged:
        return
    name = next((row["metric_name"] for row in group if row["metric_name"] is not None), None)
    parts = []
    # Modes with the same verdict for the same reason share a part.
    for (verdict, why), rows in _groups(judged, lambda row: (row["metric_verdict"], _reason(row))).items():
        because = f": {escape(why)}" if why else ""
        modes, word = _modes(rows, _evidence), WORDS[verdict]
        said = f"{word} for {modes}" if verdict is Verdict.INCONCLUSIVE else f"{modes} {_are(rows)} {word}"
        parts.append(said + because)
    yield f"{escape(metric_name(name))}: {'; '.join(parts)}"


def _evidence(row: Row) -> str:
    """What a verdict on a metric is based on, if it is not plainly that all seeds are as good."""
    parts = []
    verdict, pairs = row["metric_verdict"], row["metric_pairs"]
    if row["metric_difference"] is not None and verdict is not Verdict.NON_INFERIOR:
        few = verdict is Verdict.INCONCLUSIVE or pairs < row["seeds_planned"]
        change = metric_change(row["metric_difference"], row["metric_name"])
        parts.append(f"{change} fp32" + (f" over {plural(pairs, 'seed')}" if few else ""))
    if row["metric_seeds_needed"] is not None:
        parts.append(f"{plural(row['metric_seeds_needed'], 'seed')} would decide")
    return "; ".join(parts)


def _reason(row: Row) -> str:
    """Why there is such a verdict, if it is not the numbers alone, or if seeds were lost or left out."""
    if row["metric_verdict"] is Verdict.WORSE and row["metric_reason"]:
        return str(row["metric_reason"])
    told = row["left_out"] or row["metric_left_out"] or row["metric_verdict"] is Verdict.INCONCLUSIVE
    return metric_why(row) if told else ""


def _draws(group: Sequence[Row]) -> Iterator[str]:
    """Say where random numbers or batches differ from the baseline's: they are part of a difference in the metric."""
    for column, what in (("same_draws", "dropout masks or other random draws"), ("same_batches", "the batches seen")):
        if differ := [row for row in group if row[column] is False]:
            noise = "metric differences include that noise"
            yield f"{what} in {_modes(differ)} are not those of the baseline: {noise}"


def _overflow(group: Sequence[Row]) -> Iterator[str]:
    """Count overflow steps where there were any."""
    found = [row for row in group if row["overflow_steps"]]
    if found:
        counts = joined(
            [f"{row['overflow_steps']} of {plural(row['attempted_steps'], 'step')} in {_modes([row])}" for row in found]
        )
        yield f"overflow in {counts}"


def _memory(group: Sequence[Row]) -> Iterator[str]:
    found = [row for row in group if row["gpu_memory_ratio"] is not None]
    if found:
        names = _modes(found, lambda row: of_processes(row["gpu_memory_processes"], row).strip(" ()"))
        yield f"peak GPU memory {_range([row['gpu_memory_ratio'] for row in found])} times that of float32 in {names}"


def _cases(group: Sequence[Row], told: bool) -> Iterator[str]:
    """Say how the cases of a mode ended if not all ended well."""
    for row in group:
        if not row["not_started"] and (told or row["ok"] == row["cases"]):
            continue
        # A verdict on the metric already names the seeds that were left out.
        why = f" ({escape(row['left_out'])})" if row["left_out"] and row["metric_verdict"] is None else ""
        yield f"cases of {_modes([row])}: {statuses(row)}{why}"
