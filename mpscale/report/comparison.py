"""A comparison of runs for people: tables for a terminal or markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from tabulate import tabulate

from mpscale.analysis.change import SINGLE_RUN, Change
from mpscale.analysis.compare import ComparedRow, Comparison, State
from mpscale.analysis.gates import Finding
from mpscale.analysis.noise_floor import FEWEST_RUNS
from mpscale.analysis.quantities import COSTS, Ranked, Verdict
from mpscale.analysis.summary import Quality, Row, summary_of
from mpscale.analysis.trainings import by_reason, overflow_unknown
from mpscale.core.record import common
from mpscale.core.runs import Run, hardware, machine_words
from mpscale.report import table as cells
from mpscale.report.table import Cells, as_csv, as_json, final_metric, markdown_table, overflow, speedup, step_time

FORMATS = ("table", "markdown", "csv", "json")

_SEVERAL = 4
"""Rows whose median says something of the machine."""

_SHOWN = 12
"""Differences of the environment that are listed."""


def render(comparisons: Sequence[Comparison], findings: Sequence[Finding], output: str) -> str:
    """The comparisons of one baseline with one run or more.

    Args:
        comparisons: all of the same baseline.
        findings: of the gates, empty where there were none.
        output: one of :data:`FORMATS`.
    """
    if output == "csv":
        return as_csv(comparisons)
    if output == "json":
        return as_json(comparisons, findings)
    parts = list(_parts(comparisons, findings))
    if output == "markdown":
        return "\n\n".join(part.markdown() for part in parts) + "\n"
    return "\n\n".join(part.text() for part in parts) + "\n"


@dataclass(frozen=True, slots=True)
class _Part:
    """A heading, a table and notes; what is empty is left out."""

    title: str
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        table = tabulate(self.rows, self.headers, "simple", disable_numparse=True) if self.rows else ""
        return "\n\n".join(filter(None, [self.title, table, "\n".join(self.notes)]))

    def markdown(self) -> str:
        table = markdown_table(self.headers, self.rows) if self.rows else ""
        notes = "\n".join(f"- {' '.join(note.split())}" for note in self.notes)
        return "\n\n".join(filter(None, [f"## {self.title}", table, notes]))


def _parts(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> Iterator[_Part]:
    runs = [comparisons[0].baseline, *(comparison.other for comparison in comparisons)]
    names = {id(run): _letter(number) for number, run in enumerate(runs)}
    yield _Part("Runs", ["", "run", "device", "cases"], [[names[id(run)], *_run(run)] for run in runs])
    yield _Part("In short", notes=[_in_short(comparison, names) for comparison in comparisons])
    if len(runs) > 2 or not comparisons[0].same_device:
        yield from _side_by_side(runs, names)
    for comparison in comparisons:
        against = f"{names[id(comparison.other)]} against {names[id(comparison.baseline)]}"
        if not any(change.verdict is Verdict.NOT_COMPARABLE for change in _changes(comparison)):
            yield from _verdicts(comparison, against)
        yield from _unpaired(comparison, against)
        yield from _environment(comparison, against)
    if findings:
        yield _gates(findings, {run.name: names[id(run)] for run in runs})
    if notes := unread(comparisons):
        yield _Part("What could not be read", notes=notes)


def unread(comparisons: Sequence[Comparison]) -> list[str]:
    """What of the compared runs, and which runs of the baseline's code, could not be read, one sentence each."""
    runs = [comparisons[0].baseline, *(comparison.other for comparison in comparisons)]
    notes = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    others = [left_out for comparison in comparisons for left_out in comparison.floors.left_out]
    return list(dict.fromkeys([*notes, *(f"{folder} was left out: {reason}" for folder, reason in others)]))


def _in_short(comparison: Comparison, names: dict[int, str]) -> str:
    """How many rows came out how, most telling first."""
    rows = comparison.rows
    times: Counter[Ranked] = Counter(row.changes["step_time"].verdict for row in rows if "step_time" in row.changes)
    metrics: Counter[Ranked] = Counter(row.quality.verdict for row in rows if row.quality is not None)
    states: Counter[Ranked] = Counter(row.pair.state for row in rows if row.pair.state is not State.PAIRED)
    parts = [f"{len(rows)} row{'' if len(rows) == 1 else 's'}"]
    if times[Verdict.NOT_COMPARABLE]:
        parts.append("of different machines, so step times are not judged")
    elif times:
        parts.append("step time " + _numbers(times))
        changes = [row.changes["step_time"].change for row in rows if "step_time" in row.changes]
        known = [change for change in changes if change is not None]
        if len(known) >= _SEVERAL:
            # A machine in another state moves all rows; hardly any change of code does.
            parts.append(f"median change of all rows {statistics.median(known):+.1%}")
    if metrics:
        parts.append("metric " + _numbers(metrics))
    if states:
        parts.append(_numbers(states))
    return f"{names[id(comparison.other)]} against {names[id(comparison.baseline)]}: {'; '.join(parts)}"


