"""The run of a session: its cases, with their progress on the terminal."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpscale.pytest_plugin.output import Output
from mpscale.pytest_plugin.plan import Plan
from mpscale.pytest_plugin.so_far import SoFar
from mpscale.terminal.progress import Progress

if TYPE_CHECKING:
    from mpscale.core.case import Case
    from mpscale.harness.resume import Resumed
    from mpscale.harness.supervisor import Options, Outcome


class LiveRun:
    """Runs cases and shows their progress.

    Args:
        plan: the chosen cases, and where they run.
        how: options of the run.
        output: the terminal.
        resumed: the run that goes on; None for a new one.
    """

    def __init__(self, plan: Plan, how: Options, output: Output, resumed: Resumed | None = None) -> None:
        from mpscale.harness.run import BenchmarkRun
        from mpscale.report.lint import News
        from mpscale.telemetry.host import busy_words
        from mpscale.telemetry.presence import words

        self._output = output
        self.troubles: list[str] = []
        """Why the session fails, even if its tests have passed."""
        judge, left = SoFar(), plan.chosen
        if resumed is not None:
            left = [case for case in left if case.id not in resumed.settled]
            many = f"{len(left)} of {len(plan.chosen)} case{'' if len(plan.chosen) == 1 else 's'}"
            none = "nothing to run, every case has its result"
            if resumed.added:
                none = "rows are measured again for a gate, and all else has its result"
            todo = f"{many} to run" if left else none
            output.say(f"goes on with {resumed.journal.name}: {todo}")
            for note in resumed.notes:
                output.say(note)
            for case_id in resumed.settled:
                judge.know(resumed.outcomes[case_id].record)
        self._news = News()
        self._progress = Progress(output.live_line(), time.monotonic, judge)
        self._progress.plan(left)
        self._announced = {case.id for case in left}
        self._when_replaced: defaultdict[str, list[Callable[[Outcome], str | None]]] = defaultdict(list)
        self._run = BenchmarkRun(plan.chosen, plan.device, plan.driver, how, self._progress.event, resumed)
        # Without the driver's library, a machine with a GPU is measured as a CPU: explain that.
        no_gpu = f"; no GPU: {plan.driver.reason}" if plan.driver.reason and not plan.on_gpu else ""
        output.say(f"on {plan.device.name} ({plan.device.kind.upper()}){no_gpu}")
        if busy := busy_words():
            output.say(busy)
        if beside := words(plan.device, (how.interleaved or {}).get("id")):
            output.say(f"{beside}: rows that both disturb become invalid")
        for name, where in plan.own_workloads.items():
            output.say(f"{name} is in {where}")

    @property
    def path(self) -> Path | None:
        """The run's folder; None before the first case."""
        return self._run.path

    def measured(self, case: Case) -> Outcome | None:
        """Return the outcome of a case that has already run and did not fail."""
        return self._run.measured(case)

    def when_replaced(self, case: Case, act: Callable[[Outcome], str | None]) -> None:
        """Have ``act`` called if a case is measured again after its test; it returns what is wrong with it, if any."""
        self._when_replaced[case.id].append(act)

    def run(self, case: Case) -> Outcome:
        """Run a case, and after it those of its workload that have to be measured again without XLA."""
        outcome = self._measure(case)
        if again := self._run.take_outdated():
            many = f"{len(again)} case{'' if len(again) == 1 else 's'} of {case.workload}"
            self._output.say(f"{many} measured with XLA: measured again without it")
            self._progress.plan([each for each in again if each.id not in self._announced])
            for each in again:
                replaced = self._measure(each)
                self.troubles += filter(None, [act(replaced) for act in self._when_replaced[each.id]])
        return outcome

    def _measure(self, case: Case) -> Outcome:
        self._progress.started(case)
        try:
            outcome = self._run.run(case)
        except BaseException:  # Ctrl-C above all
            self._progress.stopped()
            raise
        self._progress.finished(case, outcome.record)
        self._announced.discard(case.id)
        if news := self._news.of(outcome.record):
            self._output.say(news)
        self._note_troubles()
        return outcome

    def run_again(self, cases: list[Case]) -> None:
        """Run further cases for rows that look slower than in the baseline, but not again those of a resumed run."""
        if not (cases := [case for case in cases if self._run.measured(case) is None]):
            return
        processes = f"{len(cases)} further process{'' if len(cases) == 1 else 'es'}"
        self._output.say(f"slower than the baseline, measured again in {processes}")
        self._progress.plan(cases)
        for case in cases:
            self.run(case)

    def finish(self, exit_status: int) -> None:
        """End the processes and close the journal."""
        self._run.finish(exit_status, free=False)
        self._note_troubles()

    def free(self) -> None:
        """Let other processes write the run's folder, once its reports are there."""
        self._run.free()

    def _note_troubles(self) -> None:
        """Report new problems with the run's files at once. They are repeated at the end of the session."""
        for trouble in self._run.troubles:
            if trouble not in self.troubles:
                self.troubles.append(trouble)
                self._output.say(trouble)
