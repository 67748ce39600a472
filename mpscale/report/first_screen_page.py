"""The first screen of a report as HTML: cards, and a matrix whose cells show speed, interval, accuracy and overflow."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from mpscale.analysis.answer import Answer, Cell, Outcome
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
from mpscale.report.first_screen import QUESTION, Card, Screen

_CLASSES = {Outcome.GOOD: "good", Outcome.BAD: "bad", Outcome.UNKNOWN: "unknown"}
_SPEEDS = {Verdict.FASTER: ("good", "▲"), Verdict.SLOWER: ("bad", "▼")}
_QUALITIES = {Verdict.NON_INFERIOR: ("good", "✓"), Verdict.WORSE: ("bad", "✗")}
"""A class and a sign: a colour alone says nothing to many readers and to printers."""
_OPEN = ("unknown", "●")

_NAME_WIDTH, _CELL_WIDTH = 9, 9.5
"""Least widths of the columns of the matrix, in rem; a page that is too narrow scrolls it."""

_LONGEST = 80
"""Most characters of a workload's name in the matrix; the title has it in full."""

_WIDEST = 4.0
"""The axis reaches at most from a fourth of the baseline's speed to four times it; what is beyond has an arrow."""


def html_of(screen: Screen) -> str:
    """Return the first screen as HTML."""
    facts = " · ".join(escape(fact) for fact in screen.facts)
    headline = f'<span class="{_CLASSES[screen.outcome]}-text">{escape(screen.headline)}</span>'
    cards = "\n".join(_card(card) for card in screen.cards)
    aside = f'<div class="aside">\n{_advice(screen)}{_picture(screen.picture)}</div>'
    parts = [
        f'<h1 class="question">{escape(QUESTION)} {headline}</h1>',
        f'<p class="when">{facts}</p>',
        f'<div class="cards">\n{cards}\n</div>',
        f'<div class="answer">\n{_matrix(screen)}\n{aside}\n</div>',
    ]
    return f'<section class="screen" aria-label="The answer">\n{"".join(parts)}</section>'


def _card(card: Card) -> str:
    kind = " warn" if card.is_warning else "" if card.outcome is None else f" {_CLASSES[card.outcome]}"
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
    heads = "".join(_mode(answer, mode) for mode in modes)
    scale = _Axis(answer)
    rows = "\n".join(_row(answer, workload, modes, scale) for workload in answer.cells)
    caption = f'<p class="caption">{escape(screen.caption)} The axis reaches from {scale.text}.</p>'
    width = _NAME_WIDTH + len(modes) * _CELL_WIDTH
    columns = f'<colgroup><col style="width: {_NAME_WIDTH}rem"></colgroup>'
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    table = f'<table class="matrix" style="min-width: {width}rem">{columns}{head}\n<tbody>\n{rows}\n</tbody></table>'
    return f'<div class="verdicts"><div class="wide" tabindex="0">{table}</div>{caption}</div>'


def _mode(answer: Answer, mode: str) -> str:
    return f'<th scope="col">{escape(mode)}{_chips(column_chips(answer, mode))}</th>'


def _row(answer: Answer, workload: str, modes: Sequence[str], scale: _Axis) -> str:
    cells = answer.cells[workload]
    baseline = escape(baseline_line(answer.baselines[workload]))
    name = workload if len(workload) <= _LONGEST else f"{workload[: _LONGEST // 2]}…{workload[-_LONGEST // 2 :]}"
    head = f'<th scope="row" title="{escape(workload)}"><bdi>{_breakable(name)}</bdi><small>{baseline}</small></th>'
    shown = (_cell(answer, mode, cells.get(mode), scale) for mode in modes)
    return f"<tr>{head}{''.join(shown)}</tr>"


def _breakable(name: str) -> str:
    """Allow a line break after each mark in a name."""
    return re.sub(r"([:_./-])(?=.)", r"\1<wbr>", escape(name))


