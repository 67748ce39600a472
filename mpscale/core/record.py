"""The result of one case: a row of :data:`~mpscale.core.columns.COLUMNS` in which every empty cell has a reason."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mpscale.core.case import Place, Variant
from mpscale.core.cause import Cause
from mpscale.core.columns import COLUMNS, FAILED, LOST, MEASURED, STATUSES
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason, encodable

Key = tuple[int, int]
"""Seed and repeat: a process of a workload and mode."""

_TYPES: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "json": dict}
_NAMES = {name: name for name in COLUMNS}
"""One string per name: the keys of ten thousand rows of JSON would otherwise be as many copies."""
_SURE: dict[str, type] = {
    column.name: _TYPES[column.kind]
    for column in COLUMNS.values()
    if column.kind in ("str", "bool") and column.name != "status"
}
"""Columns that take any value of one type, which saves a closer look at most values of a file."""
_NUMBERS: dict[str, tuple[type, float, float]] = {
    column.name: (_TYPES[column.kind], *column.range) for column in COLUMNS.values() if column.kind in ("int", "float")
}
"""The type, the smallest and the largest value of the other columns, for the same reason."""
_NO_NUMBER = (type(None), 0.0, 0.0)
_LARGEST = 2**63
_OF_A_METRIC = ("metric_name", "metric_margin", "metric_higher_is_better", "metric_target")


class Record:
    """One row, filled in while a case runs.

    None, NaN and infinity mean that a value is unknown: the cell stays empty and needs a reason, from :meth:`miss` or
    :meth:`complete`.
    """

    __slots__ = ("_unavailable", "_values")

    def __init__(
        self, values: Mapping[str, Any] | None = None, unavailable: Mapping[str, Reason] | None = None
    ) -> None:
        self._values: dict[str, Any] = {}
        self._unavailable: dict[str, Reason] = {
            known: why for name, why in (unavailable or {}).items() if (known := _NAMES.get(name))
        }
        self.update(values or {})

    def __getitem__(self, name: str) -> Any:
        """The value of a column, None if it is empty.

        Raises:
            KeyError: there is no such column.
        """
        value = self._values.get(name)
        if value is None and name not in COLUMNS:
            _check_name(name)
        return value

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several columns. None, NaN and infinity leave a column empty.

        Raises:
            KeyError: there is no such column.
        """
        for name, value in values.items():
            _check_name(name)
            value = plain(value)
            if _is_unknown(value):
                self._values.pop(name, None)
            else:
                self._values[name] = value
                self._unavailable.pop(name, None)

    def miss(self, names: str | Iterable[str], reason: Reason) -> None:
        """Say why columns are empty. Values stay, and so do earlier reasons, which came from nearer the cause."""
        for name in [names] if isinstance(names, str) else names:
            _check_name(name)
            if name not in self._values:
                self._unavailable.setdefault(name, reason)

    def complete(self, reason: Reason) -> None:
        """Give ``reason`` to every measured column that has neither a value nor a reason."""
        self.miss([column.name for column in COLUMNS.values() if column.measured], reason)

    def drop_misfits(self) -> list[str]:
        """Empty the columns whose values do not belong there, and return why, one sentence per column.

        A single such value would make whole files unreadable.
        """
        misfits = {
            name: why
            for name, value in self._values.items()
            if (kind := type(value)) is not _SURE.get(name)
            and not (kind is (number := _NUMBERS.get(name, _NO_NUMBER))[0] and number[1] <= value <= number[2])
            and (why := misfit(name, value)) is not None
        }
        for name, why in misfits.items():
            del self._values[name]
            self._unavailable[name] = Reason(Code.MISFIT, why)
        return list(misfits.values())

    def end(self, status: str, why: str | None = None, cause: Cause | None = None) -> None:
        """Say how the case ended.

        Args:
            status: one of :data:`~mpscale.core.columns.STATUSES`.
            why: in one line, for people; None if the status says it all.
            cause: the kind of event, for a failure.
        """
        self.update({"status": status, "status_reason": why, "cause": None if cause is None else cause.value})

    def invalidate(self, why: str, cause: Cause) -> None:
        """Make the record ``invalid`` so that none of its figures count, and add the reason.

        A failure keeps its status and its cause.
        """
        status, said = self["status"], self["status_reason"]
        reason = f"{said}; {why}" if said else why
        if status in (*FAILED, "unsupported"):
            self.update({"status_reason": reason})
        else:
            self.end("invalid", reason, cause)

    def note(self, text: str) -> None:
        """Add to the column ``note``."""
        said = self["note"]
        self.update({"note": f"{said}; {text}" if said else text})

    @property
    def cause(self) -> Cause | None:
        """Why the case failed; None if it did not, or if only another version of mpscale knows."""
        return Cause.of(self["cause"])

    def copy(self) -> Record:
        """An independent record with the same values and reasons."""
        found = Record()
        found._values, found._unavailable = self._values.copy(), self._unavailable.copy()
        return found

    @property
    def unavailable(self) -> dict[str, Reason]:
        """The reasons so far, by column."""
        return self._unavailable.copy()

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may end otherwise, so that a resumed run makes one."""
        return self["status"] == "interrupted" or (self.cause is not None and self.cause.transient)

    @property
    def place(self) -> Place:
        """Workload and mode as tables name them."""
        return place_of(self)

    @property
    def key(self) -> Key:
        """Seed and repeat."""
        return self["seed"], self["repeat"]

    def why_empty(self, name: str) -> Reason | None:
        """The reason why a column is empty, None if there is a value or no reason was given."""
        return self._unavailable.get(name)

    def to_json(self) -> dict[str, Any]:
        """Plain values in column order without the empty ones; reasons under ``unavailable``."""
        row = {name: self._values[name] for name in COLUMNS if name in self._values}
        if self._unavailable:
            row["unavailable"] = {n: self._unavailable[n].to_json() for n in COLUMNS if n in self._unavailable}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_json`. Columns of a newer schema are dropped.

        Raises:
            TypeError: ``unavailable`` does not hold reasons by column.
        """
        reasons = {} if row.get("unavailable") is None else row["unavailable"]
        if not isinstance(reasons, dict):
            raise TypeError(f"unavailable should hold reasons by column, not {reasons!r:.200}")
        found = cls()
        found._values = values = {
            _NAMES[name]: value if type(value) is not str or value.isascii() else encodable(value)
            for name, value in row.items()
            if name in _NAMES and value is not None and (type(value) is not float or math.isfinite(value))
        }
        values.pop("unavailable", None)
        told = _reasons(reasons)
        found._unavailable = {_NAMES[name]: why for name, why in told.items() if name in _NAMES and name not in values}
        return found


