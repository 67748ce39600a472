"""A page of HTML: the report of a run, and the shell that all pages share.

A page is complete in itself: it has no script and loads nothing, which its content security policy enforces. It can be
mailed, kept as an artifact of a nightly build or opened offline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from string import Template

from markdown_it import MarkdownIt

from mpscale.report.document import Document
from mpscale.report.figures import Picture
from mpscale.report.table import Table

_FOLDED = ("Environment", "Settings", "Missing values")
"""Sections for looking things up, folded at first."""

_SENTENCES = ("Cases that did not end well", "Largest batches", "Tries", *_FOLDED)
"""Sections whose tables have cells long enough to be broken into lines."""

_PICTURES_AFTER = "Results"

_FOOTER = "The same text is in report.md, and the CSV files beside this page have the figures."


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
    return shell(document.title, "\n".join(body))


def shell(title: str, body: str, footer: str = _FOOTER, styles: Sequence[str] = ()) -> str:
    """Return a page of HTML around ``body``, with the style of all pages.

    Args:
        title: of the browser's tab; plain text.
        body: HTML.
        footer: plain text.
        styles: names of further style sheets of this package.
    """
    template, *sheets = (_file(name) for name in ("page.html", "page.css", *styles))
    return Template(template).substitute(title=escape(title), style="".join(sheets), body=body, footer=escape(footer))


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


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
