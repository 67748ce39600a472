"""The first screen of a report as HTML: cards, and a matrix whose cells show speed, interval, accuracy and overflow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mpscale.analysis.answer import Answer, Cell
from mpscale.analysis.quantities import Verdict
from mpscale.report.cell import (
    baseline_line,
    chips,
    column_chips,
    memory_line,
    overflow_line,
    quality_line,
    ratio_text,
    speed_word,
)
from mpscale.report.figures import Picture
from mpscale.report.first_screen import GO_ON, QUESTION, Card, Screen
from mpscale.report.pieces import Tone, bar, span_of, tone_of, tone_of_effect
from mpscale.report.pieces import text as escape

_SPEEDS = {Verdict.FASTER: (Tone.GOOD, "▲"), Verdict.SLOWER: (Tone.BAD, "▼")}
_OPEN = (Tone.UNKNOWN, "●")
"""A colour and a sign: a colour alone says nothing to many readers and to printers."""

_NAME_WIDTH, _CELL_WIDTH = 9, 9.5
"""Least widths of the columns of the matrix, in rem; a page that is too narrow scrolls it."""

_LONGEST = 80
"""Most characters of a workload's name in the matrix; the title has it in full."""


def html_of(screen: Screen) -> str:
    """Return the first screen as HTML."""
    facts = " · ".join(escape(fact) for fact in screen.facts)
    headline = f'<span class="{tone_of_effect(screen.effect)}-text">{escape(screen.headline)}</span>'
    cards = "\n".join(_card(card) for card in screen.cards)
    aside = f'<div class="aside">\n{_advice(screen)}{_picture(screen.picture)}</div>'
    parts = [
        f'<h1 class="question">{escape(QUESTION)} {headline}</h1>',
        f'<p class="when">{facts}</p>',
        _lacks(screen),
        f'<div class="cards">\n{cards}\n</div>',
        f'<div class="answer">\n{_matrix(screen)}\n{aside}\n</div>',
    ]
    return f'<section class="screen" aria-label="The answer">\n{"".join(parts)}</section>'


def _lacks(screen: Screen) -> str:
    """Say what a run that was stopped lacks, and how it goes on."""
    if not screen.lacks:
        return ""
    said = f"<p>{escape(screen.lacks)}{f' {GO_ON}' if screen.go_on else ''}</p>"
    command = f'<pre tabindex="0"><code>{escape(screen.go_on)}</code></pre>' if screen.go_on else ""
    return f'<div class="card warn alone"><h2 class="small">The run is not complete</h2>{said}{command}</div>\n'


def _card(card: Card) -> str:
    kind = " warn" if card.is_warning else "" if card.effect is None else f" {tone_of_effect(card.effect)}"
    first, *rest = card.details
    items = "".join(f"<li>{escape(detail)}</li>" for detail in rest)
    more = f"<ul>{items}</ul>" if rest else ""
    return (
        f'<div class="card{kind}"><h2 class="small">{escape(card.question)}</h2>'
        f"<p><b>{escape(card.answer)}</b> {escape(first)}</p>{more}</div>"
    )


def _advice(screen: Screen) -> str:
    code = f'<pre tabindex="0"><code>{escape(screen.code)}</code></pre>' if screen.code else ""
    return f'<div class="card advice"><h2 class="small">What to do</h2><p>{escape(screen.advice)}</p>{code}</div>\n'


def _picture(picture: Picture | None) -> str:
    if picture is None:
        return ""
    svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{escape(picture.title)}"', 1)
    caption = f"<details><summary>How to read it</summary>{escape(picture.caption)}</details>"
    return f'<figure class="tradeoff">{svg}<figcaption>{caption}</figcaption></figure>\n'


