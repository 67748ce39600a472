"""Output on a terminal: text in any encoding, a line that is updated in place, and the progress of a run."""

from __future__ import annotations

import codecs
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from mpscale.core.blocks import FASTER, SLOWER
from mpscale.core.case import Case
from mpscale.core.columns import COLUMNS
from mpscale.core.record import Record
from mpscale.core.wire import Again, Noted, Phase, PhaseReached, Progressed, StepsDone

_BUSY = COLUMNS["host_other_cpu_share"]
_ERRORS = "mpscale"
"""Name of the error handler: without it, Python stops at a character that the terminal's encoding lacks."""

_REPLACEMENTS = {"–": "-", "—": "-", "−": "-", "…": "...", "°": "deg ", "×": "x", "±": "+/-"}  # noqa: RUF001
"""Any other character that the encoding lacks is shown as an escape such as \\xf6."""


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    first = error.object[error.start]
    if first in _REPLACEMENTS:
        return _REPLACEMENTS[first], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )


codecs.register_error(_ERRORS, _replace)


def adapt_standard_streams() -> None:
    """Make standard output and standard error replace characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        # Absent if the process has no such stream, or if it was replaced by some other object.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def printable(text: str, stream: TextIO | None) -> str:
    """Return ``text`` as ``stream`` can show it; unchanged if the encoding of the stream is unknown."""
    encoding = getattr(stream, "encoding", None)
    return text.encode(encoding, _ERRORS).decode(encoding) if encoding else text


def as_typed(text: str) -> str:
    """Return a command-line argument as the user typed it, even if Python mistook a UTF-8 terminal for ASCII."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


class LiveLine:
    """Permanent lines, and below them, on a terminal, one that is updated in place.

    Args:
        write: writes a piece of text, line ends included.
        live: whether the output is a terminal. If not, only permanent lines are written.
        columns: width of the terminal. The live line is cut there: one that wraps could not be overwritten.
    """

    def __init__(self, write: Callable[[str], None], live: bool, columns: int = 80) -> None:
        self._write, self.live, self._columns = write, live, columns
        self._width = 0

    def update(self, text: str) -> None:
        """Replace the live line; an empty text removes it."""
        if self.live:
            text = text[: self._columns - 1]
            self._write("\r" + text.ljust(self._width) + ("" if text else "\r"))
            self._width = len(text)

    def add(self, text: str) -> None:
        """Write a permanent line in place of the live one."""
        self.update("")
        self._write(text + "\n")


def _time_left(seconds: float) -> str:
    return f"about {int(seconds) // 60}:{int(seconds) % 60:02d} left" if seconds >= 1 else ""


def _head(number: int, total: int, workload: str, mode: str, seed: int, repeat: int) -> str:
    which = f"repeat {repeat}" if repeat else f"seed {seed}"
    return f"[{number:>{len(str(total))}}/{total}] {workload} {mode} {which}"


_WORDS = {
    Phase.IDLE: "starting",
    Phase.CONTEXT_READY: "building",
    Phase.MODEL_BUILT: "compiling",
    Phase.COMPILED: "training",
    Phase.STEPS_SYNCHRONISED: "training",
    Phase.STEPS_QUEUED: "training",
    Phase.METRIC_TRIED: "training",
    Phase.TRAINED: "evaluating",
    Phase.EVALUATED: "warming up",
    Phase.WARM: "warming up",
    Phase.TIMING_START: "timing",
    Phase.TIMING_END: "finishing",
    Phase.ENERGY_END: "finishing",
    Phase.PROFILED: "finishing",
    Phase.DONE: "finishing",
}
"""What a case is doing once it has reached a phase."""


