"""A comparison of runs: tables for a terminal or markdown, CSV and JSON for programs."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import ascii_uppercase

from mpscale.analysis.change import SINGLE_RUN, Change
from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.gates import Finding
from mpscale.analysis.noise_floor import FEWEST_RUNS
from mpscale.analysis.pairs import State
from mpscale.analysis.quantities import COSTS, Ranked, Verdict
from mpscale.analysis.summary import Quality, Row, summary_of
from mpscale.analysis.trainings import by_reason, overflow_unknown
from mpscale.core.machines import hardware, machine_words
from mpscale.core.record import common, place_of
from mpscale.core.runs import Run
from mpscale.report.comparison_data import COLUMNS, content, lines, why
from mpscale.report.part import Part
from mpscale.report.sections import doubts_note, final_metric, overflow_steps, speedup, step_time
from mpscale.report.sweep import NOTE_ON_LOGICAL
from mpscale.report.table import (
    DASH,
    Cell,
    Look,
    Table,
    change,
    count,
    interval,
    json_document,
    large,
    metric_difference,
    number,
    of_processes,
    plural,
)
from mpscale.report.words import AGAINST_RUN
from mpscale.terminal.streams import PIPE, Surface

FORMATS = ("table", "markdown", "csv", "json")

_SEVERAL = 4
"""Fewest rows whose median change is shown, because it tells something about the machine."""

_LOOKS: dict[Verdict, Look] = {
    Verdict.SLOWER: "bad",
    Verdict.MORE: "bad",
    Verdict.WORSE: "bad",
    Verdict.FASTER: "good",
    Verdict.LESS: "good",
    Verdict.NON_INFERIOR: "good",
    Verdict.CANNOT_TELL: "unknown",
    Verdict.INCONCLUSIVE: "unknown",
    Verdict.NOT_COMPARABLE: "unknown",
}

_NOTE_ON_SCALING = (
    "Examples per second and replica of the run with more replicas, over those of the other. The batch of a replica is "
    "the same, so 1 means that twice the replicas take twice the examples in the same time (weak scaling). The runs "
    "were made at different times: the interval holds how much two runs differ, which is assumed."
)

_DIFFERENCES = 12
"""Most differences in the environment that are listed."""


def render(comparisons: Sequence[Comparison], findings: Sequence[Finding], output: str, surface: Surface = PIPE) -> str:
    """Show the comparisons of one baseline with one or more runs.

    Args:
        comparisons: all with the same baseline.
        findings: results of the gates; empty if there were none.
        output: one of :data:`FORMATS`.
        surface: where a table will be shown.
    """
    if output == "csv":
        return Table.of(COLUMNS, (line for each in comparisons for line in lines(each))).csv()
    if output == "json":
        return json_document("compare", content(comparisons, findings))
    return _joined(parts(comparisons, findings), output, surface)


def render_alone(run: Run, findings: Sequence[Finding], output: str, surface: Surface = PIPE) -> str:
    """Show what limits found in a run that is compared with none; see :func:`render`.

    There is no CSV: its lines are those of a comparison.
    """
    if output == "json":
        return json_document("compare", content([], findings))
    return _joined(parts_alone(run, findings), output, surface)


def _joined(shown: Iterable[Part], output: str, surface: Surface) -> str:
    texts = (part.markdown() if output == "markdown" else part.text(surface) for part in shown)
    return "\n\n".join(texts) + "\n"


def compared_runs(comparisons: Sequence[Comparison]) -> tuple[list[Run], dict[int, str]]:
    """Return the runs, the baseline first, and the letter that tables have for each, by the id of the object."""
    runs = [comparisons[0].baseline, *(comparison.other for comparison in comparisons)]
    letters = itertools.chain(ascii_uppercase, (f"R{number}" for number in itertools.count(len(ascii_uppercase))))
    return runs, {id(run): letter for run, letter in zip(runs, letters, strict=False)}


def parts(comparisons: Sequence[Comparison], findings: Sequence[Finding]) -> Iterator[Part]:
    """Yield the tables and notes of a comparison, for a terminal or a page."""
    runs, names = compared_runs(comparisons)
    noted = [f"{names[id(run)]}: {run.note}" for run in runs if run.note]
    yield Part("Runs", ["", "run", "device", "cases"], [[names[id(run)], *_run(run)] for run in runs], noted)
    yield Part("In short", notes=[_in_short(comparison, names) for comparison in comparisons])
    if len(runs) > 2 or not comparisons[0].same_device:
        yield from _side_by_side(runs, names)
    for comparison in comparisons:
        against = f"{names[id(comparison.other)]} against {names[id(comparison.baseline)]}"
        verdicts = {change.verdict for row in comparison.rows for change in row.changes.values()}
        yield from _versions(comparison, against)
        if Verdict.NOT_COMPARABLE not in verdicts:
            yield from _verdicts(comparison, against)
        yield from _scaling(comparison, against)
        yield from _unpaired(comparison, against)
        yield from _environment(comparison, against)
    if findings:
        yield gates_part(findings, {run.name: names[id(run)] for run in runs})
    if notes := unread(comparisons):
        yield Part("What could not be read", notes=notes)


def parts_alone(run: Run, findings: Sequence[Finding]) -> Iterator[Part]:
    """Yield the tables of a run that limits judge, for a terminal or a page."""
    yield Part("Run", ["run", "device", "cases"], [_run(run)], [run.note] if run.note else [])
    yield gates_part(findings)
    if run.problems:
        yield Part("What could not be read", notes=run.problems)


def of_a_run(comparisons: Sequence[Comparison], findings: Sequence[Finding], note: str | None, fails: bool) -> str:
    """The JSON of :func:`render` for a pytest run with a baseline, with what its gates came to.

    Args:
        comparisons: the run's, or none.
        findings: results of the gates, of which some need no comparison.
        note: why no gate was judged.
        fails: whether the gates fail the run.
    """
    return json_document("compare", {"fails": fails, "note": note, **content(comparisons, findings)})


def unread(comparisons: Sequence[Comparison]) -> list[str]:
    """List what could not be read in the compared runs and in other runs of the baseline's code, a sentence each."""
    runs = [comparisons[0].baseline, *(comparison.other for comparison in comparisons)]
    notes = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    others = [left_out for comparison in comparisons for left_out in comparison.floors.left_out]
    return list(dict.fromkeys([*notes, *(f"{folder} was left out: {reason}" for folder, reason in others)]))


