"""Tables for people and programs, and numbers as text: a formatter per unit, which writes None as a dash."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tabulate import tabulate

from mpscale.core.columns import Column, Format
from mpscale.core.record import to_cell
from mpscale.report.bars import Bar
from mpscale.terminal.streams import PIPE, Surface, on_one_line, visible
from mpscale.terminal.table import fitted

DASH = "–"  # noqa: RUF001
"""Stands for an unknown value."""

_PERCENT_METRICS = ("accuracy",)


Look = Literal["", "good", "bad", "weak", "unknown"]
"""How a cell is shown beside its text: a good or bad result, a weak number, or something unknown; empty: as usual."""


class Cell(str):
    """The text of a cell with its look. CSV, JSON and markdown have the text alone, so it must say the same."""

    __slots__ = ("bar", "look")
    look: Look
    bar: Bar | None
    """What a page draws beside the text."""

    def __new__(cls, text: str, look: Look = "", bar: Bar | None = None) -> Cell:
        """Give a text a look, and a bar on pages."""
        cell = super().__new__(cls, text)
        cell.look, cell.bar = look, bar
        return cell


def look_of(cell: Any) -> Look:
    """Return the look of a cell; any other value has none."""
    return cell.look if isinstance(cell, Cell) else ""


def bar_of(cell: Any) -> Bar | None:
    """Return the bar of a cell; any other value has none."""
    return cell.bar if isinstance(cell, Cell) else None


class Heading(str):
    """The heading of a column with what it means. Terminal and markdown have the text alone."""

    __slots__ = ("help", "is_number")
    help: str
    is_number: bool
    """Whether the cells are numbers, which a page aligns to the right."""

    def __new__(cls, text: str, help: str = "", is_number: bool = True) -> Heading:
        """Give a heading its explanation, in plain text."""
        heading = super().__new__(cls, text)
        heading.help, heading.is_number = help, is_number
        return heading


def _worded(cell: Any, words: Callable[[str], str]) -> Any:
    if isinstance(cell, Cell):
        return Cell(words(cell), cell.look, cell.bar)
    return words(cell) if isinstance(cell, str) else cell


def help_of(heading: str) -> str:
    """Return the explanation of a heading; empty if there is none."""
    return heading.help if isinstance(heading, Heading) else ""


def is_number(heading: str) -> bool:
    """Whether a heading is known to be that of numbers."""
    return isinstance(heading, Heading) and heading.is_number


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headers: texts for people, or plain values for programs, None for unknown ones.

    Args:
        headers: one per column.
        rows: one value per column. A :class:`Cell` also has a look.
        spare: headers of columns that a narrow terminal may leave out, the least important first.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    spare: Sequence[str] = ()

    @classmethod
    def of(cls, headers: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Table:
        """Make a table of dicts. Values of missing keys are unknown."""
        return cls(headers, [[row.get(name) for name in headers] for row in rows])

    def __bool__(self) -> bool:
        return bool(self.rows)

    def worded(self, words: Callable[[str], str]) -> Table:
        """Change the texts of headings, their help and cells."""
        headers = [
            Heading(words(header), words(header.help), header.is_number)
            if isinstance(header, Heading)
            else words(header)
            for header in self.headers
        ]
        rows = [[_worded(cell, words) for cell in row] for row in self.rows]
        return replace(self, headers=headers, rows=rows)

    def without_blank(self, *names: str) -> Table:
        """Leave out those of the named columns that contain only dashes; without names, any such column."""
        places = [(name, self.headers.index(name)) for name in names or self.headers]
        return self.without(*(name for name, place in places if all(row[place] == DASH for row in self.rows)))

    def without(self, *names: str) -> Table:
        """Leave out the named columns."""
        kept = [place for place, header in enumerate(self.headers) if header not in names]
        rows = [[row[place] for place in kept] for row in self.rows]
        return replace(self, headers=[self.headers[place] for place in kept], rows=rows)

    def beside(self, other: Table) -> Table:
        """Add the columns of another table to the rows that have the same first two cells, dashes to all others."""
        if not other.rows:
            return self
        known = {tuple(row[:2]): row[2:] for row in other.rows}
        blank = [DASH] * len(other.headers[2:])
        rows = [[*row, *known.get(tuple(row[:2]), blank)] for row in self.rows]
        return replace(self, headers=[*self.headers, *other.headers[2:]], rows=rows)

    def text(self, surface: Surface = PIPE) -> str:
        """Return the table in plain text, as wide as it is, or to fit a terminal; empty if there are no rows."""
        if not self.rows:
            return ""
        if surface.columns is None and not surface.colour:
            rows = [[visible(str(cell)) for cell in row] for row in self.rows]
            return tabulate(rows, list(map(visible, self.headers)), "simple", disable_numparse=True)
        looks = [["unknown" if cell == DASH else look_of(cell) for cell in row] for row in self.rows]
        return fitted(self.headers, [[str(cell) for cell in row] for row in self.rows], looks, surface, self.spare)

    def markdown(self) -> str:
        """Return the table for GitHub; empty if there are no rows. No cell can break it or act as HTML."""
        if not self.rows:
            return ""
        rows = [[escape(cell) for cell in row] for row in self.rows]
        return tabulate(rows, [escape(header) for header in self.headers], "github", disable_numparse=True)

    def csv(self) -> str:
        """Return the table as CSV: numbers in full, unknown or infinite values empty, texts by :func:`to_cell`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.headers)
        writer.writerows(
            [to_cell(value) if isinstance(value, str) else "" if value is None else value for value in finite(row)]
            for row in self.rows
        )
        return text.getvalue()


