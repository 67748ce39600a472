"""Pieces of HTML that pages share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from html import escape

from mpscale.analysis.answer import Effect
from mpscale.analysis.overall import Overall
from mpscale.analysis.quantities import Outcome, Verdict
from mpscale.terminal.streams import visible

STYLES = ("pieces.css",)
"""For :func:`mpscale.report.page.shell`."""


class Tone(StrEnum):
    """How good something is: a class of the style sheet, and the symbol that says the same without colour."""

    symbol: str

    GOOD = "good", "✓"
    BAD = "bad", "✗"
    WARN = "warn", "!"
    UNKNOWN = "unknown", "?"

    def __new__(cls, name: str, symbol: str) -> Tone:
        member = str.__new__(cls, name)
        member._value_ = name
        member.symbol = symbol
        return member


def tone_of(verdict: Verdict) -> Tone:
    """The tone of a verdict."""
    tones = {Outcome.FIRED: Tone.BAD, Outcome.PASSED: Tone.GOOD}
    return tones.get(verdict.outcome, Tone.UNKNOWN)


def tone_of_effect(effect: Effect) -> Tone:
    """The tone of what a mode does, or of all of them."""
    return {Effect.GOOD: Tone.GOOD, Effect.BAD: Tone.BAD, Effect.UNKNOWN: Tone.UNKNOWN}[effect]


def tone_of_overall(answer: Overall) -> Tone:
    """The tone of an answer."""
    tones = {Overall.WORSE: Tone.BAD, Overall.BETTER: Tone.GOOD, Overall.SAME: Tone.GOOD}
    return tones.get(answer, Tone.UNKNOWN)


def marked(tone: Tone, words: str) -> str:
    """Words with the symbol and the colour of a tone."""
    return f'<span class="mark {tone}"><span class="symbol">{tone.symbol}</span> {text(words)}</span>'


def noted(tone: Tone, words: str) -> str:
    """A sentence behind the symbol of a tone."""
    return f'<span class="mark {tone} symbol">{tone.symbol}</span> {text(words)}'


def text(words: object) -> str:
    """Plain text as HTML, also within the quotes of an attribute. What nobody sees becomes visible."""
    return escape(visible(str(words)))


def sentence(words: str) -> str:
    """A sentence as HTML, with commands of mpscale between backticks as code. Names that people give stay so."""
    return re.sub("`(mpscale [a-z]+)`", r"<code>\1</code>", text(words))


def link(to: str | None, words: str) -> str:
    """Plain text, as a link if there is somewhere to go."""
    return text(words) if to is None else f'<a href="{text(to)}">{text(words)}</a>'


def card(title: str, headline: str, lines: Sequence[str], tone: Tone | None = None) -> str:
    """A box with a title, a headline and lines below it; all but the title are HTML."""
    items = "".join(f"<li>{line}</li>" for line in lines)
    kind = f"box {tone}" if tone else "box"
    below = f"<ul>{items}</ul>" if items else ""
    return f'<div class="{kind}"><p class="title">{text(title)}</p><p class="headline">{headline}</p>{below}</div>'


def cards(some: Iterable[str]) -> str:
    """Boxes side by side."""
    return f'<div class="boxes">{"".join(some)}</div>'


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, sentences: bool = False) -> str:
    """A table of HTML cells that scrolls by itself if it is wide.

    Args:
        headers: plain text.
        rows: HTML.
        sentences: whether cells are long enough to be broken into lines.
    """
    head = "".join(f"<th>{text(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    kind = "wide sentences" if sentences else "wide"
    shown = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    return f'<div class="{kind}" tabindex="0">{shown}</div>'


def matrix(workloads: Sequence[str], modes: Sequence[str], cells: dict[tuple[str, str], tuple[Tone, str]]) -> str:
    """A cell for each workload and mode: a table on a wide screen, one card below the other on a narrow one.

    Args:
        workloads: the rows.
        modes: the columns.
        cells: tone and HTML, by workload and mode.
    """
    head = "".join(f'<th scope="col">{text(mode)}</th>' for mode in modes)
    rows = []
    for workload in workloads:
        of = []
        for mode in modes:
            tone, inside = cells.get((workload, mode), (None, ""))
            kind = f"cell {tone}" if tone else "none"
            of.append(f'<td class="{kind}"><span class="mode">{text(mode)}</span>{inside}</td>')
        rows.append(f'<tr><th scope="row">{text(workload)}</th>{"".join(of)}</tr>')
    table = f'<table class="changes"><thead><tr><td></td>{head}</tr></thead>\n<tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'


_WIDTH, _HEIGHT = 200, 14
"""Of a bar, in its own units; it is as wide as its cell."""


def bar(estimate: float, low: float | None, high: float | None, span: float, tone: Tone, said: str) -> str:
    """An estimate and its interval on a log axis around 1, which is at the middle; ends that do not fit have arrows.

    Args:
        estimate: a ratio.
        low: lower end of its interval; None if there is none.
        high: upper end.
        span: the ratio at the right end of the axis, above 1; at the left end it is its inverse.
        tone: decides the colour.
        said: the same in words.
    """

    def place(ratio: float) -> float:
        share = math.log(ratio) / math.log(span) if ratio > 0 else -1.0
        return _WIDTH / 2 * (1 + max(-1.0, min(1.0, share)))

    middle, parts = _HEIGHT / 2, []
    if low is not None and high is not None:
        left, right = place(low), place(high)
        parts.append(f'<rect class="range" x="{left:.1f}" y="{middle - 2:g}" width="{right - left:.1f}" height="4"/>')
        if low < 1 / span:
            parts.append(f'<path class="end" d="M0 {middle:g}l6 -5v10z"/>')
        if high > span:
            parts.append(f'<path class="end" d="M{_WIDTH} {middle:g}l-6 -5v10z"/>')
    parts.append(f'<rect class="estimate" x="{place(estimate) - 2:.1f}" y="2" width="4" height="{_HEIGHT - 4}"/>')
    return (
        f'<svg class="interval {tone}" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">'
        f'<title>{text(said)}</title><path class="axis" d="M0 {middle:g}H{_WIDTH}"/>'
        f'{"".join(parts)}<path class="one" d="M{_WIDTH // 2} 0V{_HEIGHT}"/></svg>'
    )


def span_of(ratios: Iterable[float], ends: Iterable[float | None]) -> float:
    """The right end of an axis: wide enough for all ratios, and for the ends of their intervals up to a factor of 2."""
    logs = [abs(math.log(end)) for end in ends if end is not None and 0 < end < math.inf]
    wide = min(max(logs, default=0.0), math.log(2.0))
    return math.exp(1.05 * max(wide, math.log(1.1), *(abs(math.log(ratio)) for ratio in ratios if ratio > 0), 0.0))


def anchor(title: str) -> str:
    """An id for a heading."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
