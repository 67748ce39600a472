"""The folder of one run. Its journal is appended to; everything else can be made from it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mpscale.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.harness.case import Case
from mpscale.paths import file_name
from mpscale.records import Record, to_csv


class Journal:
    """Writes ``<results>/runs/<run>/``.

    All lines are kept in memory as well. If the folder or its journal is deleted, moved or changed while the run goes
    on, both are written anew. If they cannot be written, the run goes on, every further line tries again, and at the
    end a folder for temporary files takes everything. :attr:`troubles` says so each time.

    Args:
        results: the results folder; made where it does not exist.
        device_slug: goes into the run's name, between its time and four random characters.
        environment: where it runs, for run.json.
        settings: what was asked for, for run.json.
        cases: the plan.
        interleaved: with which other run this one takes turns; None where it is alone.

    Raises:
        OSError: the folder cannot be written, before anything was measured.
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
        started = datetime.now(UTC)
        self.name = f"{started:%Y%m%dT%H%M%SZ}-{device_slug}-{secrets.token_hex(2)}"
        self.path = results / "runs" / self.name
        """The run's folder. Only :meth:`finish` changes it."""
        self.troubles: list[str] = []
        """What went wrong with the run's files, each once."""
        self.path.mkdir(parents=True)
        self._environment = dict(environment)
        self._info: dict[str, Any] = {
            "run": self.name,
            "schema_version": SCHEMA_VERSION,
            "method_version": METHOD_VERSION,
            "started": started.isoformat(timespec="seconds"),
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
        self._write_anew()

    def steps_path(self, case: Case) -> Path:
        """Where the case's log of steps goes."""
        return self.path / "steps" / f"{file_name(case.id)}.csv.gz"

    def gpu_path(self, case: Case, attempt: int) -> Path:
        """Where the samples of the GPU go, one file an attempt."""
        return self.path / "gpu" / f"{file_name(case.id)}--a{attempt}.csv.gz"

    def add_environment(self, facts: Mapping[str, Any]) -> None:
        """Adds to the environment what only a worker could find out."""
        self._environment.update(facts)
        with self._no_trouble_ends_the_run():
            self._write_info()

    def case_started(self, case: Case, attempt: int) -> None:
        """Notes the start of a case, so that a run that is cut short shows which one it was at."""
        identity = {key: value for key, value in case.identity().items() if key != "case_id"}
        self._append("case_started", case_id=case.id, attempt=attempt, case=identity)

    def case_finished(self, case: Case, record: Record, step_s: Sequence[float], phases: Mapping[str, float]) -> None:
        """Notes the result of a case, and brings cases.csv up to date: it is there even if the run dies next.

        Args:
            case: the case.
            record: its row.
            step_s: step time of each timed block, in seconds: what the row's medians were made of.
            phases: when each phase was reached, in seconds from the start of its process.
        """
        blocks = [float(f"{value:.6g}") for value in step_s]
        self._records[case.id] = record
        self._append("case_finished", case_id=case.id, record=record.to_json(), step_s=blocks, phases=dict(phases))
        with self._no_trouble_ends_the_run():
            self._write_cases()

    def finish(self, exit_status: int) -> None:
        """Notes the end of the run. Nothing may be written afterwards."""
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
        """Whether what is at the journal's path is what was written there, and run.json is beside it."""
        try:
            there, here = (self.path / "journal.jsonl").stat(), os.fstat(file.fileno())
        except OSError:
            return False
        same = (there.st_dev, there.st_ino, there.st_size) == (here.st_dev, here.st_ino, self._size)
        return same and (self.path / "run.json").is_file()

    def _write(self, file: IO[bytes], data: bytes) -> None:
        left = memoryview(data)
        while left:
            # Less than all is written before a disk is full, which the next call says.
            left = left[file.write(left) :]
        os.fsync(file.fileno())
        self._size += len(data)

    def _write_anew(self) -> None:
        """Writes everything that is in memory."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_info()
        if self._records:
            self._write_cases()
        journal = self.path / "journal.jsonl"
        _replace(journal, b"".join(self._lines))
        self._size = sum(map(len, self._lines))
        self._file = journal.open("ab", buffering=0)

    def _write_info(self) -> None:
        _replace(self.path / "run.json", (json.dumps(self._info, indent=2) + "\n").encode())

    def _write_cases(self) -> None:
        _replace(self.path / "cases.csv", to_csv(self._records.values()).encode())

    @contextlib.contextmanager
    def _no_trouble_ends_the_run(self) -> Iterator[None]:
        """What has been measured is in memory, and what is still to be measured is worth more than a file."""
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
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps({"event": event, "time": time, **fields}).encode() + b"\n"


def _replace(path: Path, content: bytes) -> None:
    """Writes a whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        # A disk that is full needs it.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
