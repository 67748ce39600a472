"""The folder of a run, as it is written during the run; :mod:`mpscale.core.journal` reads its journal."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mpscale.core.case import Case
from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.files.errors import why
from mpscale.core.files.writing import open_to_append, remove_leftovers, write
from mpscale.core.processes import stopping
from mpscale.core.record import Record, to_csv
from mpscale.core.run_lock import RunIsHeld, RunLock

_QUICK_S = 0.05
"""A cases.csv that is written faster than this, in seconds, is written after every case."""
_PAUSE = 50
"""A slower one is written again only after this many times as long as writing it took."""


def steps_path(folder: Path, case_id: str) -> Path:
    """Where the log of steps of a case is."""
    return folder / "steps" / f"{_file_name(case_id)}.csv.gz"


def gpu_path(folder: Path, case_id: str, attempt: int) -> Path:
    """Where the samples of the GPU during an attempt of a case are."""
    return folder / "gpu" / f"{_file_name(case_id)}--a{attempt}.jsonl.gz"


def write_cases(folder: Path, content: str) -> None:
    """Write cases.csv, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    write(folder / "cases.csv", content)


def new_folder(parent: Path, slug: str) -> tuple[datetime, Path]:
    """Make a folder whose name begins with the time, and which no other process has.

    Args:
        parent: where it is made; created if it does not exist.
        slug: part of the name, between its time and four random characters.

    Returns:
        The time, which has microseconds and so orders folders that were made in one second, and the folder.

    Raises:
        OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        now = datetime.now(UTC)
        folder = parent / f"{now:%Y%m%dT%H%M%SZ}-{slug}-{secrets.token_hex(2)}"
        # Another process may have drawn the same characters in the same second.
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return now, folder


class Journal:
    """Writes ``<results>/runs/<run>/``.

    All lines are also kept in memory. If the folder or its journal is deleted, moved or changed during the run, both
    are written again. If they cannot be written, the run goes on, each further line tries again, and in the end a
    temporary folder takes everything. :attr:`troubles` says so each time.

    Args:
        results: the results folder; created if it does not exist.
        device_slug: part of the run's name, between its time and four random characters.
        environment: where it runs, for run.json.
        settings: what was asked for, for run.json.
        cases: the plan.
        interleaved: the other run, if two take turns.
        invocation: how the run was started, to go on with it; its ``folder`` is an absolute path.
        named: its name and note, as far as it was given them; see :mod:`mpscale.core.naming`.
        shard: which part of a plan it is, if it is one.

    Raises:
        OSError: the folder cannot be written. Nothing has been measured then.
    """

    def __init__(
        self,
        results: Path,
        device_slug: str,
        environment: Mapping[str, Any],
        settings: Mapping[str, Any],
        cases: list[Case],
        interleaved: Mapping[str, Any] | None = None,
        invocation: Mapping[str, Any] | None = None,
        named: Mapping[str, str] | None = None,
        shard: Mapping[str, Any] | None = None,
    ) -> None:
        started, path = new_folder(results / "runs", device_slug)
        name = path.name
        info: dict[str, Any] = {
            "run": name,
            **(named or {}),
            "schema_version": SCHEMA_VERSION,
            "method_version": METHOD_VERSION,
            "started": started.isoformat(timespec="microseconds"),
            "environment": dict(environment),
            "settings": dict(settings),
            "planned": [case.id for case in cases],
        }
        if invocation is not None:
            info["invocation"] = {**invocation, "folder": os.path.relpath(invocation["folder"], path)}
        if interleaved is not None:
            info["interleaved"] = dict(interleaved)
        if shard is not None:
            info["shard"] = dict(shard)
        self._begin(path, info, [_line("run_started", run=name)], {}, None)
        self._write_anew()

    @classmethod
    def reopen(
        cls, path: Path, info: dict[str, Any], records: Sequence[Record], noted: Mapping[str, Any], lock: RunLock
    ) -> Journal:
        """Open the journal of a run that was stopped, to go on in its folder.

        Nothing is written before the first case, except the lock. Then a last line that was cut off goes, lines before
        it stay as they are, and ``run_resumed`` follows.

        Args:
            path: the run's folder.
            info: its run.json.
            records: what the journal has; the last attempt of every case.
            noted: what the event says of the resumption; run.json has the same, under ``resumed``.
            lock: of the folder, which is held.

        Raises:
            OSError: the journal cannot be read.
        """
        whole, cut = whole_lines((path / "journal.jsonl").read_bytes())
        self = cls.__new__(cls)
        self._begin(path, info, [whole], {str(record["case_id"]): record for record in records}, lock)
        self._resumption = {"cut_bytes": cut, **noted}
        return self

    def _begin(
        self,
        path: Path,
        info: dict[str, Any],
        lines: list[bytes],
        records: dict[str, Record],
        lock: RunLock | None,
    ) -> None:
        self.name = path.name
        self.path = path
        """The run's folder. Only :meth:`finish` changes it."""
        self.troubles: list[str] = []
        """What went wrong with the run's files, without repetition."""
        self._info = info
        self._environment: dict[str, Any] = info["environment"]
        self._records, self._lines = records, lines
        self._lock = lock
        self._resumption: dict[str, Any] | None = None
        """What is to be noted before the next event; None if this run was not resumed, or has been noted."""
        self._file: IO[bytes] | None = None
        """Open for appending; None while it cannot be written."""
        self._size = 0
        self._has_info = False
        """Whether run.json has been written."""
        self._cases_due = 0.0
        """When cases.csv may be written again, on the monotonic clock; 0 if after every case."""

    def steps_path(self, case: Case) -> Path:
        """Where the case's log of steps goes."""
        return steps_path(self.path, case.id)

    def gpu_path(self, case: Case, attempt: int) -> Path:
        """Where the samples of the GPU go, one file per attempt."""
        return gpu_path(self.path, case.id, attempt)

    def add_environment(self, facts: Mapping[str, Any]) -> None:
        """Add to the environment what only a worker can find out."""
        self._environment.update(facts)
        with self._table_may_fail():
            self._write_info()

    def case_started(self, case: Case, attempt: int) -> None:
        """Note the start of a case. If the run is cut short, this shows which case was running."""
        identity = {key: value for key, value in case.identity().items() if key != "case_id"}
        self._append("case_started", case_id=case.id, attempt=attempt, case=identity)

    def case_finished(self, case: Case, record: Record, step_s: Sequence[float], phases: Mapping[str, float]) -> None:
        """Note the result of a case.

        Also write cases.csv, but less often if that takes long, because it is then a large file: a run that is killed
        may lack the last rows there. Its journal has them all.

        Args:
            case: the case.
            record: its row.
            step_s: step time of each timed block in seconds, from which the row's medians were made.
            phases: when each phase was reached, in seconds from the start of its process.
        """
        blocks = [float(f"{value:.6g}") for value in step_s]
        self._records[case.id] = record
        self._append("case_finished", case_id=case.id, record=record.to_json(), step_s=blocks, phases=dict(phases))
        if time.monotonic() >= self._cases_due:
            with self._table_may_fail():
                self._write_cases()

    def finish(self, exit_status: int, leave: bool = False) -> None:
        """Note the end of the run. Nothing but :meth:`free` may follow.

        Args:
            exit_status: that of the whole run.
            leave: note nothing, for a run that had ended and was opened again in vain.
        """
        if leave:
            return
        if self._cases_due:
            with self._table_may_fail():
                self._write_cases()
        self._append("run_finished", exit_status=exit_status, cases=len(self._records))
        if self._file is None or not self._has_info:
            self._close()
            with self._no_trouble_ends_the_run():
                self.path = Path(tempfile.mkdtemp(prefix="mpscale-")) / self.name
                self._write_anew()
                self.troubles.append(f"everything but steps and GPU samples is kept in {self.path}")
        if self._file is not None:
            self._file.close()
        for folder in (self.path, self.path / "steps", self.path / "gpu"):
            remove_leftovers(folder)

    def _append(self, event: str, **fields: Any) -> None:
        if self._resumption is not None:
            noted, self._resumption = self._resumption, None
            self._go_on(noted)
        line = _line(event, **fields)
        self._lines.append(line)
        with self._no_trouble_ends_the_run():
            if self._file is not None and self._is_in_place(self._file):
                self._write(self._file, line)
                if not self._has_info:
                    with self._table_may_fail():
                        self._write_info()
                return
            known = self._file is None
            self._close()
            self._write_anew()
            self._say(
                f"{self.path} can be written again, and its journal is whole"
                if known
                else f"{self.path} was deleted, moved or changed while the run went on: journal and tables were "
                "written anew; steps and GPU samples of earlier cases were lost with it"
            )

    def _go_on(self, noted: Mapping[str, Any]) -> None:
        """Cut off what is no whole line, and note that the run goes on."""
        line = _line("run_resumed", **noted)
        earlier = self._info.get("resumed")
        self._info["resumed"] = [
            *(earlier if isinstance(earlier, list) else []),
            {"time": json.loads(line)["time"], **noted},
        ]
        (whole,) = self._lines
        self._lines.append(line)
        with self._no_trouble_ends_the_run():
            self._file = open_to_append(self.path / "journal.jsonl")
            there = os.fstat(self._file.fileno()).st_size
            if there > len(whole):
                self._file.truncate(len(whole))
            self._size = min(there, len(whole))
            self._write(self._file, whole[self._size :] + line)
        with self._table_may_fail():
            self._write_info()

    def _is_in_place(self, file: IO[bytes]) -> bool:
        """Whether the file at the journal's path is the one that was written, and run.json, if it was, is beside it."""
        try:
            there, here = (self.path / "journal.jsonl").stat(), os.fstat(file.fileno())
        except OSError:
            return False
        same = (there.st_dev, there.st_ino, there.st_size) == (here.st_dev, here.st_ino, self._size)
        return same and (not self._has_info or (self.path / "run.json").is_file())

    def _write(self, file: IO[bytes], data: bytes) -> None:
        left = memoryview(data)
        with stopping.whole():
            while left:
                # A write may be partial if the disk fills up; the next one then fails.
                left = left[file.write(left) :]
            os.fsync(file.fileno())
            # Within the block: a signal that waited is raised at its end.
            self._size += len(data)

    def _write_anew(self) -> None:
        """Write everything that is in memory: the journal, which has all results, and then what can be made of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None or not self._lock.is_in_place:
            self.free()
            with contextlib.suppress(OSError, RunIsHeld):
                self._lock = RunLock.take(self.path)
        journal = self.path / "journal.jsonl"
        write(journal, b"".join(self._lines))
        self._size = sum(map(len, self._lines))
        self._file = open_to_append(journal)
        with self._table_may_fail():
            self._write_info()
        if self._records:
            with self._table_may_fail():
                self._write_cases()

    def _write_cases(self) -> None:
        start = time.monotonic()
        write_cases(self.path, to_csv(self._records.values()))
        end = time.monotonic()
        took = end - start
        self._cases_due = end + _PAUSE * took if took > _QUICK_S else 0.0

    def _write_info(self) -> None:
        self._has_info = False
        write(self.path / "run.json", json.dumps(self._info, indent=2) + "\n")
        self._has_info = True

    @contextlib.contextmanager
    def _no_trouble_ends_the_run(self) -> Iterator[None]:
        """Note a failure to write and go on: results are in memory, and those to come are worth more than a file."""
        try:
            yield
        except OSError as error:
            self._close()
            self._say_unwritten(error)

    @contextlib.contextmanager
    def _table_may_fail(self) -> Iterator[None]:
        """Note a failure to write a file beside the journal and go on: the journal has what was to be in it."""
        try:
            yield
        except OSError as error:
            self._say_unwritten(error)

    def _say_unwritten(self, error: OSError) -> None:
        # A write that fails does not say which file it was for; that of the journal is the only one that gets here so.
        name = os.fsdecode(error.filename or self.path / "journal.jsonl")
        self._say(f"{name} cannot be written: {why(error)}; the run goes on, and writes it as soon as that is possible")

    def free(self) -> None:
        """Let other processes write the run's folder."""
        if self._lock is not None:
            self._lock.free()
        self._lock = None

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def _say(self, trouble: str) -> None:
        if trouble not in self.troubles:
            self.troubles.append(trouble)


def whole_lines(data: bytes) -> tuple[bytes, int]:
    """Return the lines of a journal that are whole, and how many bytes of another one follow.

    A last line that lacks only its end is whole, and gets it.
    """
    *_, rest = data.rpartition(b"\n")
    if not rest:
        return data, 0
    try:
        json.loads(rest.decode())
    except (ValueError, RecursionError):
        return data[: -len(rest)], len(rest)
    return data + b"\n", 0


def _line(event: str, **fields: Any) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"event": event, "time": now, **fields}).encode() + b"\n"


_LONGEST = 220
"""Most bytes of a name, so that there is room for what comes behind it: file systems take 255."""


def _file_name(case_id: str) -> str:
    """Make a name of an id, which may come from a stranger's journal and must not lead out of the folder.

    Names on the disk are UTF-8, even if Python takes the file system for ASCII.
    """
    name = case_id.encode("utf-8", "surrogatepass")
    if 0 < len(name) <= _LONGEST and not re.search(r"[/\0\ud800-\udfff]|^\.", case_id):
        return os.fsdecode(name)
    plain = re.sub(r"[^A-Za-z0-9_+-]+", "-", case_id)[:60]
    return f"{plain}-{hashlib.sha256(name).hexdigest()[:16]}"
