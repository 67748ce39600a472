"""Two pytest sessions that take turns: starts both, decides whose turn it is, and ends both."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscale.ab import turns
from mpscale.ab.environments import LETTERS, Environment
from mpscale.core.columns import FAILED
from mpscale.core.files.temporary import TemporaryFolder
from mpscale.core.processes import stopping
from mpscale.core.processes.events import Event, event_of
from mpscale.core.processes.process import Child, describe_exit
from mpscale.core.processes.wire import Garbled, Wire, wait_for
from mpscale.terminal.progress import Screen

_BAD = (*FAILED, "diverged", "stalled")
_LISTED = 4
_STOPPED = 2
"""Exit code of a session that got no more turns, or was interrupted."""
END = "end"
"""What a session without further cases waits for. No case has this id."""
_LEAVE_S = 30.0
_STOP_S = 180.0
_TAIL = 15
_ENDS = {
    1: "some of its tests failed",
    2: "it was stopped, or a test file could not be collected",
    3: "pytest itself failed",
    4: "pytest was called incorrectly",
    5: "no case was selected",
}


class Referee:
    """Runs the same cases in both environments, the two of a pair one right after the other.

    Args:
        environments: the two.
        arguments: of pytest.
        screen: shows progress.
        start_s: how long a session may take to collect its cases.
    """

    def __init__(
        self, environments: Sequence[Environment], arguments: Sequence[str], screen: Screen, start_s: float
    ) -> None:
        self._environments, self._arguments, self._screen, self._start_s = environments, arguments, screen, start_s
        self._sessions: list[Session] = []
        self._random = random.Random()
        self._order: dict[str, int] = {}
        self._first: dict[tuple[str, str], str] = {}
        self._stopping: str | None = None
        self.interrupted = False
        """Whether the user stopped it."""
        self.problems: list[str] = []
        """What went wrong; empty if both sessions ran all their cases and none failed."""

    @property
    def runs(self) -> list[Path | None]:
        """The folders of A's and B's runs; None for a session that ran no case."""
        return [session.run for session in self._sessions]

    def run(self) -> None:
        """Start both sessions, and go on until both have ended."""
        seed, pair = secrets.randbelow(2**32), secrets.token_hex(8)
        self._random.seed(seed)
        logs = TemporaryFolder("ab-logs")
        forget = (
            stopping.before_ending_at_once(logs.close),
            stopping.before_ending_at_once(self._end_at_once, children_live=True),
        )
        try:
            for each in self._environments:
                log = logs.path / f"{each.letter}.log"
                self._sessions.append(Session(each, self._arguments, seed, pair, log, self._start_s))
            self._take_turns()
        except KeyboardInterrupt:
            logs.close()
            raise
        finally:
            with stopping.held():
                for session in self._sessions:
                    session.kill()
        if self.problems:
            logs.keep()
        logs.close()
        for forgotten in forget:
            forgotten()

    def _take_turns(self) -> None:
        while living := [session for session in self._sessions if session.code is None]:
            try:
                if not self._move(living):
                    self._listen(living)
            except KeyboardInterrupt:
                if self.interrupted:
                    raise
                self._interrupt(living)
        self._screen.end()
        self._find_problems()

    def _interrupt(self, living: Sequence[Session]) -> None:
        self.interrupted = True
        self._stopping = "stopped by the user"
        self._screen.line("stopping both; what has been measured is kept (Ctrl-C again: end them at once)")
        for session in living:
            if session.wants is None and not session.ending:
                session.interrupt()

    def _end_at_once(self) -> None:
        """Have the sessions end at once by themselves, so that they remove what they have made."""
        for _ in range(2):
            for session in self._sessions:
                if session.code is None:
                    session.interrupt()
            time.sleep(1.2 * stopping.ONE_S)

    def _move(self, living: Sequence[Session]) -> bool:
        """Answer waiting sessions if it is time; return whether any was answered.

        No session gets a turn before all are waiting: what one does between cases must not disturb the other.
        """
        waiting = [session for session in living if session.wants is not None]
        if self._stopping is None:
            if len(waiting) < len(living):
                return False
            self._stopping = self._why_stop(living)
        if self._stopping is None:
            self._give_turn(living)
            return True
        for session in waiting:
            session.go() if session.wants == END else session.stop(self._stopping)
        return bool(waiting)

    def _give_turn(self, living: Sequence[Session]) -> None:
        def place(session: Session) -> int:
            assert session.wants is not None
            return len(self._order) if session.wants == END else self._order[session.wants]

        behind = min(map(place, living))
        candidates = [session for session in living if place(session) == behind]
        session = candidates[0] if len(candidates) == 1 else self._draw(candidates)
        if session.wants is not None and session.wants != END:
            self._screen.running(session.letter, session.wants)
        session.go()

    def _draw(self, both: Sequence[Session]) -> Session:
        """Return which session begins a pair: at random for the first pair of a workload and mode, then alternately.

        The machine may be in another state for the first of a pair than for the second, so both begin equally often.
        """
        plan = {case["id"]: case for case in both[0].plan or ()}
        case = plan.get(both[0].wants or "")
        if case is None:
            return both[0]
        row = (case["workload"], case["mode"])
        before = self._first.get(row)
        session = self._random.choice(both) if before is None else next(s for s in both if s.letter != before)
        self._first[row] = session.letter
        return session

    def _why_stop(self, living: Sequence[Session]) -> str | None:
        """Return why sessions that wait for a case should not run it; None if they should."""
        for session in self._sessions:
            for other in living:
                gone = session.code is not None or (session.wants == END and other.wants not in session.ran)
                if other is not session and other.wants != END and gone:
                    return f"{session.letter} has ended after {len(session.ran)} of {len(other.plan or ())} cases"
        if not self._order and any(session.wants != END for session in living):
            plans = [[case["id"] for case in session.plan or ()] for session in self._sessions]
            if plans[0] != plans[1]:
                return _difference(*plans)
            self._order = {case: place for place, case in enumerate(plans[0])}
            self._screen.plan(self._sessions[0].plan or ())
        return None

    def _listen(self, living: Sequence[Session]) -> None:
        left = [seconds for session in living if (seconds := session.left_s()) is not None]
        ready = wait_for([source for session in living for source in session.sources()], min(left, default=None))
        for session in living:
            # If none is ready, one has been silent for too long.
            if not ready or any(source in ready for source in session.sources()):
                for event in session.hear():
                    if isinstance(event, turns.Done):
                        self._screen.done(session.letter, event.to_json())

    def _find_problems(self) -> None:
        if self._stopping is not None and not self.interrupted:
            self.problems.append(self._stopping)
        for session in self._sessions:
            by_order = session.was_stopped and session.hung is None and (self.interrupted or session.code == _STOPPED)
            if session.code == 0 or by_order:
                continue
            failed = [f"{case} {done.status}" for case, done in session.ran.items() if done.status in _BAD]
            if failed:
                output = f": {_listed(failed)}; its output is {session.log}"
            else:
                output = f"; its output, {session.log}, ends with\n{session.tail()}"
            self.problems.append(f"{session.letter}: {session.ended_how()}{output}")


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_LISTED]) + (f" and {len(items) - _LISTED} more" if items[_LISTED:] else "")


def _difference(one: Sequence[str], two: Sequence[str]) -> str:
    """Describe how two lists of cases differ."""
    only = [[case for case in mine if case not in theirs] for mine, theirs in ((one, two), (two, one))]
    parts = [f"only {letter} has {_listed(cases)}" for letter, cases in zip(LETTERS, only, strict=True) if cases]
    what = "; ".join(parts) or "they are in another order"
    return f"the two sessions would not run the same cases: {what}. Select some that both have"


class Session:
    """One of the two pytest sessions: its process, its events, and how long it may be silent.

    Args:
        environment: where it runs.
        arguments: of pytest.
        seed: of the order of the cases.
        pair: the id that both sessions have in their run.json.
        log: file for its output.
        start_s: how long it may take to collect its cases.
    """

    def __init__(
        self, environment: Environment, arguments: Sequence[str], seed: int, pair: str, log: Path, start_s: float
    ) -> None:
        self.letter = environment.letter
        self.log, self._silence_s = log, start_s
        entry = {"id": pair, "side": environment.letter, "python": environment.given, "seed": seed}
        ours, theirs = Wire.pair()
        environ = {
            **os.environ,
            turns.VARIABLE: turns.invitation(theirs.fileno(), seed, entry),
            "PYTHONUNBUFFERED": "1",  # so the log is complete even if it is killed
        }
        with log.open("wb") as output:
            # -P: as with the command `pytest`, modules come from the environment, not from the working directory.
            command: list[str | Path] = [environment.python, "-P", "-m", "pytest", *arguments]
            # Ctrl-C reaches only `mpscale ab`, which forwards it to the session that is running a case.
            self._process = Child(command, environ, output, ends=(ours, theirs))
        self._deadline = time.monotonic() + start_s
        self.plan: list[dict[str, Any]] | None = None
        self.wants: str | None = None
        """The case that it waits for, or :data:`END`; None during its turn and before it first waits."""
        self.code: int | None = None
        """Its exit code, negative for a signal; None while it lives."""
        self.ran: dict[str, turns.Done] = {}
        """The outcomes of its cases, by id."""
        self.run: Path | None = None
        self.hung: str | None = None
        """Why it was killed."""
        self.was_stopped = False
        self.ending = False
        """Whether it has got its last turn, in which it writes its reports."""

    def sources(self) -> list[Wire | int]:
        """What becomes readable when it sends an event or ends."""
        return self._process.sources()

    def left_s(self) -> float | None:
        """How much longer it may be silent; None, without limit, while it waits."""
        return None if self.wants is not None else max(self._deadline - time.monotonic(), 0.0)

    def go(self) -> None:
        """Give it the turn."""
        self.ending = self.wants == END
        self._answer({"go": True})

    def stop(self, why: str) -> None:
        """Give it no more turns, so that it ends."""
        self._give_time_to_end()
        self._answer({"stop": why})

    def interrupt(self) -> None:
        """Stop it in the middle of its turn; its run keeps what was measured."""
        self._give_time_to_end()
        with contextlib.suppress(ProcessLookupError):
            self._process.interrupt()

    def hear(self) -> list[Event]:
        """Return new events. Marks the session finished if it exited or exceeded its silence limit."""
        # Checked first, so that what it sent right before it ended is still read.
        ended = self._process.wait(0.0) is not None
        try:
            events = [event_of(message, turns.EVENTS) for message in self._process.wire.arrived()]
        except Garbled as error:
            self.hung = f"its events could not be read ({error})"
            self.kill()
            return []
        for event in events:
            self._take(event)
        if ended or self._process.wire.closed:
            self._leave()
        elif self.left_s() == 0.0:
            self.hung = self._why_late()
            self.kill()
        return events

    def kill(self) -> None:
        """End it at once, if it has not ended. Workers end with their session."""
        if self.code is None:
            code = self._process.kill()
            self.code = -int(signal.SIGKILL) if code is None else code

    def ended_how(self) -> str:
        """Describe how it ended."""
        if self.hung is not None:
            return self.hung
        assert self.code is not None
        if self.code < 0:
            return f"it was {describe_exit(self.code)}"
        return f"{_ENDS.get(self.code, 'it ended')} (exit code {self.code})"

    def tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])

    def _take(self, event: Event) -> None:
        match event:
            case turns.Plan(cases, turn_s):
                self.plan, self._silence_s = cases, turn_s
                self._prolong()
            case turns.Ready(case):
                self.wants = case
            case turns.Done(case, run=run):
                self.ran[case] = event
                self.run = Path(run)
                self._prolong()
            case turns.End(run):
                self.wants = END
                self.run = self.run if run is None else Path(run)

    def _give_time_to_end(self) -> None:
        self.was_stopped = True
        self._deadline = time.monotonic() + _STOP_S

    def _prolong(self) -> None:
        if not self.was_stopped:
            self._deadline = time.monotonic() + self._silence_s

    def _answer(self, answer: Mapping[str, Any]) -> None:
        self.wants = None
        self._prolong()
        self._process.send(answer)

    def _leave(self) -> None:
        """Wait for its end, which has come or is about to, and kill what is left."""
        self._process.wait(_LEAVE_S)
        self.wants = None
        self.kill()

    def _why_late(self) -> str:
        if self.was_stopped:
            return f"it did not end within {_STOP_S:g} s after it was stopped"
        if self.plan is None:
            return f"it did not collect its cases within {self._silence_s:g} s (--start-timeout)"
        return f"it was silent for {self._silence_s:g} s"
