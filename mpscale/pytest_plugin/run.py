"""The run of a pytest session while it goes on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mpscale.harness.run import BenchmarkRun
from mpscale.harness.supervisor import Options
from mpscale.telemetry.host import busy_words
from mpscale.terminal import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from mpscale.core.case import Case
    from mpscale.harness.supervisor import Outcome
    from mpscale.pytest_plugin.plan import Plan
    from mpscale.pytest_plugin.session import Output


class LiveRun:
    """Runs cases, and shows how far it has come.

    Args:
        plan: the chosen cases, and where they run.
        how: options of the run.
        output: the terminal.
    """

    def __init__(self, plan: Plan, how: Options, output: Output) -> None:
        self._output = output
        self.troubles: list[str] = []
        """Why the session is no success, even if its tests have passed."""
        self._progress = Progress(len(plan.chosen), output.live_line(), time.monotonic)
        self._announce(plan.chosen)
        self._run = BenchmarkRun(plan.chosen, plan.device, plan.driver, how, self._progress.event)
        # A GPU that the driver's library does not find is measured as a CPU; say so.
        no_gpu = f"; no GPU: {plan.driver.reason}" if plan.driver.reason and not plan.on_gpu else ""
        output.say(f"on {plan.device.name} ({plan.device.kind.upper()}){no_gpu}")
        busy = busy_words()
        if busy:
            output.say(busy)
        for name, where in plan.own_workloads.items():
            output.say(f"{name} is in {where}")

    @property
    def path(self) -> Path | None:
        """The run's folder; None before the first case."""
        return self._run.path

    def measured(self, case: Case) -> Outcome | None:
        """Return the outcome of a case that has already run and did not fail."""
        return self._run.measured(case)

    def run(self, case: Case) -> Outcome:
        """Run a case."""
        self._progress.started(case)
        outcome = self._run.run(case)
        self._progress.finished(case, outcome.record)
        self._note_troubles()
        return outcome

    def run_again(self, cases: list[Case]) -> None:
        """Run further cases for rows that look slower than in the baseline."""
        self._output.say(f"slower than the baseline, measured again in {len(cases)} further processes")
        self._announce(cases, further=True)
        for case in cases:
            self.run(case)

    def finish(self, exit_status: int) -> None:
        """End the processes and close the journal."""
        self._run.finish(exit_status)
        self._note_troubles()

    def _announce(self, cases: Iterable[Case], *, further: bool = False) -> None:
        for workload, number in Counter(case.workload for case in cases).items():
            self._progress.plan(workload, number, further=further)

    def _note_troubles(self) -> None:
        """Say at once what went wrong with the run's files. It is said again at the end of the session."""
        for trouble in self._run.troubles:
            if trouble not in self.troubles:
                self.troubles.append(trouble)
                self._output.say(trouble)
