"""A comparison of runs as a page: first whether each is as good as the baseline, then the tables."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from mpscale.analysis.answer import speed_verdict
from mpscale.analysis.change import SINGLE_RUN, Change
from mpscale.analysis.claim import conditions
from mpscale.analysis.compare import ComparedRow, Comparison
from mpscale.analysis.gates import Finding
from mpscale.analysis.overall import Overall, OverallAnswer, RealChange, failed_here, overall_of
from mpscale.analysis.pairs import Pair, State
from mpscale.analysis.quantities import COSTS, Outcome, Verdict
from mpscale.analysis.summary import Row, summary_of
from mpscale.core.columns import COLUMNS, MEASURED
from mpscale.core.machines import hardware, machine_words
from mpscale.core.record import common, in_order_of_modes, of_good_trainings, place_of
from mpscale.core.runs import Run
from mpscale.report import pieces
from mpscale.report.comparison import compared_runs, models, parts, parts_alone
from mpscale.report.page import shell
from mpscale.report.part import Part
from mpscale.report.pieces import (
    Tone,
    bar,
    card,
    cards,
    marked,
    matrix,
    noted,
    sentence,
    span_of,
    text,
    tone_of,
    tone_of_overall,
)
from mpscale.report.table import DASH, change, listed, metric_difference, number, plural
from mpscale.report.words import AGAINST_RUN, OVERALL, WORDS, metric_name

_SHOWN = 5
"""Most changes, differences and reasons that the first screen lists; the tables have all."""

_BUSY = COLUMNS["host_other_cpu_share"].warn_above or 1.0

_DIGEST = re.compile(r"[0-9a-f]{16,}")

_FOOTER = "The tables are those of `mpscale compare`. Intervals are 95 % intervals over processes."

_DIRECTIONS = {Verdict.SLOWER: "slower", Verdict.FASTER: "faster", Verdict.MORE: "more", Verdict.LESS: "less"}


def comparison_page(
    comparisons: Sequence[Comparison],
    findings: Sequence[Finding] = (),
    links: Mapping[str, str] = MappingProxyType({}),
    above: str = "",
) -> str:
    """Return the comparisons of one baseline with one or more runs as a page of HTML.

    Args:
        comparisons: all with the same baseline.
        findings: results of the gates; empty if there were none.
        links: to the reports of the runs, by name, if they have one.
        above: HTML above the title.
    """
    runs, names = compared_runs(comparisons)
    answers = [overall_of(comparison) for comparison in comparisons]
    letters = [names[id(comparison.other)] for comparison in comparisons]
    baseline = names[id(runs[0])]
    body = [above]
    if len(comparisons) == 1:
        said = marked(tone_of_overall(answers[0].answer), headline(comparisons[0], answers[0]))
        body.append(f"<h1>Is {letters[0]} as good as {baseline}? {said}</h1>")
    else:
        body.append(f"<h1>Is each as good as {baseline}?</h1>\n<ul class='answers'>")
        for comparison, answer, letter in zip(comparisons, answers, letters, strict=True):
            said = marked(tone_of_overall(answer.answer), headline(comparison, answer))
            body.append(f'<li><a href="#{_id(letter)}">{letter}</a> {said}</li>')
        body.append("</ul>")
    body.append(f'<ul class="runs">{"".join(_run(run, names[id(run)], links) for run in runs)}</ul>')
    if not all(comparison.same_device for comparison in comparisons):
        body.append(_within_each(runs, names))
    for comparison, answer, letter in zip(comparisons, answers, letters, strict=True):
        if len(comparisons) > 1:
            body.append(f'<h2 id="{_id(letter)}">{letter} against {baseline}</h2>')
        found = [finding for finding in findings if finding.run == comparison.other.name]
        body += [_cards(comparison, answer, found), _matrix(comparison), _not_compared(comparison)]
    body += _tables(parts(comparisons, findings), bool(findings))
    title = f"mpscale: {', '.join(run.shown for run in runs[1:])} against {runs[0].shown}"
    return shell(title, "\n".join(body), _FOOTER, pieces.STYLES)


def limits_page(run: Run, findings: Sequence[Finding]) -> str:
    """Return what limits found in a run, which is compared with none, as a page of HTML."""
    tone, said = _outcome(findings)
    word = {Tone.GOOD: "Yes", Tone.BAD: "No"}.get(tone, "Cannot tell")
    body = [f"<h1>Does the run keep its limits? {marked(tone, f'{word}: {said}')}</h1>", cards([_gates(findings)])]
    return shell(
        f"mpscale: limits of {run.shown}",
        "\n".join([*body, *_tables(parts_alone(run, findings), True)]),
        "The tables are those of `mpscale compare RUN`. Intervals are 95 % intervals over processes or seeds.",
        pieces.STYLES,
    )


def _tables(shown: Iterable[Part], sentences: bool) -> Iterator[str]:
    for part in shown:
        notes = "".join(f"<li>{sentence(note)}</li>" for note in part.notes)
        yield f"<section><h2>{text(part.title)}</h2>"
        if part.rows:
            rows = ([text(cell) for cell in row] for row in part.rows)
            yield pieces.table(part.headers, rows, sentences="why" in part.headers or sentences)
        yield f"<ul>{notes}</ul></section>" if notes else "</section>"


def headline(comparison: Comparison, answer: OverallAnswer) -> str:
    """The answer of a comparison in a few words, with how many rows."""
    word = OVERALL[answer.answer]
    if answer.answer is Overall.WORSE:
        better = f", better in {answer.better}" if answer.better else ""
        return f"No: {word} in {answer.worse} of {plural(answer.rows, 'row')}{better}"
    if answer.answer is Overall.BETTER:
        return f"Yes: {word} in {answer.better} of {plural(answer.rows, 'row')}, worse in none"
    if answer.answer is Overall.SAME:
        return f"Yes: {word} in {_judged(answer)}"
    if answer.answer is Overall.NO_DIFFERENCE:
        return f"{word[0].upper()}{word[1:]} in {_judged(answer)}"
    good = sum(row.quality is not None and row.quality.verdict is Verdict.NON_INFERIOR for row in comparison.rows)
    metric = f"; metric as good in {good} of {plural(answer.rows, 'row')}" if good else ""
    return f"{word[0].upper()}{word[1:]}: {_why_not(comparison)}{metric}"


def _judged(answer: OverallAnswer) -> str:
    rows = plural(answer.rows, "row")
    if answer.judged < answer.rows:
        return f"{answer.judged} of {rows}"
    return f"all {rows}" if answer.rows > 1 else rows


def _has_speed(comparison: Comparison) -> bool:
    changes = [row.changes["step_time"] for row in comparison.rows if "step_time" in row.changes]
    return any(change.verdict is not Verdict.NOT_COMPARABLE for change in changes)


def _is_compared(comparison: Comparison) -> bool:
    """Whether any row is. One that neither run has measured is a pair, too."""
    return any(row.pair.state is State.PAIRED and _measured(row.pair) for row in comparison.rows)


def _why_not(comparison: Comparison) -> str:
    paired = [row for row in comparison.rows if row.pair.state is State.PAIRED]
    if not _is_compared(comparison):
        if any(row.scaling is not None for row in comparison.rows):
            return "the number of replicas differs, so only the scaling efficiency is shown"
        return "no row of the two runs can be compared"
    if any(change.verdict is Verdict.NOT_COMPARABLE for row in paired for change in row.changes.values()):
        return "another device, so only ratios within each run are shown"
    return f"no figure of {plural(len(paired), 'row')} has an interval"


def _id(letter: str) -> str:
    return f"run-{letter.lower()}"


def _run(run: Run, letter: str, links: Mapping[str, str]) -> str:
    git = run.environment.get("git")
    commit = str(git.get("commit") or "")[:7] if isinstance(git, dict) else ""
    facts = [machine_words(hardware(run)), plural(len(run.records), "case")]
    facts += [f"commit {commit}"] if commit else []
    facts += [] if run.finished else ["not finished"]
    facts += [run.note] if run.note else []
    name = pieces.link(links.get(run.name), run.shown)
    return f"<li><b>{letter}</b> {' · '.join([name, *(text(fact) for fact in facts)])}</li>"


def _cards(comparison: Comparison, answer: OverallAnswer, findings: Sequence[Finding]) -> str:
    return cards(filter(None, [_changed(comparison, answer), _trust(comparison), _gates(findings)]))


def _changed(comparison: Comparison, answer: OverallAnswer) -> str:
    lines = [_change_line(one) for one in answer.changes[:_SHOWN]]
    if more := len(answer.changes) - len(lines):
        lines.append(f"and {more} more, in the tables")
    if answer.changes:
        tone = Tone.BAD if answer.worse else Tone.GOOD
        return card("What changed", f"{plural(len(answer.changes), 'change')} beyond noise", lines, tone)
    times = [row.changes["step_time"] for row in comparison.rows if "step_time" in row.changes]
    known = {
        row.pair.place: found
        for row in comparison.rows
        if (time := row.changes.get("step_time")) and (found := time.change) is not None
    }
    scaled = [(row.pair.place, row.scaling.efficiency) for row in comparison.rows if row.scaling is not None]
    if efficiencies := [(" ".join(place), one) for place, one in scaled if one is not None]:
        lines = [f"scaling efficiency of {text(place)}: {number(one)}" for place, one in efficiencies[:_SHOWN]]
        return card("What changed", "the number of replicas", lines)
    if not _has_speed(comparison) or not known:
        return card("What changed", "nothing that can be shown", [])
    visible = [found.detectable for found in times if found.detectable is not None]
    largest = max(known, key=lambda place: abs(math.log1p(known[place])))
    lines = [
        f"step time, median of all rows: {text(change(statistics.median(known.values())))}",
        f"largest: {text(' '.join(largest))} {text(change(known[largest]))}",
    ]
    if visible:
        lines.append(f"a change of step time below about {statistics.median(visible):.0%} would not have been seen")
    return card("What changed", "nothing beyond noise", lines)


def _change_line(one: RealChange) -> str:
    where = text(" ".join(one.row.pair.place))
    tone = Tone.BAD if one.is_worse else Tone.GOOD
    if one.verdict is None:
        return f"{where}: {_failed(one.row)}"
    if one.quantity == "metric":
        return f"{where}: {marked(tone, _metric(one.row))}"
    return f"{where}: {COSTS[one.quantity].title} {marked(tone, f'{change(one.size)} {_DIRECTIONS[one.verdict]}')}"


def _failed(row: ComparedRow) -> str:
    return marked(Tone.BAD, f"{plural(len(failed_here(row)), 'case')} failed")


def _metric(row: ComparedRow) -> str:
    assert row.quality is not None
    name = common([*row.pair.baseline, *row.pair.other], "metric_name")
    found = row.quality.difference
    changed = "" if found is None else f" {metric_difference(found.mean, None, None, name)}"
    return f"{metric_name(name)}{changed}, {AGAINST_RUN[row.quality.verdict]}"


def _trust(comparison: Comparison) -> str:
    """What strengthens and weakens the comparison; the weaknesses first."""
    weak, strong = list(_weaknesses(comparison)), []
    drifting = [found for row in comparison.rows for name, found in row.changes.items() if COSTS[name].drifts]
    runs = {found.floor_runs for found in drifting if found.floor_runs}
    if comparison.in_turns:
        strong.append("interleaved, process by process: both saw the same machine")
    elif runs:
        strong.append(f"noise floor known from {plural(max(runs), 'run')} of the baseline's code")
    lines = [noted(Tone.WARN, line) for line in weak] + [noted(Tone.GOOD, line) for line in strong]
    if weak:
        return card("Can I trust it?", f"with {plural(len(weak), 'reservation')}", lines, Tone.WARN)
    said = "nothing speaks against it" if _is_compared(comparison) else "nothing was compared"
    return card("Can I trust it?", said, lines, Tone.GOOD if strong else None)


def _weaknesses(comparison: Comparison) -> Iterator[str]:
    baseline, other = comparison.baseline, comparison.other
    if not comparison.same_device:
        yield "other device: times, memory and energy are not judged, only ratios within each run"
    if any(row.scaling is not None for row in comparison.rows):
        yield "the runs were made at different times: how much runs differ is assumed in an efficiency's interval"
        if hardware(other)["kind"] == "cpu":
            yield "replicas on a CPU share its cores: their efficiency says nothing about GPUs"
    methods = [run.methods for run in (baseline, other)]
    if all(methods) and methods[0] != methods[1]:
        said = " and ".join("/".join(map(str, sorted(method))) for method in methods)
        yield f"other method of measurement: versions {said}"
    forced = [row.pair for row in comparison.rows if row.pair.state is State.PAIRED and row.pair.reason]
    apart = list(dict.fromkeys(str(pair.reason) for pair in forced if _measured(pair)))
    if apart:
        yield f"rows are compared although they were measured in different ways: {listed(apart, 2)}"
    if changed := models(comparison):
        yield listed(changed, 2)
    changes = [row.changes["step_time"] for row in comparison.rows if "step_time" in row.changes]
    if not comparison.in_turns and comparison.same_device and any(found.floor_runs == 0 for found in changes):
        yield f"{SINGLE_RUN}: how much runs of this code differ is assumed, so only large changes are seen"
    single = sum(found.change is not None and found.low is None for found in changes)
    if single:
        yield f"one process on a side in {plural(single, 'row')}: no interval"
    for letter, run in (("the baseline", baseline), ("the run", other)):
        sides = [row.pair.baseline if run is baseline else row.pair.other for row in comparison.rows]
        shares = [conditions(of_good_trainings(cases))["host_other_cpu_share"] or 0.0 for cases in sides if cases]
        if busy := sum(share > _BUSY for share in shares):
            yield f"other processes kept the machine busy in {busy} of {plural(len(shares), 'row')} of {letter}"
        if not run.finished:
            yield f"{letter} did not finish"
        if run.problems:
            yield f"{plural(len(run.problems), 'problem')} in the files of {letter}"
    if found := comparison.differences:
        named = [f"{name} {_short(before)} → {_short(after)}" for name, before, after in found]
        yield f"{plural(len(found), 'difference')} in the environment: {listed(named, 3)}"


def _measured(pair: Pair) -> bool:
    """Whether both runs have figures, so that the reason of a pair says how they differ."""
    return all(any(case["status"] in MEASURED for case in side) for side in (pair.baseline, pair.other))


def _short(value: str) -> str:
    """A value of the environment; of a commit or a digest, the first digits."""
    return (value[:7] if _DIGEST.fullmatch(value) else value) or DASH


def _gates(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    fired = [finding for finding in findings if finding.outcome is Outcome.FIRED]
    unclear = [finding for finding in findings if finding.outcome is Outcome.CANNOT_TELL]
    lines = [noted(Tone.BAD, f"fired: {_gate(finding)}") for finding in fired]
    gates = Counter(str(finding.gate) for finding in unclear)
    lines += [noted(Tone.UNKNOWN, f"cannot tell: {gate}, {plural(of, 'row')}") for gate, of in gates.items()]
    tone, title = _outcome(findings)
    more = len(lines) - _SHOWN
    return card("Gates", title, [*lines[:_SHOWN], *([f"and {more} more, in the tables"] if more > 0 else [])], tone)


def _outcome(findings: Sequence[Finding]) -> tuple[Tone, str]:
    """What gates came to, in a few words. What no workload has was not checked."""
    counts = Counter(finding.outcome for finding in findings)
    checks = plural(len(findings) - counts[Outcome.NOT_APPLICABLE], "check")
    if fired := counts[Outcome.FIRED]:
        return Tone.BAD, f"{fired} of {checks} fired"
    if unclear := counts[Outcome.CANNOT_TELL]:
        return Tone.WARN, f"{unclear} of {checks} cannot tell"
    return (Tone.GOOD, f"all {checks} passed") if counts[Outcome.PASSED] else (Tone.UNKNOWN, "nothing to check")


def _gate(finding: Finding) -> str:
    return f"{finding.gate}, {' '.join(finding.row) if finding.row else 'no row'}"


def _matrix(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if row.pair.state is State.PAIRED]
    if not rows:
        return ""
    times = [found for row in rows if (found := row.changes.get("step_time")) and found.change is not None]
    judged = [found for found in times if found.verdict is not Verdict.NOT_COMPARABLE]
    ends = [None if end is None else 1 + end for found in judged for end in (found.low, found.high)]
    span = span_of([1 + (found.change or 0.0) for found in judged], ends)
    cells = {row.pair.place: _cell(row, span) for row in rows}
    workloads = list(dict.fromkeys(workload for workload, _ in cells))
    modes = in_order_of_modes(mode for _, mode in cells)
    note = ""
    if judged:
        note = (
            "<p class='note'>Large: verdict on the step time and its change. Bar: its 95 % interval on a log axis from "
            f"{1 / span - 1:+.0%} to {span - 1:+.0%}; further right is slower, the line in the middle is no change, "
            "an arrow means that the interval goes on.</p>"
        )
    return matrix(workloads, modes, cells) + note


def _cell(row: ComparedRow, span: float) -> tuple[Tone, str]:
    """Tone and content: the step time large, the rest below. A cell is as bad as the worst that it shows."""
    lines, tones = [], []
    time = row.changes.get("step_time")
    if time is not None:
        tones.append(tone_of(time.verdict))
        lines.append(_time(time, span))
    if failed_here(row):
        tones.append(Tone.BAD)
        lines.append(f"<p>{_failed(row)}</p>")
    small = []
    for name in ("gpu_memory", "host_memory", "device_time", "energy"):
        if (found := row.changes.get(name)) is None or found.change is None:
            continue
        if name == "host_memory" and "gpu_memory" in row.changes:
            continue
        said = f"{COSTS[name].title} {change(found.change)}"
        if found.verdict in _DIRECTIONS:
            tones.append(tone_of(found.verdict))
            small.append(marked(tone_of(found.verdict), f"{said} {WORDS[found.verdict]}"))
        else:
            small.append(text(f"{said}, {WORDS[found.verdict]}"))
    if row.quality is not None:
        tone = tone_of(row.quality.verdict)
        if tone is not Tone.UNKNOWN:
            tones.append(tone)
        small.append(marked(tone, _metric(row)) if tone is Tone.BAD else text(_metric(row)))
    if row.overflow_rates != (None, None):
        before, after = (DASH if rate is None else f"{rate:.2%}" for rate in row.overflow_rates)
        small.append(text(f"overflow {before}" if before == after else f"overflow {before} → {after}"))
    if row.pair.versions and (lines or small):
        small.append("another model")
    if not (lines or small):
        return Tone.UNKNOWN, f"<p>{text(row.pair.reason or 'nothing was measured')}</p>"
    lines += [f"<p>{line}</p>" for line in small]
    return _worst(tones), "".join(lines)


def _worst(tones: Sequence[Tone]) -> Tone:
    if Tone.BAD in tones:
        return Tone.BAD
    # The first is that of the step time: no other figure turns "no difference shown" into good news.
    return tones[0] if tones else Tone.UNKNOWN


def _time(found: Change, span: float) -> str:
    tone = tone_of(found.verdict)
    said = marked(tone, WORDS[found.verdict])
    if found.change is None:
        return f'<p class="verdict">{said}</p><p>{text(found.reason or "unknown")}</p>'
    if found.verdict is Verdict.NOT_COMPARABLE:
        return f'<p class="verdict">{said}</p>'
    ends = [None if end is None else 1 + end for end in (found.low, found.high)]
    words = f"step time {change(found.change, found.low, found.high)}: {WORDS[found.verdict]}"
    why = f"; {found.reason}" if found.reason else ""
    drawn = bar(1 + found.change, ends[0], ends[1], span, tone, words + why)
    return f'<p class="verdict">{said} {text(change(found.change))}</p>{drawn}'


def _not_compared(comparison: Comparison) -> str:
    """Rows that cannot be compared, those with the same reason together."""
    found: dict[tuple[State, str], list[str]] = {}
    for row in comparison.rows:
        if row.pair.state is not State.PAIRED:
            found.setdefault((row.pair.state, row.pair.reason or ""), []).append(" ".join(row.pair.place))
    if not found:
        return ""
    said = {State.MISSING: "only in the baseline", State.NEW: "only in the run", State.NOT_COMPARABLE: "not comparable"}
    lines = "".join(
        f"<li>{text(listed(places, _SHOWN))}: {text(said[state])}{text(f' ({why})' if why else '')}</li>"
        for (state, why), places in found.items()
    )
    rows = plural(sum(map(len, found.values())), "row")
    return f'<div class="left-out"><h3>Not compared: {rows}</h3><ul>{lines}</ul></div>'


def _within_each(runs: Sequence[Run], names: dict[int, str]) -> str:
    """What each mode buys on each device: only these ratios may be compared between devices."""
    summaries = {id(run): {place_of(row): row for row in summary_of(run)} for run in runs}
    judged = [row for rows in summaries.values() for row in rows.values() if speed_verdict(row) is not None]
    if not judged:
        return ""
    ratios = [_ratio(row) for row in judged]
    span = span_of([ratio for ratio, *_ in ratios if ratio], [end for _, *ends in ratios for end in ends])
    cells: dict[tuple[str, str], tuple[Tone, str]] = {}
    for place in dict.fromkeys(place_of(row) for row in judged):
        lines = []
        for run in runs:
            row = summaries[id(run)].get(place)
            verdict = None if row is None else speed_verdict(row)
            if row is not None and verdict is not None:
                lines.append(_of_run(names[id(run)], row, verdict, span))
        cells[place] = (Tone.UNKNOWN, "".join(lines))
    workloads = list(dict.fromkeys(workload for workload, _ in cells))
    modes = in_order_of_modes(mode for _, mode in cells)
    return (
        "<h2>What each mode buys, within each run</h2>\n"
        + matrix(workloads, modes, cells)
        + "<p class='note'>Speed-up over fp32, or over tf32 in runs that have it; above 1.00 is faster. Only ratios "
        f"within a run may be compared between devices. Bar: 95 % interval on a log axis from {1 / span:.2f} to "
        f"{span:.2f}; further right is faster.</p>"
    )


def _ratio(row: Row) -> tuple[float | None, float | None, float | None]:
    name = f"speedup_{row['headline_baseline']}"
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


def _of_run(letter: str, row: Row, verdict: Verdict, span: float) -> str:
    ratio, low, high = _ratio(row)
    assert ratio is not None
    tone = tone_of(verdict)
    ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    over = row["headline_baseline"]
    drawn = bar(ratio, low, high, span, tone, f"{letter}: {ratio:.2f}x{ends} over {over}: {WORDS[verdict]}")
    # fp32 goes without saying, and the note says it.
    named = "" if over == "fp32" else f" over {over}"
    return f"<p><b>{letter}</b> {ratio:.2f}x{named} {marked(tone, WORDS[verdict])}</p>{drawn}"
