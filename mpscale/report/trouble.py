"""What went wrong in a run: cases that did not end well, what could not be read, and why cells are empty."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mpscale.core.record import in_order_of_modes
from mpscale.core.runs import Run
from mpscale.report.table import Table, escape, listed, text
from mpscale.terminal.streams import visible

_COLUMNS_SHOWN = 8


def troubles(run: Run) -> list[Table | str]:
    """Show the cases that are not ok: why, and the last output of each process."""
    tails = [
        f"The last lines of {escape(record['case_id'])}:\n\n{fenced(record['output_tail'])}"
        for record in run.records
        if record["status"] != "ok" and record["output_tail"]
    ]
    return [trouble_table(run), *tails]


def trouble_table(run: Run) -> Table:
    """Return a row per case that is not ok."""
    names = ("case_id", "status", "status_reason")
    bad = [record for record in run.records if record["status"] != "ok"]
    return Table(["case", "status", "reason"], [[text(record[name]) for name in names] for record in bad])


def notes(run: Run) -> Table:
    """Return a row per case with a note: failed attempts, files that were not kept, what a model asked for in vain."""
    noted = [record for record in run.records if record["note"] is not None]
    return Table(
        ["case", "status", "note"], [[text(record[name]) for name in ("case_id", "status", "note")] for record in noted]
    )


def unread(run: Run, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """List what could not be read in the run's own files, and the folders of other runs, with reasons."""
    lines = [*run.problems, *(f"{folder} was left out: {reason}" for folder, reason in left_out)]
    return "\n".join(f"- {escape(line)}" for line in lines)


def missing(run: Run) -> Table:
    """Show the reasons for empty cells, with the columns and modes that they apply to."""
    cases: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(run.records):
        for column, reason in record.unavailable.items():
            cases.setdefault((reason.text, column), []).append(place)
    # Columns that are empty in the same cases for the same reason share a row.
    shared: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (why, column), places in cases.items():
        shared.setdefault((why, tuple(places)), []).append(column)
    rows = []
    for (why, numbers), columns in shared.items():
        modes = in_order_of_modes(sorted({run.records[number]["mode"] for number in numbers}))
        rows.append([why, listed(columns, _COLUMNS_SHOWN), ", ".join(modes), f"{len(numbers)} of {len(run.records)}"])
    rows.sort(key=lambda row: (row[0], row[2]))
    return Table(["reason", "empty columns", "modes", "cases"], rows)


def fenced(text: str) -> str:
    """Return a code block that nothing in ``text`` can end, without a terminal's colours; what is not seen is shown."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n").replace("\r", "\n"))
    plain = visible(plain).strip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", plain))])
    return f"{fence}text\n{plain}\n{fence}"
