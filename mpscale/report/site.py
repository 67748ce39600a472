"""A site of static pages over the runs of results folders: an index, reports, comparisons and a history."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpscale.analysis.history import RunFacts, make_history, oldest_first, read_what_can_be
from mpscale.analysis.neighbours import Neighbours
from mpscale.analysis.overall import overall_of
from mpscale.analysis.quantities import QUANTITIES, Verdict
from mpscale.core.machines import hardware, machine_words
from mpscale.core.record import place_of
from mpscale.core.runs import Run, RunError, without_parts
from mpscale.report import pieces
from mpscale.report.cell import quality_line, ratio_text, speed_word
from mpscale.report.comparison_page import comparison_page, headline
from mpscale.report.files import report_page
from mpscale.report.first_screen import QUESTION, first_screen
from mpscale.report.history import shown_commit
from mpscale.report.history_page import history_page
from mpscale.report.page import read_page, shell
from mpscale.report.pieces import Tone, card, cards, link, marked, noted, text, tone_of_effect, tone_of_overall
from mpscale.report.site_folder import SiteError, SiteFolder
from mpscale.report.table import DASH, plural
from mpscale.report.words import OVERALL

__all__ = ["Site", "SiteError", "write_site"]

_HISTORIES = ("step_time", "gpu_memory", "metric")
"""What the history shows, as far as there is any."""

_FOOTER = "Made by `mpscale site`. Times are UTC."


@dataclass(frozen=True)
class Site:
    """What was written.

    Args:
        index: the first page.
        runs: how many runs have a page.
        broken: what could not be shown, and why.
        removed: pages of earlier calls that are not needed any more, such as those of runs that are gone.
    """

    index: Path
    runs: int
    broken: list[tuple[str, str]]
    removed: list[str]


@dataclass(frozen=True)
class _Answer:
    """What a run answers, in a word, and its worst row."""

    tone: Tone
    word: str
    worst: str


@dataclass(frozen=True)
class _Entry:
    """A run and its pages.

    Args:
        run: the run.
        facts: about it.
        answer: what it answers.
        slug: its name as the name of a file.
        before: name of the run that it is compared with; None if there is none.
    """

    run: Run
    facts: RunFacts
    answer: _Answer
    slug: str
    before: str | None

    @property
    def report(self) -> str:
        return f"runs/{self.slug}.html"

    @property
    def comparison(self) -> str | None:
        return None if self.before is None else f"comparisons/{self.slug}.html"


def write_site(
    folder: Path,
    results: Sequence[Path],
    title: str = "mpscale",
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    by_name: bool = False,
) -> Site:
    """Write a site over the runs in ``runs/`` and ``reference/`` of some results folders.

    Pages of an earlier call are replaced, and those of runs that are gone removed. A report is copied if it is not
    older than the run's journal and can do no more than a page of mpscale does, and made otherwise. A run that cannot
    be read, or whose pages cannot be made, is named on the index.

    Args:
        folder: where to; it is made if it does not exist.
        results: the results folders; if several have a run of the same name, the first counts.
        title: of the index.
        progress: is told how many of the runs are done, how many there are, and the name of the next.
        by_name: see :func:`mpscale.analysis.compare.compare`.

    Raises:
        SiteError: the folder holds something else. It is left as it is.
        RunError: there is no run.
        OSError: the folder cannot be written.
    """
    site = SiteFolder(folder)
    runs, answers, broken = _read(results)
    neighbours = Neighbours([run for _, run in runs], by_name)
    slugs = _slugs([run.name for _, run in runs])
    entries = [
        _Entry(run, facts, answers[run.name], slugs[run.name], neighbours.before(run.name)) for facts, run in runs
    ]
    pages = [page for entry in entries for page in (entry.report, entry.comparison) if page is not None]
    site.begin([*pages, "history.html", "index.html", ".nojekyll"])
    shown = []
    for done, entry in enumerate(entries):
        progress(done, len(entries), entry.run.name)
        try:
            report = _report(site, entry)
        except Exception as error:  # whatever is wrong with one run must not cost the others their pages
            broken.append((str(entry.run.path), f"its report cannot be made: {error}"))
            continue
        if report is None:
            site.keep(entry.report)
        else:
            site.write(entry.report, report)
        shown.append(entry)
    links = {entry.run.name: f"../{entry.report}" for entry in shown}
    has_history = _write_history(site, [entry.run for entry in shown], neighbours, links)
    above = _back("../", has_history)
    compared = {
        entry.run.name: found for entry in shown if (found := _write_comparison(site, entry, neighbours, links, above))
    }
    # The index comes last, and pages of runs that are gone are removed after it: no link leads nowhere.
    site.write("index.html", _index(title, shown, compared, broken, has_history))
    site.write(".nojekyll", "")
    removed = [name for name in site.finish() if name.endswith(".html")]
    return Site(folder / "index.html", len(shown), broken, removed)


def _read(
    results: Sequence[Path],
) -> tuple[list[tuple[RunFacts, Run]], dict[str, _Answer], list[tuple[str, str]]]:
    """The runs with their facts, oldest first; what each answers, by name; and what cannot be read."""
    runs: list[Run] = []
    answers: dict[str, _Answer] = {}
    broken: list[tuple[str, str]] = []
    for folder in results:
        found, unread = read_what_can_be(folder)
        broken += unread
        for run in found:
            try:
                hardware(run)
                answers.setdefault(run.name, _answer_of(run))
            except Exception as error:  # as above
                broken.append((str(run.path), str(error)))
            else:
                runs.append(run)
    # The parts of a run may be in another results folder than it.
    return oldest_first(without_parts(runs)), answers, broken


def _slugs(names: Sequence[str]) -> dict[str, str]:
    """Names of files, each different also where upper and lower case are the same."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:120].strip("-.") or "run"
        slug, number = plain, 1
        while slug.lower() in taken:
            number += 1
            slug = f"{plain}-{number}"
        taken.add(slug.lower())
        found[name] = slug
    return found


