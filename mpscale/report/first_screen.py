"""The first screen of a report in words: the answer, what it buys, what it costs, if it can be trusted, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from mpscale.analysis.answer import Advice, Answer, Cell, Effect, Weakness, Worth, answer_of
from mpscale.analysis.quantities import Verdict
from mpscale.core.record import place_of
from mpscale.core.runs import Run
from mpscale.report import merged, trouble
from mpscale.report.advice import code_of, measure_again
from mpscale.report.cell import chips, quality_line, ratio_text, speed_word, times
from mpscale.report.figures import Picture
from mpscale.report.missing import go_on, lacks
from mpscale.report.table import DASH, Table, escape, joined, listed, number, plural
from mpscale.report.words import WORDS

QUESTION = "Is mixed precision worth it here?"

GO_ON = "To go on, in the folder where it was started:"

_NAMED = 3
"""Most rows that a card names; more are counted."""

_WEAKNESSES = 3
"""Most weaknesses that the card shows; the chips beside the figures and the sections below have all."""


@dataclass(frozen=True, slots=True)
class Card:
    """One of the three cards.

    Args:
        question: what it answers.
        answer: the short answer.
        details: sentences.
        effect: whether the answer is good news; None for a neutral card.
        is_warning: whether it weakens the others.
    """

    question: str
    answer: str
    details: Sequence[str]
    effect: Effect | None = None
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class Screen:
    """The first screen, in plain text; report/first_screen_page.py draws it.

    Args:
        headline: the answer to :data:`QUESTION`.
        effect: whether it is good news.
        facts: device, software, date and size of the run.
        cards: what it buys, what it costs, can I trust it.
        answer: what the cells of the matrix show.
        advice: what to do, in a sentence or two.
        code: lines that do it; empty if there are none.
        language: of the lines.
        lacks: which cases of the run have no result; empty if all have one.
        go_on: the command that runs them; empty if there is none.
        picture: the trade-off, which only a page has; None if there is nothing to draw.
    """

    headline: str
    effect: Effect
    facts: Sequence[str]
    cards: Sequence[Card]
    answer: Answer
    advice: str
    code: str
    language: str
    lacks: str = ""
    go_on: str = ""
    picture: Picture | None = None

    @property
    def caption(self) -> str:
        """How to read the matrix."""
        return (
            "Speed-up over the baseline, which is under the name of the workload; above 1x is faster. Bar: its 95 % "
            "interval on a log axis; line: as fast as the baseline. Metrics are compared with fp32's, accuracies in "
            "percentage points (pt)."
        )


def first_screen(run: Run) -> Screen:
    """Return the first screen of the report of a run.

    Args:
        run: finished or not.
    """
    answer = answer_of(run)
    code, language = code_of(answer, run)
    headline, effect = _headline(answer, run)
    cards = (_buys(answer), _costs(answer), _trust(answer))
    said = (headline, effect, _facts(run, answer), cards, answer, _advice(answer, run), code, language)
    return Screen(*said, lacks(run), go_on(run))


def place(run: Run) -> str:
    """``CPU`` or ``GPU``; ``machine`` if neither run.json nor a record has it."""
    kinds = [run.device.get("kind"), *(record["device"] for record in run.records)]
    return next((str(kind).upper() for kind in kinds if kind), "machine")


def _headline(answer: Answer, run: Run) -> tuple[str, Effect]:
    said, effect = _said(answer, run)
    if Weakness.STAND_IN in answer.weaknesses:
        return f"{said} But the GPU is a stand-in for tests, so the figures are invented.", Effect.UNKNOWN
    incomplete = answer.weaknesses.keys() & {Weakness.UNFINISHED, Weakness.NOT_STARTED}
    if incomplete and answer.worth in (Worth.YES, Worth.PARTLY, Worth.NO):
        return f"{said} But the run is not complete.", effect
    return said, effect


def _said(answer: Answer, run: Run) -> tuple[str, Effect]:
    here = place(run)
    match answer.worth:
        case Worth.YES | Worth.PARTLY:
            where = "" if answer.worth is Worth.YES else f", on {len(answer.good)} of {len(answer.asked)} workloads"
            unknown = _unmeasured(answer.chosen)
            return f"Yes{where}: {_how(answer)}{unknown}.", Effect.UNKNOWN if unknown else Effect.GOOD
        case Worth.NO:
            if others := len(answer.asked) - len(answer.refused):
                of = f"{len(answer.refused)} of {len(answer.asked)} workloads"
                return f"No, on {of}; the other{'s' if others > 1 else ''} cannot be told.", Effect.UNKNOWN
            if small := [cell for cell in answer.serious if cell.saves_memory and not cell.is_worse]:
                saved = _times([cell.row["gpu_memory_ratio"] for cell in small])
                return f"No for speed on this {here}, but {saved} the memory.", Effect.UNKNOWN
            if Weakness.INPUT_BOUND in answer.weaknesses:
                return "No, not with this input pipeline: training waits for its batches.", Effect.BAD
            return f"No, not on this {here}.", Effect.BAD
        case Worth.NOT_SHOWN:
            if any(cell.speed is Verdict.FASTER and not cell.is_worse for cell in answer.serious):
                return "Not shown yet: faster, but it is not known if it trains as well.", Effect.UNKNOWN
            return "Not shown yet: no gain is certain.", Effect.UNKNOWN
        case Worth.CANNOT_TELL:
            return f"Cannot tell: {_main_reason(answer)}.", Effect.UNKNOWN
    why = "nothing could be compared with float32"
    if not answer.serious:
        unsupported = any(cell.unsupported for cells in answer.cells.values() for cell in cells.values())
        why = "no mixed mode can run here" if unsupported else "no mixed mode was measured"
    return f"No answer: {why}.", Effect.UNKNOWN


def _how(answer: Answer) -> str:
    """What the chosen modes gain, for the headline."""
    cells = answer.chosen
    which = f"with {answer.mode}" if answer.mode is not None else "with another mode on each workload"
    which = which if answer.mode is not None or len(cells) == 2 else "with different modes"
    ratios = [cell.ratio for cell in cells if cell.ratio is not None and cell.speed is Verdict.FASTER]
    if ratios:
        fed = [cell.with_input for cell in cells if cell.with_input is not None]
        with_input = f" ({_times(fed)} with the input pipeline)" if fed else ""
        return f"{_times(ratios)} as fast {which}{with_input}"
    unknown = "; its speed is not known" if any(not cell.claimed for cell in cells) else ""
    return f"{_times([cell.row['gpu_memory_ratio'] for cell in cells])} the memory {which}{unknown}"


def _unmeasured(cells: Sequence[Cell]) -> str:
    """Say that no accuracy was measured, which a plain yes would hide; empty if it was."""
    without = sum(cell.quality is None for cell in cells)
    if not without:
        return ""
    where = "" if without == len(cells) else f" on {without} of {len(cells)} workloads"
    return f"; accuracy not measured{where}"


def _main_reason(answer: Answer) -> str:
    reasons = {
        Weakness.ONE_PROCESS: "one process a row",
        Weakness.IDLE: "the GPU was idle for most of a step",
        Weakness.DISPATCH: "the steps are too short to show what a mode does",
        Weakness.BUSY: "other processes kept the machine busy",
        Weakness.NO_BASELINE: "there is no fp32 to compare with",
        Weakness.BASELINE_FAILED: "fp32 has no step time to compare with",
        Weakness.BASELINE_OOM: "fp32 ran out of memory, but mixed precision did not",
        Weakness.UNTIMED: "no mixed mode has a step time",
    }
    found = {weakness: answer.weaknesses[weakness] for weakness in reasons if weakness in answer.weaknesses}
    return reasons[max(found, key=lambda weakness: found[weakness])] if found else "no speed could be compared"


def _facts(run: Run, answer: Answer) -> list[str]:
    environment = run.environment
    names = [run.device.get("name"), *(record["device_name"] for record in run.records)]
    facts = [listed(list(dict.fromkeys(str(name) for name in names if name)), 2)]
    facts = [fact for fact in facts if fact]
    cores = (environment.get("cpu") or {}).get("physical_cores") if place(run) == "CPU" else None
    facts += [plural(cores, "core")] if isinstance(cores, int) else []
    version = (environment.get("packages") or {}).get("tensorflow")
    facts += [f"TensorFlow {version}"] if version else []
    started = run.info.get("started")
    try:
        facts += [f"{datetime.fromisoformat(str(started)):%-d %b %Y}"] if started else []
    except ValueError:
        facts += [str(started)]
    counts = [cell.row["processes"] for cell in answer.serious if cell.row["processes"]]
    if counts:
        low, high = min(counts), max(counts)
        facts.append(f"{plural(high, 'process')} a row" if low == high else f"{low} to {high} processes a row")
    part = merged.in_short(run)
    return [*facts, *([part] if part else []), run.shown]


def _times(ratios: Sequence[float]) -> str:
    """Write a range of ratios; one number if both ends look the same."""
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low.removesuffix('x')}{DASH}{high}"


def _buys(answer: Answer) -> Card:
    claimed = [cell for cell in answer.serious if cell.claimed]
    details = []
    if claimed:
        counts = {word: sum(cell.speed is word for cell in claimed) for word in (Verdict.FASTER, Verdict.SLOWER)}
        told = [f"{found} {WORDS[word]}" for word, found in counts.items() if found]
        rest = len(claimed) - sum(counts.values())
        told += [f"{rest} unclear"] if rest else []
        fed = [cell.with_input for cell in claimed if cell.with_input is not None]
        details += [f"the speed of {_baseline(answer)}", *([f"{_times(fed)} with the input pipeline"] if fed else [])]
        details += [f"of {plural(len(claimed), 'row')}: {', '.join(told)}"]
    else:
        details.append(f"no claim about the speed: {_main_reason(answer)}")
    for column, what in (("gpu_memory_ratio", "the peak GPU memory"), ("gpu_energy_ratio", "the GPU energy")):
        known = [cell.row[column] for cell in answer.serious if cell.row[column] is not None]
        details += [f"{_times(known)} {what}"] if known else []
    if claimed and (fits := answer.weaknesses.get(Weakness.BASELINE_OOM)):
        details.append(f"fp32 ran out of memory where {plural(fits, 'row')} of mixed precision did not")
    if not any(cell.row["gpu_memory_ratio"] is not None for cell in answer.serious):
        on_cpu = answer.weaknesses.get(Weakness.EMULATED) == len(answer.serious) > 0
        details.append(f"GPU memory not {'measured (no GPU)' if on_cpu else 'compared'}")
    speeds = {cell.speed for cell in claimed}
    effect = Effect.GOOD if answer.good else Effect.BAD if Verdict.SLOWER in speeds else None
    return Card(
        "What does it buy?", _times([cell.ratio or 0.0 for cell in claimed]) if claimed else "unknown", details, effect
    )


def _baseline(answer: Answer) -> str:
    names = {cell.row["headline_baseline"] for cell in answer.serious}
    return names.pop() if len(names) == 1 else "the default"


def _costs(answer: Answer) -> Card:
    rows = answer.serious
    judged = [cell for cell in rows if cell.quality is not None or cell.is_worse]
    worse = [cell for cell in judged if cell.is_worse]
    as_good = sum(cell.quality is Verdict.NON_INFERIOR for cell in judged)
    details = []
    if judged:
        details.append(f"{as_good} of {plural(len(rows), 'row')} as good as fp32")
        details += [f"worse: {_named(worse)}"] if worse else []
        open_ = len(judged) - as_good - len(worse)
        details += [f"{open_} undecided"] if open_ else []
        details += [f"{len(rows) - len(judged)} not compared"] if len(rows) > len(judged) else []
    elif Weakness.NO_METRIC in answer.weaknesses:
        details.append("synthetic inputs or no metric: accuracy cannot be compared")
    else:
        details.append("no metric was compared with fp32's")
    overflowed = [cell.row for cell in answer.serious if cell.row["overflow_steps"] is not None]
    if overflowed:
        steps, of = (sum(row[name] for row in overflowed) for name in ("overflow_steps", "attempted_steps"))
        details.append(f"{steps:,} of {of:,} checked steps overflowed")
    controls: dict[str, list[bool]] = {}
    for cell in answer.controls:
        if cell.quality is not None or cell.is_worse:
            controls.setdefault(place_of(cell.row)[1], []).append(cell.is_worse)
    for mode, found in controls.items():
        if any(found):
            details.append(f"control experiment ({mode}): worse on {sum(found)} of {plural(len(found), 'row')}")
    if worse:
        return Card("What does it cost?", f"accuracy, in {plural(len(worse), 'row')}", details, Effect.BAD)
    if not judged or as_good < len(rows):
        where = f", in {len(rows) - as_good} of {plural(len(rows), 'row')}" if as_good else ""
        return Card("What does it cost?", f"unknown{where}", details)
    return Card("What does it cost?", "no accuracy", details, Effect.GOOD)


def _named(cells: Sequence[Cell]) -> str:
    """Name rows, by mode."""
    by_mode: dict[str, list[str]] = {}
    for cell in cells:
        workload, mode = place_of(cell.row)
        by_mode.setdefault(mode, []).append(workload)
    parts = []
    for mode, workloads in by_mode.items():
        many = len(workloads) > _NAMED
        parts.append(f"{mode} on {f'{len(workloads)} workloads' if many else joined(workloads)}")
    shown = parts[:_NAMED]
    return "; ".join([*shown, f"{len(parts) - len(shown)} more modes"] if len(parts) > len(shown) else shown)


def _trust(answer: Answer) -> Card:
    found = list(_weak_points(answer.weaknesses, len(answer.serious), answer.worth))
    details = found[:_WEAKNESSES]
    if len(found) > len(details):
        details.append(f"and {plural(len(found) - len(details), 'other point')}: see labels and sections of the report")
    if answer.noise is not None:
        noise = _noise(100 * answer.noise)
        details.insert(0, "noise of a speed-up (its 95 % interval, median)")
    else:
        details.insert(0, "no speed-up has an interval")
        noise = "unknown noise"
    if not found:
        details.append("nothing was found that weakens a figure")
    return Card("Can I trust it?", noise, details, is_warning=bool(found))


def _noise(percent: float) -> str:
    if percent < 0.1:
        return "± less than 0.1 %"
    return f"± {number(percent, 2)} %" if percent < 100 else "± more than 100 %"


def _weak_points(weaknesses: Mapping[Weakness, int], rows: int, worth: Worth) -> Iterator[str]:
    """Yield what weakens the figures, the most serious first."""

    def of_rows(number: int) -> str:
        return "all rows" if number == rows else f"{number} of {plural(rows, 'row')}"

    sentences: dict[Weakness, Callable[[int], str]] = {
        Weakness.STAND_IN: lambda _: "the GPU is a stand-in for tests: its figures are invented",
        Weakness.UNKNOWN_DEVICE: lambda n: f"it is not known on which device it ran: {of_rows(n)}",
        Weakness.EMULATED: lambda n: (
            "low precision is emulated on a CPU: speeds say nothing about a GPU"
            + ("" if n == rows else f" ({of_rows(n)})")
        ),
        Weakness.UNREADABLE: lambda n: f"{plural(n, 'part')} of the run could not be read",
        Weakness.UNFINISHED: lambda n: "the run was stopped or is still going on",
        Weakness.ONE_PROCESS: lambda n: f"one process, so no interval: {of_rows(n)}",
        Weakness.IDLE: lambda n: f"the GPU was idle for most of a step: {of_rows(n)}",
        Weakness.DISPATCH: lambda n: f"Python took most of a step: {of_rows(n)}",
        Weakness.INPUT_BOUND: lambda n: f"training waits for its input, so it gains no speed: {of_rows(n)}",
        Weakness.BUSY: lambda n: f"other processes kept the machine busy: {of_rows(n)}",
        Weakness.BASELINE_LOST: lambda n: f"{plural(n, 'training')} in float32 diverged or stalled",
        Weakness.BASELINE_OOM: lambda n: f"fp32 ran out of memory, so nothing to compare with: {of_rows(n)}",
        Weakness.BASELINE_FAILED: lambda n: f"fp32 has no step time to compare with: {of_rows(n)}",
        Weakness.LOST_CASES: lambda n: f"{plural(n, 'case')} failed or did not end",
        Weakness.NOT_STARTED: lambda n: f"{plural(n, 'planned case')} did not start",
        Weakness.NO_BASELINE: lambda n: f"no fp32 to compare with: {of_rows(n)}",
        Weakness.UNTIMED: lambda n: f"no step time: {of_rows(n)}",
        Weakness.WITHOUT_XLA: lambda n: (
            "without XLA, which can change more than the mode does" + ("" if n == rows else f" ({of_rows(n)})")
        ),
        Weakness.UNJUDGED: lambda n: f"too few seeds to judge the metric: {of_rows(n)}",
        Weakness.INCOMPLETE: lambda n: f"seeds are missing, so the metric cannot be judged: {of_rows(n)}",
        Weakness.UNCLEAR_METRIC: lambda n: f"the metric's margin or direction is not clear: {of_rows(n)}",
        Weakness.UNCOMPARED: lambda n: f"the metric was not compared with fp32's: {of_rows(n)}",
        Weakness.NO_METRIC: lambda n: f"{plural(n, 'workload')} without a metric: accuracy not measured",
        Weakness.TWO_LEVELS: lambda n: f"the step time of {plural(n, 'process')} jumped between two levels",
        Weakness.OLDER_METHOD: lambda n: "measured by an older method",
    }
    for weakness, sentence in sentences.items():
        if weakness in weaknesses:
            yield sentence(weaknesses[weakness])


def _advice(answer: Answer, run: Run) -> str:
    mode = answer.mode
    match answer.advice:
        case Advice.USE if mode is None:
            modes = answer.choices.values()
            chosen = {name: [place for place, one in answer.choices.items() if one == name] for name in modes}
            parts = [f"{name} on {_listed(where)}" for name, where in chosen.items()]
            return f"Choose by workload: {'; '.join(parts)}.{_elsewhere(answer)}"
        case Advice.USE:
            where = f" on {_listed(answer.good)}" if len(answer.good) < len(answer.asked) else ""
            return f"Train with {mode}{where}: {_evidence(answer.chosen)}.{_elsewhere(answer)}"
        case Advice.STAY:
            small = any(cell.saves_memory and not cell.is_worse for cell in answer.serious)
            stay = f"Stay with float32 on this {place(run)}{', unless memory is short' if small else ''}."
            if Weakness.INPUT_BOUND in answer.weaknesses:
                bound = [cell.ratio for cell in answer.serious if cell.input_bound and cell.ratio is not None]
                stay += (
                    f" Make the input pipeline faster first: on the device alone, a step is {_times(bound)} as fast."
                )
            if mode is None:
                return stay
            evidence = _evidence([found[mode] for found in answer.cells.values() if mode in found])
            if place(run) == "CPU":
                return f"{stay} To train in float16 on a GPU, scale with {mode}: {evidence}."
            return f"{stay} If float16 is needed all the same, scale with {mode}: {evidence}."
    return measure_again(answer)


def _evidence(cells: Sequence[Cell]) -> str:
    """Say how well a mode trains, over all workloads that the advice is about."""
    as_good = sum(cell.quality is Verdict.NON_INFERIOR for cell in cells)
    if not as_good:
        return "its accuracy is not known"
    unknown = sum(cell.quality is None for cell in cells)
    rest = f", not compared on {unknown}" if unknown else ""
    return "as good as fp32" if len(cells) == 1 else f"as good as fp32 on {as_good} of {len(cells)} workloads{rest}"


def _elsewhere(answer: Answer) -> str:
    """Say what to do on all other workloads; float32 is no answer where it ran out of memory."""
    others = len(answer.good) < len(answer.asked)
    return " Keep float32 elsewhere." if others and Weakness.BASELINE_OOM not in answer.weaknesses else ""


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return f"{', '.join(names[:_NAMED])} and {more} more" if more > 0 else joined(names)


def matrix(answer: Answer) -> Table:
    """Return the matrix as a table of texts: a row per workload, a column per mode."""
    rows = []
    for workload, cells in answer.cells.items():
        texts = [_text(cells[mode]) if mode in cells else DASH for mode in answer.modes]
        rows.append([workload, *texts])
    return Table(["workload", *answer.modes], rows)


def _text(cell: Cell) -> str:
    ratio = "" if cell.ratio is None else f"{ratio_text(cell)} "
    return "; ".join(filter(None, [f"{ratio}{speed_word(cell)}", quality_line(cell), *chips(cell)]))


def markdown(screen: Screen) -> str:
    """Return the first screen as markdown."""
    parts = [f"**{escape(QUESTION)} {escape(screen.headline)}**"]
    parts.append(
        "\n".join(
            f"- {escape(card.question)} **{escape(card.answer)}** {escape(_details(card))}" for card in screen.cards
        )
    )
    if table := matrix(screen.answer):
        parts.append(table.markdown())
    parts.append(escape(screen.advice))
    if screen.code:
        parts.append(f"```{screen.language}\n{screen.code}\n```")
    if screen.lacks:
        parts.append(f"{escape(screen.lacks)} {GO_ON if screen.go_on else ''}".strip())
    if screen.go_on:
        parts.append(trouble.fenced(screen.go_on))
    return "\n\n".join(parts)


def plain(screen: Screen) -> str:
    """Return the first screen for a terminal, without the matrix, which the table of results stands for."""
    lines = [f"{QUESTION} {screen.headline}"]
    lines += [f"  {card.question} {card.answer}: {_details(card)}" for card in screen.cards]
    lines += [f"  {screen.lacks}"] if screen.lacks else []
    return "\n".join([*lines, f"  What to do? {screen.advice}"])


def _details(card: Card) -> str:
    return f"{'; '.join(card.details)}."
