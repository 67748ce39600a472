"""What a run has written, and what must hold of it. Only files are read, none by mpscale."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

SAME = (
    "status", "workload_digest", "series_key", "policy", "batch_size", "initial_weights_digest", "data_order_digest",
    "data_digest", "model_digest", "optimizer_config", "loss_inputs", "loss_probe", "step_operations",
    "process_settings", "attempted_steps", "applied_steps", "skipped_steps", "overflow_steps", "longest_skip_run",
    "loss_scale_initial", "loss_scale_final", "loss_scale_min", "loss_scale_max", "train_loss_first",
    "train_loss_final", "steps_to_target", "final_accuracy", "metric_value", "test_examples",
)  # fmt: skip
"""Columns that two trainings of the same case share to the last bit."""
REPORTS = {"report.html": "</html>\n", "report.md": "\n", "summary.csv": "\n", "cases.csv": "\n"}
"""Files of a report, and how each ends if it is whole."""


@dataclass(frozen=True)
class Journal:
    """The lines of a journal.

    Args:
        text: all whole lines.
        torn: what stands behind the last line end.
        events: the lines as JSON.
        broken: lines that are not JSON.
    """

    text: bytes = b""
    torn: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Journal:
        """Read a journal, which need not exist."""
        try:
            content = path.read_bytes()
        except OSError:
            return cls()
        text, end, torn = content.rpartition(b"\n")
        events, broken = [], []
        for number, line in enumerate(text.splitlines() if end else [], start=1):
            try:
                events.append(json.loads(line))
            except ValueError:
                broken.append(f"line {number} of the journal is not JSON: {line[:80]!r}")
        return cls(text + end, torn, events, broken)

    def count(self, event: str) -> int:
        """How many events of a kind there are."""
        return sum(each.get("event") == event for each in self.events)

    def good(self) -> dict[str, list[dict[str, Any]]]:
        """The records of each case that was measured; more than one if it was measured more than once."""
        found: dict[str, list[dict[str, Any]]] = {}
        for event in self.events:
            if event.get("event") == "case_finished" and event["record"].get("status") == "ok":
                found.setdefault(event["case_id"], []).append(event["record"])
        return found

    def last(self) -> dict[str, dict[str, Any]]:
        """The record that counts of each case: the last, if it came after the last start."""
        found: dict[str, dict[str, Any]] = {}
        for event in self.events:
            if event.get("event") == "case_started":
                found.pop(event["case_id"], None)
            elif event.get("event") == "case_finished":
                found[event["case_id"]] = event["record"]
        return found

    def odd_attempts(self) -> list[str]:
        """Attempts of a case that are not counted 1, 2, 3 ..., and results that belong to none."""
        odd, started = [], dict[str, int]()
        for event in self.events:
            name = event.get("case_id", "")
            if event.get("event") == "case_started":
                started[name] = started.get(name, 0) + 1
                if event.get("attempt") != started[name]:
                    odd.append(f"{name}: start {started[name]} is called attempt {event.get('attempt')}")
            elif event.get("event") == "case_finished" and event["record"].get("attempts") != started.get(name):
                odd.append(f"{name}: a result of attempt {event['record'].get('attempts')} after {started.get(name)}")
        return odd


def steps(folder: Path) -> dict[str, str]:
    """The log of steps of each case, by its path in the folder of the run."""
    return {
        str(path.relative_to(folder)): gzip.decompress(path.read_bytes()).decode()
        for path in sorted(folder.glob("steps/*"))
    }


@dataclass(frozen=True)
class Pace:
    """How long the parts of a session take, in seconds.

    Args:
        start: until its first case starts.
        first: the first case, which waits until TensorFlow has been imported.
        case: each further case.
        end: what comes after the last case.
    """

    start: float
    first: float
    case: float
    end: float

    @classmethod
    def of(cls, journal: Journal, begun: float, ended: float) -> Pace:
        """Measure a session that began and ended at these times since 1970."""
        started, finished = (
            [datetime.fromisoformat(each["time"]).timestamp() for each in journal.events if each["event"] == event]
            for event in ("case_started", "case_finished")
        )
        each = (finished[-1] - finished[0]) / max(1, len(finished) - 1)
        return cls(started[0] - begun, finished[0] - started[0], each, ended - finished[-1])

    def after(self, finished: int, cases: int) -> float:
        """How long it takes from the end of a case to that of the next.

        Args:
            finished: how many cases have finished; -1 for the start of a session.
            cases: how many there are.
        """
        return {-1: self.start, 0: self.first, cases: self.end}.get(finished, self.case)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: what every other must be equal to."""

    journal: Journal
    steps: dict[str, str]
    names: set[str]
    around: set[str]
    pace: Pace

    @classmethod
    def of(cls, run: Path, begun: float = 0.0, ended: float = 0.0) -> Reference:
        """Read the folder of a run, which began and ended at these times since 1970."""
        journal = Journal.read(run / "journal.jsonl")
        return cls(journal, steps(run), _names(run), _around(run), Pace.of(journal, begun, ended))

    @property
    def cases(self) -> set[str]:
        """The ids of its cases."""
        return set(self.journal.good())


