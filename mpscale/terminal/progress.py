"""The progress of a run: a line that is updated in place, and a line for each case that has ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mpscale.core.blocks import FASTER, SLOWER
from mpscale.core.case import Case
from mpscale.core.columns import COLUMNS
from mpscale.core.processes.events import Again, Noted, Phase, PhaseReached, Progressed, StepsDone
from mpscale.core.record import Record
from mpscale.terminal.streams import PIPE, Surface, on_one_line, visible

_BUSY = COLUMNS["host_other_cpu_share"]
_WIDTH = 99
"""Longest line of a case that has ended."""
_NAME = 20
"""Widest column of names: a longer one pushes what follows to the right."""


class LiveLine:
    """Permanent lines, and below them, on a terminal, one that is updated in place.

    Nothing is drawn in the background, as rich would do: the session starts processes, and those must not be copies of
    one with threads.

    Args:
        write: writes a piece of text, line ends included.
        surface: where it is written. The live line is cut to its width: one that wraps could not be overwritten.
    """

    def __init__(self, write: Callable[[str], None], surface: Surface = PIPE) -> None:
        self._write, self.surface = write, surface
        self._width = 0

    def update(self, text: str) -> None:
        """Replace the live line; an empty text removes it."""
        if self.surface.live and (text or self._width):
            text = _cut(self.surface.printable(on_one_line(text)), (self.surface.columns or 80) - 1)
            self._write("\r" + text.ljust(self._width) + ("" if text else "\r"))
            self._width = len(text)

    def add(self, text: str) -> None:
        """Write a permanent line, which may have colours, in place of the live one."""
        self.update("")
        self._write(text + "\n")


def _cut(text: str, width: int) -> str:
    """Return the beginning of a text. It ends with a word where it can, since half a number is another number."""
    if len(text) <= width:
        return text
    whole, _, rest = text[: width + 1].rpartition(" ")
    return (whole if whole and rest != text else text[:width]).rstrip(" ,;:")


def _time_left(seconds: float) -> str:
    return f"about {int(seconds) // 60}:{int(seconds) % 60:02d} left" if seconds >= 1 else ""


def _which(seed: int, repeat: int) -> str:
    return f"repeat {repeat}" if repeat else f"seed {seed}"


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


class _Part(NamedTuple):
    """A part of the line of a case that has ended, with its style."""

    text: str
    style: str = ""
    may_be_cut: bool = False


class Progress:
    """The cases of one run: a permanent line for each that has ended, the live line for the one that is running.

    Args:
        line: where the lines go.
        clock: returns seconds; for the time left.
        judge: returns a word on the speed of the mode of a case that has ended, and its look (``good``, ``bad`` or
            empty), as far as the cases so far show it; empty texts if they do not.
    """

    def __init__(
        self,
        line: LiveLine,
        clock: Callable[[], float],
        judge: Callable[[Record], tuple[str, str]] = lambda record: ("", ""),
    ) -> None:
        self._line, self._clock, self._judge = line, clock, judge
        self._total = self._done = 0
        self._started = 0.0
        self._doing = ""
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._remaining: Counter[str] = Counter()
        self._widths = [0, 0, 0]

    def plan(self, cases: Sequence[Case]) -> None:
        """Announce cases, in addition to those announced before."""
        self._total += len(cases)
        self._remaining.update(case.place[0] for case in cases)
        for case in cases:
            self._widths = [
                max(wide, min(len(text), _NAME)) for wide, text in zip(self._widths, _names(case), strict=True)
            ]

    def started(self, case: Case) -> None:
        """Show that a case begins."""
        self._started = self._clock()
        self._doing = "starting"
        self._update(case)

    def event(self, case: Case, event: Progressed) -> None:
        """Show an event of a case: a phase, a number of steps, another attempt, or a note."""
        match event:
            case Again(reason):
                self._line.add(f"{self._head(case)}  {visible(reason)}; run again")
            case Noted(text):
                self._line.add(visible(text))
            case PhaseReached(phase):
                self._doing = _WORDS[phase]
                self._update(case)
            case StepsDone(done, total):
                self._update(case, f" {done}/{total}")

    def stopped(self) -> None:
        """Remove the live line: the case that was running will not end."""
        self._line.update("")

    def finished(self, case: Case, record: Record) -> None:
        """Show the result of a case."""
        # The case's own time if it is known: the first case also waits for TensorFlow to be imported.
        seconds = record["case_wall_time_s"] or self._clock() - self._started
        head = self._head(case)
        self._done += 1
        self._remaining[case.place[0]] -= 1
        self._seconds[case.place[0]].append(seconds)
        parts = list(self._result(record))
        if not self._line.surface.live and (left := self._left()):
            parts.append(_Part(left, "dim"))
        width = min(_WIDTH, (self._line.surface.columns or _WIDTH + 1) - 1)
        self._line.add(head + "  " + self._fitting(parts, width - len(head) - 2))

    def _fitting(self, parts: Iterable[_Part], width: int) -> str:
        """Join as many parts as fit, the first ones first."""
        shown: list[str] = []
        for part in parts:
            text = self._line.surface.printable(visible(part.text))
            if part.may_be_cut and 0 < width < len(text):
                text = _cut(text, width)
            if len(text) > width:
                break
            shown.append(self._line.surface.paint(text, part.style))
            width -= len(text) + 2
        return ", ".join(shown)

    def _update(self, case: Case, steps: str = "") -> None:
        left = self._left()
        done = f"{self._done} of {self._total} done" + (f", {left}" if left else "")
        self._line.update(f"{done}; {' '.join(_names(case))}: {self._doing}{steps}")

    def _head(self, case: Case) -> str:
        number = f"[{self._done + 1:>{len(str(self._total))}}/{self._total}]"
        columns = (text.ljust(wide) for text, wide in zip(_names(case), self._widths, strict=True))
        return "  ".join([number, *columns])

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
        return _time_left(left)

    def _result(self, record: Record) -> Iterator[_Part]:
        """Yield what a case has shown, the most important first."""
        yield _Part(str(record["status"]), "" if record["status"] == "ok" else "red")
        if record["step_time_ms_median"] is not None:
            yield _Part(f"{record['step_time_ms_median']:.3g} ms")
        word, look = self._judge(record)
        if word:
            yield _Part(word, {"good": "green", "bad": "red"}.get(look, "dim"))
        if record["final_accuracy"] is not None:
            yield _Part(f"accuracy {100 * record['final_accuracy']:.1f} %")
        elif record["metric_value"] is not None:
            yield _Part(f"{record['metric_name']} {record['metric_value']:.4g}")
        elif record["has_metric"] is False:
            yield _Part("synthetic inputs" if record["synthetic_inputs"] else "no metric", "dim")
        if overflows := record["overflow_steps"]:
            yield _Part(f"{overflows} overflow{'' if overflows == 1 else 's'}", "yellow")
        elif overflows == 0:
            yield _Part("no overflow")
        if record["status_reason"]:
            yield _Part(str(record["status_reason"]).splitlines()[0], may_be_cut=True)
        busy = record[_BUSY.name] or 0.0
        if busy > (_BUSY.warn_above or 1.0):
            yield _Part(f"busy machine ({100 * busy:.0f} %)", "yellow")
        if record[SLOWER] is not None:
            yield _Part(f"jumps between {record[FASTER]:.3g} and {record[SLOWER]:.3g} ms", "yellow")
        if record["device_busy_share"] is not None:
            yield _Part(f"GPU busy {100 * record['device_busy_share']:.0f} %")


def _names(case: Case) -> tuple[str, str, str]:
    workload, mode = map(on_one_line, case.place)
    return workload, mode, _which(case.seed, case.repeat)


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
            names = on_one_line(f"{case['workload']} {case['mode']} {_which(case['seed'], case['repeat'])}")
            self._names[case["id"]] = f"[{number:>{len(str(len(cases)))}}/{len(cases)}] {names}"
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
        self._line.add(visible(text))

    def _pair(self, case: str, results: Mapping[str, str]) -> str:
        return f"{self._names[case]}: " + ", ".join(f"{letter} {results[letter]}" for letter in sorted(results))

    def _left(self) -> str:
        return _time_left((self._clock() - self._begun) / len(self._shown) * (len(self._names) - len(self._shown)))


def _short_result(case: Mapping[str, Any]) -> str:
    time = None if case["step_time_ms"] is None else f"{case['step_time_ms']:.3g} ms"
    if case["status"] == "ok":
        return time or "ok"
    reason = (str(case["reason"] or "").splitlines() or [""])[0][:120]
    return visible(" ".join(filter(None, [time, case["status"], f"({reason})" if reason else ""])))
