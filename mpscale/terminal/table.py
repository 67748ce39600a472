"""Tables that fit the width of a terminal: cells fold, columns that can be spared are left out, numbers stay whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mpscale.terminal.streams import Surface, visible

_GAP = 2
"""Spaces between two columns."""

_STYLES = {"": "", "good": "green", "bad": "red", "weak": "dim", "unknown": "dim"}
"""How looks are shown. Terminals have their own shades of these."""

_NARROW = 24
"""Below this, a table of folded cells is harder to read than a list."""

_UNIT = re.compile(r"(?<=[\d\])]) (?=[^\s\d(\[]{1,6}(?:\s|$|[),;:\]]))|(?<=%) (?=to )")
"""The space between a number and its unit, or another short word; and the one before the end of a range."""
_IN_BRACKETS = re.compile(r"\[[^\[\]]*\]")
_IN_PARENTHESES = re.compile(r"\([^()]*\)")
_PART_OF_NAME = re.compile(r"[^-_/:.@,]*[-_/:.@,]*")
_NUMBER = re.compile(r"[\d.,+/%x()\[\]:e*?-]+")
_GROUP = 24
"""Longest text in parentheses that is kept on one line if there is room."""

_EASY = 3
"""Most lines of a cell that are easy to read."""

_TIED = "\x00"
"""Stands for a space at which no line may end."""


def fitted(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    looks: Sequence[Sequence[str]],
    surface: Surface,
    spare: Sequence[str] = (),
) -> str:
    """Draw a table for a surface.

    If it is too wide, texts fold between words, and an interval goes below its number. If that is not enough, columns
    are left out, which a note names. Then ranges and long names fold, too. Last, the table becomes a list.

    Args:
        headers: one text per column.
        rows: texts.
        looks: of the same shape as ``rows``.
        surface: where it is shown.
        spare: headers of columns that may be left out, the least important first.
    """
    texts = [[surface.printable(visible(cell)) for cell in row] for row in (headers, *rows)]
    if surface.columns is None:
        return _draw([[cell.split("\n") for cell in row] for row in texts], looks, surface)
    texts = [[" ".join(cell.split()) for cell in row] for row in texts]
    columns = list(zip(*texts, strict=True))
    needed = sum(map(_natural, columns)) + _GAP * (len(columns) - 1)
    if surface.columns < _NARROW:
        return _list(texts, looks, surface)
    kept, left_out = list(range(len(headers))), list[str]()
    optional = [name for name in spare if name in headers]
    while (
        not _is_easy(columns, kept, widths := _widths([columns[place] for place in kept], surface.columns, 0))
        and optional
    ):
        left_out.append(optional.pop(0))
        kept.remove(list(headers).index(left_out[-1]))
    for level in (1, 2):
        widths = widths or _widths([columns[place] for place in kept], surface.columns, level)
    if widths is None:
        return _list(texts, looks, surface)
    wrapped = [[_wrap(row[place], width) for place, width in zip(kept, widths, strict=True)] for row in texts]
    drawn = _draw(wrapped, [[row[place] for place in kept] for row in looks], surface)
    if not left_out:
        return drawn
    names = ", ".join(surface.printable(visible(name)) for name in left_out)
    note = f"Left out for lack of width: {names}. A pipe, or a terminal of {needed} columns, shows all."
    return f"{drawn}\n\n{surface.paint(surface.wrapped(note), _STYLES['weak'])}"


def _is_easy(columns: Sequence[Sequence[str]], kept: Sequence[int], widths: Sequence[int] | None) -> bool:
    """Whether a table of these widths is easy to read: no cell takes many lines."""
    if widths is None:
        return False
    return all(
        len(_wrap(cell, width)) <= _EASY for place, width in zip(kept, widths, strict=True) for cell in columns[place]
    )


def _natural(column: Sequence[str]) -> int:
    return max(_width(cell) for cell in column)


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _widths(columns: Sequence[Sequence[str]], limit: int, level: int) -> list[int] | None:
    """Return a width for each column so that they fit; None if they cannot at this level of :func:`_atoms`."""
    # Most columns of a long table repeat a few texts.
    columns = [list(dict.fromkeys(column)) for column in columns]
    widths = [_natural(column) for column in columns]
    least = [max(_width(atom) for cell in column for atom, _ in _atoms(cell, level)) for column in columns]
    limit -= _GAP * (len(columns) - 1)
    if sum(least) > limit:
        return None
    steps = [_narrower(column, width) for column, width in zip(columns, widths, strict=True)]
    while sum(widths) > limit:
        # Fewest lines first, and of those the widest.
        possible = (place for place in range(len(widths)) if widths[place] > least[place])
        place = min(possible, key=lambda place: (steps[place][1], -widths[place]))
        widths[place] = steps[place][0]
        steps[place] = _narrower(columns[place], widths[place])
    return widths


def _narrower(column: Sequence[str], width: int) -> tuple[int, int]:
    """Return the next width below ``width`` at which the lines of a column can end, and the most lines of a cell."""
    folded = [_wrap(cell, width - 1) for cell in column]
    return max(_width(line) for lines in folded for line in lines), max(map(len, folded))


@lru_cache(maxsize=20_000)
def _atoms(cell: str, level: int) -> Sequence[tuple[str, str]]:
    """Split a cell where its lines may end: pieces, each with what goes before it on the same line.

    Level 0 keeps what is in parentheses together, level 1 no longer does, and level 2 also ends lines within names.
    Numbers, intervals and a number with its unit are never split.
    """

    def tie(found: re.Match[str]) -> str:
        return found[0].replace(" ", _TIED) if len(found[0]) <= _GROUP else found[0]

    text = _UNIT.sub(_TIED, _IN_BRACKETS.sub(lambda found: found[0].replace(" ", _TIED), cell))
    if level == 0:
        text = _IN_PARENTHESES.sub(tie, text)
    atoms: list[tuple[str, str]] = []
    for word in text.split(" "):
        whole = word.replace(_TIED, " ")
        if level < 2 or _TIED in word or _NUMBER.fullmatch(word):
            atoms.append((whole, " "))
        else:
            pieces = [piece for piece in _PART_OF_NAME.findall(whole) if piece] or [""]
            atoms += [(piece, "" if place else " ") for place, piece in enumerate(pieces)]
    return atoms


def _wrap(cell: str, width: int) -> list[str]:
    """Break a cell into lines of at most ``width``, at the first level of :func:`_atoms` that can."""
    if _width(cell) <= width:
        return [cell]
    splits = (_atoms(cell, level) for level in (0, 1))
    fitting = (atoms for atoms in splits if all(_width(text) <= width for text, _ in atoms))
    atoms = next(fitting, None) or _atoms(cell, 2)
    lines = [atoms[0][0]]
    for text, before in atoms[1:]:
        longer = f"{lines[-1]}{before}{text}"
        if _width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(text)
    return lines


def _draw(lines: Sequence[Sequence[list[str]]], looks: Sequence[Sequence[str]], surface: Surface) -> str:
    """Draw cells, given as lines; the first row has the headers.

    Not with rich's Table, which breaks between a number and its unit, and takes a second for a thousand rows.
    """
    widths = [max(_width(line) for row in lines for line in row[place]) for place in range(len(lines[0]))]
    rule = (" " * _GAP).join("-" * width for width in widths)
    drawn = []
    for row, styles in zip(lines, (["bold"] * len(widths), *looks), strict=True):
        height = max(map(len, row))
        for number in range(height):
            cells = []
            for cell, style, width in zip(row, styles, widths, strict=True):
                # Headers stand on the line below them.
                place = number - (height - len(cell) if row is lines[0] else 0)
                text = cell[place] if 0 <= place < len(cell) else ""
                cells.append(surface.paint(text, _STYLES.get(style, style)) + " " * (width - _width(text)))
            drawn.append((" " * _GAP).join(cells).rstrip())
        if row is lines[0]:
            drawn.append(rule)
    return "\n".join(drawn)


def _list(texts: Sequence[Sequence[str]], looks: Sequence[Sequence[str]], surface: Surface) -> str:
    """Show a table as a list: a block per row, with each cell beside its header or, for lack of width, below it."""
    wide = max(map(_width, texts[0])) + _GAP
    columns = surface.columns or 0
    beside = columns - wide >= _NARROW
    blocks = []
    for row, styles in zip(texts[1:], looks, strict=True):
        lines = []
        for header, cell, look in zip(texts[0], row, styles, strict=True):
            folded = _wrap(cell, columns - wide if beside else columns - _GAP)
            first = surface.paint(header.ljust(wide) if beside else header, "bold")
            cells = [surface.paint(line, _STYLES[look]) for line in folded]
            lines += [f"{first}{cells[0]}", *(" " * wide + cell for cell in cells[1:])] if beside else [
                first, *(" " * _GAP + cell for cell in cells)
            ]  # fmt: skip
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
