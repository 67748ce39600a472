"""Tables as HTML: one table, and the wide table of all figures that have a row per workload and mode."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from mpscale.core.case import Place
from mpscale.report.pieces import text as escape
from mpscale.report.table import DASH, Table, bar_of, help_of, is_number, look_of

_LONG = 45
"""Most characters of a cell that is not broken into lines."""


def html(table: Table) -> str:
    """Return a table in a box in which it can scroll sideways."""
    head = "".join(_heading(header) for header in table.headers)
    barred = _barred(table)
    rows = "".join(f"<tr>{_cells(table, row, barred)}</tr>\n" for row in table.rows)
    return _box(f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{rows}</tbody>", "wide")


@dataclass(frozen=True, slots=True)
class Group:
    """Columns that stand together in a wide table.

    Args:
        title: above them.
        anchor: the id of what is said about them on the same page; empty if there is nothing.
        table: with a row per workload and mode, which its first two columns name.
    """

    title: str
    anchor: str
    table: Table


def wide(groups: Sequence[Group]) -> str:
    """Return one table of all groups, with the columns of each side by side and the rows of a workload together."""
    places = list(dict.fromkeys(_place(row) for group in groups for row in group.table.rows))
    by_workload: dict[str, list[str]] = {}
    for workload, mode in places:
        by_workload.setdefault(workload, []).append(mode)
    known = [{_place(row): row for row in group.table.rows} for group in groups]
    barred = [_barred(group.table) for group in groups]
    blank = [[DASH] * len(group.table.headers) for group in groups]
    columns = 1 + sum(len(group.table.headers) - 2 for group in groups)
    bodies = []
    for workload, modes in by_workload.items():
        rows = [f'<tr class="workload"><th scope="rowgroup" colspan="{columns}"><b>{escape(workload)}</b></th></tr>\n']
        for mode in modes:
            cells = "".join(
                _cells(group.table, found.get((workload, mode), none), bars, skip=2, has_edge=True)
                for group, found, none, bars in zip(groups, known, blank, barred, strict=True)
            )
            rows.append(f'<tr><th scope="row">{escape(mode)}</th>{cells}</tr>\n')
        bodies.append(f"<tbody>\n{''.join(rows)}</tbody>")
    body = "\n".join([_two_rows_of_headings(groups), *bodies])
    return _box(body, "wide by-mode", ' role="region" aria-label="All figures by workload and mode"')


def legend(groups: Sequence[Group]) -> str:
    """Return the explanations of all columns of a wide table, each once."""
    parts = []
    for group in groups:
        terms = "".join(
            f"<dt>{escape(header)}</dt><dd>{escape(said)}</dd>\n"
            for header in group.table.headers[2:]
            if (said := help_of(header))
        )
        if terms:
            parts.append(f"<h3>{escape(group.title)}</h3>\n<dl>\n{terms}</dl>")
    return "\n".join(parts)


def _place(row: Sequence[str]) -> Place:
    return row[0], row[1]


def _two_rows_of_headings(groups: Sequence[Group]) -> str:
    widths = [len(group.table.headers) - 2 for group in groups]
    columns = "".join(f'<colgroup span="{width}"></colgroup>' for width in (1, *widths))
    above = "".join(
        f'<th scope="colgroup" colspan="{width}" class="first"><span>{_linked(group)}</span></th>'
        for group, width in zip(groups, widths, strict=True)
    )
    below = "".join(
        _heading(header, is_first=place == 0)
        for group in groups
        for place, header in enumerate(group.table.headers[2:])
    )
    mode = groups[0].table.headers[1]
    corner = f'<th scope="col" rowspan="2" title="{escape(help_of(mode))}">{escape(mode)}</th>'
    return f"{columns}\n<thead>\n<tr>{corner}{above}</tr>\n<tr>{below}</tr>\n</thead>"


def _linked(group: Group) -> str:
    title = escape(group.title)
    return f'<a href="#{group.anchor}">{title}</a>' if group.anchor else title


def _heading(header: str, is_first: bool = False) -> str:
    classes = " ".join(name for name, there in (("number", is_number(header)), ("first", is_first)) if there)
    said = help_of(header)
    title = f' title="{escape(said)}"' if said else ""
    kind = f' class="{classes}"' if classes else ""
    return f'<th scope="col"{kind}{title}>{escape(header)}</th>'


def _cells(table: Table, row: Sequence[str], barred: Set[int], skip: int = 0, has_edge: bool = False) -> str:
    """Return the cells of a row.

    Args:
        table: theirs.
        row: of the table.
        barred: columns in which some cell has a bar.
        skip: how many cells at its beginning are left out.
        has_edge: whether the first of the others begins a group.
    """
    return "".join(
        _cell(header, cell, place in barred, has_edge and place == skip)
        for place, (header, cell) in enumerate(zip(table.headers, row, strict=True))
        if place >= skip
    )


def _barred(table: Table) -> set[int]:
    """The columns in which some cell has a bar: the numbers of all their cells stand one below the other."""
    return {place for row in table.rows for place, cell in enumerate(row) if bar_of(cell) is not None}


def _cell(header: str, cell: str, is_barred: bool, is_first: bool) -> str:
    look = look_of(cell) or ("unknown" if cell == DASH else "")
    bar = bar_of(cell)
    names = (
        ("number", is_number(header)),
        ("long", len(cell) > _LONG),
        (f"look-{look}", bool(look)),
        ("first", is_first),
        ("bare", is_barred and not bar),
    )
    classes = " ".join(name for name, there in names if there)
    kind = f' class="{classes}"' if classes else ""
    return f"<td{kind}>{escape(cell)}{bar.svg() if bar else ''}</td>"


def _box(body: str, kind: str, role: str = "") -> str:
    return f'<div class="{kind}" tabindex="0"{role}><table>\n{body}\n</table></div>'
