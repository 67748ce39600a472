"""One run: the supervisor runs its cases, and the journal records them.

A finished case is compared with the other modes of its seed (:class:`SameStart`), and its empty columns get their
reasons (:func:`explain`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from mpscale.core.case import Case
from mpscale.core.cause import Cause
from mpscale.core.columns import FAILED, MEASURED
from mpscale.core.device import Device
from mpscale.core.files.errors import in_words
from mpscale.core.processes import stopping
from mpscale.core.processes.events import Again, Noted
from mpscale.core.record import Record
from mpscale.core.run_folder import Journal
from mpscale.harness.empty_columns import explain
from mpscale.harness.resume import Resumed, with_allocator
from mpscale.harness.same_start import SameStart
from mpscale.harness.supervisor import Listener, Options, Outcome, Supervisor
from mpscale.harness.without_xla import SLOW_FLOAT16, WithoutXla, case_of, is_outdated, is_slow, outdated, refused
from mpscale.telemetry.client import Driver
from mpscale.telemetry.host import environment, run_slug

_NOT_WITHIN_A_RUN = (Cause.STOPPED, Cause.NO_END, Cause.UNREADABLE, Cause.GPU_LOST, Cause.GPU_STATE)
"""Transient causes that have other remedies: a run that goes on later, or a retry after the GPU has cooled down."""


def worth_retrying(record: Record) -> bool:
    """Whether a case failed for a cause on this machine that may be gone at once, so that it is worth a retry."""
    return record.cause is not None and record.cause.transient and record.cause not in _NOT_WITHIN_A_RUN


class BenchmarkRun:
    """Makes the run's folder and first process only when the first case runs, so a run without cases leaves nothing.

    Args:
        cases: the plan, for the record; :meth:`run` runs cases one by one.
        device: where they run.
        driver: gives access to the GPU's driver.
        options: how they run.
        listener: called at each phase and with progress.
        resumed: the run that goes on; None for a new one.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        device: Device,
        driver: Driver,
        options: Options,
        listener: Listener,
        resumed: Resumed | None = None,
    ) -> None:
        self._cases, self._device, self._driver = list(cases), device, driver
        self._options, self._listener = options, listener
        self._journal: Journal | None = None
        self._forget: Callable[[], None] | None = None
        """Takes back what is to be done with the journal before a second signal ends the process."""
        self._supervisor: Supervisor | None = None
        self._same_start = SameStart()
        self._outcomes: dict[str, Outcome] = {}
        self._not_kept: list[str] = []
        self._settled: frozenset[str] = frozenset()
        """Cases of a resumed run that are not run again."""
        self._runtime_known = self._not_forked_noted = False
        self._started = 0
        self._ended_before = False
        """Whether the run had ended, so that it stays as it is if no further case runs."""
        self._gpu_lost_in: str | None = None
        known = {} if resumed is None else resumed.xla_refused
        self._without_xla = WithoutXla(options.jit_fallback, options.interleaved is not None, known)
        self._outdated: list[Case] = []
        if resumed is not None:
            self._go_on(resumed)

    def _go_on(self, resumed: Resumed) -> None:
        self._hold(resumed.journal)
        self._outcomes = dict(resumed.outcomes)
        self._settled, self._started, self._ended_before = resumed.settled, resumed.started, resumed.finished
        settled = [self._outcomes[case_id].record for case_id in sorted(self._settled)]
        self._options = with_allocator(self._options, settled)
        for record in sorted(settled, key=lambda record: record["order"] or 0):
            self._same_start.take(record)
        self._runtime_known = any(self._outcomes[case_id].record["status"] in MEASURED for case_id in self._settled)

    def _hold(self, journal: Journal) -> None:
        """Write this journal, which is locked."""
        self._journal = journal
        # The file of the lock names this host, and folders of runs get published.
        self._forget = stopping.before_ending_at_once(journal.free)

    @property
    def path(self) -> Path | None:
        """The run's folder, None before the first case."""
        return None if self._journal is None else self._journal.path

    @property
    def troubles(self) -> list[str]:
        """Problems with the run's files so far, each once. A run with any of them fails."""
        return [*self._not_kept, *([] if self._journal is None else self._journal.troubles)]

    def measured(self, case: Case) -> Outcome | None:
        """The outcome of a case that has already run and did not fail, or that a resumed run does not run again."""
        outcome = self._outcomes.get(case.id)
        if case.id in self._settled or outcome is None:
            return outcome
        return None if outcome.record["status"] in FAILED else outcome

    def take_outdated(self) -> list[Case]:
        """The cases that were measured with XLA and must run again, since their workload goes on without it.

        Until then they are ``invalid``, for a cause that may pass. Each is returned once.
        """
        found, self._outdated = self._outdated, []
        return sorted(found, key=lambda case: case.order)

    def run(self, case: Case) -> Outcome:
        """Run one case and record it. A case that has run before gets another attempt.

        So does one that failed for a cause that may pass, as often as the options say: the state of the GPU, after a
        pause, or another transient cause. One that XLA refuses runs again without it, if the options say so, and then
        :meth:`take_outdated` has cases. Every attempt is in the journal, and the last one has the reasons of the
        earlier ones.
        """
        cooled = retried = 0
        failures: list[str] = []
        if self._without_xla.what(case) is not None:
            self._set_aside(case)
        case, earlier = self._without_xla.applied_to(case), self._outcomes.get(case.id)
        if earlier is not None and earlier.record.cause is Cause.OTHER_COMPILER:
            failures.append(_told(earlier.record))
        while True:
            with stopping.held():
                outcome = self._attempt(case, failures)
            reason = str(outcome.record["status_reason"])
            match outcome.again:
                case "cooled" if cooled < self._options.gpu_retries:
                    cooled += 1
                    self._listener(case, Again(f"invalid, {reason}"))
                    self._open()[1].cool_down(self._options.cool_down_s)
                case "allocator":
                    now = self._open()[1].allocator
                    text = f"TensorFlow failed with cuda_malloc_async twice ({reason}), and is tried with {now}"
                    self._listener(case, Again(text))
                case "touched":
                    self._listener(case, Again(f"failed on touching the GPU ({reason})"))
                case None if refused(case, outcome.record) and self._without_xla.what(case) is not None:
                    self._go_on_without_xla(case, outcome.record)
                    case = self._without_xla.applied_to(case)
                case None if worth_retrying(outcome.record) and retried < self._options.retries:
                    retried += 1
                    self._listener(case, Again(f"{outcome.record['status']}, {reason}"))
                case _:
                    return outcome
            failures.append(_told(outcome.record))

    def finish(self, exit_status: int, free: bool = True) -> None:
        """End the processes and close the journal.

        Args:
            exit_status: that of the whole run, 0 if all went well.
            free: let other processes write the run's folder; else :meth:`free` has to.
        """
        try:
            # First: whoever has sent SIGTERM may soon send SIGKILL, and a process may take its time to end.
            if self._journal is not None:
                self._journal.finish(exit_status, leave=self._ended_before)
        finally:
            if self._supervisor is not None:
                self._supervisor.close()
            self._supervisor = None
            if free:
                self.free()

    def free(self) -> None:
        """Let other processes write the run's folder."""
        if self._journal is not None:
            self._journal.free()
        if self._forget is not None:
            self._forget()

    def _go_on_without_xla(self, case: Case, record: Record) -> None:
        """Say that the workload of a case goes on without XLA, and set aside what was measured with it."""
        self._listener(case, Again(f"XLA cannot compile {record['xla_refused']}"))
        modes = {each.mode for each in self._cases if each.workload == case.workload}
        slow = f"; {SLOW_FLOAT16}" if is_slow(modes, self._device.kind) else ""
        self._listener(case, Noted(f"{case.workload} goes on without XLA in all modes{slow}"))
        self._same_start.forget(case.group)
        self._set_aside(case)

    def _set_aside(self, case: Case) -> None:
        """Make the cases of a workload that were measured with XLA ``invalid``: its rows must not mix.

        Before the first of them runs again, so that whatever stops the run leaves no mixture.
        """
        what = self._without_xla.what(case)
        assert what is not None and self._journal is not None
        for case_id, outcome in list(self._outcomes.items()):
            if is_outdated(outcome.record, case.workload):
                again = case_of(outcome.record, case.settings)
                record = outdated(outcome.record, what)
                self._outcomes[case_id] = dataclasses.replace(outcome, record=record)
                self._settled -= {case_id}
                self._same_start.forget(again.group)
                self._journal.case_finished(again, record, outcome.step_s, outcome.phases)
                if case_id != case.id:
                    self._outdated.append(again)

    def _attempt(self, case: Case, failures: Sequence[str] = ()) -> Outcome:
        """Run a case once. ``failures`` says how earlier attempts of this run of it failed."""
        journal, supervisor = self._open()
        earlier = self._outcomes.get(case.id)
        attempt = 1 if earlier is None else (earlier.record["attempts"] or 0) + 1
        # Its place among the cases that ran, which differs from the plan if a test was left out or run again.
        case = dataclasses.replace(case, order=self._started)
        self._started += 1
        self._ended_before = False
        journal.case_started(case, attempt)
        outcome = Outcome(Record({**case.identity(), "xla_refused": self._without_xla.what(case)}))
        for failure in failures:
            outcome.record.note(failure)
        if self._gpu_lost_in is not None:
            reason = f"not started: the GPU was lost in {self._gpu_lost_in}"
            supervisor.describe(case, outcome.record, attempt)
            outcome.record.end("error", reason, Cause.GPU_LOST)
            self._finish_case(journal, case, outcome)
            return outcome
        steps_path = journal.steps_path(case) if case.trains else None
        gpu_path = journal.gpu_path(case, attempt) if self._device.kind == "gpu" else None
        try:
            supervisor.run(case, steps_path, gpu_path, outcome, attempt)
        except OSError as error:
            # A file or folder of the session's own. The next case may do without it, or find it again.
            outcome.record.end("error", in_words(error), Cause.FILE_SYSTEM)
        except Exception as error:
            outcome.record.end("error", f"{type(error).__name__}: {error}", Cause.EXCEPTION)
            self._finish_case(journal, case, outcome)
            raise
        except BaseException as error:
            reason = f"stopped by {stopping.asked() or type(error).__name__}"
            outcome.record.end("interrupted", reason, Cause.STOPPED)
            self._finish_case(journal, case, outcome)
            raise
        if supervisor.why_not_forked is not None and not self._not_forked_noted:
            journal.add_environment({"why_not_forked": supervisor.why_not_forked.to_json()})
            self._not_forked_noted = True
        if outcome.record.cause is Cause.GPU_LOST:
            self._gpu_lost_in = case.id
        if difference := self._same_start.difference(case, outcome.record):
            outcome.again = None
            known = outcome.record["status_reason"] if outcome.record["status"] == "invalid" else None
            reason = f"{known}; {difference}" if known else difference
            outcome.record.end("invalid", reason, Cause.OTHER_TRAINING)
        self._finish_case(journal, case, outcome)
        if outcome.runtime and not self._runtime_known:
            journal.add_environment({"runtime": outcome.runtime})
            self._runtime_known = True
        return outcome

    def _finish_case(self, journal: Journal, case: Case, outcome: Outcome) -> None:
        # Checked here and not when the run is read, so that a value that no reader accepts is reported with its case.
        if misfits := outcome.record.drop_misfits():
            outcome.record.update(case.identity())
            outcome.record.invalidate("; ".join(misfits), Cause.BAD_RECORD)
        if refused(case, outcome.record):
            others = (other.record for case_id, other in self._outcomes.items() if case_id != case.id)
            self._without_xla.begin(case, outcome.record, others)
        explain(outcome.record, case)
        self._outcomes[case.id] = outcome
        self._not_kept += [f"{case.id}: {text}" for text in outcome.not_kept]
        journal.case_finished(case, outcome.record, outcome.step_s, outcome.phases)

    def _open(self) -> tuple[Journal, Supervisor]:
        if self._journal is None:
            journal = Journal(
                self._options.results,
                run_slug(self._device),
                environment(self._device, self._driver, self._options.project),
                self._options.asked,
                self._cases,
                self._options.interleaved,
                self._options.invocation,
                self._options.named,
                self._options.shard,
            )
            self._hold(journal)
        assert self._journal is not None
        if self._supervisor is None:
            self._supervisor = Supervisor(self._device, self._driver, self._options, self._listener)
        return self._journal, self._supervisor


def _told(record: Record) -> str:
    """How an attempt failed, for the attempts after it."""
    cause = f" ({record['cause']})" if record["cause"] else ""
    return f"attempt {record['attempts']} was {record['status']}{cause}: {record['status_reason']}"
