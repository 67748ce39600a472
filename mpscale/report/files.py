"""The files of a report: report.html, report.md, summary.csv and cases.csv, all made from the run's journal.

report.html is complete in itself: it has no script and loads nothing, which its content security policy enforces. It
can be mailed, kept as an artifact of a nightly build or opened offline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt

from mpscale.analysis.noise_floor import floors_of
from mpscale.analysis.probe import probes_of
from mpscale.analysis.summary import summary_csv, summary_of
from mpscale.core.cases_csv import read_cases
from mpscale.core.record import Record, to_csv
from mpscale.core.run_folder import write_cases
from mpscale.core.runs import Run, RunError, read_run
from mpscale.report.document import Document, document, render
from mpscale.report.figures import Picture
from mpscale.report.run_figures import gains, training
from mpscale.report.sweep_figure import over_batch
from mpscale.report.table import Table, plural

WRITTEN = ("report.html", "report.md", "summary.csv", "cases.csv")
"""Names of the files; the one to look at comes first."""

_FOLDED = ("Environment", "Settings", "Missing values")
"""Sections for looking things up, folded at first."""

_SENTENCES = ("Cases that did not end well", "Largest batches", "Tries", *_FOLDED)
"""Sections whose tables have cells long enough to be broken into lines."""

_PICTURES_AFTER = "Results"


def rebuild(run_dir: str | Path) -> Run:
    """Write the files of :data:`WRITTEN` again, from the journal of the run in ``run_dir`` and the steps beside it.

    Raises:
        RunError: the folder is not a run, or a file that they are made from is broken.
        OSError: the folder cannot be written.
    """
    run = read_run(run_dir)
    if run.path.is_file():
        raise RunError(f"{run.path}: a report is made from a run's journal, and this is a cases.csv alone")
    cases = to_csv(run.records)
    if lost := _lost_from_the_journal(run, cases):
        run.problems.append(
            f"journal.jsonl lacks the results of {plural(len(lost), 'case')} that cases.csv has, such as {lost[0]}: "
            "it was cut off or changed; cases.csv is left as it was"
        )
    write_reports(run, None if lost else cases)
    return run


def write_reports(run: Run, cases: str | None) -> None:
    """Write the files of :data:`WRITTEN` into the folder of a run.

    Args:
        run: the run.
        cases: the content of cases.csv; None leaves that file as it is.

    Raises:
        OSError: the folder cannot be written.
    """
    if cases is not None:
        write_cases(run.path, cases)
    _write(run.path / "summary.csv", summary_csv(summary_of(run)))
    report = document(run, floors_of(run), probes_of(run))
    _write(run.path / "report.md", render(report))
    # Pictures come last: they take longest, and if they fail, everything else is written.
    pictures = [picture for picture in (gains(run), over_batch(run), training(run)) if picture is not None]
    _write(run.path / "report.html", page(report, pictures))


def _lost_from_the_journal(run: Run, cases: str) -> list[str]:
    """Cases whose result is in cases.csv, which is written after the journal, but no longer in the journal.

    Args:
        run: as its journal has it.
        cases: the content that cases.csv should have.
    """
    path = run.path / "cases.csv"
    try:
        if path.read_bytes() == cases.encode():
            return []  # the usual case, without parsing a large file
        written = read_cases(path, only=["attempts"])
    except (OSError, RunError):
        return []
    known = {record["case_id"]: record for record in run.records}

    def is_lost(row: Record) -> bool:
        here = known.get(row["case_id"])
        if here is None or here["status"] != "interrupted" or row["status"] == "interrupted":
            return here is None
        # cases.csv has no row of an attempt that was cut off, only of the attempt before.
        return (row["attempts"] or 1) >= (here["attempts"] or 1)

    return [row["case_id"] for row in written if is_lost(row)]


def write_whole(folder: Path, files: Mapping[str, str]) -> None:
    """Write files by name, each whole or not at all: the process may be killed at any time.

    Raises:
        OSError: the folder cannot be written.
    """
    for name, text in files.items():
        partial = folder / f".{name}.partial"
        _write(partial, text)
        partial.replace(folder / name)


def _write(path: Path, text: str) -> None:
    # run.json holds names of folders and variables, which need not be valid text.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def page(document: Document, pictures: Sequence[Picture] = ()) -> str:
    """Return the report as one page of HTML.

    Args:
        document: the report.
        pictures: shown after the results.
    """
    # HTML is shown as text: names come from users' own suites, and a crash may print anything.
    markdown = MarkdownIt("commonmark", {"html": False})
    body = [f"<h1>{escape(document.title)}</h1>"]
    if document.when:
        body.append(f'<p class="when">{markdown.renderInline(document.when)}</p>')
    body += [markdown.render(document.findings), _contents(document.sections)]
    for title, parts in document.sections.items():
        shown = (_table(part) if isinstance(part, Table) else markdown.render(part) for part in parts)
        body.append(_section(title, "\n".join(shown)))
        if title == _PICTURES_AFTER:
            body += [_figure(picture) for picture in pictures]
    template, style = (files(__package__).joinpath(name).read_text("utf-8") for name in ("page.html", "page.css"))
    return Template(template).substitute(title=escape(document.title), style=style, body="\n".join(body))


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in table.rows)
    body = f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{rows}</tbody>"
    return f'<div class="wide" tabindex="0"><table>\n{body}\n</table></div>'


def _contents(titles: Iterable[str]) -> str:
    links = "\n".join(f'<li><a href="#{_anchor(title)}">{escape(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Sections"><ul>\n{links}\n</ul></nav>'


def _section(title: str, text: str) -> str:
    heading = f"<h2>{escape(title)}</h2>"
    kind = ' class="sentences"' if title in _SENTENCES else ""
    if title in _FOLDED:
        # The id is inside the fold, so that a link to it unfolds it.
        return f'<details><summary>{heading}</summary>\n<div id="{_anchor(title)}"{kind}>{text}</div></details>'
    return f'<section id="{_anchor(title)}"{kind}>{heading}\n{text}</section>'


def _figure(picture: Picture) -> str:
    svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{escape(picture.title)}"', 1)
    return (
        f'<figure id="{_anchor(picture.title)}"><h3>{escape(picture.title)}</h3>\n<div class="paper">{svg}</div>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
