"""Reads ``journal.jsonl``, the account of a run, into one record a case."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpscale.modes import MODES
from mpscale.records import Record, misfit

NO_END = "the journal holds no end of this case: the run was stopped, or is still going on"

IDENTITY = ("workload", "mode", "seed", "repeat")
_CASE_ID = re.compile(r"(.+)--(.+)--s(\d{1,18})--r(\d{1,18})")


class RunError(Exception):
    """A run that is not there, or a file of it that is broken. The message says which, and what to do."""


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says.

    Args:
        records: the last attempt of every started case, in plan order.
        finished: whether the run ended.
        problems: what of the file could not be read as it stands, and what was made of it.
    """

    records: list[Record]
    finished: bool
    problems: list[str]


def read_journal(path: Path, info: Mapping[str, Any]) -> Journal:
    """Reads a journal; a last line that was cut off is ignored.

    The last event of a case counts: of several attempts the last, and one that was started and not finished is a
    record with status ``interrupted``.

    A line that is broken, or whose record holds what does not belong there, costs its own case and no other: that
    case becomes ``invalid`` with the reason.

    Args:
        path: of ``journal.jsonl``.
        info: ``run.json``, for the plan and for what an interrupted case could not say of itself.

    Raises:
        RunError: the file is missing, cannot be read at all, or holds no event: every journal begins with one.
    """
    told = _Told(path.name, info)
    for number, line in _lines(path):
        told.take(number, line)
    if not told.events:
        why = told.problems[0] if told.problems else "it is empty or was cut off"
        raise RunError(f"{path}: holds no event that can be read ({why}){_what_is_left(path)}")
    place = {case_id: index for index, case_id in enumerate(info.get("planned", []))}
    # sorted() keeps the order of the journal among cases that no plan names.
    ordered = sorted(told.records, key=lambda case_id: place.get(case_id, len(place)))
    return Journal([told.records[case_id] for case_id in ordered], told.finished, told.problems)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        # Bytes, because a cut can fall inside a character.
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file{_what_is_left(path)}") from None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    # A whole line ends with a newline, so what comes after the last one was cut off, if it is no whole object.
    last = lines.pop()
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    try:
        json.loads(last.decode("utf-8"))
    except (ValueError, RecursionError):
        return
    yield len(lines) + 1, last


def _what_is_left(path: Path) -> str:
    cases = path.with_name("cases.csv")
    left = f", but its cases can be compared: {cases}" if cases.is_file() else ""
    return f"; without its journal a run cannot be read{left}"


@dataclass
class _Told:
    """What the lines so far have told."""

    name: str
    info: Mapping[str, Any]
    records: dict[str, Record] = field(default_factory=dict)
    finished: bool = False
    problems: list[str] = field(default_factory=list)
    events: int = 0
    running: str | None = None
    """The case that has begun and not ended. Cases run one at a time, so a line that cannot be read was about it."""

    def take(self, number: int, line: bytes) -> None:
        """Takes one line, whatever is in it."""
        where = f"{self.name}, line {number}: "
        try:
            event = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            self._broken(f"{where}not readable as JSON: {error}")
            return
        try:
            self._take(event, where)
        except _Odd as why:
            self._broken(f"{where}{why}")

    def _take(self, event: Any, where: str) -> None:
        kind = _part(event, "event", str, "the line")
        self.events += 1
        match kind:
            case "case_started":
                # Noted before its parts are looked at: if they are broken, it has begun all the same.
                self.running = _part(event, "case_id", str)
                case = _part(event, "case", dict)
                self.records[self.running] = self._without_end(self.running, case, event.get("attempt"))
            case "case_finished":
                self.running = _part(event, "case_id", str)
                self._finish(self.running, _part(event, "record", dict), where)
                self.running = None
            case "run_started":
                self.finished = False
            case "run_finished":
                self.finished = True

    def _finish(self, case_id: str, row: dict[str, Any], where: str) -> None:
        """Takes the record of a ``case_finished``."""
        reasons = row.get("unavailable", {})
        odd = [why for why in [misfit("unavailable", reasons)] if why is not None]
        record = Record.from_json({**row, "unavailable": {} if odd else reasons})
        record.update({"case_id": case_id})
        odd += [*record.drop_misfits(), *lacks(record, case_id)]
        if odd:
            record.update(self._identity(case_id))
            record.invalidate(where + "; ".join(odd))
            self.problems.append(f"{case_id} counts as {record['status']}: {where}{'; '.join(odd)}")
        self.records[case_id] = record

    def _broken(self, why: str) -> None:
        """Takes a line that tells nothing, which costs the case that was running its result."""
        self.problems.append(why)
        if self.running is None:
            return
        try:
            identity = self._identity(self.running)
        except _Odd:
            return
        record = self._without_end(self.running, identity, None)
        record.update({"status": "invalid", "status_reason": why})
        self.records[self.running] = record
        self.problems[-1] = f"{self.running} counts as invalid: {why}"

    def _identity(self, case_id: str) -> dict[str, Any]:
        """Which case it is, by what was told before or by its id.

        Raises:
            _Odd: neither says so.
        """
        before, parts = self.records.get(case_id), _CASE_ID.fullmatch(case_id)
        if before is not None:
            return {name: before[name] for name in (*IDENTITY, "order", "attempts")}
        if parts is None:
            raise _Odd(f"{case_id!r} does not say which case it is")
        workload, mode, seed, repeat = parts.groups()
        return dict(zip(IDENTITY, (workload.replace("+", ":"), mode, int(seed), int(repeat)), strict=True))

    def _without_end(self, case_id: str, case: Mapping[str, Any], attempt: Any) -> Record:
        """The record of a case of which the journal holds no result."""
        record = Record(
            {
                **{name: case.get(name) for name in (*IDENTITY, "order")},
                "case_id": case_id,
                "attempts": case.get("attempts") if attempt is None else attempt,
                "status": "interrupted",
                "status_reason": NO_END,
                "schema_version": self.info.get("schema_version"),
                "method_version": self.info.get("method_version"),
            }
        )
        odd = [*record.drop_misfits(), *lacks(record, case_id)]
        if odd:
            raise _Odd("; ".join(odd))
        if record["mode"] in MODES:
            record.update({"policy": MODES[record["mode"]].policy})
        environment = self.info.get("environment")
        device = environment.get("device") if isinstance(environment, dict) else None
        if isinstance(device, dict):
            record.update({"device": device.get("kind"), "device_name": device.get("name")})
            record.drop_misfits()
        record.complete(NO_END)
        return record


class _Odd(Exception):
    """A line that is no account of an event. The message says why."""


def _part(event: Any, name: str, kind: type, what: str = "the event") -> Any:
    """A part of an event.

    Raises:
        _Odd: it is not there or not of its kind.
    """
    if not isinstance(event, dict):
        raise _Odd(f"should hold a JSON object, not {type(event).__name__}")
    if name not in event:
        raise _Odd(f"{what} lacks {name!r}")
    if not isinstance(event[name], kind):
        raise _Odd(f"{name} should be {kind.__name__}, not {event[name]!r:.200}")
    return event[name]


def lacks(record: Record, case_id: str) -> list[str]:
    """What a record has to say and does not: which case it is and how that ended, one sentence each."""
    return [f"the record of {case_id} has no {name}" for name in (*IDENTITY, "status") if record[name] is None]
