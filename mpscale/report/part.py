"""A heading with a table and notes, for a terminal, markdown or a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpscale.report.table import DASH, Cell, Table, escape, look_of
from mpscale.terminal.streams import Surface

_SPARE = ("smallest visible", "noise floor")
"""Columns that a narrow terminal leaves out."""

_MARKS = ("(a)", "(b)", "(c)", "(d)")
"""Of reasons that are said below a table."""


@dataclass(frozen=True, slots=True)
class Part:
    """A heading, a table and notes. An empty table is left out, and so are empty notes."""

    title: str
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def text(self, surface: Surface) -> str:
        table = Table(self.headers, self.rows, _SPARE).text(surface)
        notes = "\n".join(map(surface.wrapped, self.notes))
        return "\n\n".join(filter(None, [surface.paint(surface.wrapped(self.title), "bold"), table, notes]))

    def with_reasons_below(self) -> Part:
        """Say a reason that rows share below the table: beside each row it would take most of the space.

        The last column has the reasons, which may be empty.
        """
        reasons = list(dict.fromkeys(row[-1] for row in self.rows if row[-1]))
        shared = [reason for reason in reasons if sum(row[-1] == reason for row in self.rows) > 1]
        if len(self.rows) == 1 or len(shared) < len(reasons) or len(shared) > len(_MARKS):
            rows = [[*row[:-1], row[-1] or DASH] for row in self.rows]
            return replace(self, rows=rows) if reasons else self._without_reasons({})
        return self._without_reasons(dict(zip(shared, _MARKS if len(shared) > 1 else [""], strict=False)))

    def _without_reasons(self, marks: Mapping[str, str]) -> Part:
        rows = []
        for *cells, verdict, reason in self.rows:
            mark = marks.get(reason, "")
            rows.append([*cells, Cell(f"{verdict} {mark}", look_of(verdict)) if mark else verdict])
        said = [f"{mark} {reason[0].upper()}{reason[1:]}.".strip() for reason, mark in marks.items()]
        return replace(self, headers=self.headers[:-1], rows=rows, notes=[*said, *self.notes])

    def markdown(self) -> str:
        notes = "\n".join(f"- {escape(note)}" for note in self.notes)
        return "\n\n".join(filter(None, [f"## {escape(self.title)}", Table(self.headers, self.rows).markdown(), notes]))
