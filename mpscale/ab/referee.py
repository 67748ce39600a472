"""Two pytest sessions that take turns: who is next, and when both have to end."""

from __future__ import annotations

import random
import secrets
import select
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpscale.ab.environments import Environment
from mpscale.ab.screen import Screen
from mpscale.ab.side import END, Side
from mpscale.columns import FAILED

_BAD = (*FAILED, "diverged", "stalled")
_LISTED = 4
_STOPPED = 2
"""Exit code of a session that was given no more turns, or was interrupted."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the two sessions.

    Args:
        runs: the folders of A's run and of B's, None where one has no case.
        problems: what went wrong, in words; empty where both ran all their cases and none failed.
        interrupted: whether the user stopped it.
    """

    runs: tuple[Path | None, Path | None]
    problems: Sequence[str]
    interrupted: bool


def run_in_turns(
    environments: Sequence[Environment], arguments: Sequence[str], screen: Screen, start_s: float
) -> Result:
    """Runs the same cases in both environments, the two of a pair one right after the other.

    Args:
        environments: the two.
        arguments: of pytest.
        screen: shows how it goes.
        start_s: how long a session may take until it knows its cases.
    """
    logs = Path(tempfile.mkdtemp(prefix="mpscale-ab-"))
    referee = _Referee(environments, arguments, screen, start_s, logs)
    try:
        referee.run()
    finally:
        referee.close()
    if not referee.problems:
        shutil.rmtree(logs, ignore_errors=True)
    first, second = referee.sides
    return Result((first.run, second.run), referee.problems, referee.interrupted)


class _Referee:
    def __init__(
        self, environments: Sequence[Environment], arguments: Sequence[str], screen: Screen, start_s: float, logs: Path
    ) -> None:
        seed, pair = secrets.randbelow(2**32), secrets.token_hex(8)
        self._random = random.Random(seed)
        self._screen, self._logs = screen, logs
        self._order: dict[str, int] = {}
        self._first: dict[tuple[str, str], str] = {}
        self._stopping: str | None = None
        self.interrupted = False
        self.problems: list[str] = []
        self.sides: list[Side] = []
        try:
            for each in environments:
                self.sides.append(Side(each, arguments, seed, pair, logs / f"{each.letter}.log", start_s))
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Goes on until both sessions have ended."""
        while living := [side for side in self.sides if side.code is None]:
            try:
                if not self._move(living):
                    self._listen(living)
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self.interrupted = True
                self._stopping = "stopped by the user"
                self._screen.line("stopping both; what has been measured is kept (Ctrl-C again: end them at once)")
                for side in living:
                    if side.wants is None and not side.ending:
                        side.interrupt()
        self._screen.end()
        self._find_problems()

    def close(self) -> None:
        """Leaves no session behind."""
        for side in self.sides:
            side.kill()

    def _move(self, living: Sequence[Side]) -> bool:
        """Answers sessions that wait, if it is time for that.

        No turn is given before all wait: nothing that one does after its case, or before its first, disturbs the other.
        """
        waiting = [side for side in living if side.wants is not None]
        if self._stopping is None:
            if len(waiting) < len(living):
                return False
            self._stopping = self._why_stop(living)
        if self._stopping is None:
            self._give_turn(living)
            return True
        for side in waiting:
            side.go() if side.wants == END else side.stop(self._stopping)
        return bool(waiting)

    def _give_turn(self, living: Sequence[Side]) -> None:
        def place(side: Side) -> int:
            assert side.wants is not None
            return len(self._order) if side.wants == END else self._order[side.wants]

        behind = min(map(place, living))
        candidates = [side for side in living if place(side) == behind]
        side = candidates[0] if len(candidates) == 1 else self._draw(candidates)
        if side.wants is not None and side.wants != END:
            self._screen.running(side.letter, side.wants)
        side.go()

    def _draw(self, both: Sequence[Side]) -> Side:
        """Who comes first: by chance the first time of a workload and mode, then the other one, and so on.

        The first of a pair may find the machine in another state than the second; half of the pairs each way, and
        that is the same for both.
        """
        plan = {case["id"]: case for case in both[0].plan or ()}
        case = plan.get(both[0].wants or "")
        if case is None:
            return both[0]
        row = (case["workload"], case["mode"])
        before = self._first.get(row)
        side = self._random.choice(both) if before is None else next(s for s in both if s.letter != before)
        self._first[row] = side.letter
        return side

    def _why_stop(self, living: Sequence[Side]) -> str | None:
        """Why the sessions that wait for a case should not have it, None where they should."""
        for side in self.sides:
            for other in living:
                gone = side.code is not None or (side.wants == END and other.wants not in side.ran)
                if other is not side and other.wants != END and gone:
                    return f"{side.letter} has ended after {len(side.ran)} of {len(other.plan or ())} cases"
        if not self._order and any(side.wants != END for side in living):
            plans = [[case["id"] for case in side.plan or ()] for side in self.sides]
            if plans[0] != plans[1]:
                return _difference(*plans)
            self._order = {case: place for place, case in enumerate(plans[0])}
            self._screen.plan(self.sides[0].plan or ())
        return None

    def _listen(self, living: Sequence[Side]) -> None:
        left = [seconds for side in living if (seconds := side.left_s()) is not None]
        descriptors = {descriptor: side for side in living for descriptor in side.descriptors()}
        ready, _, _ = select.select(list(descriptors), [], [], min(left, default=None))
        for side in living if not ready else {id(s): s for s in (descriptors[d] for d in ready)}.values():
            for event in side.hear():
                if event["event"] == "done":
                    self._screen.done(side.letter, event)

    def _find_problems(self) -> None:
        if self._stopping is not None and not self.interrupted:
            self.problems.append(self._stopping)
        for side in self.sides:
            by_order = side.was_stopped and side.hung is None and (self.interrupted or side.code == _STOPPED)
            if side.code == 0 or by_order:
                continue
            failed = [f"{case} {facts['status']}" for case, facts in side.ran.items() if facts["status"] in _BAD]
            listed = ", ".join(failed[:_LISTED]) + (f" and {len(failed) - _LISTED} more" if failed[_LISTED:] else "")
            log = self._logs / f"{side.letter}.log"
            self.problems.append(
                f"{side.letter}: {side.ended_how()}"
                + (f": {listed}; its output is {log}" if listed else f"; its output, {log}, ends with\n{side.tail()}")
            )


def _difference(one: Sequence[str], two: Sequence[str]) -> str:
    """Why two lists of cases are not the same."""
    only = [[case for case in mine if case not in theirs] for mine, theirs in ((one, two), (two, one))]
    parts = [
        f"only {letter} has {', '.join(cases[:_LISTED])}"
        + (f" and {len(cases) - _LISTED} more" if cases[_LISTED:] else "")
        for letter, cases in zip("AB", only, strict=True)
        if cases
    ]
    what = "; ".join(parts) or "they are in another order"
    return f"the two sessions would not run the same cases: {what}. Select some that both have"