def models(comparison: Comparison) -> list[str]:
    """Say what changed in the model of each workload, a sentence each; empty if none did."""
    pairs = [row.pair for row in comparison.rows]
    return list(dict.fromkeys(f"{pair.workload}: the model changed: {pair.said}" for pair in pairs if pair.versions))


def _in_short(comparison: Comparison, names: dict[int, str]) -> str:
    """Count the rows by verdict, the most important verdict first."""
    rows = comparison.rows
    times: Counter[Ranked] = Counter(row.changes["step_time"].verdict for row in rows if "step_time" in row.changes)
    metrics: Counter[Ranked] = Counter(row.quality.verdict for row in rows if row.quality is not None)
    states: Counter[Ranked] = Counter(row.pair.state for row in rows if row.pair.state is not State.PAIRED)
    parts = [plural(len(rows), "row")]
    if times[Verdict.NOT_COMPARABLE]:
        parts.append("from different machines, so step times are not judged")
    elif times:
        parts.append("step time " + _numbers(times))
        changes = [row.changes["step_time"].change for row in rows if "step_time" in row.changes]
        known = [change for change in changes if change is not None]
        if len(known) >= _SEVERAL:
            # The state of the machine moves all rows; a change to the code hardly ever does.
            parts.append(f"median change of all rows {statistics.median(known):+.1%}")
    if metrics:
        parts.append("metric " + _numbers(metrics))
    if states:
        parts.append(_numbers(states))
    if other := sum(bool(row.pair.versions) for row in rows):
        parts.append(f"another version of the model in {plural(other, 'row')}")
    return f"{names[id(comparison.other)]} against {names[id(comparison.baseline)]}: {'; '.join(parts)}"


def _numbers(counts: Counter[Ranked]) -> str:
    """Return all counts, ordered by rank."""
    ranked = sorted(counts, key=lambda word: word.rank)
    return ", ".join(f"{counts[word]} {AGAINST_RUN[word] if isinstance(word, Verdict) else word}" for word in ranked)


def _verdict(verdict: Verdict) -> Cell:
    return Cell(AGAINST_RUN[verdict], _LOOKS.get(verdict, ""))


def _run(run: Run) -> list[str]:
    started = f"{len(run.records)}"
    if run.not_started:
        started += f" of {len(run.records) + len(run.not_started)}"
    if not run.finished:
        started += ", not finished"
    return [run.shown, machine_words(hardware(run)), started]