_known_reasons: deque[tuple[dict[str, Any], dict[str, Reason]]] = deque(maxlen=16)
"""The latest reasons from JSON: those of a mode are mostly the same in all of its cases, and comparing is cheap."""


def _reasons(values: dict[str, Any]) -> dict[str, Reason]:
    """The reasons by column, from JSON."""
    for known, reasons in _known_reasons:
        if known == values:
            return reasons
    reasons = {name: Reason.from_json(why) for name, why in values.items()}
    _known_reasons.appendleft((values, reasons))
    return reasons


def plain(value: Any) -> Any:
    """Turn a NumPy scalar into a Python one and make text safe for any file; return other values as they are."""
    if type(value) in (float, int, bool):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return encodable(value) if isinstance(value, str) else value


def misfit(name: str, value: Any) -> str | None:
    """Why a value does not belong in its column; None if it does or is unknown.

    Args:
        name: of the column.
        value: as :func:`plain` returned it.
    """
    _check_name(name)
    if _is_unknown(value):
        return None
    kind = COLUMNS[name].kind
    # A bool is an int to Python, but not here; an int is a float here, but not to Python.
    wanted: Any = (int, float) if kind == "float" else _TYPES[kind]
    if not isinstance(value, wanted) or (kind == "bool") != isinstance(value, bool):
        return f"{name} should be {kind}, not {value!r:.200}"
    if kind == "json" and not all(isinstance(part, str) for pair in value.items() for part in pair):
        return f"{name} should hold texts, not {value!r:.200}"
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        return f"{name} does not fit into 64 bits: {str(value)[:30]}..."
    if name == "status" and value not in STATUSES:
        return f"{value!r} is not a status of a case"
    if COLUMNS[name].positive and value <= 0:
        return f"{name} is {value}; it must be above 0"
    if name in _NUMBERS and not (bounds := COLUMNS[name].range)[0] <= value <= bounds[1]:
        unit = COLUMNS[name].unit
        return f"{name} is {value:g}{f' {unit}' if unit else ''}; it can be from {bounds[0]:g} to {bounds[1]:g}"
    return None


def _is_unknown(value: Any) -> bool:
    return value is None or (type(value) is float and not math.isfinite(value))


def _check_name(name: str) -> None:
    if name not in COLUMNS:
        raise KeyError(f"{name!r} is not a column of a case; docs/metrics.md lists them")


def settle(records: Sequence[Record]) -> list[Record]:
    """The same records, with status ``diverged`` for trainings that have the status ``ok`` but no metric.

    Earlier versions of mpscale, and tables from elsewhere, have such trainings: NaN and infinity are empty cells there.
    A table without any facts about metrics is left as it is, and so are trainings of a workload without a metric.
    """
    with_metric = {r["workload"] for r in records if r["metric_value"] is not None and r["repeat"] == 0}

    def settled(record: Record) -> Record:
        if record["metric_value"] is not None or record["status"] != "ok" or record["repeat"] != 0:
            return record
        if record["has_metric"] is False:
            return record
        why = record.why_empty("metric_value")
        told = why is not None or any(record[name] is not None for name in _OF_A_METRIC)
        if not told and record["workload"] not in with_metric:
            return record
        found = record.copy()
        reason = f"trained to the end, and has no {record['metric_name'] or 'metric'}{f': {why}' if why else ''}"
        found.update({"status": "diverged", "status_reason": reason})
        return found

    return [settled(record) for record in records]


