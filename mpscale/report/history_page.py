"""A history of runs as a page: whether the last run is worse, then a small panel for each workload and mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType

from mpscale.analysis.history import History, Point, Series
from mpscale.analysis.neighbours import Neighbours
from mpscale.analysis.overall import REAL
from mpscale.analysis.quantities import COSTS, Outcome, Quantity, Verdict
from mpscale.core.machines import machine_words
from mpscale.report import pieces
from mpscale.report.history import shown_change, shown_commit, shown_value
from mpscale.report.history_panel import MOST_DOTS, Step, band_of, known, panel_svg, when, worst_of
from mpscale.report.page import shell
from mpscale.report.pieces import Tone, marked, noted, text, tone_of
from mpscale.report.table import listed, plural
from mpscale.report.words import AGAINST_RUN

_SHOWN = 3
"""Most changes that are listed below a panel, and rows that a headline names."""

_MOST_STEPS = 30
"""Most changes that are marked in a panel, the newest."""

_FOOTER = "Times are UTC. Made by mpscale; `mpscale history` has the same figures as a table, as CSV and as JSON."

_JUDGED = ("metric", *COSTS)

Links = Mapping[str, str]
"""Where the report of a run is, by the name of the run."""


def history_page(
    histories: Sequence[History], neighbours: Neighbours, links: Links = MappingProxyType({}), above: str = ""
) -> str:
    """Return histories of one or more quantities as a page of HTML.

    Args:
        histories: of the same runs.
        neighbours: those runs.
        links: to their reports, if they have one.
        above: HTML above the title.
    """
    *others, last = (history.measure.title for history in histories)
    titles = f"{', '.join(others)} and {last}" if others else last
    body = [above, f"<h1>History of the {text(titles)}</h1>"]
    found = [(history, _steps(history, neighbours)) for history in histories]
    answers = [_latest(history, steps) for history, steps in found]
    if len(found) == 1:
        body.append(f'<p class="answers">{answers[0]}</p>')
    else:
        names = (f'<a href="#{history.measure.name}">{text(_heading(history.measure))}</a>' for history in histories)
        items = (f"<li>{name}: {answer}</li>" for name, answer in zip(names, answers, strict=True))
        body.append(f'<ul class="answers">{"".join(items)}</ul>')
    for history, steps in found:
        if len(found) > 1:
            body.append(f'<h2 id="{history.measure.name}">{text(_heading(history.measure))}</h2>')
        body += [_about(history), _panels(history, steps, neighbours, links), _once(history)]
    if skipped := list(dict.fromkeys(entry for history in histories for entry in history.skipped)):
        items = (f"<li>{text(what)}: {text(reason)}</li>" for what, reason in skipped)
        body.append(f"<details><summary><h2>Left out</h2></summary><ul>{''.join(items)}</ul></details>")
    return shell(f"mpscale: history of the {titles}", "\n".join(body), _FOOTER, pieces.STYLES)


def _heading(measure: Quantity) -> str:
    return f"{measure.title[0].upper()}{measure.title[1:]}"


def _steps(history: History, neighbours: Neighbours) -> list[list[Step]]:
    """For each series, the changes between neighbouring runs that a comparison of the two calls real."""
    found = []
    for series in history.series:
        points, steps = known(series), []
        for place in range(1, len(points)):
            verdict = neighbours.verdict(
                series, history.measure.name, points[place - 1].run.name, points[place].run.name
            )
            if verdict in REAL:
                steps.append(Step(place, verdict))
        found.append(steps)
    return found


def _latest(history: History, steps: Sequence[Sequence[Step]]) -> str:
    """What the newest run of each machine changed, in a sentence."""
    if history.measure.name not in _JUDGED:
        return noted(Tone.UNKNOWN, "comparisons do not judge this quantity, so no change is marked")
    newest: dict[str, datetime] = {}
    for series in history.series:
        for point in series.points:
            if point.run.started is not None:
                machine = _machine(series)
                newest[machine] = max(newest.get(machine, point.run.started), point.run.started)
    worse: list[str] = []
    better: list[str] = []
    total = 0
    for series, found in zip(history.series, steps, strict=True):
        points = known(series)
        if len(points) < 2 or points[-1].run.started != newest.get(_machine(series)):
            continue
        total += 1
        if found and found[-1].place == len(points) - 1:
            is_worse = found[-1].verdict.outcome is Outcome.FIRED
            (worse if is_worse else better).append(f"{series.workload} {series.label}")
    run = "The last run" if len(newest) < 2 else "The last run of each machine"
    if worse:
        named = listed(worse, _SHOWN)
        return marked(Tone.BAD, f"{run} is worse in {len(worse)} of {plural(total, 'row')}: {named}")
    if better:
        named = listed(better, _SHOWN)
        return marked(Tone.GOOD, f"{run} is better in {len(better)} of {plural(total, 'row')}: {named}")
    if total:
        return marked(Tone.UNKNOWN, f"{run} shows no change in {plural(total, 'row')}")
    return marked(Tone.UNKNOWN, f"{run} has no earlier one to compare it with")


def _about(history: History) -> str:
    runs = history.runs
    days = [f"{run.started:%Y-%m-%d}" for run in runs if run.started]
    span = "" if not days else f", {days[0]}" if days[0] == days[-1] else f", {days[0]} to {days[-1]}"
    spread = (
        "Light band: 95 % interval over processes."
        if history.measure.spread == "interval"
        else "Light band: minimum and maximum over seeds."
    )
    marks = ""
    if history.measure.name in _JUDGED:
        marks = (
            " Triangle: the run differs from the one before it by the verdict of `mpscale compare` for the two; it "
            "points to where the value went."
        )
    how = (
        f"Dot: a run; hollow: the value lacks something. With over {MOST_DOTS} runs, bars are several runs each, from "
        f"the smallest to the largest value, with the median. {spread} Grey stripe: where 95 % of runs of the code "
        f"before the last run are expected, if there are five such runs.{marks} What was measured in another way or on "
        "another machine has a panel of its own."
    )
    said = f"{plural(len(runs), 'run')}{span}; how to read this"
    return f'<details class="how"><summary>{said}</summary><p class="note">{how}</p></details>'


def _panels(history: History, steps: Sequence[Sequence[Step]], neighbours: Neighbours, links: Links) -> str:
    """The panels of series with more than one value, by machine and workload."""
    found: dict[tuple[str, str], list[str]] = {}
    machines = {_machine(series) for series in history.series}
    for series, of in zip(history.series, steps, strict=True):
        if len(known(series)) > 1:
            place = series.workload, _machine(series) if len(machines) > 1 else ""
            found.setdefault(place, []).append(_panel(history.measure, series, of, neighbours, links))
    return "\n".join(
        f"<h3>{text(workload)}{f' <small>{text(machine)}</small>' if machine else ''}</h3>"
        f'<div class="panels">{"".join(panels)}</div>'
        for (workload, machine), panels in found.items()
    )


def _machine(series: Series) -> str:
    return machine_words({"kind": None, "name": None, **series.hardware})


def _panel(measure: Quantity, series: Series, steps: Sequence[Step], neighbours: Neighbours, links: Links) -> str:
    points = known(series)
    last = points[-1]
    # As in the comparison of the last two: the last run must not widen the band that it is held against.
    floors = neighbours.floors(points[-2].run.name, leave_out=last.run.name)
    band = band_of(points, floors.runs, floors.get(measure.name, (series.workload, series.mode)))
    lines = [f"<b>{text(shown_value(measure, series, last))}</b> {_run(last, links)}"]
    lines.append(_change(measure, series, points, steps, neighbours))
    worst = worst_of(measure, points, neighbours.higher_is_better(series))
    if worst is not None and worst != len(points) - 1 and points[worst].value != last.value:
        lines.append(f"worst {text(shown_value(measure, series, points[worst]))} {_run(points[worst], links)}")
    earlier = [step for step in steps if step.place < len(points) - 1]
    for step in reversed(earlier[-_SHOWN:]):
        point = points[step.place]
        moved = shown_change(point) if point.change is not None else shown_value(measure, series, point)
        lines.append(f"{marked(tone_of(step.verdict), AGAINST_RUN[step.verdict])} {text(moved)} {_run(point, links)}")
    if (more := len(earlier) - _SHOWN) > 0:
        lines.append(f"and {plural(more, 'earlier change')}")
    if measure.name in COSTS:
        lines.append(f"noise floor {band.limit:.1%} from {band.runs} runs" if band else "noise floor unknown")
    title = text(series.mode) + (f" <small>{text(series.apart)}</small>" if series.apart else "")
    newest = steps[-1] if steps and steps[-1].place == len(points) - 1 else None
    kind = f"panel {tone_of(newest.verdict)}" if newest else "panel"
    return (
        f'<article class="{kind}"><h4>{title}</h4>{panel_svg(measure, series, steps[-_MOST_STEPS:], band)}'
        f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul></article>"
    )


def _change(
    measure: Quantity, series: Series, points: Sequence[Point], steps: Sequence[Step], neighbours: Neighbours
) -> str:
    """The change of the last point, with the verdict of the comparison of its run with the one before."""
    last, before = points[-1], points[-2]
    moved = f"{shown_change(last)} " if last.change is not None else ""
    verdict = neighbours.verdict(series, measure.name, before.run.name, last.run.name)
    if verdict is None:
        return f"{text(moved)}since the run before: not judged"
    words = AGAINST_RUN[verdict]
    if verdict in (Verdict.CANNOT_TELL, Verdict.INCONCLUSIVE):
        return f"{text(moved)}since the run before: {text(words)}"
    return f"{text(moved)}since the run before: {marked(tone_of(verdict), words)}"


def _run(point: Point, links: Links) -> str:
    """Date and commit of a point's run, linked to its report."""
    words = pieces.link(links.get(point.run.name), f"{when(point)[:10]} {shown_commit(point.run)}")
    return f'<span class="soft" title="{text(point.run.shown)}">{words}</span>'


def _once(history: History) -> str:
    """Series with a single value, which have no history yet."""
    rows = []
    for series in history.series:
        if len(points := known(series)) == 1:
            value = shown_value(history.measure, series, points[0])
            cells = (series.workload, series.mode, series.apart or _machine(series), value, said_when(points[0]))
            rows.append([text(cell) for cell in cells])
    if not rows:
        return ""
    shown = pieces.table(["workload", "mode", "series", history.measure.title, "run"], rows, sentences=True)
    return f"<details><summary><h3>Measured once: {plural(len(rows), 'series')}</h3></summary>{shown}</details>"


def said_when(point: Point) -> str:
    """Date and name of the run of a point."""
    return f"{when(point)}, {point.run.shown}"
