"""The folder of one run. Its journal is appended to and never rewritten; everything else can be made from it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mpscale.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.harness.case import Case
from mpscale.paths import file_name
from mpscale.records import Record, to_csv


class Journal:
    """Writes ``<results>/runs/<run>/``.

    Args:
        results: the results folder; made where it does not exist.
        device_slug: goes into the run's name, between its time and four random characters.
        environment: where it runs, for run.json.
        settings: what was asked for, for run.json.
        cases: the plan.
        interleaved: with which other run this one takes turns; None where it is alone.

    Raises:
        OSError: the folder cannot be written.
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
        self._write_info()
        self._file: IO[str] = (self.path / "journal.jsonl").open("a", encoding="utf-8")
        self._append("run_started", run=self.name)
        self._records: dict[str, Record] = {}

    def steps_path(self, case: Case) -> Path:
        """Where the case's log of steps goes."""
        return self.path / "steps" / f"{file_name(case.id)}.csv.gz"

    def gpu_path(self, case: Case, attempt: int) -> Path:
        """Where the samples of the GPU go, one file an attempt."""
        return self.path / "gpu" / f"{file_name(case.id)}--a{attempt}.csv.gz"

    def add_environment(self, facts: Mapping[str, Any]) -> None:
        """Adds to the environment what only a worker could find out."""
        self._environment.update(facts)
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
        self._append("case_finished", case_id=case.id, record=record.to_json(), step_s=blocks, phases=dict(phases))
        self._records[case.id] = record
        _replace(self.path / "cases.csv", to_csv(self._records.values()))

    def finish(self, exit_status: int) -> None:
        """Notes the end of the run. Nothing may be written afterwards."""
        self._append("run_finished", exit_status=exit_status, cases=len(self._records))
        self._file.close()

    def _append(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_info(self) -> None:
        _replace(self.path / "run.json", json.dumps(self._info, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    # What a dying process wrote need not be text; nothing of it may keep the other rows from being written.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)