def _report(site: SiteFolder, entry: _Entry) -> str | None:
    """The report of a run, or None if the site has it already."""
    source, journal = entry.run.path / "report.html", entry.run.path / "journal.jsonl"
    if (written := read_page(source)) is not None and _is_newer(source, journal):
        return written
    if site.has(entry.report) and _is_newer(site.path / entry.report, journal):
        return None
    return report_page(entry.run)


def _is_newer(page: Path, journal: Path) -> bool:
    return not journal.is_file() or page.stat().st_mtime_ns >= journal.stat().st_mtime_ns


@dataclass(frozen=True)
class _Compared:
    """What a comparison with the run before says: in HTML, and whether it has a page."""

    tone: Tone
    words: str
    has_page: bool


def _write_comparison(
    site: SiteFolder, entry: _Entry, neighbours: Neighbours, links: dict[str, str], above: str
) -> _Compared | None:
    if entry.before is None or entry.comparison is None:
        return None
    try:
        comparison = neighbours.comparison(entry.before, entry.run.name)
        answer = overall_of(comparison)
        page = comparison_page([comparison], links=links, above=above)
    except Exception as error:  # as above
        return _Compared(Tone.UNKNOWN, f"not compared: {error}", False)
    site.write(entry.comparison, page)
    words = OVERALL[answer.answer] if answer.judged else headline(comparison, answer)
    return _Compared(tone_of_overall(answer.answer), words, True)


def _write_history(site: SiteFolder, runs: Sequence[Run], neighbours: Neighbours, links: dict[str, str]) -> bool:
    histories = []
    for quantity in _HISTORIES:
        column = QUANTITIES[quantity].column
        if not any(record[column] is not None for run in runs for record in run.records):
            continue
        try:
            histories.append(make_history(runs, quantity, by_name=neighbours.by_name))
        except RunError:  # none of these figures counts
            continue
    if not histories:
        return False
    here = {name: to.removeprefix("../") for name, to in links.items()}
    site.write("history.html", history_page(histories, neighbours, here, above=_back("", True)))
    return True


def _back(root: str, has_history: bool) -> str:
    history = f' · <a href="{root}history.html">History</a>' if has_history else ""
    return f'<p class="note"><a href="{root}index.html">All runs</a>{history}</p>'


