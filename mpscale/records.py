"""The result of one case: a row of :data:`~mpscale.columns.COLUMNS`, and the rule that an empty cell has a reason."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from mpscale.columns import COLUMNS


class Record:
    """One row, filled in as a case goes on.

    A value of None, NaN or infinity counts as unknown: it needs a reason, given by :meth:`miss` or by
    :meth:`complete`.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, unavailable: Mapping[str, str] | None = None) -> None:
        self._values: dict[str, Any] = {}
        self._unavailable: dict[str, str] = dict(unavailable or {})
        self.update(values or {})

    def __getitem__(self, name: str) -> Any:
        """The value of a column, None where it is empty."""
        _check_name(name)
        return self._values.get(name)

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets several columns; one set to None, NaN or infinity stays empty.

        Raises:
            KeyError: a name is no column.
        """
        for name, value in values.items():
            _check_name(name)
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                self._values.pop(name, None)
            else:
                self._values[name] = value
                self._unavailable.pop(name, None)

    def miss(self, names: str | Iterable[str], reason: str) -> None:
        """Says why columns are empty. A value stays, and so does an earlier reason: it came from nearer the cause."""
        for name in [names] if isinstance(names, str) else names:
            _check_name(name)
            if name not in self._values:
                self._unavailable.setdefault(name, reason)

    def complete(self, reason: str) -> None:
        """Gives ``reason`` to every measured column that has neither a value nor a reason."""
        self.miss([column.name for column in COLUMNS.values() if column.measured], reason)

    @property
    def unavailable(self) -> dict[str, str]:
        """The reasons given so far, by column."""
        return dict(self._unavailable)

    def to_json(self) -> dict[str, Any]:
        """Plain values in the order of the columns, the empty ones left out; reasons under ``unavailable``."""
        row = {name: self._values[name] for name in COLUMNS if name in self._values}
        if self._unavailable:
            row["unavailable"] = {name: self._unavailable[name] for name in COLUMNS if name in self._unavailable}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_json`. Columns of a newer schema are dropped."""
        values = {name: value for name, value in row.items() if name in COLUMNS and name != "unavailable"}
        return cls(values, row.get("unavailable"))


def _one_kind_of_line_end(value: Any) -> Any:
    """Python's csv leaves a lone carriage return, as progress bars write it, unquoted: readers end the row there."""
    return value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else value


def _check_name(name: str) -> None:
    if name not in COLUMNS:
        raise KeyError(f"{name!r} is no column of a case; docs/metrics.md lists them")


def to_csv(records: Iterable[Record]) -> str:
    """cases.csv: every column, in the order of :data:`COLUMNS`, one row a record, an empty cell for what is unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = {name: _one_kind_of_line_end(value) for name, value in record.to_json().items()}
        if "unavailable" in row:
            row["unavailable"] = json.dumps(row["unavailable"], ensure_ascii=False)
        writer.writerow(row)
    return text.getvalue()