def _cell(answer: Answer, mode: str, cell: Cell | None, scale: _Axis) -> str:
    if cell is None:
        return f'<td class="none" data-mode="{escape(mode)}"><span class="soft">not run</span></td>'
    weak = " weak" if cell.doubts or cell.ends is None else ""
    hoisted = column_chips(answer, mode)
    kind, sign = _SPEEDS.get(cell.speed or Verdict.CANNOT_TELL, _OPEN)
    if cell.is_worse:
        kind = "unknown"  # to be fast is no good news then
    quality_kind, quality_sign = _QUALITIES.get(cell.quality or Verdict.INCONCLUSIVE, ("", ""))
    lines = [(f"{quality_kind}-text" if quality_kind == "bad" else "", f"{quality_sign} {quality_line(cell)}".strip())]
    lines += [("", line) for line in (memory_line(cell), overflow_line(cell))]
    below = "".join(f'<span class="{kind}">{escape(line)}</span>' for kind, line in lines if line)
    others = [chip for chip in chips(cell) if chip not in hoisted]
    return (
        f'<td class="{_CLASSES[cell.outcome]}" data-mode="{escape(mode)}">'
        f'<div class="{kind}-text"><p class="speed{weak}"><span class="sign" aria-hidden="true">{sign}</span> '
        f"<b>{ratio_text(cell)}</b> <span>{escape(speed_word(cell))}</span>{_chips(others)}</p>{scale.bar(cell)}</div>"
        f'<p class="below">{below}</p></td>'
    )


def _chips(texts: Sequence[str]) -> str:
    return "".join(f' <span class="chip">{escape(text)}</span>' for text in texts)


class _Axis:
    """A log axis of speed-ups that all cells share, symmetrical about 1."""

    def __init__(self, answer: Answer) -> None:
        ratios = [cell.ratio for cells in answer.cells.values() for cell in cells.values() if cell.ratio]
        # Estimates decide, because one wide interval would make all others short.
        reach = 1.1 * max((max(ratio, 1 / ratio) for ratio in ratios), default=1.0)
        self._reach = math.log(min(_WIDEST, max(2.0, reach)))
        self.text = f"{math.exp(-self._reach):.2g}x to {math.exp(self._reach):.2g}x"

    def _x(self, value: float) -> float:
        """The place of a value on the axis, from 0 to 100; beyond it if it is off the axis."""
        return 50.0 + 50.0 * math.log(value) / self._reach if value > 0 else -math.inf

    def bar(self, cell: Cell) -> str:
        """Draw the ratio of a cell and its interval; nothing if there is no ratio."""
        if cell.ratio is None:
            return ""
        parts = ['<rect class="axis" x="0" y="6.5" width="100" height="1"/>']
        place = self._x(cell.ratio)
        title = f"{cell.ratio:.2f}x"
        if cell.ends is not None:
            low, high = (self._x(end) for end in cell.ends)
            left, right = max(0.0, min(low, 100.0)), min(100.0, max(high, 0.0))
            parts.append(
                f'<rect class="interval" x="{left:.1f}" y="5" width="{max(0.5, right - left):.1f}" height="4"/>'
            )
            parts += ['<path class="arrow" d="M3 3.5 L0 7 L3 10.5"/>'] if low < 0 else []
            parts += ['<path class="arrow" d="M97 3.5 L100 7 L97 10.5"/>'] if high > 100 else []
            title += f", 95 % interval {cell.ends[0]:.2f}x to {cell.ends[1]:.2f}x"
        parts.append('<rect class="one" x="49.7" y="0" width="0.6" height="14"/>')
        if 0 <= place <= 100:
            parts.append(f'<rect class="estimate" x="{min(place, 99.0) - 0.8:.1f}" y="2" width="1.6" height="10"/>')
        return (
            f'<svg class="bar" viewBox="0 0 100 14" preserveAspectRatio="none" role="img" aria-label="{title}">'
            f"<title>{title}</title>{''.join(parts)}</svg>"
        )