def _numbers(counts: Counter[Ranked]) -> str:
    """All that were counted, so that no word can be forgotten."""
    return ", ".join(f"{counts[word]} {word}" for word in sorted(counts, key=lambda word: word.rank))


def _letter(number: int) -> str:
    return ascii_uppercase[number] if number < len(ascii_uppercase) else f"R{number}"


def _run(run: Run) -> list[str]:
    started = f"{len(run.records)}"
    if run.not_started:
        started += f" of {len(run.records) + len(run.not_started)}"
    if not run.finished:
        started += ", not finished"
    return [run.name, machine_words(hardware(run)), started]


def _changes(comparison: Comparison) -> Iterator[Change]:
    for row in comparison.rows:
        yield from row.changes.values()


def _side_by_side(runs: Sequence[Run], names: dict[int, str]) -> Iterator[_Part]:
    """Ratios within each machine first: they are what may be compared between machines."""
    summaries = {id(run): {(row["workload"], row["mode"]): row for row in summary_of(run)} for run in runs}
    keys = list(dict.fromkeys(key for rows in summaries.values() for key in rows))

    def table(title: str, cell: Callable[[Row], str], note: str) -> Iterator[_Part]:
        found = {
            key: [cell(row) if (row := summaries[id(run)].get(key)) else cells.DASH for run in runs] for key in keys
        }
        rows = [[*key, *texts] for key, texts in found.items() if any(text != cells.DASH for text in texts)]
        if rows:
            yield _Part(title, ["workload", "mode", *(names[id(run)] for run in runs)], rows, [note])

    def of(row: Row, text: str, processes: str) -> str:
        """``text``, and of how many processes it is where not all are in it: no status stands beside it here."""
        return text if text == cells.DASH else text + cells.of_processes(row[processes], row)

    for baseline in ("fp32", "tf32"):

        def ratio(row: Row, baseline: str = baseline) -> str:
            return (
                cells.DASH if row["mode"] == baseline else of(row, speedup(row, baseline), f"speedup_{baseline}_pairs")
            )

        yield from table(f"Speed-up over {baseline}, within each run", ratio, "Above 1.00 is faster; 95 % interval.")
    yield from table(
        "GPU memory over fp32, within each run",
        lambda row: (
            cells.DASH
            if row["mode"] == "fp32"
            else of(row, cells.number(row["gpu_memory_ratio"]), "gpu_memory_processes")
        ),
        "Peak of the process by NVML; below 1 is less.",
    )
    yield from table("Final metric", final_metric, "Mean over seeds, with smallest and largest.")
    yield from table("Overflow steps of attempted steps", overflow, "A dash: the mode checks no gradient.")
    yield from table(
        "Step time",
        lambda row: of(row, step_time(row), "processes"),
        "Of different machines: how fast each is, not what mixed precision does on it.",
    )
    yield from table(
        "Peak GPU memory (MiB)",
        lambda row: of(row, cells.number(row["gpu_memory_mib"], 4), "gpu_memory_processes"),
        "By NVML.",
    )


def _verdicts(comparison: Comparison, against: str) -> Iterator[_Part]:
    rows = [row for row in comparison.rows if row.pair.state is State.PAIRED]
    for name, cost in COSTS.items():
        changed = [(row, row.changes[name]) for row in rows if name in row.changes]
        if changed:
            yield _Part(
                f"{against}: {cost.title}",
                ["workload", "mode", "before", "after", "change", "noise floor", "smallest visible", "verdict"],
                [[row.pair.workload, row.pair.mode, *_change_cells(change, cost.unit)] for row, change in changed],
                _noise(comparison, [change for _, change in changed]),
            )
    trained = [(row, row.quality) for row in rows if row.quality is not None]
    if trained:
        yield _Part(
            f"{against}: metric, seed by seed",
            ["workload", "mode", "difference", "seeds", "verdict"],
            [[row.pair.workload, row.pair.mode, *_quality_cells(quality, row)] for row, quality in trained],
        )
    rated = [row for row in rows if row.overflow_rates != (None, None)]
    if rated:
        yield _Part(
            f"{against}: overflow steps of attempted steps",
            ["workload", "mode", "before", "after"],
            [[row.pair.workload, row.pair.mode, *_rates(row)] for row in rated],
        )


