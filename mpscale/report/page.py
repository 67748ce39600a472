"""A page of HTML: the report of a run, and the shell that all pages share.

A page is complete in itself: it has no script and loads nothing, which its content security policy enforces. It can be
mailed, kept as an artifact of a nightly build or opened offline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline

from mpscale.core.files.reading import REPORT, RunError, read_text
from mpscale.report.document import Document, Section
from mpscale.report.figures import Picture
from mpscale.report.first_screen_page import html_of
from mpscale.report.html_table import Group, html, legend, wide
from mpscale.report.pieces import sentence
from mpscale.report.pieces import text as escape
from mpscale.report.table import NOTHING, Table

_FOOTER = "The same text is in report.md, and the CSV files beside this page have the figures."


def page(document: Document, pictures: Sequence[Picture] = ()) -> str:
    """Return the report as one page of HTML.

    Args:
        document: the report.
        pictures: shown after the first section.
    """
    # HTML is shown as text: names come from users' own suites, and a crash may print anything.
    markdown = MarkdownIt("commonmark", {"html": False})
    markdown.inline.ruler.before("html_inline", "nothing", _nothing)
    body = [] if document.screen is None else [html_of(document.screen)]
    title = escape(document.title)
    body.append(f"<h1>{title}</h1>" if document.screen is None else f'<h2 class="run">{title}</h2>')
    if document.note:
        body.append(f"<p>{escape(document.note)}</p>")
    if document.when:
        body.append(f'<p class="when">{markdown.renderInline(document.when)}</p>')
    body.append(markdown.render(document.findings))
    by_mode = [section for section in document.sections if section.group]
    alone = [section for section in document.sections if not section.group]
    shown = [_figures(by_mode, markdown)] if by_mode else []
    shown += [_section(section, "\n".join(_part(part, markdown) for part in section.parts)) for section in alone]
    titles = [*(section.title for section in by_mode[:1]), *(section.title for section in alone)]
    body += [_contents(titles), *shown[:1], *map(_figure, pictures), *shown[1:]]
    return shell(document.title, "\n".join(body))


def _nothing(state: StateInline, silent: bool) -> bool:
    """Leave out the comment that parts a text for GitHub."""
    there = state.src.startswith(NOTHING, state.pos)
    state.pos += len(NOTHING) if there else 0
    return there


def shell(title: str, body: str, footer: str = _FOOTER, styles: Sequence[str] = ()) -> str:
    """Return a page of HTML around ``body``, with the style of all pages.

    Args:
        title: of the browser's tab; plain text.
        body: HTML.
        footer: a sentence, see :func:`sentence`.
        styles: names of further style sheets of this package.
    """
    template, *sheets = (_file(name) for name in ("page.html", "page.css", *styles))
    return Template(template).substitute(title=escape(title), style="".join(sheets), body=body, footer=sentence(footer))


def read_page(path: Path) -> str | None:
    """Read a page that somebody else may have written; None if it could do more than a page of mpscale does.

    It must begin with the policy of these pages, under which a browser runs and loads nothing, and must not lead to
    another page by itself. A link is not followed: it may lead to a file that is nobody's business.
    """
    if path.is_symlink():
        return None
    try:
        content = read_text(path, REPORT)
    except RunError:
        return None
    head = _file("page.html").partition("<meta name")[0]
    can_no_more = content.startswith(head) and len(re.findall("http-equiv", content, re.I)) == 1
    return content if can_no_more else None


@cache
def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _part(part: Table | str, markdown: MarkdownIt) -> str:
    return html(part) if isinstance(part, Table) else str(markdown.render(part))


def _figures(sections: Sequence[Section], markdown: MarkdownIt) -> str:
    """Return the sections with a row per workload and mode as one wide table, with what each says below it."""
    groups, notes = [], []
    for number, section in enumerate(sections):
        tables = [part for part in section.parts if isinstance(part, Table)][:1]
        is_first = number == 0
        said = "\n".join(_part(part, markdown) for part in section.parts if part not in tables)
        anchor = anchor_of(section.title) if said and not is_first else ""
        # A section may have something to say about rows that are in no table, because none of them counts.
        groups += [Group(section.group, anchor, table) for table in tables]
        if said:
            notes.append(said if is_first else f'<h3 id="{anchor}">{escape(section.group)}</h3>\n{said}')
    columns = f"<details><summary>What the columns mean</summary>\n<div>{legend(groups)}</div></details>"
    below = "\n".join([*notes, columns])
    return _section(
        Section(sections[0].title, ()), f'{wide(groups) if groups else ""}\n<div class="notes">{below}</div>'
    )


def _contents(titles: Iterable[str]) -> str:
    links = "\n".join(f'<li><a href="#{anchor_of(title)}">{escape(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Sections"><ul>\n{links}\n</ul></nav>'


def _section(section: Section, text: str) -> str:
    heading = f"<h2>{escape(section.title)}</h2>"
    kind = ' class="sentences"' if section.sentences else ""
    if section.folded:
        # The id is inside the fold, so that a link to it unfolds it.
        return (
            f'<details><summary>{heading}</summary>\n<div id="{anchor_of(section.title)}"{kind}>{text}</div></details>'
        )
    return f'<section id="{anchor_of(section.title)}"{kind}>{heading}\n{text}</section>'


def _figure(picture: Picture) -> str:
    svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{escape(picture.title)}"', 1)
    # Whoever makes the page again must not lose lines: see report.files.
    unread = f' data-unread="{picture.unread}"' if picture.unread else ""
    return (
        f'<figure id="{anchor_of(picture.title)}"{unread}>'
        f'<h3>{escape(picture.title)}</h3>\n<div class="paper">{svg}</div>\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def anchor_of(title: str) -> str:
    """The id of a section or a figure of a page."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
