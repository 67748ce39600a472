"""report.html: the report as one page that needs nothing beside it, with pictures.

The page has no script and asks for nothing from anywhere: it can be mailed, kept as an artifact of a nightly build, or
opened where there is no network, and a browser is told to hold it to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from mpscale.analysis.noise_floor import floors_of
from mpscale.analysis.summary import summary_csv, summary_of
from mpscale.core.cases_csv import read_cases
from mpscale.core.record import Record
from mpscale.core.run_folder import write_cases
from mpscale.core.runs import Run, RunError, read_run
from mpscale.report import document as markdown
from mpscale.report.document import Document, document
from mpscale.report.figures import Picture
from mpscale.report.run_figures import gains, training

_FOLDED = ("Environment", "Settings", "What is empty and why")
"""Sections that are looked up rather than read, folded until they are."""

_SENTENCES = ("Cases that did not end well", *_FOLDED)
"""Sections whose tables have cells long enough to be broken into lines."""

_PICTURES_AFTER = "Results"

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --page: #ffffff; --band: #f6f8fa; --line: #d0d7de;
  --link: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9aa4af; --page: #0d1117; --band: #161b22;
  --line: #3d444d; --link: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
.when { color: var(--soft); margin: 0 0 20px; }
nav ul { list-style: none; margin: 20px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px;
  font-size: .9rem; }
.wide { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 8px; border-bottom: 1px solid var(--line); }
th { background: var(--band); white-space: nowrap; }
td { white-space: nowrap; }
.sentences td { white-space: normal; max-width: 36rem; overflow-wrap: break-word; }
tbody tr:hover { background: var(--band); }
pre { overflow-x: auto; padding: 12px; background: var(--band); border: 1px solid var(--line); font-size: .8rem; }
figure { margin: 24px 0; }
figure h3 { font-size: 1rem; margin: 0 0 8px; }
figure .paper { background: #ffffff; border: 1px solid var(--line); padding: 8px; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 640px; height: auto; }
figcaption { color: var(--soft); font-size: .875rem; margin-top: 6px; }
details { margin-top: 40px; border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-size: 1.2rem; padding-bottom: 4px; }
details > div { scroll-margin-top: 3rem; }
summary h2 { display: inline; font-size: inherit; margin: 0; padding: 0; border: 0; }
footer { margin-top: 48px; color: var(--soft); font-size: .875rem; }
@media print { nav { display: none; } .wide, figure .paper, pre { overflow: visible; } }
"""


def render(document: Document, pictures: Sequence[Picture] = ()) -> str:
    """The report as one page of HTML.

    Args:
        document: what it says.
        pictures: put after the results, without which there is nothing to draw either.
    """
    markdown = _markdown()
    sections = {title: markdown.render(text) for title, text in document.sections.items()}
    body = [f"<h1>{escape(document.title)}</h1>"]
    if document.when:
        body.append(f'<p class="when">{markdown.renderInline(document.when)}</p>')
    body += [markdown.render(document.findings), _contents(sections)]
    for title, text in sections.items():
        body.append(_section(title, text))
        if title == _PICTURES_AFTER:
            body += [_figure(picture) for picture in pictures]
    return _PAGE.format(policy=_POLICY, title=escape(document.title), style=_STYLE, body="\n".join(body))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="mpscale">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
<footer>The same text is in report.md, and one row a case in cases.csv, both beside this page.</footer>
</main>
</body>
</html>
"""


def _markdown() -> MarkdownIt:
    # HTML in the text stays text: names come from people's own suites, and the last lines of a crash from anywhere.
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("table_open", lambda *_: '<div class="wide" tabindex="0"><table>\n')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return markdown


def _contents(titles: Iterable[str]) -> str:
    links = "\n".join(f'<li><a href="#{_anchor(title)}">{escape(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Sections"><ul>\n{links}\n</ul></nav>'


def _section(title: str, text: str) -> str:
    heading = f"<h2>{escape(title)}</h2>"
    kind = ' class="sentences"' if title in _SENTENCES else ""
    if title in _FOLDED:
        # The id lies on what is folded, so that a link to it unfolds it.
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


# Makes everything in a run's folder that follows from its journal.

WRITTEN = ("report.html", "report.md", "summary.csv", "cases.csv")
"""Names of the files that are made, the one to look at first."""


def rebuild(run_dir: str | Path) -> Run:
    """Writes the files of :data:`WRITTEN` anew from the journal of the run in ``run_dir``, and the steps beside it.

    Raises:
        RunError: the folder is no run, or a file that they are made from is broken.
        OSError: the folder cannot be written.
    """
    run = read_run(run_dir)
    if run.path.is_file():
        raise RunError(f"{run.path}: a report is made from a run's journal, which a cases.csv by itself does not have")
    lost = _lost_from_the_journal(run)
    if lost:
        run.problems.append(
            f"journal.jsonl lacks the results of {len(lost)} case{'' if len(lost) == 1 else 's'} that cases.csv has, "
            f"such as {lost[0]}: it was cut off or changed; cases.csv is left as it was"
        )
    write_reports(run, cases=not lost)
    return run


def write_reports(run: Run, cases: bool = True) -> None:
    """Writes the files of :data:`WRITTEN` into the folder of a run that was read.

    Args:
        run: the run.
        cases: whether cases.csv is written too.

    Raises:
        OSError: the folder cannot be written.
    """
    if cases:
        write_cases(run.path, run.records)
    _write(run.path / "summary.csv", summary_csv(summary_of(run)))
    said = document(run, floors_of(run))
    _write(run.path / "report.md", markdown.render(said))
    # Last: pictures take longest, and nothing else should wait for them or be lost with them.
    pictures = [picture for picture in (gains(run), training(run)) if picture is not None]
    _write(run.path / "report.html", render(said, pictures))


def _lost_from_the_journal(run: Run) -> list[str]:
    """Cases whose result is in cases.csv, which is written after the journal, and no longer in the journal."""
    try:
        written = read_cases(run.path / "cases.csv", only=["attempts"])
    except RunError:
        return []
    known = {record["case_id"]: record for record in run.records}

    def is_lost(row: Record) -> bool:
        here = known.get(row["case_id"])
        if here is None or here["status"] != "interrupted" or row["status"] == "interrupted":
            return here is None
        # An attempt that was cut off has no row in cases.csv, where the one before it stands.
        return (row["attempts"] or 1) >= (here["attempts"] or 1)

    return [row["case_id"] for row in written if is_lost(row)]


def _write(path: Path, text: str) -> None:
    # run.json holds names of folders and variables, which need not be text.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