JSON_VERSION = 1
"""Of the documents that commands print with ``--json``. A new key does not change it; another meaning of one does."""


def json_document(command: str, content: Mapping[str, Any]) -> str:
    """Return what a command prints with ``--json``: one object, with null for unknown or infinite values."""
    return json_text({"schema_version": JSON_VERSION, "command": command, **content})


def json_text(content: Any) -> str:
    """Return JSON, with null for unknown or infinite values: JSON has no infinity."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    if visible(text) != text:
        # Only texts have such characters, and there JSON allows escapes: a terminal must not obey them.
        text = "".join(c if visible(c) == c else json.dumps(c)[1:-1] for c in text)
    return text + "\n"


def finite(value: Any) -> Any:
    """Replace every float that is not finite by None, such as an end of a very wide interval."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


NOTHING = "<!-- -->"
"""A comment, which parts a text so that GitHub finds no mention, reference or address in it. Escapes do not help:
GitHub looks for these when markdown has already become HTML."""

_MARKDOWN = re.compile(
    r"[\\`*~|$]"  # code, emphasis, cells, formulas
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # emphasis, but not step_time
    r"|\](?=[(\[:])|!(?=\[)|^[\[>]"  # links, images, check boxes, quotations
    r"|^[-+](?=\s|$)|^[-=:](?=[-=: ]*$)|^#(?=#*(?:\s|$))|(?<=\s)#(?=#*$)"  # lists, rules, headings
)
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")
_GITHUB = re.compile(
    r"@(?=[A-Za-z0-9])|#(?=\d)|\bGH-(?=\d)|:(?=//)|\bwww(?=\.)|:(?=[a-z0-9_+-]*[a-z][a-z0-9_+-]*:)", re.I
)
"""Mentions, references to issues, addresses and emojis, up to the place where they are parted."""


def escape(text: str) -> str:
    """Put ``text`` on one line and escape everything that markdown, HTML or GitHub would interpret.

    Characters that are not seen become visible. What comes behind the text must not begin with ``(``, ``[`` or ``:``
    if that could make a link of it.
    """
    line = _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", on_one_line(str(text))))
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    return without_references(line)


def without_references(text: str) -> str:
    """Part what GitHub would make a mention, a reference, a link or an emoji of, in markdown or in HTML."""
    return _GITHUB.sub(rf"\g<0>{NOTHING}", text)


def number(value: float | None, digits: int = 3) -> str:
    """Write ``value`` to ``digits`` significant digits, without an exponent as long as that is readable."""
    if value is None:
        return DASH
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    return f"{value:.{_decimals(value, digits)}f}"


def large(value: float | None, unit: str = "") -> str:
    """Write ``value`` to four significant digits, with its unit."""
    return DASH if value is None else f"{number(value, 4)} {unit}".strip()


def count(value: float | None) -> str:
    """Write a whole number."""
    return DASH if value is None else f"{value:.0f}"


def share(value: float | None, decimals: int = 0) -> str:
    """Write a share of 1 as percent."""
    return DASH if value is None else f"{100 * value:.{decimals}f} %"


def loss_scale(value: float | None) -> str:
    """Write a loss scale, in full if it is a whole number below 1e9."""
    if value is None:
        return DASH
    return f"{value:.0f}" if abs(value) < 1e9 and value == int(value) else f"{value:.6g}"


def flops(value: float | None) -> str:
    """Write a number of operations with three significant digits and a prefix: ``5.22 T``."""
    if value is None:
        return DASH
    power = max((power for power in _PREFIXES if value >= power), default=1)
    return f"{number(value / power)} {_PREFIXES[power]}".strip()


def yes_no(value: bool | None) -> str:
    """Write a truth value."""
    return DASH if value is None else "yes" if value else "no"


