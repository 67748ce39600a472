"""Read the journal of a run, from which everything else can be made. One that was cut short gives what it holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpscale.core import extras
from mpscale.core.blocks import FASTER, group_columns
from mpscale.core.case import CaseId
from mpscale.core.cause import Cause
from mpscale.core.files.reading import (
    JOURNAL,
    MOST_CASES,
    MOST_LINE,
    NoSuchFileError,
    RunError,
    other_encoding,
    parse_json,
    read_lines,
)
from mpscale.core.mode import MODES
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Record, misfit

IDENTITY = ("workload", "mode", "seed", "repeat")
"""The columns that say which case a record is of."""
SWEPT = ("swept_batch", "swept_scale", "swept_replicas")
"""Those that say it besides, in a sweep."""
_MOST_LINES = 20 * MOST_CASES
"""A case has two lines for each attempt."""
_MOST_BROKEN = 10_000
"""More lines than that in a file that is no journal would take minutes."""
_SHOWN = 20
"""How many problems are told one by one."""
NO_END = "the journal has no result of this case: the run was stopped, or is still going on"


@dataclass(frozen=True, slots=True)
class JournalContent:
    """What a journal holds.

    Args:
        records: the last attempt of every started case, in the order of the plan.
        finished: whether the run ended.
        problems: what in the file could not be read, and what was done about it.
    """

    records: list[Record]
    finished: bool
    problems: list[str]


def read_journal(path: Path, info: Mapping[str, Any]) -> JournalContent:
    """Read a journal. A last line that was cut off is ignored.

    The last event of a case counts: the last of several attempts, even if that has no result. Then the case becomes a
    record with status ``interrupted``.

    A broken line, or a record with values that do not belong there, costs only its own case, which becomes ``invalid``
    with the reason.

    Args:
        path: of ``journal.jsonl``.
        info: ``run.json``, for the plan and for what the lines of an interrupted case lack.

    Raises:
        RunError: the file is missing, cannot be read at all, is larger than any journal, or holds no event; every
            journal begins with one.
    """
    told = _Told(path.name, info)
    try:
        for number, line in _lines(path):
            told.take(number, line)
            if number == 1 and not told.events and (what := other_encoding(line)) is not None:
                raise RunError(f"{path}: it is not UTF-8 but {what}{_what_is_left(path)}")
            if number > _MOST_LINES or len(told.records) > MOST_CASES or told.broken > _MOST_BROKEN:
                raise RunError(
                    f"{path}: is no journal of a run: by line {number:,} it has {len(told.records):,} cases, and "
                    f"{told.broken:,} lines that cannot be read{_what_is_left(path)}"
                )
    except NoSuchFileError as error:
        raise RunError(f"{error}{_what_is_left(path)}") from None
    told.close()
    if not told.events:
        why = told.problems[0] if told.problems else "it is empty or was cut off"
        raise RunError(f"{path}: holds no event that can be read ({why}){_what_is_left(path)}")
    if (more := told.broken - len(told.problems)) > 0:
        told.problems.append(f"{path.name}: {more:,} more lines like these")
    place = {case_id: index for index, case_id in enumerate(info.get("planned", []))}
    # sorted() keeps the journal's order for cases that are not in the plan.
    ordered = sorted(told.records, key=lambda case_id: place.get(case_id, len(place)))
    return JournalContent([told.records[case_id] for case_id in ordered], told.finished, told.problems)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, one at a time because journals of long runs are large."""
    # As bytes, because a cut can fall inside a character.
    for number, (line, whole) in enumerate(read_lines(path, JOURNAL), start=1):
        # A line ends with a newline, so a last line without one was cut off, unless it is complete JSON.
        if number > _MOST_LINES or (line.strip() and (not whole or line.endswith(b"\n") or _is_json(line))):
            yield number, line if whole else b""


def _parsed(line: bytes) -> Any:
    """The JSON of a line.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
        RunError: the extra `bench` is not installed.
    """
    try:
        import orjson  # here, since the base installation lacks it
    except ModuleNotFoundError as error:
        raise RunError(extras.why_not_imported(error) or str(error)) from error
    try:
        return orjson.loads(line)  # not json, which takes almost half of the time to read a large run
    except orjson.JSONDecodeError:
        # Python writes NaN and lone surrogates, which are not JSON.
        return parse_json(line.decode("utf-8"))


