"""The folder of a run, as it is written during the run; :mod:`mpscale.core.journal` reads its journal."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mpscale.core import stopping
from mpscale.core.case import Case
from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.record import Record, to_csv

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
    _replace(folder / "cases.csv", content.encode())


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
    ) -> None:
        started, self.path = new_folder(results / "runs", device_slug)
        """The run's folder. Only :meth:`finish` changes it."""
        self.name = self.path.name
        self.troubles: list[str] = []
        """What went wrong with the run's files, without repetition."""
        self._environment = dict(environment)
        self._info: dict[str, Any] = {
            "run": self.name,
            "schema_version": SCHEMA_VERSION,
            "method_version": METHOD_VERSION,
            "started": started.isoformat(timespec="microseconds"),
            "environment": self._environment,
            "settings": dict(settings),
            "planned": [case.id for case in cases],
        }
        if interleaved is not None:
            self._info["interleaved"] = dict(interleaved)
        self._records: dict[str, Record] = {}
        self._lines: list[bytes] = [_line("run_started", run=self.name)]
        self._file: IO[bytes] | None = None
        """Open for appending; None while it cannot be written."""
        self._size = 0
        self._cases_due = 0.0
        """When cases.csv may be written again, on the monotonic clock; 0 if after every case."""
        self._write_anew()

    def steps_path(self, case: Case) -> Path:
        """Where the case's log of steps goes."""
        return steps_path(self.path, case.id)

    def gpu_path(self, case: Case, attempt: int) -> Path:
        """Where the samples of the GPU go, one file per attempt."""
        return gpu_path(self.path, case.id, attempt)

    def add_environment(self, facts: Mapping[str, Any]) -> None:
        """Add to the environment what only a worker can find out."""
        self._environment.update(facts)
        with self._no_trouble_ends_the_run():
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
            with self._no_trouble_ends_the_run():
                self._write_cases()

    def finish(self, exit_status: int) -> None:
        """Note the end of the run. Nothing may be written afterwards."""
        if self._cases_due:
            with self._no_trouble_ends_the_run():
                self._write_cases()
        self._append("run_finished", exit_status=exit_status, cases=len(self._records))
        if self._file is None:
            self.path = Path(tempfile.mkdtemp(prefix="mpscale-")) / self.name
            self.troubles.append(f"everything but steps and GPU samples is kept in {self.path}")
            self._write_anew()
        if self._file is not None:
            self._file.close()

    def _append(self, event: str, **fields: Any) -> None:
        line = _line(event, **fields)
        self._lines.append(line)
        with self._no_trouble_ends_the_run():
            if self._file is not None and self._is_in_place(self._file):
                self._write(self._file, line)
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

    def _is_in_place(self, file: IO[bytes]) -> bool:
        """Whether the file at the journal's path is the one that was written, and run.json is beside it."""
        try:
            there, here = (self.path / "journal.jsonl").stat(), os.fstat(file.fileno())
        except OSError:
            return False
        same = (there.st_dev, there.st_ino, there.st_size) == (here.st_dev, here.st_ino, self._size)
        return same and (self.path / "run.json").is_file()

    def _write(self, file: IO[bytes], data: bytes) -> None:
        left = memoryview(data)
        with stopping.whole():
            while left:
                # A write may be partial if the disk fills up; the next one then fails.
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        self._size += len(data)

    def _write_anew(self) -> None:
        """Write everything that is in memory."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_info()
        if self._records:
            self._write_cases()
        journal = self.path / "journal.jsonl"
        _replace(journal, b"".join(self._lines))
        self._size = sum(map(len, self._lines))
        self._file = journal.open("ab", buffering=0)

    def _write_cases(self) -> None:
        start = time.monotonic()
        write_cases(self.path, to_csv(self._records.values()))
        end = time.monotonic()
        took = end - start
        self._cases_due = end + _PAUSE * took if took > _QUICK_S else 0.0

    def _write_info(self) -> None:
        _replace(self.path / "run.json", (json.dumps(self._info, indent=2) + "\n").encode())

    @contextlib.contextmanager
    def _no_trouble_ends_the_run(self) -> Iterator[None]:
        """Note a failure to write and go on: results are in memory, and those to come are worth more than a file."""
        try:
            yield
        except OSError as error:
            self._close()
            self._say(
                f"{error.filename or self.path} cannot be written: {error.strerror or error}; the run goes on, and "
                "writes it as soon as that is possible"
            )

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None

    def _say(self, trouble: str) -> None:
        if trouble not in self.troubles:
            self.troubles.append(trouble)


def _line(event: str, **fields: Any) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"event": event, "time": now, **fields}).encode() + b"\n"


def _file_name(case_id: str) -> str:
    """Names on the disk are UTF-8, even if Python takes the file system for ASCII."""
    return os.fsdecode(case_id.encode("utf-8"))


def _replace(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        # A full disk needs the space.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
