"""Read a cases.csv without its run, as it comes from another machine, an artifact or people's tools.

A file that was saved again by a data frame or a spreadsheet is fine as long as no figure can have changed: another word
for unknown, another order, an index, 3.0 for 3. A file that may have lost a decimal point is refused.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscale.core.columns import COLUMNS, SCHEMA_VERSION
from mpscale.core.files.reading import (
    CASES,
    MOST_CASES,
    MOST_LINE,
    RunError,
    check_text,
    lines_of,
    parse_json,
    read_bytes,
)
from mpscale.core.journal import IDENTITY, lacks
from mpscale.core.reason import Reason
from mpscale.core.record import Record, from_cell

_NEEDED = (*IDENTITY, "case_id", "status")
_UNKNOWN = frozenset(
    "na n/a <na> #n/a #na nan -nan none null nil nat 1.#ind -1.#ind 1.#qnan -1.#qnan".split()  # noqa: SIM905
)
"""What pandas, R, polars, Julia and spreadsheets write into empty cells, in lower case."""
_ELSEWHERE = "save it as CSV in UTF-8, with commas between cells and points in numbers, or take the original file"


def read_cases(path: Path, only: Iterable[str] = COLUMNS) -> list[Record]:
    """Read one record per row. Unknown columns are ignored; missing ones are empty.

    A cell is unknown if it is empty or holds a word such as NA, NaN or null. In a column of text such a word counts as
    unknown only if a column of numbers has it too: a metric may well be called ``none``.

    Args:
        path: of the file.
        only: columns that are needed, besides those that say which case a row is and how it ended.

    Raises:
        RunError: the file cannot be read, lacks the columns that say which case a row is, or holds a value that does
            not belong in its column. The message names file and line.
    """
    wanted = {*only, *_NEEDED}
    names, rows = _rows(path, _content(path), wanted)
    if twice := sorted({name for name in names if name in COLUMNS and names.count(name) > 1}):
        raise RunError(f"{path}: has several columns {', '.join(twice)}; leave one of each")
    if missing := [name for name in _NEEDED if name not in names]:
        raise RunError(f"{path}: is not a cases.csv of mpscale: it has no column {', '.join(missing)}")
    columns = [name for name in names if name in wanted and name in COLUMNS]
    words = _words_for_unknown(columns, [cells for _, cells in rows])
    records = [_record(path, line, columns, cells, words) for line, cells in rows]
    if not records:
        raise RunError(f"{path}: holds no case")
    seen: set[Any] = set()
    for record in records:
        if record["case_id"] in seen:
            raise RunError(f"{path}: holds {record['case_id']} twice; compare one run at a time")
        seen.add(record["case_id"])
    return records


def _content(path: Path) -> bytes:
    """The content of a file, which must be UTF-8."""
    content = read_bytes(path, CASES)
    check_text(path, content, f"it cannot be read as CSV: {_ELSEWHERE}")
    return content


def _rows(path: Path, content: bytes, wanted: Container[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the wanted cells of each row that has content, with the number of its last line."""
    header = content[: len(content) if (end := re.search(b"[\r\n]", content)) is None else end.start()]
    for separator, name in ((b";", "semicolons"), (b"\t", "tabs")):
        if header.count(separator) > header.count(b","):
            raise RunError(
                f"{path}: its cells are separated by {name}, as in spreadsheets with decimal commas; then 1,234 may be "
                f"more than a thousand or less than two: {_ELSEWHERE}"
            )
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(lines_of(path, content), strict=True)
    # The output of a process, or the scales of a large model, may be longer than csv's own limit of 128 KiB.
    limit = csv.field_size_limit(MOST_LINE)
    try:
        names = [name.strip() for name in next(reader, [])]
        places = [place for place, name in enumerate(names) if name in wanted and name in COLUMNS]
        for row in reader:
            if not any(row):
                continue
            if len(row) != len(names):
                raise RunError(f"{path}, line {reader.line_num}: does not have as many cells as the header")
            rows.append((reader.line_num, [row[place] for place in places]))
            if len(rows) > MOST_CASES:
                raise RunError(f"{path}: has more than {MOST_CASES:,} rows; a run of so many cases is not read")
    except csv.Error as error:
        raise RunError(f"{path}, line {reader.line_num}: cannot be read as CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return names, rows


def _words_for_unknown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> frozenset[str]:
    """The words that stand for an empty cell in this file: those that appear where a number should be."""
    numbers = [place for place, name in enumerate(columns) if COLUMNS[name].kind != "str"]
    found = {cells[place] for cells in rows for place in numbers}
    return frozenset(word for cell in found if (word := cell.strip()).lower() in _UNKNOWN)


def _record(path: Path, line: int, columns: Sequence[str], cells: Sequence[str], words: frozenset[str]) -> Record:
    try:
        row = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
        known = {name: text for name, text in row.items() if not _is_unknown(row, name, words)}
        values = {name: _value(name, text) for name, text in known.items()}
        reasons = values.pop("unavailable", None) or {}
        record = Record(values, {name: Reason.from_json(why) for name, why in reasons.items()})
        if odd := [*record.drop_misfits(), *lacks(record, str(record["case_id"]))]:
            raise ValueError("; ".join(odd))
    except ValueError as error:
        raise RunError(f"{path}, line {line}: {error}") from error
    version = record["schema_version"] or SCHEMA_VERSION
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{path}, line {line}: written with schema version {version}, this mpscale reads up to {SCHEMA_VERSION}; "
            "upgrade it"
        )
    return record


def _is_unknown(row: Mapping[str, str], name: str, words: frozenset[str]) -> bool:
    text = row[name]
    if COLUMNS[name].kind != "str":
        word = text.strip()
        return not word or word in words
    # A workload may be called NA; then the ids of its cases begin with that.
    named = name == "case_id" or (name == "workload" and row.get("case_id", "").startswith(f"{text}--"))
    return text in words and not named


def _value(name: str, text: str) -> Any:
    try:
        return _PARSERS[COLUMNS[name].kind](text)
    except ValueError as error:
        raise ValueError(f"{error}, in the column {name}") from error


def _float(text: str) -> float:
    # Python reads 1_2 as 12, but no tool writes numbers that way, and a name may look like that.
    try:
        if "_" not in text and "," not in text:
            return float(text)
    except ValueError:
        pass
    raise ValueError(f"expected a number such as 1234.5, not {text!r:.200}")


def _integer(text: str) -> int:
    # Spreadsheets and data frames turn 3 into 3.0.
    value = _float(text)
    if not value.is_integer():
        raise ValueError(f"expected a whole number, not {text!r:.200}")
    return int(text) if text.strip().lstrip("+-").isdecimal() else int(value)


def _flag(text: str) -> bool:
    flags = {"true": True, "t": True, "1": True, "1.0": True, "false": False, "f": False, "0": False, "0.0": False}
    if text.strip().lower() not in flags:
        raise ValueError(f"expected True or False, not {text!r:.200}")
    return flags[text.strip().lower()]


def _reasons(text: str) -> dict[str, str]:
    try:
        value = parse_json(text)
    except ValueError:
        # A data frame of a run is saved with dicts as Python shows them.
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ValueError(f"expected a JSON object of texts, not {text!r:.200}")
    return value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": from_cell,
    "int": _integer,
    "float": _float,
    "bool": _flag,
    "json": _reasons,
}
