"""Text on its way to and from a terminal that is not UTF-8, where Python would stop with a UnicodeEncodeError."""

from __future__ import annotations

import codecs
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from mpscale.ab.environments import LETTERS
from mpscale.core.case import Case
from mpscale.core.record import Record
from mpscale.core.wire import Again, Phase, PhaseReached, Progressed, StepsDone
from mpscale.telemetry.host import BUSY_SHARE

_ERRORS = "mpscale"
_PLAIN = {"–": "-", "—": "-", "−": "-", "…": "...", "°": "deg ", "×": "x", "±": "+/-"}  # noqa: RUF001
"""What stands for a character that the terminal does not have; any other is shown by its escape, such as \\xf6."""


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    first = error.object[error.start]
    if first in _PLAIN:
        return _PLAIN[first], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )


codecs.register_error(_ERRORS, _plain)


def adapt_standard_streams() -> None:
    """Has standard output and standard error of this process show what their encoding lacks in another way."""
    for stream in (sys.stdout, sys.stderr):
        # Absent where the process has no such stream, or somebody has put another object in its place.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def printable(text: str, stream: TextIO | None) -> str:
    """``text`` as ``stream`` can show it; as it is where the stream's encoding is unknown."""
    encoding = getattr(stream, "encoding", None)
    return text.encode(encoding, _ERRORS).decode(encoding) if encoding else text


def as_typed(text: str) -> str:
    """An argument of the command line as its user typed it, where Python took the terminal's UTF-8 for ASCII."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


# What the terminal shows while a run goes on: a line for each finished case and, on a terminal, a live one below.

_PHASES = {
    Phase.IDLE: "starting",
    Phase.CONTEXT_READY: "building",
    Phase.MODEL_BUILT: "compiling",
    Phase.COMPILED: "training",
    Phase.TRAINED: "warming up",
    Phase.WARM: "warming up",
    Phase.TIMING_START: "timing",
    Phase.TIMING_END: "finishing",
    Phase.ENERGY_END: "finishing",
    Phase.DONE: "finishing",
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

    def event(self, case: Case, event: Progressed) -> None:
        """A phase was reached, steps were taken, or another attempt begins."""
        match event:
            case Again(reason):
                self._show("")
                self._write(f"{self._head(case)}: {reason}; run again\n")
            case PhaseReached(phase):
                self._phase = _PHASES[phase]
                self._show(f"{self._head(case)}: {self._phase}{self._left()}")
            case StepsDone(done, total):
                self._show(f"{self._head(case)}: {self._phase} {done}/{total}{self._left()}")

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


# What the terminal shows of two sessions in turns: a line for each pair of cases.

_REASON = 120


class Screen:
    """Turns what the sessions say into text.

    Args:
        write: takes a piece of text, line ends included.
        live: whether the output is a terminal, where a line can be written over.
        clock: seconds, for the time left.
        columns: width of the terminal.
    """

    def __init__(self, write: Callable[[str], None], live: bool, clock: Callable[[], float], columns: int) -> None:
        self._write, self._live, self._clock, self._columns = write, live, clock, columns
        self._names: dict[str, str] = {}
        self._found: dict[str, dict[str, str]] = {}
        self._shown: set[str] = set()
        self._begun = 0.0
        self._width = 0

    def plan(self, cases: Sequence[Mapping[str, Any]]) -> None:
        """Says how many pairs there will be."""
        for number, case in enumerate(cases, 1):
            which = f"seed {case['seed']}" if case["repeat"] == 0 else f"repeat {case['repeat']}"
            head = f"[{number:>{len(str(len(cases)))}}/{len(cases)}]"
            self._names[case["id"]] = f"{head} {case['workload']} {case['mode']} {which}"
        self._begun = self._clock()
        self.line(f"{len(cases)} pair{'' if len(cases) == 1 else 's'} of cases, in turns")

    def running(self, letter: str, case: str) -> None:
        """A side has the turn for a case."""
        if self._live:
            self._show(self._pair(case, {**self._found.get(case, {}), letter: "running"}))

    def done(self, letter: str, case: Mapping[str, Any]) -> None:
        """A side has run a case."""
        found = self._found.setdefault(case["case"], {})
        found[letter] = _result_screen(case)
        if len(found) == len(LETTERS):
            self._shown.add(case["case"])
            self.line(self._pair(case["case"], found) + self._left())

    def end(self) -> None:
        """Shows what has no partner."""
        self._show("")
        for case, found in self._found.items():
            if case not in self._shown:
                self.line(self._pair(case, {**dict.fromkeys(LETTERS, "not run to its end"), **found}))

    def line(self, text: str) -> None:
        """Writes a line of its own."""
        self._show("")
        self._write(text + "\n")

    def _pair(self, case: str, found: Mapping[str, str]) -> str:
        return f"{self._names[case]}: " + ", ".join(f"{letter} {found[letter]}" for letter in sorted(found))

    def _left(self) -> str:
        left = (self._clock() - self._begun) / len(self._shown) * (len(self._names) - len(self._shown))
        return f" (about {int(left) // 60}:{int(left) % 60:02d} left)" if left >= 1 else ""

    def _show(self, line: str) -> None:
        """Writes over the live line."""
        if self._live:
            line = line[: self._columns - 1]
            self._write("\r" + line.ljust(self._width) + ("" if line else "\r"))
            self._width = len(line)


def _result_screen(case: Mapping[str, Any]) -> str:
    time = None if case["step_time_ms"] is None else f"{case['step_time_ms']:.3g} ms"
    if case["status"] == "ok":
        return time or "ok"
    reason = (str(case["reason"] or "").splitlines() or [""])[0][:_REASON]
    return " ".join(filter(None, [time, case["status"], f"({reason})" if reason else ""]))
