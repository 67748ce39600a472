"""report.html: the report as one page that needs nothing beside it, with pictures.

The page has no script and asks for nothing from anywhere: it can be mailed, kept as an artifact of a nightly build, or
opened where there is no network, and a browser is told to hold it to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from markdown_it import MarkdownIt

from mpscale.report.document import Document
from mpscale.report.figures import Picture

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
