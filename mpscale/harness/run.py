"""One run: its cases through the supervisor, into the journal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscale.harness.case import Case, StartMethod
from mpscale.harness.journal import Journal
from mpscale.harness.reasons import explain
from mpscale.harness.same_start import SameStart
from mpscale.harness.supervisor import Listener, Outcome, Supervisor
from mpscale.telemetry.device import Device
from mpscale.telemetry.fingerprint import environment, run_slug
from mpscale.telemetry.nvml import NoNvml, Nvml
from mpscale.telemetry.sampler import MemorySampler


@dataclass(frozen=True)
class Options:
    """How a run is made, as against what is in it.

    Args:
        results: the results folder.
        project: the folder whose git commit is recorded and in which workloads are looked for.
        start_method: how workers are started.
        timeout_s: seconds that a case may take.
        asked: what the user asked for, for run.json.
    """

    results: Path
    project: Path
    start_method: StartMethod
    timeout_s: float
    asked: dict[str, Any]


class BenchmarkRun:
    """Makes the run's folder and its first process when the first case is run, so that nothing is left of a run
    that had none.

    Args:
        cases: the plan, for the record; cases are run one by one by :meth:`run`.
        device: where they run.
        nvml: the GPU's driver library, or its stand-in.
        options: how.
        listener: told of phases and progress.
    """

    def __init__(
        self, cases: Sequence[Case], device: Device, nvml: Nvml | NoNvml, options: Options, listener: Listener
    ) -> None:
        self._cases, self._device, self._nvml = list(cases), device, nvml
        self._options, self._listener = options, listener
        self._journal: Journal | None = None
        self._supervisor: Supervisor | None = None
        self._same_start = SameStart()
        self._runtime_known = False

    @property
    def path(self) -> Path | None:
        """The run's folder, None before the first case."""
        return None if self._journal is None else self._journal.path

    def run(self, case: Case) -> Outcome:
        """Runs one case and writes it down."""
        journal, supervisor = self._open()
        journal.case_started(case, attempt=1)
        outcome = supervisor.run(case, journal.steps_path(case) if case.trains else None)
        difference = self._same_start.difference(case, outcome.record)
        if difference is not None:
            outcome.record.update({"status": "invalid", "status_reason": difference})
        explain(outcome.record, case)
        journal.case_finished(case, outcome.record)
        if outcome.runtime and not self._runtime_known:
            journal.add_environment({"runtime": outcome.runtime})
            self._runtime_known = True
        return outcome

    def finish(self) -> None:
        """Ends the processes and closes the journal."""
        if self._supervisor is not None:
            self._supervisor.close()
        if self._journal is not None:
            self._journal.finish()
        self._supervisor = None

    def _open(self) -> tuple[Journal, Supervisor]:
        if self._journal is None:
            self._journal = Journal(
                self._options.results,
                run_slug(self._device),
                environment(self._device, self._nvml, self._options.project),
                self._options.asked,
                self._cases,
            )
        if self._supervisor is None:
            self._supervisor = Supervisor(
                self._device,
                MemorySampler(self._nvml, self._device),
                self._options.start_method,
                self._options.timeout_s,
                os.environ,
                [str(self._options.project), *sys.path],
                self._listener,
            )
        return self._journal, self._supervisor