def _is_json(line: bytes) -> bool:
    try:
        _parsed(line)
    except ValueError:
        return False
    return True


def _what_is_left(path: Path) -> str:
    cases = path.with_name("cases.csv")
    left = f", but its cases can be compared: {cases}" if cases.is_file() else ""
    return f"; without its journal a run cannot be read{left}"


def _add_groups(record: Record, step_s: Any) -> None:
    """Fill the columns on groups of blocks in a record of an older mpscale, which kept the blocks but lacks these."""
    if record[FASTER] is not None or record.why_empty(FASTER) is not None or not isinstance(step_s, list):
        return
    times = [time for time in step_s if isinstance(time, float) and math.isfinite(time) and time > 0]
    if times and len(times) == len(step_s):
        found = group_columns(times)
        record.update(found.values)
        for column, why in found.unavailable.items():
            record.miss(column, why)


_PENDING = Record()
"""Keeps the place of a case that has started until its result comes."""


@dataclass
class _Told:
    """What has been read from the lines so far."""

    name: str
    info: Mapping[str, Any]
    records: dict[str, Record] = field(default_factory=dict)
    started: dict[str, tuple[Mapping[str, Any], Any]] = field(default_factory=dict)
    """Cases whose result has not come: the facts in the event of their start, and the attempt."""
    without_end: set[str] = field(default_factory=set)
    finished: bool = False
    problems: list[str] = field(default_factory=list)
    """Those of the first few lines that had one."""
    broken: int = 0
    """How many lines had one."""
    events: int = 0
    running: str | None = None
    """The case that has started and not ended. Cases run one at a time, so an unreadable line is about this one."""

    def take(self, number: int, line: bytes) -> None:
        """Take one line, whatever is in it."""
        where = f"{self.name}, line {number}: "
        if not line:
            self._broken(f"{where}longer than {MOST_LINE:,} bytes")
            return
        try:
            event = _parsed(line)
        except ValueError as error:
            self._broken(f"{where}not readable as JSON: {error}")
            return
        try:
            self._take(event, where)
        except _Odd as why:
            self._broken(f"{where}{why}")
        except RecursionError:  # Python's own, for instance where a message shows a value
            self._broken(f"{where}its values are nested too deeply")

    def _take(self, event: Any, where: str) -> None:
        kind = _part(event, "event", str, "the line")
        self.events += 1
        match kind:
            case "case_started":
                # Noted before its parts are checked: the case has started even if they are broken.
                self.running = _part(event, "case_id", str)
                case = _part(event, "case", dict)
                self._start(self.running, case, event.get("attempt"))
            case "case_finished":
                self.running = _part(event, "case_id", str)
                self._finish(self.running, _part(event, "record", dict), where, event.get("step_s"))
                self.running = None
            case "run_started" | "run_resumed":
                self.finished = False
            case "run_finished":
                self.finished = True

    def _finish(self, case_id: str, row: dict[str, Any], where: str, step_s: Any) -> None:
        """Take the record of a ``case_finished``, and the step times of its blocks."""
        odd: list[str] = []
        try:
            record = Record.from_json(row)
        except TypeError as error:
            odd.append(str(error))
            record = Record.from_json({**row, "unavailable": {}})
        record.update({"case_id": case_id})
        odd += [*record.drop_misfits(), *lacks(record, case_id)]
        _add_groups(record, step_s)
        if odd:
            self._settle(case_id)
            record.update(self._identity(case_id))
            record.invalidate(where + "; ".join(odd), Cause.BAD_RECORD)
            self._say(f"{case_id} counts as {record['status']}: {where}{'; '.join(odd)}")
        self.records[case_id] = record
        self.started.pop(case_id, None)
        self.without_end.discard(case_id)

    def _broken(self, why: str) -> None:
        """Take a line that cannot be used, which costs the running case its result."""
        said = why
        if self.running is not None:
            with contextlib.suppress(_Odd):
                self._settle(self.running)
                self._note(self.running, self._identity(self.running), None)
                self.records[self.running].end("invalid", why, Cause.UNREADABLE)
                said = f"{self.running} counts as invalid: {why}"
        self._say(said)

    def _say(self, problem: str) -> None:
        self.broken += 1
        if len(self.problems) < _SHOWN:
            self.problems.append(problem)

    def _identity(self, case_id: str) -> dict[str, Any]:
        """Which case it is, from an earlier line or from its id; raise ``_Odd`` if neither is of use."""
        if before := self.records.get(case_id):
            return {name: before[name] for name in (*IDENTITY, *SWEPT, "order", "attempts")}
        if case := CaseId.parse(case_id):
            return case.columns()
        raise _Odd(f"{case_id!r} does not say which case it is")

    def _start(self, case_id: str, case: Mapping[str, Any], attempt: Any) -> None:
        """Note a case whose result has not come yet; raise ``_Odd`` if its facts do not say which case it is."""
        names, numbers = (case.get("workload"), case.get("mode")), (case.get("seed"), case.get("repeat"))
        rest = (case.get("order"), case.get("attempts") if attempt is None else attempt)
        known = (*numbers, *(number for number in rest if number is not None))
        swept = [name for name in SWEPT if case.get(name) is not None]
        if (
            all(type(name) is str for name in names)
            and all(type(n) is int and abs(n) < 2**63 for n in known)
            and all(misfit(name, case[name]) is None for name in swept)
        ):
            # Nearly all cases end, so their records without an end would be made for nothing.
            self.records[case_id] = _PENDING
            self.started[case_id] = case, attempt
        else:
            self._note(case_id, case, attempt)

    def _settle(self, case_id: str) -> None:
        """Make the record of a case that has started, and whose result has not come."""
        if case_id in self.started:
            self._note(case_id, *self.started.pop(case_id))

    def _note(self, case_id: str, case: Mapping[str, Any], attempt: Any) -> None:
        record = Record(
            {
                **{name: case.get(name) for name in (*IDENTITY, *SWEPT, "order")},
                "case_id": case_id,
                "attempts": case.get("attempts") if attempt is None else attempt,
                "status": "interrupted",
                "status_reason": NO_END,
                "cause": Cause.NO_END.value,
                "schema_version": self.info.get("schema_version"),
                "method_version": self.info.get("method_version"),
            }
        )
        odd = [*record.drop_misfits(), *lacks(record, case_id)]
        if odd:
            raise _Odd("; ".join(odd))
        self.records[case_id] = record
        self.without_end.add(case_id)

    def close(self) -> None:
        """Complete the records of cases whose result never came with the policy, the device and the reason."""
        for case_id in list(self.started):
            self._settle(case_id)
        environment = self.info.get("environment")
        device = environment.get("device") if isinstance(environment, dict) else None
        for record in (self.records[case_id] for case_id in self.without_end):
            if record["mode"] in MODES:
                record.update({"policy": MODES[record["mode"]].policy})
            if isinstance(device, dict):
                record.update({"device": device.get("kind"), "device_name": device.get("name")})
                record.drop_misfits()
            record.complete(Reason(Code.NOT_REACHED, NO_END))


class _Odd(Exception):
    """A line that does not describe an event. The message says why."""


def _part(event: Any, name: str, kind: type, what: str = "the event") -> Any:
    """A part of an event; raise ``_Odd`` if it is missing or of another type."""
    if not isinstance(event, dict):
        raise _Odd(f"should hold a JSON object, not {type(event).__name__}")
    if name not in event:
        raise _Odd(f"{what} lacks {name!r}")
    if not isinstance(event[name], kind):
        raise _Odd(f"{name} should be {kind.__name__}, not {event[name]!r:.200}")
    return event[name]


def lacks(record: Record, case_id: str) -> list[str]:
    """What a record must say and does not: which case it is and how that ended, one sentence each."""
    return [f"the record of {case_id} has no {name}" for name in (*IDENTITY, "status") if record[name] is None]
