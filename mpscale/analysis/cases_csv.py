"""Reads a cases.csv by itself, as it comes from another machine or out of an artifact."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpscale.analysis.journal_lines import IDENTITY, RunError, lacks
from mpscale.columns import COLUMNS, SCHEMA_VERSION
from mpscale.records import Record

_NEEDED = (*IDENTITY, "case_id", "status")


def read_cases(path: Path) -> list[Record]:
    """One record a row. Columns that are not known here are left out; those that are missing are empty.

    Raises:
        RunError: the file cannot be read, lacks the columns that say which case a row is, or holds a value that does
            not belong in its column. The message names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            missing = [name for name in _NEEDED if name not in (rows.fieldnames or ())]
            if missing:
                raise RunError(f"{path}: is no cases.csv of mpscale: it has no column {', '.join(missing)}")
            records = [_record(path, rows.line_num, row) for row in rows]
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: cannot be read as CSV: {error}") from error
    if not records:
        raise RunError(f"{path}: holds no case")
    seen: set[Any] = set()
    for record in records:
        if record["case_id"] in seen:
            raise RunError(f"{path}: holds {record['case_id']} twice; compare one run at a time")
        seen.add(record["case_id"])
    return records


def _record(path: Path, line: int, row: Mapping[str | None, Any]) -> Record:
    if None in row or None in row.values():
        raise RunError(f"{path}, line {line}: has not as many cells as the header")
    try:
        values = {
            str(name): _PARSERS[COLUMNS[name].kind](text)
            for name, text in row.items()
            if name in COLUMNS and text != ""
        }
        reasons = values.pop("unavailable", None)
        record = Record(values, reasons)
        odd = [*record.drop_misfits(), *lacks(record, str(record["case_id"]))]
        if odd:
            raise ValueError("; ".join(odd))
    except ValueError as error:
        raise RunError(f"{path}, line {line}: {error}") from error
    version = record["schema_version"]
    if version is not None and version > SCHEMA_VERSION:
        raise RunError(
            f"{path}, line {line}: written with schema version {version}, this mpscale reads up to {SCHEMA_VERSION}; "
            "upgrade it"
        )
    return record


def _integer(text: str) -> int:
    # Spreadsheets and data frames make 3 into 3.0.
    value = float(text)
    if not value.is_integer():
        raise ValueError(f"expected a whole number, not {text!r}")
    return int(value)


def _flag(text: str) -> bool:
    flags = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if text.lower() not in flags:
        raise ValueError(f"expected True or False, not {text!r}")
    return flags[text.lower()]


def _reasons(text: str) -> dict[str, str]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, not {text!r}")
    return value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": _integer,
    "float": float,
    "bool": _flag,
    "json": _reasons,
}
