"""What the terminal shows while a run goes on: a line for each finished case and, on a terminal, a live one below."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from mpscale.harness.case import Case
from mpscale.records import Record
from mpscale.telemetry.host_noise import BUSY_SHARE

_PHASES = {
    "idle": "starting",
    "context-ready": "building",
    "model-built": "compiling",
    "compiled": "training",
    "trained": "warming up",
    "warm": "warming up",
    "timing-start": "timing",
    "timing-end": "finishing",
    "energy-end": "finishing",
    "done": "finishing",
}


class Progress:
    """Turns events into text.

    Args:
        total: cases of the run.
        write: takes a piece of text, line ends included.
        live: whether the output is a terminal, where a line can be written over. Elsewhere a case has one line
            when it starts and one when it ends.
        clock: seconds, for the time left.
        columns: width of the terminal: a live line that wraps could not be written over.
    """

    def __init__(
        self, total: int, write: Callable[[str], None], live: bool, clock: Callable[[], float], columns: int = 80
    ) -> None:
        self._columns = columns
        self._total, self._write, self._live, self._clock = total, write, live, clock
        self._done = 0
        self._width = 0
        self._started = 0.0
        self._phase = ""
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._remaining: dict[str, int] = defaultdict(int)

    def plan(self, workload: str, cases: int, *, further: bool = False) -> None:
        """Says how many cases of a workload are to come; the time left is reckoned by workload.

        Args:
            workload: its name.
            cases: how many.
            further: they are not in the total that was given at first.
        """
        self._remaining[workload] += cases
        if further:
            self._total += cases

    def started(self, case: Case) -> None:
        """A case begins."""
        self._started = self._clock()
        self._phase = ""
        line = f"{self._head(case)}: starting{self._left()}"
        self._show(line) if self._live else self._write(line + "\n")

    def event(self, case: Case, event: str, fields: Mapping[str, Any]) -> None:
        """A phase, a number of steps, or a further attempt, as the supervisor's listener hears of it."""
        if event == "again":
            self._show("")
            self._write(f"{self._head(case)}: {fields['reason']}; run again\n")
            return
        if not self._live:
            return
        if event == "phase":
            self._phase = _PHASES.get(fields["phase"], fields["phase"])
            self._show(f"{self._head(case)}: {self._phase}{self._left()}")
        elif event == "progress":
            self._show(f"{self._head(case)}: {self._phase} {fields['done']}/{fields['total']}{self._left()}")

    def finished(self, case: Case, record: Record) -> None:
        """A case has ended."""
        # The case's own time where there is one: the first case also waits for TensorFlow to be imported.
        seconds = record["case_wall_time_s"] or self._clock() - self._started
        head = self._head(case)
        self._done += 1
        self._remaining[case.workload] -= 1
        self._seconds[case.workload].append(seconds)
        self._show("")
        self._write(f"{head}: {_result(record)} ({seconds:.1f} s{self._left()})\n")

    def _head(self, case: Case) -> str:
        number = f"{self._done + 1:>{len(str(self._total))}}/{self._total}"
        which = f"seed {case.seed}" if case.trains else f"repeat {case.repeat}"
        return f"[{number}] {case.workload} {case.mode} {which}"

    def _left(self) -> str:
        """The time left, once a first case has told how long one takes."""
        known = [second for seconds in self._seconds.values() for second in seconds]
        if not known:
            return ""
        mean = sum(known) / len(known)
        left = 0.0
        for workload, cases in self._remaining.items():
            own = self._seconds.get(workload)
            left += cases * (sum(own) / len(own) if own else mean)
        return f", about {int(left) // 60}:{int(left) % 60:02d} left" if left >= 1 else ""

    def _show(self, line: str) -> None:
        """Writes over the live line."""
        if self._live:
            line = line[: self._columns - 1]
            self._write("\r" + line.ljust(self._width) + ("" if line else "\r"))
            self._width = len(line)


def _result(record: Record) -> str:
    parts = [str(record["status"])]
    if record["status_reason"]:
        parts.append(str(record["status_reason"]).splitlines()[0][:160])
    if record["step_time_ms_median"] is not None:
        parts.append(f"{record['step_time_ms_median']:.3g} ms a step")
    if record["final_accuracy"] is not None:
        parts.append(f"accuracy {100 * record['final_accuracy']:.1f} %")
    elif record["metric_value"] is not None:
        parts.append(f"{record['metric_name']} {record['metric_value']:.4g}")
    if record["overflow_steps"]:
        parts.append(f"{record['overflow_steps']} overflows")
    if (record["host_other_cpu_share"] or 0.0) > BUSY_SHARE:
        parts.append(f"busy machine: {100 * record['host_other_cpu_share']:.0f} % of its CPU time to others")
    return ", ".join(parts)
