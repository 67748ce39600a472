"""What a worker tells the session, from its start to its end, as a row."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mpscale.core.case import Case
from mpscale.core.cause import Cause
from mpscale.core.columns import FAILED
from mpscale.core.processes import events, wire
from mpscale.core.processes.events import Looked, Phase, PhaseReached, StepsDone
from mpscale.core.processes.process import Process, describe_exit
from mpscale.core.reason import Code, Reason
from mpscale.core.variables import without_secrets
from mpscale.harness.peers import Judged
from mpscale.telemetry.gpu_memory import AllocatorFacts
from mpscale.telemetry.watch import WorkerFacts

if TYPE_CHECKING:
    from mpscale.harness.supervisor import Outcome

OWN_SIGNALS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
"""Signals of a program that fails by itself. Others come from people, the kernel's out-of-memory killer or a limit."""
_SIGNALS_OF_LIMITS = (signal.SIGXCPU, signal.SIGXFSZ)
_REASON, _BEGINNING = 500, 120
"""Characters of a reason, and how many of them are its beginning."""
GRACE_S = 15.0
"""How long a worker may take to end after its last message."""


class Conversation:
    """Records in ``outcome`` what a worker reports. ``start`` is when it was started, by the monotonic clock."""

    def __init__(self, worker: Process, case: Case, outcome: Outcome, start: float, scratch: Path) -> None:
        self.worker, self.case, self._outcome, self._start = worker, case, outcome, start
        self.scratch = scratch
        self._phase: Phase | Literal["start"] = "start"
        self._energy: events.EnergySteps | None = None
        self.energy_off = _energy_off(case)
        self.signal: int | None = None
        """The signal that ended the worker before its last message; None if none did."""

    def events(self, timeout_s: float) -> Iterator[PhaseReached | StepsDone | Looked]:
        """Yield phases, progress and looks until the worker has ended; afterwards the record has its status."""
        deadline = self._start + timeout_s
        try:
            while True:
                event = events.event_of(self.worker.receive(deadline - time.monotonic()), events.WORKER_EVENTS)
                match event:
                    case events.Values(values):
                        self._outcome.record.update(values)
                    case events.Missed(columns, why):
                        self._outcome.record.miss(columns, why)
                    case events.EnergySteps():
                        self._energy = event
                    case events.Blocks(step_s):
                        self._outcome.step_s = step_s
                    case PhaseReached(phase):
                        self._phase = phase
                        self._outcome.phases[phase.value] = round(time.monotonic() - self._start, 4)
                        yield event
                    case StepsDone() | Looked():
                        yield event
                    case events.NotKept(what, why):
                        self._outcome.note_not_kept(what, why)
                    case events.Remarked(text):
                        self._outcome.record.note(one_line(text))
                    case events.Finished(status, reason, runtime):
                        # What was measured is valid, even if the process then fails on its way out.
                        self._outcome.runtime = runtime
                        return self._end(status, reason, Cause.OTHER_PRECISION if status in FAILED else None)
                    case events.Failed(kind, message, cause):
                        status = "oom" if cause is Cause.OUT_OF_MEMORY else "error"
                        return self._end(status, one_line(f"{self.worker.who}{kind}: {message}"), cause)
        except TimeoutError:
            self._end("timeout", f"not finished after {timeout_s:g} s, killed {self._where()}", Cause.TIMEOUT)
        except Judged as other:
            self._end(other.status, one_line(f"{self.worker.who}{other.reason}"), other.cause)
        except wire.Garbled:
            reason = f"something other than mpscale wrote to the worker's connection {self._where()}"
            self._end("error", f"{self.worker.who}{reason}", Cause.GARBLED)
        except EOFError:
            self._end_silently(deadline)

    def facts(self) -> WorkerFacts:
        """What the columns of the GPU need from the worker."""
        record = self._outcome.record
        peaks = record["gpu_memory_allocator_peak_mib"], record["gpu_memory_allocator_synchronised_peak_mib"]
        allocator = AllocatorFacts(*peaks, record["gpu_allocator"])
        if self._energy is None:
            return WorkerFacts(allocator, energy_off=self.energy_off, replicas=self.case.settings.replicas)
        steps, overflows = self._energy.steps, self._energy.overflow_steps
        applied = None if overflows is None else steps - overflows
        return WorkerFacts(allocator, steps, applied, self.energy_off, self.case.settings.replicas)

    def _where(self) -> str:
        return f"in or after phase {str(self._phase)!r}"

    def _end(self, status: str, reason: str | None, cause: Cause | None) -> None:
        self._outcome.record.end(status, reason, cause)

    def _end_silently(self, deadline: float) -> None:
        """Record what became of a worker that neither finished nor reported an exception."""
        code, who = self.worker.wait(max(min(GRACE_S, deadline - time.monotonic()), 0.1)), self.worker.who
        if self.worker.abandoned is not None:
            self._end("crashed", f"{who}{self.worker.abandoned}, {self._where()}", Cause.NOT_STARTED)
        elif code is None:
            self._end("crashed", f"{who}closed its connection {self._where()} and did not end", Cause.EXITED)
        elif code >= 0:
            self._end("error", f"{who}{describe_exit(code)} {self._where()} and without a result", Cause.EXITED)
        else:
            self.signal = -code
            cause = Cause.FATAL_SIGNAL if -code in OWN_SIGNALS else Cause.KILLED
            cause = Cause.LIMIT if -code in _SIGNALS_OF_LIMITS else cause
            self._end("crashed", f"{who}{describe_exit(code)} {self._where()}", cause)


def _energy_off(case: Case) -> Reason | None:
    """Why a case measures no energy; None if it does."""
    if case.settings.timing_s == 0:
        return Reason(Code.NOT_ASKED_FOR, "timing was off")
    if case.settings.energy_s == 0:
        return Reason(Code.NOT_ASKED_FOR, "energy was off (--mp-energy 0, or the preset)")
    return None


def one_line(text: str) -> str:
    """Put a text on one line. Of a long one, keep the beginning and more of the end, where the error usually is."""
    # Escapes for colours, which some libraries put into messages, must not reach the user's terminal.
    text = without_secrets(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text), os.environ)
    line = "".join(c for c in " ".join(text.split()) if c.isprintable() or "\ud800" <= c <= "\udfff")
    return line if len(line) <= _REASON else f"{line[:_BEGINNING]} … {line[_BEGINNING - _REASON :]}"