def _change_cells(change: Change, unit: str) -> list[str]:
    before, after = (
        cells.DASH if v is None else f"{cells.number(v, 4)} {unit}" for v in (change.baseline, change.other)
    )
    text = cells.DASH if change.change is None else f"{change.change:+.1%}"
    if change.low is not None and change.high is not None:
        text += f" [{change.low:+.1%}, {change.high:+.1%}]"
    floor, visible = (
        cells.DASH if share is None else f"{share:.1%}" for share in (change.noise_floor, change.detectable)
    )
    if change.floor_runs == 0:
        floor += "?"
    # Left out is the reason itself where nothing else speaks against a verdict.
    why = "; ".join(dict.fromkeys(filter(None, (change.reason, change.left_out))))
    verdict = f"{change.verdict}: {why}" if why else change.verdict
    return [before, after, text, floor, visible, verdict]


def _noise(comparison: Comparison, changes: Sequence[Change]) -> list[str]:
    """What the noise floors of a table rest on."""
    if comparison.in_turns:
        return ["Both ran in turns, process by process: no state of the machine lies between them."]
    notes = []
    runs = {change.floor_runs for change in changes if change.floor_runs is not None}
    if runs - {0}:
        notes.append(
            f"Noise floor: two runs of the same code differ by less in 19 of 20 cases, by {max(runs)} runs of the "
            "baseline's code on this machine."
        )
    if 0 in runs:
        notes.append(
            f"{SINGLE_RUN.capitalize()} (?): how much runs of the same code differ here is not known, and assumed from "
            f"what processes of one run do. {FEWEST_RUNS} runs of the baseline's code would tell, or `mpscale ab`."
        )
    return notes


def _quality_cells(quality: Quality, row: ComparedRow) -> list[str]:
    found = quality.difference
    name = common([*row.pair.baseline, *row.pair.other], "metric_name")
    difference = cells.DASH if found is None else cells.difference(found.mean, found.low, found.high, name)
    seeds = cells.DASH if found is None else cells.count(found.n)
    needed = f"{quality.seeds} seeds would tell" if quality.seeds else ""
    more = "; ".join(filter(None, (needed, quality.why)))
    return [difference, seeds, f"{quality.verdict}: {more}" if more else quality.verdict]


def _rates(row: ComparedRow) -> list[str]:
    """Of the seeds that know theirs; those that do not are named."""
    found = []
    for rate, cases, waiting in zip(
        row.overflow_rates, (row.pair.baseline, row.pair.other), row.pair.not_started, strict=True
    ):
        unknown = by_reason(overflow_unknown(cases, waiting)) if rate is not None else ""
        found.append((cells.DASH if rate is None else f"{rate:.2%}") + (f" (not of {unknown})" if unknown else ""))
    return found


def _unpaired(comparison: Comparison, against: str) -> Iterator[_Part]:
    rows = [
        [row.pair.workload, row.pair.mode, row.pair.state, row.pair.reason or ""]
        for row in comparison.rows
        if row.pair.state is not State.PAIRED or row.pair.reason
    ]
    rows += [
        [row.pair.workload, row.pair.mode, "failed", failed]
        for row in comparison.rows
        if row.pair.state is State.PAIRED
        for failed in row.pair.newly_failed
    ]
    if rows:
        yield _Part(f"{against}: rows that are not compared as they stand", ["workload", "mode", "", "why"], rows)


def _environment(comparison: Comparison, against: str) -> Iterator[_Part]:
    found = comparison.differences
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        yield _Part(
            f"{against}: what differs around them", ["", "before", "after"], [list(row) for row in found[:_SHOWN]], more
        )


def _gates(findings: Sequence[Finding], letters: dict[str, str]) -> _Part:
    shown = sorted(findings, key=lambda finding: finding.outcome.rank)
    rows: Cells = [
        [
            str(finding.gate),
            finding.outcome,
            letters[finding.run],
            " ".join(finding.row or ("no row",)),
            finding.text,
        ]
        for finding in shown
    ]
    return _Part("Gates", ["gate", "outcome", "run", "row", "what was found"], rows)
