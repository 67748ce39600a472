"""The result of one case: a row of :data:`~mpscale.core.columns.COLUMNS`; an empty cell has a reason."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpscale.core.columns import COLUMNS, FAILED, STATUSES
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason, encodable

_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "json": dict,
}
Place = tuple[str, str]
"""Workload and mode: what a row of most tables is about."""

_POSITIVE = (
    "step_time_ms_median",
    "gpu_memory_nvml_peak_mib",
    "host_memory_peak_mib",
    "gpu_energy_j_per_step",
)
"""Columns that are compared as ratios."""


class Record:
    """One row, filled in as a case goes on.

    A value of None, NaN or infinity counts as unknown: it needs a reason, given by :meth:`miss` or by
    :meth:`complete`.
    """

    def __init__(
        self, values: Mapping[str, Any] | None = None, unavailable: Mapping[str, Reason] | None = None
    ) -> None:
        self._values: dict[str, Any] = {}
        self._unavailable: dict[str, Reason] = {n: _reason(why) for n, why in (unavailable or {}).items()}
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
            value = plain(value)
            if _is_unknown(value):
                self._values.pop(name, None)
            else:
                self._values[name] = value
                self._unavailable.pop(name, None)

    def miss(self, names: str | Iterable[str], reason: Reason | str) -> None:
        """Says why columns are empty. A value stays, and so does an earlier reason: it came from nearer the cause."""
        for name in [names] if isinstance(names, str) else names:
            _check_name(name)
            if name not in self._values:
                self._unavailable.setdefault(name, _reason(reason))

    def complete(self, reason: Reason | str) -> None:
        """Gives ``reason`` to every measured column that has neither a value nor a reason."""
        self.miss([column.name for column in COLUMNS.values() if column.measured], reason)

    def drop_misfits(self) -> list[str]:
        """Empties the columns whose values do not belong in them; why, one sentence a column.

        One such value would keep whole files from being read.
        """
        misfits = {name: why for name, value in self._values.items() if (why := misfit(name, value)) is not None}
        for name, why in misfits.items():
            del self._values[name]
            self._unavailable[name] = Reason(Code.MISFIT, why)
        return list(misfits.values())

    def invalidate(self, why: str) -> None:
        """Lets no figure of the record count: ``invalid``, or the failure that it is already, with one more reason."""
        status, said = self["status"], self["status_reason"]
        self.update(
            {
                "status": status if status in (*FAILED, "unsupported") else "invalid",
                "status_reason": f"{said}; {why}" if said else why,
            }
        )

    @property
    def unavailable(self) -> dict[str, Reason]:
        """The reasons given so far, by column."""
        return dict(self._unavailable)

    def to_json(self) -> dict[str, Any]:
        """Plain values in the order of the columns, the empty ones left out; reasons under ``unavailable``."""
        row = {name: self._values[name] for name in COLUMNS if name in self._values}
        if self._unavailable:
            row["unavailable"] = {n: self._unavailable[n].to_json() for n in COLUMNS if n in self._unavailable}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_json`. Columns of a newer schema are dropped.

        Raises:
            TypeError: a reason is none.
        """
        values = {name: value for name, value in row.items() if name in COLUMNS and name != "unavailable"}
        reasons = row.get("unavailable") or {}
        return cls(values, {name: Reason.from_json(why) for name, why in reasons.items()})


def plain(value: Any) -> Any:
    """A scalar of NumPy as Python's own, and text that any file can hold; other values as they are."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return encodable(value) if isinstance(value, str) else value


def _reason(why: Reason | str) -> Reason:
    return why if isinstance(why, Reason) else Reason(Code.OTHER, why)


def misfit(name: str, value: Any) -> str | None:
    """Why a value does not belong in its column, None where it does, or where it is unknown.

    Args:
        name: of the column.
        value: what :func:`plain` made of it.
    """
    _check_name(name)
    if _is_unknown(value):
        return None
    kind = COLUMNS[name].kind
    # bool is a kind of int in Python, and not here.
    if not isinstance(value, _TYPES[kind]) or (kind == "bool") != isinstance(value, bool):
        return f"{name} should be {kind}, not {value!r:.200}"
    if kind == "json" and not all(isinstance(part, str) for pair in value.items() for part in pair):
        return f"{name} should hold texts, not {value!r:.200}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{name} does not fit into 64 bits: {str(value)[:30]}..."
    if name == "status" and value not in STATUSES:
        return f"{value!r} is no status of a case"
    if name in _POSITIVE and value <= 0:
        return f"{name} is {value}; it must be above 0"
    return None


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _one_kind_of_line_end(value: Any) -> Any:
    """Python's csv leaves a lone carriage return, as progress bars write it, unquoted: readers end the row there."""
    return value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else value


def _check_name(name: str) -> None:
    if name not in COLUMNS:
        raise KeyError(f"{name!r} is no column of a case; docs/metrics.md lists them")


def in_order_of_modes(names: Iterable[str]) -> list[str]:
    """The modes in the order in which tables show them; those that are not known here come after, as they came."""
    there = list(dict.fromkeys(names))
    return [mode for mode in MODES if mode in there] + [mode for mode in there if mode not in MODES]


def grouped(records: Iterable[Record]) -> dict[Place, list[Record]]:
    """The records of each workload and mode: workloads in order of first appearance, modes as tables show them."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        found.setdefault(record["workload"], {}).setdefault(record["mode"], []).append(record)
    return {
        (workload, mode): by_mode[mode] for workload, by_mode in found.items() for mode in in_order_of_modes(by_mode)
    }


def to_csv(records: Iterable[Record]) -> str:
    """cases.csv: every column, in the order of :data:`COLUMNS`, one row a record, an empty cell for what is unknown."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = {name: _one_kind_of_line_end(value) for name, value in record.to_json().items()}
        if "unavailable" in row:
            reasons = {name: str(why) for name, why in record.unavailable.items() if name in COLUMNS}
            row["unavailable"] = json.dumps(reasons, ensure_ascii=False)
        writer.writerow(row)
    return text.getvalue()


@dataclass(slots=True)
class Findings:
    """Columns as telemetry finds them: {column: value} if known and {column: reason} if not."""

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
