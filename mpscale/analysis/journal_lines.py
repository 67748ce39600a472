"""Reads ``journal.jsonl``, the append-only account of a run, into one record a case."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscale.columns import COLUMNS, STATUSES
from mpscale.modes import MODES
from mpscale.records import Record

NO_END = "the journal holds no end of this case: the run was stopped, or is still going on"

IDENTITY = ("workload", "mode", "seed", "repeat")
_POSITIVE = (
    "step_time_ms_median",
    "gpu_memory_nvml_peak_mib",
    "host_memory_peak_mib",
    "gpu_energy_j_per_step",
)
"""Columns that are compared as ratios."""
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "json": dict,
}


class RunError(Exception):
    """A run that is not there, or a file of it that is broken. The message says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says: the last attempt of every started case, in plan order, and whether the run ended."""

    records: list[Record]
    finished: bool


def read_journal(path: Path, info: Mapping[str, Any]) -> Journal:
    """Reads a journal; a last line that was cut off is ignored.

    The last event of a case counts: of several attempts the last, and one that was started and not finished is a
    record with status ``interrupted``.

    Args:
        path: of ``journal.jsonl``.
        info: ``run.json``, for the plan and for what an interrupted case could not say of itself.

    Raises:
        RunError: the file is missing or a line of it is broken.
    """
    records: dict[str, Record] = {}
    finished = False
    for number, event in _events(path):
        try:
            match event["event"]:
                case "case_started":
                    records[event["case_id"]] = _interrupted(event, info)
                case "case_finished":
                    records[event["case_id"]] = _finished(event)
                case "run_started":
                    finished = False
                case "run_finished":
                    finished = True
        except KeyError as error:
            raise RunError(f"{path}, line {number}: the event lacks {error}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise RunError(f"{path}, line {number}: {error}") from error
    place = {case_id: index for index, case_id in enumerate(info.get("planned", []))}
    # sorted() keeps the order of the journal among cases that no plan names.
    ordered = sorted(records, key=lambda case_id: place.get(case_id, len(place)))
    return Journal([records[case_id] for case_id in ordered], finished)


def _events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        # Bytes, because a cut can fall inside a character.
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; without its journal a run cannot be read") from None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line.decode("utf-8"))
        except ValueError as error:
            # A whole line ends with a newline, so after split() the last element is what was cut off.
            if number == len(lines):
                return
            raise RunError(f"{path}, line {number}: not readable as JSON: {error}") from error
        if not isinstance(event, dict):
            raise RunError(f"{path}, line {number}: should hold a JSON object, not {type(event).__name__}")
        yield number, event


def _finished(event: Mapping[str, Any]) -> Record:
    """The record of a ``case_finished``."""
    record = Record.from_json(event["record"])
    record.update({"case_id": event["case_id"]})
    check(record, event["case_id"])
    return record


def check(record: Record, case_id: str) -> None:
    """Refuses a record whose values would fail or mislead further on.

    Raises:
        ValueError: it does not say which case it is, or a value is of the wrong kind or out of range.
    """
    for name in IDENTITY:
        if record[name] is None:
            raise ValueError(f"the record of {case_id} has no {name}")
    for name, column in COLUMNS.items():
        value = record[name]
        # bool is a kind of int in Python, and not here.
        fits = isinstance(value, _TYPES[column.kind]) and (column.kind == "bool") == isinstance(value, bool)
        if value is not None and not fits:
            raise ValueError(f"{name} of {case_id} should be {column.kind}, not {value!r}")
    if record["status"] not in STATUSES:
        raise ValueError(f"{record['status']!r} is no status of a case")
    for name in _POSITIVE:
        value = record[name]
        if value is not None and value <= 0:
            raise ValueError(f"{name} of {case_id} is {value}; it must be above 0")


def _interrupted(event: Mapping[str, Any], info: Mapping[str, Any]) -> Record:
    case = event["case"]
    record = Record(
        {
            **{name: case[name] for name in (*IDENTITY, "order")},
            "case_id": event["case_id"],
            "attempts": event.get("attempt"),
            "status": "interrupted",
            "status_reason": NO_END,
            "schema_version": info.get("schema_version"),
            "method_version": info.get("method_version"),
        }
    )
    if case["mode"] in MODES:
        record.update({"policy": MODES[case["mode"]].policy})
    environment = info.get("environment")
    device = environment.get("device") if isinstance(environment, dict) else None
    if isinstance(device, dict):
        record.update({"device": device.get("kind"), "device_name": device.get("name")})
    record.complete(NO_END)
    return record