def _side_by_side(runs: Sequence[Run], names: dict[int, str]) -> Iterator[Part]:
    """Ratios within each machine come first: only they may be compared between machines."""
    summaries = {id(run): {place_of(row): row for row in summary_of(run)} for run in runs}
    keys = list(dict.fromkeys(key for rows in summaries.values() for key in rows))

    doubtful = doubts_note([row for rows in summaries.values() for row in rows.values()])

    def table(title: str, cell: Callable[[Row], str], note: str) -> Iterator[Part]:
        found = {key: [cell(row) if (row := summaries[id(run)].get(key)) else DASH for run in runs] for key in keys}
        rows = [[*key, *texts] for key, texts in found.items() if any(text != DASH for text in texts)]
        if rows:
            yield Part(title, ["workload", "mode", *(names[id(run)] for run in runs)], rows, [note])

    def of(row: Row, text: str, processes: str) -> str:
        # These tables have no status column that would show a missing process.
        return text if text == DASH else text + of_processes(row[processes], row)

    for baseline in ("fp32", "tf32"):

        def ratio(row: Row, baseline: str = baseline) -> str:
            return DASH if row["mode"] == baseline else of(row, speedup(row, baseline), f"speedup_{baseline}_pairs")

        yield from table(
            f"Speed-up over {baseline}, within each run",
            ratio,
            f"Above 1.00 is faster; 95 % interval. {doubtful}".strip(),
        )
    yield from table(
        "GPU memory over fp32, within each run",
        lambda row: DASH if row["mode"] == "fp32" else of(row, number(row["gpu_memory_ratio"]), "gpu_memory_processes"),
        "Peak of the process according to the driver; below 1 is less.",
    )
    yield from table("Final metric", final_metric, "Mean over seeds, with minimum and maximum.")
    yield from table("Overflow steps of attempted steps", overflow_steps, "A dash: the mode does not check gradients.")
    yield from table(
        "Step time",
        lambda row: of(row, step_time(row), "processes"),
        "On different machines: how fast each is, not what mixed precision does on it.",
    )
    yield from table(
        "Peak GPU memory (MiB)",
        lambda row: of(row, large(row["gpu_memory_mib"]), "gpu_memory_processes"),
        "According to the driver.",
    )


