"""The first screen of a report in words: the answer, what it buys, what it costs, if it can be trusted, what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from mpscale.analysis.answer import Advice, Answer, Cell, Outcome, Weakness, Worth, answer_of
from mpscale.analysis.quantities import Verdict
from mpscale.core.record import place_of
from mpscale.core.runs import Run
from mpscale.report.advice import code_of, measure_again
from mpscale.report.cell import chips, quality_line, ratio_text, speed_word
from mpscale.report.figures import Picture
from mpscale.report.table import DASH, Table, escape, number, plural
from mpscale.report.words import WORDS

QUESTION = "Is mixed precision worth it here?"

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
        outcome: whether the answer is good news; None for a neutral card.
        is_warning: whether it weakens the others.
    """

    question: str
    answer: str
    details: Sequence[str]
    outcome: Outcome | None = None
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class Screen:
    """The first screen, in plain text; report/first_screen_page.py draws it.

    Args:
        headline: the answer to :data:`QUESTION`.
        outcome: whether it is good news.
        facts: device, software, date and size of the run.
        cards: what it buys, what it costs, can I trust it.
        answer: what the cells of the matrix show.
        advice: what to do, in a sentence or two.
        code: lines that do it; empty if there are none.
        language: of the lines.
        picture: the trade-off, which only a page has; None if there is nothing to draw.
    """

    headline: str
    outcome: Outcome
    facts: Sequence[str]
    cards: Sequence[Card]
    answer: Answer
    advice: str
    code: str
    language: str
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
    headline, outcome = _headline(answer, run)
    cards = (_buys(answer), _costs(answer), _trust(answer))
    return Screen(headline, outcome, _facts(run, answer), cards, answer, _advice(answer, run), code, language)


def place(run: Run) -> str:
    """``CPU`` or ``GPU``; ``machine`` if neither run.json nor a record has it."""
    kinds = [run.device.get("kind"), *(record["device"] for record in run.records)]
    return next((str(kind).upper() for kind in kinds if kind), "machine")


def _headline(answer: Answer, run: Run) -> tuple[str, Outcome]:
    here = place(run)
    match answer.worth:
        case Worth.YES | Worth.PARTLY:
            where = "" if answer.worth is Worth.YES else f", on {len(answer.good)} of {len(answer.cells)} workloads"
            return f"Yes{where}{_how(answer)}.", Outcome.GOOD
        case Worth.NO:
            return f"No, not on this {here}.", Outcome.BAD
        case Worth.NOT_SHOWN:
            return "Not shown yet: no gain is certain.", Outcome.UNKNOWN
        case Worth.CANNOT_TELL:
            return f"Cannot tell: {_main_reason(answer)}.", Outcome.UNKNOWN
    why = "no mixed mode was measured" if not answer.cells else "nothing could be compared with float32"
    return f"No answer: {why}.", Outcome.UNKNOWN


def _how(answer: Answer) -> str:
    """What the advised mode gains, for the headline."""
    good = [cells[answer.mode] for cells in answer.cells.values() if answer.mode in cells and answer.mode is not None]
    good = [cell for cell in good if cell.outcome is Outcome.GOOD]
    ratios = [cell.ratio for cell in good if cell.ratio is not None and cell.speed is Verdict.FASTER]
    if ratios:
        return f": {_times(ratios)} as fast with {answer.mode}"
    saved = [cell.row["gpu_memory_ratio"] for cell in good if cell.row["gpu_memory_ratio"] is not None]
    return f": {_times(saved)} the memory with {answer.mode}" if saved else ""


def _is_good(cell: Cell | None) -> bool:
    return cell is not None and cell.outcome is Outcome.GOOD


def _main_reason(answer: Answer) -> str:
    reasons = {
        Weakness.ONE_PROCESS: "one process a row",
        Weakness.IDLE: "the GPU was idle for most of a step",
        Weakness.DISPATCH: "the steps are too short to show what a mode does",
        Weakness.BUSY: "other processes kept the machine busy",
        Weakness.NO_BASELINE: "there is no fp32 to compare with",
    }
    found = {weakness: answer.weaknesses[weakness] for weakness in reasons if weakness in answer.weaknesses}
    return reasons[max(found, key=lambda weakness: found[weakness])] if found else "no speed could be compared"


def _facts(run: Run, answer: Answer) -> list[str]:
    environment = run.environment
    names = [run.device.get("name"), *(record["device_name"] for record in run.records)]
    facts = [str(name) for name in names if name][:1]
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
    return [*facts, run.name]


def _times(ratios: Sequence[float]) -> str:
    """Write a range of ratios; one number if both ends look the same."""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return f"{low}x" if low == high else f"{low}{DASH}{high}x"