def _matrix(screen: Screen) -> str:
    answer = screen.answer
    if not answer.cells:
        return ""
    modes = answer.modes
    hoisted = {mode: column_chips(answer, mode) for mode in modes}
    heads = "".join(f'<th scope="col">{escape(mode)}{_chips(hoisted[mode])}</th>' for mode in modes)
    cells = [cell for by_mode in answer.cells.values() for cell in by_mode.values()]
    span = span_of((cell.ratio for cell in cells if cell.ratio), (end for cell in cells for end in cell.ends or ()))
    rows = "\n".join(_row(answer, workload, hoisted, span) for workload in answer.cells)
    axis = f"The axis reaches from {1 / span:.2g}x to {span:.2g}x; an arrow means that the interval goes on."
    caption = f'<p class="caption">{escape(screen.caption)} {axis}</p>'
    width = _NAME_WIDTH + len(modes) * _CELL_WIDTH
    columns = f'<colgroup><col style="width: {_NAME_WIDTH}rem"></colgroup>'
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    table = f'<table class="matrix" style="min-width: {width}rem">{columns}{head}\n<tbody>\n{rows}\n</tbody></table>'
    return f'<div class="verdicts"><div class="wide" tabindex="0">{table}</div>{caption}</div>'


def _row(answer: Answer, workload: str, hoisted: Mapping[str, Sequence[str]], span: float) -> str:
    cells = answer.cells[workload]
    baseline = escape(baseline_line(answer.baselines[workload]))
    name = workload if len(workload) <= _LONGEST else f"{workload[: _LONGEST // 2]}…{workload[-_LONGEST // 2 :]}"
    head = f'<th scope="row" title="{escape(workload)}"><bdi>{_breakable(name)}</bdi><small>{baseline}</small></th>'
    shown = (_cell(mode, cells.get(mode), chips_above, span) for mode, chips_above in hoisted.items())
    return f"<tr>{head}{''.join(shown)}</tr>"


def _breakable(name: str) -> str:
    """Allow a line break after each mark in a name."""
    return re.sub(r"([:_./-])(?=.)", r"\1<wbr>", escape(name))


def _cell(mode: str, cell: Cell | None, chips_above: Sequence[str], span: float) -> str:
    if cell is None:
        return f'<td class="none" data-mode="{escape(mode)}"><span class="soft">not run</span></td>'
    weak = " weak" if cell.doubts or cell.ends is None else ""
    # To be fast is no good news if the training is worse.
    tone, sign = _SPEEDS.get(cell.speed or Verdict.CANNOT_TELL, _OPEN)
    tone = Tone.UNKNOWN if cell.is_worse else tone
    quality = Tone.UNKNOWN if cell.quality is None else tone_of(cell.quality)
    mark = quality.symbol if quality in (Tone.GOOD, Tone.BAD) else ""
    lines = [("bad-text" if quality is Tone.BAD else "", f"{mark} {quality_line(cell)}".strip())]
    lines += [("", line) for line in (memory_line(cell), overflow_line(cell))]
    below = "".join(f'<span class="{kind}">{escape(line)}</span>' for kind, line in lines if line)
    others = [chip for chip in chips(cell) if chip not in chips_above]
    return (
        f'<td class="{tone_of_effect(cell.effect)}" data-mode="{escape(mode)}">'
        f'<div class="{tone}-text"><p class="speed{weak}"><span class="sign" aria-hidden="true">{sign}</span> '
        f"<b>{ratio_text(cell)}</b> <span>{escape(speed_word(cell))}</span>{_chips(others)}</p></div>"
        f'{_interval(cell, span, tone)}<p class="below">{below}</p></td>'
    )


def _interval(cell: Cell, span: float, tone: Tone) -> str:
    """Draw the ratio of a cell and its interval; nothing if there is no ratio."""
    if cell.ratio is None:
        return ""
    low, high = cell.ends or (None, None)
    said = f"{cell.ratio:.2f}x" + ("" if low is None else f", 95 % interval {low:.2f}x to {high:.2f}x")
    return bar(cell.ratio, low, high, span, tone, said)


def _chips(texts: Sequence[str]) -> str:
    return "".join(f' <span class="chip">{escape(text)}</span>' for text in texts)