def _answer_of(run: Run) -> _Answer:
    """The answer of a run for the index, and the row that looks worst in it."""
    screen = first_screen(run)
    cells = screen.answer.serious
    bad = [cell for cell in cells if cell.quality is Verdict.WORSE or cell.lost]
    timed = [cell for cell in cells if cell.ratio is not None and not cell.doubts]
    worst = DASH
    if bad:
        worst = f"{' '.join(place_of(bad[0].row))}: {quality_line(bad[0])}"
    elif timed:
        lowest = min(timed, key=lambda cell: cell.ratio or 0.0)
        worst = f"{' '.join(place_of(lowest.row))}: {ratio_text(lowest)} {speed_word(lowest)}"
    return _Answer(tone_of_effect(screen.effect), screen.headline.removesuffix("."), worst)


def _index(
    title: str,
    entries: Sequence[_Entry],
    compared: dict[str, _Compared],
    broken: Sequence[tuple[str, str]],
    has_history: bool,
) -> str:
    newest_first = entries[::-1]
    devices = list(dict.fromkeys(_device(entry.run) for entry in newest_first))
    about = f"{plural(len(entries), 'run')} on {plural(len(devices), 'machine')}" if entries else "No run can be shown"
    if broken:
        about += f"; {plural(len(broken), 'folder')} could not be shown"
    history = ' · <a href="history.html">History of all runs</a>' if has_history else ""
    body = [f"<h1>{text(title)}</h1>", f'<p class="when">{text(about)}{history}</p>']
    if newest_first:
        body.append(cards(_newest(device, newest_first, compared) for device in devices[:_CARDS]))
        rows = (_index_row(entry, compared.get(entry.run.name)) for entry in newest_first)
        headers = ["date (UTC)", "answer", "worst row", "against the run before", "device", "commit", "run"]
        body.append(f"<h2>Runs</h2>{pieces.table(headers, rows, sentences=True)}")
        body.append(
            f'<p class="note">Answer: {text(QUESTION)} The run before is the last one on the same machine with the '
            "same preset.</p>"
        )
    if broken:
        items = (f"<li>{text(what)}: {text(why)}</li>" for what, why in broken)
        body.append(f"<h2>What could not be shown</h2><ul>{''.join(items)}</ul>")
    return shell(title, "\n".join(body), _FOOTER, pieces.STYLES)


_CARDS = 6
"""Most machines whose newest run is shown at the top."""


def _newest(device: str, newest_first: Sequence[_Entry], compared: dict[str, _Compared]) -> str:
    entry = next(entry for entry in newest_first if _device(entry.run) == device)
    answer, found = entry.answer, compared.get(entry.run.name)
    lines = [link(entry.report, f"{_when(entry.facts)} {shown_commit(entry.facts)}")]
    if answer.worst != DASH:
        lines.append(f"lowest: {text(answer.worst)}" if answer.tone is Tone.GOOD else f"worst: {text(answer.worst)}")
    if found is not None:
        lines.append(f"against the run before: {_comparison(entry, found)}")
    return card(f"Newest on {device}", marked(answer.tone, answer.word), lines)


def _index_row(entry: _Entry, found: _Compared | None) -> list[str]:
    answer = entry.answer
    unfinished = "" if entry.run.finished else f" {noted(Tone.WARN, 'not finished')}"
    return [
        f'<span class="nowrap">{link(entry.report, _when(entry.facts))}</span>{unfinished}',
        marked(answer.tone, answer.word),
        text(answer.worst),
        DASH if found is None else _comparison(entry, found),
        text(_device(entry.run)),
        text(shown_commit(entry.facts)),
        f"{text(entry.run.shown)}{_note(entry.run)}",
    ]


def _note(run: Run) -> str:
    return f'<br><span class="soft">{text(run.note)}</span>' if run.note else ""


def _comparison(entry: _Entry, found: _Compared) -> str:
    said = marked(found.tone, found.words)
    return f'<a href="{text(entry.comparison)}">{said}</a>' if found.has_page else said


def _device(run: Run) -> str:
    return machine_words(hardware(run))


def _when(facts: RunFacts) -> str:
    return f"{facts.started:%Y-%m-%d %H:%M}" if facts.started else "unknown"