def _buys(answer: Answer) -> Card:
    claimed = [cell for cell in answer.serious if cell.ratio is not None and not cell.doubts and cell.ends]
    details = []
    if claimed:
        counts = {word: sum(cell.speed is word for cell in claimed) for word in (Verdict.FASTER, Verdict.SLOWER)}
        told = [f"{found} {WORDS[word]}" for word, found in counts.items() if found]
        rest = len(claimed) - sum(counts.values())
        told += [f"{rest} unclear"] if rest else []
        details += [f"the speed of {_baseline(answer)}", f"of {plural(len(claimed), 'row')}: {', '.join(told)}"]
    else:
        details.append(f"no claim about the speed: {_main_reason(answer)}")
    for column, what in (("gpu_memory_ratio", "the peak GPU memory"), ("gpu_energy_ratio", "the GPU energy")):
        known = [cell.row[column] for cell in answer.serious if cell.row[column] is not None]
        details += [f"{_times(known)} {what}"] if known else []
    if not any(cell.row["gpu_memory_ratio"] is not None for cell in answer.serious):
        on_cpu = Weakness.EMULATED in answer.weaknesses
        details.append(f"GPU memory not {'measured (no GPU)' if on_cpu else 'compared'}")
    speeds = {cell.speed for cell in claimed}
    outcome = Outcome.GOOD if answer.good else Outcome.BAD if Verdict.SLOWER in speeds else None
    return Card(
        "What does it buy?", _times([cell.ratio or 0.0 for cell in claimed]) if claimed else "unknown", details, outcome
    )


def _baseline(answer: Answer) -> str:
    names = {cell.row["headline_baseline"] for cell in answer.serious}
    return names.pop() if len(names) == 1 else "the default"


def _costs(answer: Answer) -> Card:
    judged = [cell for cell in answer.serious if cell.quality is not None or cell.lost]
    worse = [cell for cell in judged if cell.quality is Verdict.WORSE or cell.lost]
    as_good = sum(cell.quality is Verdict.NON_INFERIOR for cell in judged)
    details = []
    if judged:
        details.append(f"{as_good} of {plural(len(judged), 'row')} as good as fp32")
        details += [f"worse: {_named(worse)}"] if worse else []
        open_ = len(judged) - as_good - len(worse)
        details += [f"{open_} undecided"] if open_ else []
    elif Weakness.NO_METRIC in answer.weaknesses:
        details.append("synthetic inputs or no metric: accuracy cannot be compared")
    else:
        details.append("no metric was compared with fp32's")
    overflowed = [cell.row for cell in answer.serious if cell.row["overflow_steps"] is not None]
    if overflowed:
        steps, of = (sum(row[name] for row in overflowed) for name in ("overflow_steps", "attempted_steps"))
        details.append(f"{steps:,} of {of:,} checked steps overflowed")
    controls = [cell for cell in answer.controls if cell.quality is not None or cell.lost]
    bad = [cell for cell in controls if cell.quality is Verdict.WORSE or cell.lost]
    if bad:
        names = ", ".join(dict.fromkeys(place_of(cell.row)[1] for cell in bad))
        details.append(f"control experiment ({names}): worse on {len(bad)} of {plural(len(controls), 'row')}")
    if worse:
        return Card("What does it cost?", f"accuracy, in {plural(len(worse), 'row')}", details, Outcome.BAD)
    if not judged or as_good < len(judged):
        return Card("What does it cost?", "unknown", details)
    return Card("What does it cost?", "no accuracy", details, Outcome.GOOD)


def _named(cells: Sequence[Cell]) -> str:
    """Name rows, by mode."""
    by_mode: dict[str, list[str]] = {}
    for cell in cells:
        workload, mode = place_of(cell.row)
        by_mode.setdefault(mode, []).append(workload)
    parts = []
    for mode, workloads in by_mode.items():
        many = len(workloads) > _NAMED
        parts.append(f"{mode} on {f'{len(workloads)} workloads' if many else _and(workloads)}")
    shown = parts[:_NAMED]
    return "; ".join([*shown, f"{len(parts) - len(shown)} more modes"] if len(parts) > len(shown) else shown)


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _trust(answer: Answer) -> Card:
    found = list(_weak_points(answer.weaknesses, len(answer.serious), answer.worth))
    details = found[:_WEAKNESSES]
    if len(found) > len(details):
        details.append(f"and {plural(len(found) - len(details), 'other point')}: see the chips and the sections below")
    if answer.noise is not None:
        noise = f"± {number(100 * answer.noise, 2)} %"
        details.insert(0, "noise of a speed-up (its 95 % interval, median)")
    else:
        details.insert(0, "of a speed-up: no row has an interval")
        noise = "unknown noise"
    if not found:
        details.append("nothing was found that weakens a figure")
    return Card("Can I trust it?", noise, details, is_warning=bool(found))