def text(value: Any) -> str:
    """Write any value as it is."""
    return DASH if value is None else str(value)


_PREFIXES = {1: "", 10**3: "k", 10**6: "M", 10**9: "G", 10**12: "T", 10**15: "P"}

_FORMATTERS: dict[Format, Callable[[Any], str]] = {
    Format.TEXT: text,
    Format.YES_NO: yes_no,
    Format.COUNT: count,
    Format.NUMBER: number,
    Format.LARGE: large,
    Format.SHARE: share,
    Format.FLOPS: flops,
    Format.LOSS_SCALE: loss_scale,
}


def shown(column: Column, value: Any) -> str:
    """Write a value of a column in the format that the data dictionary gives it."""
    return _FORMATTERS[column.format](value)


def interval(estimate: float | None, low: float | None, high: float | None, unit: str) -> str:
    """Write ``7.91 [7.80, 8.02] ms``: the ends have the decimals of the estimate and are left out if unknown.

    Args:
        estimate: the number itself, written with three significant digits; ratios (``x``) with two decimals.
        low: lower end of its interval; None if a single process cannot give it.
        high: upper end.
        unit: written behind the number; include a leading space if it needs one.
    """
    if estimate is None:
        return DASH
    places = 2 if unit == "x" else _decimals(estimate, 3)
    if low is None or high is None:
        return f"{estimate:.{places}f}{unit}"
    ends = f"[{low:.{places}f}, {high:.{places}f}]"
    # "7.91 [7.80, 8.02] ms", but "0.98x [0.95, 1.01]".
    return f"{estimate:.{places}f} {ends}{unit}" if unit.startswith(" ") else f"{estimate:.{places}f}{unit} {ends}"


def change(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Write a relative change as percent, with its interval if known: ``+3.1% [+1.0%, +5.2%]``."""
    if value is None:
        return DASH
    return f"{value:+.1%}" if low is None or high is None else f"{value:+.1%} [{low:+.1%}, {high:+.1%}]"


def in_points(name: str | None) -> bool:
    """Whether differences of a metric are written in percentage points: it is an accuracy."""
    return name in _PERCENT_METRICS


def metric(value: float | None, name: str | None) -> str:
    """Write a workload's metric, as percent if it is an accuracy."""
    return share(value, 2) if name in _PERCENT_METRICS else number(value, 4)


def metric_change(difference: float, name: str | None) -> str:
    """Write a difference between two values of a metric in words."""
    if name in _PERCENT_METRICS:
        size, rounded = f"{abs(100 * difference):.2f} points", round(100 * difference, 2)
    else:
        size, rounded = number(abs(difference)), difference
    return "no different from" if rounded == 0 else f"{size} {'above' if difference > 0 else 'below'}"


def metric_difference(value: float | None, low: float | None, high: float | None, name: str | None) -> str:
    """Write a difference between two values of a metric with its interval, in points if it is an accuracy."""
    if value is None:
        return DASH
    factor, unit = (100, " points") if name in _PERCENT_METRICS else (1, "")

    def signed(number: float) -> str:
        return f"{factor * number:+.2f}" if unit else f"{number:+.3g}"

    ends = "" if low is None or high is None else f" [{signed(low)}, {signed(high)}]"
    return f"{signed(value)}{ends}{unit}"


def metric_margin(value: float | None, name: str | None) -> str:
    """Write a margin of a metric, in points if it is an accuracy."""
    if value is None:
        return DASH
    if name not in _PERCENT_METRICS:
        return number(value)
    return f"{100 * value:g} point{'' if 100 * value == 1 else 's'}"


def span(texts: Iterable[str]) -> str:
    """Write the first and the last of some sorted texts, or the only one."""
    known = [text for text in texts if text != DASH]
    if not known:
        return DASH
    return known[0] if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def joined(names: Sequence[str]) -> str:
    """Write ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def plural(number: int, noun: str) -> str:
    """Write ``1 row``, ``2 rows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """Write the first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def of_seeds(known: int, row: Mapping[str, Any]) -> str:
    """Apply :func:`of_all` to the seeds of a row of the summary."""
    return of_all(known, row["seeds_planned"], "seed")


def of_processes(known: int, row: Mapping[str, Any]) -> str:
    """Apply :func:`of_all` to the processes of a row of the summary."""
    return of_all(known, row["cases"] + row["not_started"], "process")


def of_all(known: int, planned: int, what: str) -> str:
    """Write `` (4 of 5 seeds)`` for a figure that does not cover all, else nothing.

    Args:
        known: how many have it.
        planned: how many there should be.
        what: singular noun.
    """
    return f" ({known} of {plural(planned, what)})" if known < planned else ""


def _decimals(value: float, digits: int) -> int:
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