def _names(run: Path) -> set[str]:
    """The files of a run, but those with samples of a GPU, of which every attempt has one."""
    found = (path.relative_to(run) for path in run.rglob("*"))
    return {str(path) for path in found if path.parts[0] != "gpu"}


def _around(run: Path) -> set[str]:
    results = run.parents[1]
    found = (path.relative_to(results) for path in results.rglob("*"))
    return {str(path) for path in found if not (path.parts[0] == "runs" and len(path.parts) > 1)}


def kept(before: Journal, after: Journal) -> list[str]:
    """What has become of lines that the journal had."""
    if after.text.startswith(before.text):
        return []
    missing = [line[:160] for line in before.text.splitlines() if line not in set(after.text.splitlines())]
    return [f"{len(missing)} lines of the journal were lost or changed, such as {missing[0]!r}"] if missing else [
        "the lines of the journal are in another order"
    ]  # fmt: skip


def is_complete(run: Path, reference: Reference) -> bool:
    """Whether a run has a good result of every case, and its report."""
    journal = Journal.read(run / "journal.jsonl")
    if {name for name, record in journal.last().items() if record.get("status") == "ok"} != reference.cases:
        return False
    return journal.count("run_finished") > 0 and not unfinished_files(run) and not other_cells(run, journal)


def unfinished_files(run: Path) -> list[str]:
    """Files of the report that are missing or not whole, and files that should have been renamed."""
    wrong = [f"{path.relative_to(run)} was left" for path in run.rglob("*.partial")]
    for name, end in REPORTS.items():
        path = run / name
        if not path.is_file():
            wrong.append(f"there is no {name}")
        elif not path.read_bytes().endswith(end.encode()):
            wrong.append(f"{name} is not whole")
    return wrong


def other_cells(run: Path, journal: Journal) -> list[str]:
    """Cells of cases.csv that differ from the journal."""
    try:
        rows = list(csv.DictReader(io.StringIO((run / "cases.csv").read_text(encoding="utf-8"), newline="")))
    except (OSError, ValueError) as error:
        return [f"cases.csv cannot be read: {error}"]
    records = journal.last()
    wrong = []
    if sorted(row["case_id"] for row in rows) != sorted(records):
        wrong.append(f"cases.csv has {len(rows)} rows, the journal has results of {len(records)} cases")
    for row in rows:
        record = records.get(row["case_id"], {})
        differing = [
            name
            for name, cell in row.items()
            if name != "unavailable" and name in row and not _same(cell, record.get(name))
        ]
        if differing:
            wrong.append(f"cases.csv differs from the journal: {row['case_id']}, {', '.join(differing[:5])}")
    return wrong


def _same(cell: str, value: Any) -> bool:
    if value is None:
        return cell == ""
    if isinstance(value, bool):
        return cell.lower() == str(value).lower()
    if isinstance(value, int | float):
        return cell != "" and float(cell) == value
    return cell == value or cell == f"'{value}"


def compare(run: Path, reference: Reference, full_disk: bool = False) -> list[str]:
    """What of a complete run differs from the undisturbed one.

    Args:
        run: its folder.
        reference: the undisturbed run.
        full_disk: whether its disk was full: then a case may lack its log of steps, if it has a note.
    """
    wrong = []
    journal = Journal.read(run / "journal.jsonl")
    good, expected = journal.good(), reference.journal.good()
    if set(good) != set(expected):
        lacks, more = sorted(set(expected) - set(good)), sorted(set(good) - set(expected))
        wrong.append(f"lacks the cases {lacks}, and has {more} that were not planned")
    for name, records in good.items():
        if len(records) > 1:
            wrong.append(f"{name} was measured {len(records)} times")
        theirs = expected.get(name, [{}])[0]
        others = [column for column in SAME if records[-1].get(column) != theirs.get(column)]
        wrong += [f"{name}: {each} is {records[-1].get(each)}, not {theirs.get(each)}" for each in others]
    noted = {name for name, records in good.items() if full_disk and records[-1].get("note")}
    excused = {name for name in reference.steps.keys() - _names(run) if any(case in name for case in noted)}
    wrong += _other_steps(run, reference, excused)
    extra = _names(run) - reference.names
    if extra:
        wrong.append(f"files that an undisturbed run does not have: {sorted(extra)}")
    if lacking := reference.names - _names(run) - excused:
        wrong.append(f"files are missing: {sorted(lacking)}")
    if extra := _around(run) - reference.around:
        wrong.append(f"something else in the results folder: {sorted(extra)}")
    return wrong + unfinished_files(run) + other_cells(run, journal)


def _other_steps(run: Path, reference: Reference, excused: set[str]) -> list[str]:
    try:
        ours = steps(run)
        for path in run.glob("gpu/*"):
            gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        return [f"a file of steps or samples is not whole: {error}"]
    names = (ours.keys() | reference.steps.keys()) - excused
    return [f"{name} differs" for name in sorted(names) if ours.get(name) != reference.steps.get(name)]