def _weak_points(weaknesses: Mapping[Weakness, int], rows: int, worth: Worth) -> Iterator[str]:
    """Yield what weakens the figures, the most serious first."""

    def of_rows(number: int) -> str:
        return "all rows" if number == rows else f"{number} of {plural(rows, 'row')}"

    sentences: dict[Weakness, Callable[[int], str]] = {
        Weakness.STAND_IN: lambda _: "the GPU is a stand-in for tests: its figures are invented",
        Weakness.EMULATED: lambda _: "low precision is emulated on a CPU: speeds say nothing about a GPU",
        Weakness.UNREADABLE: lambda n: f"{plural(n, 'part')} of the run could not be read",
        Weakness.UNFINISHED: lambda n: "the run was stopped or is still going on",
        Weakness.ONE_PROCESS: lambda n: f"one process, so no interval: {of_rows(n)}",
        Weakness.IDLE: lambda n: f"the GPU was idle for most of a step: {of_rows(n)}",
        Weakness.DISPATCH: lambda n: f"Python took most of a step: {of_rows(n)}",
        Weakness.BUSY: lambda n: f"other processes kept the machine busy: {of_rows(n)}",
        Weakness.LOST_CASES: lambda n: f"{plural(n, 'case')} failed or did not end",
        Weakness.NOT_STARTED: lambda n: f"{plural(n, 'planned case')} did not start",
        Weakness.NO_BASELINE: lambda n: f"no speed-up, for want of a baseline or a step time: {of_rows(n)}",
        Weakness.WITHOUT_XLA: lambda n: "without XLA, which can change more than the mode does",
        Weakness.UNJUDGED: lambda n: f"if the metric is as good cannot be told: {of_rows(n)}",
        Weakness.NO_METRIC: lambda n: f"{plural(n, 'workload')} without a metric: accuracy not measured",
        Weakness.TWO_LEVELS: lambda n: f"the step time of {plural(n, 'process')} jumped between two levels",
        Weakness.OLDER_METHOD: lambda n: "measured by an older method",
    }
    for weakness, sentence in sentences.items():
        if weakness in weaknesses:
            yield sentence(weaknesses[weakness])


def _advice(answer: Answer, run: Run) -> str:
    mode = answer.mode
    cells = [found[mode] for found in answer.cells.values() if mode is not None and mode in found]
    as_good = sum(cell.quality is Verdict.NON_INFERIOR for cell in cells)
    judged = sum(cell.quality is not None for cell in cells)
    evidence = (
        f"as good as fp32 on {as_good} of {plural(judged, 'workload')}" if judged else "its accuracy is not known"
    )
    match answer.advice:
        case Advice.USE:
            good = [name for name, found in answer.cells.items() if _is_good(found.get(str(mode)))]
            where = "" if len(good) == len(answer.cells) else f" on {_and(good[:_NAMED])}"
            where += f" and {len(good) - _NAMED} more" if len(good) > _NAMED and where else ""
            return f"Train with {mode}{where}: {evidence}."
        case Advice.STAY if mode is not None and place(run) == "CPU":
            return f"Stay with float32 on this CPU. To train in float16 on a GPU, scale with {mode}: {evidence}."
        case Advice.STAY if mode is not None:
            return f"Stay with float32 here. If float16 is needed all the same, scale with {mode}: {evidence}."
        case Advice.STAY if answer.good:
            return "Stay with float32 here: every mode that gains on one workload loses on another."
        case Advice.STAY:
            return f"Stay with float32 on this {place(run)}."
    return measure_again(answer)


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
        "\n".join(f"- {escape(card.question)} **{escape(card.answer)}** {_details(card)}" for card in screen.cards)
    )
    if table := matrix(screen.answer):
        parts.append(table.markdown())
    parts.append(escape(screen.advice))
    if screen.code:
        parts.append(f"```{screen.language}\n{screen.code}\n```")
    return "\n\n".join(parts)


def plain(screen: Screen) -> str:
    """Return the first screen for a terminal, without the matrix, which the table of results stands for."""
    lines = [f"{QUESTION} {screen.headline}"]
    lines += [f"  {card.question} {card.answer}: {_details(card)}" for card in screen.cards]
    return "\n".join([*lines, f"  What to do? {screen.advice}"])


def _details(card: Card) -> str:
    return f"{'; '.join(card.details)}."