def of_good_trainings(cases: Iterable[Record]) -> list[Record]:
    """The cases that ran to the end, without those of lost seeds.

    A lost training has a step time but no speed worth having. Nor have its repeats: they time the same steps, although
    their own status is ``ok``.
    """
    measured = [case for case in cases if case["status"] in MEASURED]
    lost = {case["seed"] for case in measured if case["status"] in LOST}
    return [case for case in measured if case["seed"] not in lost] if lost else measured


def values_of(records: Iterable[Record], column: str) -> list[Any]:
    """The values of a column, without the empty cells."""
    _check_name(column)
    return [value for record in records if (value := record._values.get(column)) is not None]


def common(cases: Iterable[Record], column: str) -> Any:
    """The value of a column if all cases that have one agree; None if they do not or none has one."""
    values = set(values_of(cases, column))
    return values.pop() if len(values) == 1 else None


def in_order_of_modes(names: Iterable[str]) -> list[str]:
    """Modes in the order of tables; unknown ones come last, as they came."""
    there = list(dict.fromkeys(names))
    return [mode for mode in MODES if mode in there] + [mode for mode in there if mode not in MODES]


def place_of(row: Record | Mapping[str, Any]) -> Place:
    """Workload and mode of a record, or of a row of the summary, as tables name them; see :class:`Variant`."""
    batch, scale, replicas = row["swept_batch"], row["swept_scale"], row["swept_replicas"]
    if batch is None and scale is None and replicas is None:
        return row["workload"], row["mode"]
    return Variant(batch, scale, replicas).place(row["workload"], row["mode"])


def modes_of(records: Iterable[Record]) -> dict[str, str]:
    """The modes of records as tables name them, in the order of tables and by loss scale; each with its own name."""
    found = {record.place[1]: (record["mode"], record["swept_scale"] or 0.0) for record in records}
    names = in_order_of_modes(mode for mode, _ in found.values())
    ordered = sorted(found.items(), key=lambda item: (names.index(item[1][0]), item[1][1]))
    return {label: mode for label, (mode, _) in ordered}


def grouped(records: Iterable[Record]) -> dict[Place, list[Record]]:
    """The records of each workload and mode: workloads in order of first appearance, modes in the order of tables."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        workload, mode = record.place
        found.setdefault(workload, {}).setdefault(mode, []).append(record)
    return {
        (workload, mode): by_mode[mode]
        for workload, by_mode in found.items()
        for mode in modes_of(cases[0] for cases in by_mode.values())
    }


_FORMULA = re.compile("'*[=+\\-@\\t\\r\\n\uff1d\uff0b\uff0d\uff20]")
"""Beginnings that make a spreadsheet compute a cell; and an apostrophe before them, as it may be in a name."""
_NUMBER = re.compile(r"[+-]?[\d.,]+(?:e[+-]?\d+)?\s?%?", re.I)


def to_cell(text: str) -> str:
    """Return a text for CSV: with an apostrophe if a spreadsheet would take it for a formula. Numbers stay numbers."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def from_cell(cell: str) -> str:
    """The inverse of :func:`to_cell`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _csv_value(value: Any) -> Any:
    if type(value) is not str:
        return value
    # Progress bars write lone carriage returns. Python's csv leaves them unquoted, and readers end the row there.
    return to_cell(value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value)


class _Echo:
    """Makes ``writerow`` return the row."""

    def write(self, text: str) -> str:
        return text


_row = csv.writer(_Echo(), lineterminator="\n").writerow


def to_csv(records: Iterable[Record]) -> str:
    """The content of cases.csv: all columns in order, one row per record; texts by :func:`to_cell`."""
    *columns, last = COLUMNS
    assert last == "unavailable"
    text = io.StringIO()
    text.write(_row(COLUMNS))
    for record in records:
        row: str = _row(map(_csv_value, map(record._values.get, columns)))
        reasons = tuple((name, why.text) for name, why in record._unavailable.items())
        text.write(f"{row[:-1]},{_reasons_cell(reasons)}\n")
    return text.getvalue()


@lru_cache(maxsize=1024)
def _reasons_cell(reasons: tuple[tuple[str, str], ...]) -> str:
    """The last cell of a row, made once for all that share it: it is long, and the same in most cases of a mode."""
    texts = dict(reasons)
    ordered = {name: texts[name] for name in COLUMNS if name in texts}
    return _row([json.dumps(ordered, ensure_ascii=False)])[:-1] if ordered else ""


@dataclass(slots=True)
class Findings:
    """Columns on their way into a record: values by name for what is known, reasons for what is not."""

    values: dict[str, Any] = field(default_factory=dict)
    unavailable: dict[str, Reason] = field(default_factory=dict)

    def put(self, column: str, found: Any | Reason) -> None:
        """Note the value of a column, or the reason why it has none."""
        if isinstance(found, Reason):
            self.unavailable[column] = found
        else:
            self.values[column] = found

    def miss(self, columns: Iterable[str], reason: Reason) -> None:
        """Note one reason for several columns."""
        self.unavailable |= dict.fromkeys(columns, reason)

    def add(self, other: Findings) -> None:
        """Take over everything that another found."""
        self.values |= other.values
        self.unavailable |= other.unavailable