def _versions(comparison: Comparison, against: str) -> Iterator[Part]:
    """What changed in the models of rows that are compared all the same: once for all modes of which it is true."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for pair in (row.pair for row in comparison.rows):
        for one in pair.versions:
            found.setdefault((pair.workload, one.what, one.before, one.after), []).append(pair.mode)
    modes = {
        workload: [row.pair.mode for row in comparison.rows if row.pair.workload == workload and row.pair.versions]
        for workload, *_ in found
    }
    if found:
        rows = [
            [workload, "all" if of == modes[workload] else ", ".join(of), what, before or DASH, after or DASH]
            for (workload, what, before, after), of in found.items()
        ]
        note = "The model changed, so a verdict on these rows is about the model as much as about the software."
        yield Part(
            f"{against}: what changed in the model", ["workload", "modes", "what", "before", "after"], rows, [note]
        )


def _verdicts(comparison: Comparison, against: str) -> Iterator[Part]:
    rows = [row for row in comparison.rows if row.pair.state is State.PAIRED]
    for name, cost in COSTS.items():
        changed = [(row, row.changes[name]) for row in rows if name in row.changes]
        if changed:
            yield Part(
                f"{against}: {cost.title}",
                ["workload", "mode", "before", "after", "change", "noise floor", "smallest visible", "verdict", "why"],
                [[row.pair.workload, row.pair.mode, *_change_cells(change, cost.unit, row)] for row, change in changed],
                _noise(comparison, [change for _, change in changed]),
            ).with_reasons_below()
    trained = [(row, row.quality) for row in rows if row.quality is not None]
    if trained:
        yield Part(
            f"{against}: metric, seed by seed",
            ["workload", "mode", "difference", "seeds", "verdict", "why"],
            [[row.pair.workload, row.pair.mode, *_quality_cells(quality, row)] for row, quality in trained],
        ).with_reasons_below()
    rated = [row for row in rows if row.overflow_rates != (None, None)]
    if rated:
        yield Part(
            f"{against}: overflow steps of attempted steps",
            ["workload", "mode", "before", "after"],
            [[row.pair.workload, row.pair.mode, *_rates(row)] for row in rated],
        )


def _change_cells(found: Change, unit: str, row: ComparedRow) -> list[str]:
    floor, visible = (DASH if share is None else f"{share:.1%}" for share in (found.noise_floor, found.detectable))
    return [
        large(found.baseline, unit),
        large(found.other, unit),
        change(found.change, found.low, found.high),
        f"{floor}?" if found.floor_runs == 0 else floor,
        visible,
        _verdict(found.verdict),
        "; ".join(filter(None, (why(found), _model(row)))),
    ]


def _model(row: ComparedRow) -> str:
    return "the model changed" if row.pair.versions else ""


def _noise(comparison: Comparison, changes: Sequence[Change]) -> list[str]:
    """Explain where the noise floors of a table come from."""
    if comparison.in_turns:
        return ["The runs were interleaved, process by process, so the state of the machine was the same for both."]
    notes = []
    runs = {change.floor_runs for change in changes if change.floor_runs is not None}
    if runs - {0}:
        notes.append(
            f"Noise floor: 95 % limit on the difference between two runs of the same code, from {max(runs)} runs of "
            "the baseline's code on this machine."
        )
    if 0 in runs:
        notes.append(
            f"{SINGLE_RUN.capitalize()} (?): how much runs of the same code differ is unknown, and assumed from how "
            f"much processes of one run do. {FEWEST_RUNS} runs of the baseline's code would show it, or `mpscale ab`."
        )
    return notes


def _quality_cells(quality: Quality, row: ComparedRow) -> list[str]:
    found = quality.difference
    name = common([*row.pair.baseline, *row.pair.other], "metric_name")
    difference = DASH if found is None else metric_difference(found.mean, found.low, found.high, name)
    seeds = DASH if found is None else count(found.n)
    needed = f"{quality.seeds} seeds would decide" if quality.seeds else ""
    more = "; ".join(filter(None, (needed, quality.why, _model(row))))
    return [difference, seeds, _verdict(quality.verdict), more]


def _rates(row: ComparedRow) -> list[str]:
    """Return both overflow rates, each with the seeds whose overflow is unknown."""
    found = []
    sides = zip(row.overflow_rates, (row.pair.baseline, row.pair.other), row.pair.not_started, strict=True)
    for rate, cases, waiting in sides:
        unknown = by_reason(overflow_unknown(cases, waiting)) if rate is not None else ""
        found.append((DASH if rate is None else f"{rate:.2%}") + (f" (not of {unknown})" if unknown else ""))
    return found


def _scaling(comparison: Comparison, against: str) -> Iterator[Part]:
    """The scaling efficiency of rows that differ in the number of replicas alone."""
    found = [(row, row.scaling) for row in comparison.rows if row.scaling is not None]
    if not found:
        return
    sides_of = [f"{what} {when}" for when in ("before", "after") for what in ("replicas", "examples per second")]
    headers = ["workload", "mode", "batch per replica", *sides_of, "scaling efficiency", "why"]
    rows = []
    for row, scaled in found:
        sides = zip(scaled.replicas, scaled.examples_per_s, strict=True)
        cells = [cell for replicas, rate in sides for cell in (count(replicas), number(rate, 4))]
        shown = interval(scaled.efficiency, scaled.low, scaled.high, "")
        rows.append([*row.pair.place, count(scaled.batch), *cells, shown, scaled.reason or ""])
    logical = comparison.hardware[1]["kind"] == "cpu"
    notes = [_NOTE_ON_SCALING, NOTE_ON_LOGICAL] if logical else [_NOTE_ON_SCALING]
    yield Part(f"{against}: scaling over replicas", headers, rows, notes).with_reasons_below()


def _unpaired(comparison: Comparison, against: str) -> Iterator[Part]:
    pairs = [row.pair for row in comparison.rows]
    rows = [
        [pair.workload, pair.mode, pair.state, pair.reason or ""]
        for pair in pairs
        if pair.state is not State.PAIRED or pair.reason
    ]
    rows += [
        [pair.workload, pair.mode, "failed", case]
        for pair in pairs
        if pair.state is State.PAIRED
        for case in pair.newly_failed
    ]
    if rows:
        yield Part(f"{against}: rows that cannot be compared as they are", ["workload", "mode", "", "why"], rows)


def _environment(comparison: Comparison, against: str) -> Iterator[Part]:
    if found := comparison.differences:
        more = [f"and {len(found) - _DIFFERENCES} more"] if len(found) > _DIFFERENCES else []
        title = f"{against}: differences in the environment"
        yield Part(title, ["", "before", "after"], found[:_DIFFERENCES], more)


def gates_part(findings: Sequence[Finding], letters: Mapping[str, str] | None = None) -> Part:
    """What each gate found in each row, what fired first; ``letters`` has that of each run, by name, if several."""
    rows = [
        [str(found.gate), found.outcome]
        + ([] if letters is None else [letters[found.run]])
        + [" ".join(found.row or ("no row",)), found.text]
        for found in sorted(findings, key=lambda found: found.outcome.rank)
    ]
    return Part("Gates", ["gate", "outcome", *([] if letters is None else ["run"]), "row", "what was found"], rows)
