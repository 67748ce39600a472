"""What the terminal shows of two sessions in turns: a line for each pair of cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpscale.ab.environments import LETTERS

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
        found[letter] = _result(case)
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


def _result(case: Mapping[str, Any]) -> str:
    time = None if case["step_time_ms"] is None else f"{case['step_time_ms']:.3g} ms"
    if case["status"] == "ok":
        return time or "ok"
    reason = (str(case["reason"] or "").splitlines() or [""])[0][:_REASON]
    return " ".join(filter(None, [time, case["status"], f"({reason})" if reason else ""]))