class Progress:
    """The cases of one run: a permanent line for each that has ended, the live line for the one that is running.

    Without a terminal each case has a permanent line when it starts, too.

    Args:
        line: where the lines go.
        clock: returns seconds; for the time left.
    """

    def __init__(self, line: LiveLine, clock: Callable[[], float]) -> None:
        self._line, self._clock = line, clock
        self._total = self._done = 0
        self._started = 0.0
        self._doing = ""
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._remaining: Counter[str] = Counter()

    def plan(self, cases: Sequence[Case]) -> None:
        """Announce cases, in addition to those announced before."""
        self._total += len(cases)
        self._remaining.update(case.place[0] for case in cases)

    def started(self, case: Case) -> None:
        """Show that a case begins."""
        self._started = self._clock()
        self._doing = "starting"
        if self._line.live:
            self._update(case)
        else:
            self._line.add(f"{self._head(case)}: starting{self._left()}")

    def event(self, case: Case, event: Progressed) -> None:
        """Show an event of a case: a phase, a number of steps, another attempt, or a note."""
        match event:
            case Again(reason):
                self._line.add(f"{self._head(case)}: {reason}; run again")
            case Noted(text):
                self._line.add(text)
            case PhaseReached(phase):
                self._doing = _WORDS[phase]
                self._update(case)
            case StepsDone(done, total):
                self._update(case, f" {done}/{total}")

    def finished(self, case: Case, record: Record) -> None:
        """Show the result of a case."""
        # The case's own time if it is known: the first case also waits for TensorFlow to be imported.
        seconds = record["case_wall_time_s"] or self._clock() - self._started
        head = self._head(case)
        self._done += 1
        self._remaining[case.place[0]] -= 1
        self._seconds[case.place[0]].append(seconds)
        self._line.add(f"{head}: {self._result(record)} ({seconds:.1f} s{self._left()})")

    def _update(self, case: Case, steps: str = "") -> None:
        self._line.update(f"{self._head(case)}: {self._doing}{steps}{self._left()}")

    def _head(self, case: Case) -> str:
        return _head(self._done + 1, self._total, *case.place, case.seed, case.repeat)

    def _left(self) -> str:
        """The time left, estimated by workload once the first case has shown how long one takes."""
        known = [second for seconds in self._seconds.values() for second in seconds]
        if not known:
            return ""
        mean = sum(known) / len(known)
        left = 0.0
        for workload, cases in self._remaining.items():
            own = self._seconds.get(workload)
            left += cases * (sum(own) / len(own) if own else mean)
        text = _time_left(left)
        return f", {text}" if text else ""

    def _result(self, record: Record) -> str:
        parts = [str(record["status"])]
        if record["status_reason"]:
            parts.append(str(record["status_reason"]).splitlines()[0][:160])
        if record["step_time_ms_median"] is not None:
            parts.append(f"{record['step_time_ms_median']:.3g} ms a step")
        if record["device_busy_share"] is not None:
            parts.append(f"GPU busy {100 * record['device_busy_share']:.0f} % of it")
        if record[SLOWER] is not None:
            parts.append(f"jumping between {record[FASTER]:.3g} and {record[SLOWER]:.3g} ms")
        if record["final_accuracy"] is not None:
            parts.append(f"accuracy {100 * record['final_accuracy']:.1f} %")
        elif record["metric_value"] is not None:
            parts.append(f"{record['metric_name']} {record['metric_value']:.4g}")
        elif record["has_metric"] is False:
            parts.append("no accuracy: synthetic inputs" if record["synthetic_inputs"] else "no metric")
        if record["overflow_steps"]:
            parts.append(f"{record['overflow_steps']} overflows")
        busy = record[_BUSY.name] or 0.0
        if busy > (_BUSY.warn_above or 1.0):
            parts.append(f"busy machine: other processes took {100 * busy:.0f} % of its CPU time")
        return ", ".join(parts)


class Screen:
    """The cases of interleaved sessions: a line for each case with the result of every session.

    Args:
        letters: names of the sessions.
        line: where the lines go.
        clock: returns seconds; for the time left.
    """

    def __init__(self, letters: Sequence[str], line: LiveLine, clock: Callable[[], float]) -> None:
        self._letters, self._line, self._clock = letters, line, clock
        self._names: dict[str, str] = {}
        self._results: dict[str, dict[str, str]] = {}
        self._shown: set[str] = set()
        self._begun = 0.0

    def plan(self, cases: Sequence[Mapping[str, Any]]) -> None:
        """Announce the cases, each of which every session will run."""
        for number, case in enumerate(cases, 1):
            names = (case[name] for name in ("workload", "mode", "seed", "repeat"))
            self._names[case["id"]] = _head(number, len(cases), *names)
        self._begun = self._clock()
        self._line.add(f"{len(cases)} pair{'' if len(cases) == 1 else 's'} of cases, interleaved")

    def running(self, letter: str, case: str) -> None:
        """Show that a session runs a case."""
        self._line.update(self._pair(case, {**self._results.get(case, {}), letter: "running"}))

    def done(self, letter: str, case: Mapping[str, Any]) -> None:
        """Show the result that a session has of a case."""
        name = case["case"]
        results = self._results.setdefault(name, {})
        results[letter] = _short_result(case)
        if len(results) == len(self._letters):
            self._shown.add(name)
            left = self._left()
            self._line.add(self._pair(name, results) + (f" ({left})" if left else ""))

    def end(self) -> None:
        """Show the cases that not every session has finished."""
        self._line.update("")
        for case, results in self._results.items():
            if case not in self._shown:
                self._line.add(self._pair(case, {**dict.fromkeys(self._letters, "not finished"), **results}))

    def line(self, text: str) -> None:
        """Write a line of its own."""
        self._line.add(text)

    def _pair(self, case: str, results: Mapping[str, str]) -> str:
        return f"{self._names[case]}: " + ", ".join(f"{letter} {results[letter]}" for letter in sorted(results))

    def _left(self) -> str:
        return _time_left((self._clock() - self._begun) / len(self._shown) * (len(self._names) - len(self._shown)))


def _short_result(case: Mapping[str, Any]) -> str:
    time = None if case["step_time_ms"] is None else f"{case['step_time_ms']:.3g} ms"
    if case["status"] == "ok":
        return time or "ok"
    reason = (str(case["reason"] or "").splitlines() or [""])[0][:120]
    return " ".join(filter(None, [time, case["status"], f"({reason})" if reason else ""]))
