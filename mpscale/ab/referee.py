"""Two pytest sessions that take turns: who is next, and when both have to end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscale.ab import turns
from mpscale.ab.environments import Environment
from mpscale.core.columns import FAILED
from mpscale.terminal import Screen

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


# One of the two pytest sessions, seen from outside: its process, what it says, and how long it may be silent.

END = "end"
"""What a session waits for that has no more cases. No case has this id."""

_LEAVE_S = 30.0
_STOP_S = 180.0
_TAIL = 15

_ENDS = {
    1: "tests of it failed",
    2: "it was stopped, or a file of tests could not be collected",
    3: "pytest itself failed",
    4: "pytest was used in a wrong way",
    5: "no case was selected",
}


class Side:
    """Starts the session.

    Args:
        environment: where.
        arguments: of pytest.
        seed: of the order of the cases.
        pair: the id that both sessions have in their run.json.
        log: takes what it prints.
        start_s: how long it may take until it knows its cases.
    """

    def __init__(
        self, environment: Environment, arguments: Sequence[str], seed: int, pair: str, log: Path, start_s: float
    ) -> None:
        self.letter = environment.letter
        self._log, self._silence_s = log, start_s
        entry = {"id": pair, "side": environment.letter, "python": environment.given, "seed": seed}
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                # -P as the command `pytest` has it: what is imported is the environment's own.
                [environment.python, "-P", "-m", "pytest", *arguments],
                env={
                    **os.environ,
                    turns.VARIABLE: turns.invitation(theirs.fileno(), seed, entry),
                    "PYTHONUNBUFFERED": "1",  # what it printed last is wanted where it is killed
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # The terminal's Ctrl-C is for `mpscale ab` alone, which passes it on to whom it is good for.
                start_new_session=True,
            )
        self._wire = ours
        self._wire.setblocking(False)
        self._ended = os.pidfd_open(self._process.pid)
        self._buffer = b""
        self._deadline = time.monotonic() + start_s
        self.plan: list[dict[str, Any]] | None = None
        self.wants: str | None = None
        """The case that it waits for, or :data:`END`; None while it has the turn, and before it first waits."""
        self.code: int | None = None
        """Its exit code, negative for a signal; None while it lives."""
        self.ran: dict[str, Mapping[str, Any]] = {}
        """What it said of the cases that it has run."""
        self.run: Path | None = None
        self.hung: str | None = None
        """What it was killed for."""
        self.was_stopped = False
        self.ending = False
        """Whether it has had its last turn, in which it makes its reports."""

    def descriptors(self) -> list[int]:
        """Those that become readable when it has something to say or has ended."""
        return [self._wire.fileno(), self._ended]

    def left_s(self) -> float | None:
        """How long it may still be silent; None without limit, as long as it waits."""
        return None if self.wants is not None else max(self._deadline - time.monotonic(), 0.0)

    def go(self) -> None:
        """Gives it the turn."""
        self.ending = self.wants == END
        self._answer({"go": True})

    def stop(self, why: str) -> None:
        """Gives it no more turns, which ends it."""
        self._give_time_to_end()
        self._answer({"stop": why})

    def interrupt(self) -> None:
        """Stops it in the middle of what it does; its run keeps what it has."""
        self._give_time_to_end()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def hear(self) -> list[dict[str, Any]]:
        """What it has said since; where it has been silent for too long, or has ended, it is over afterwards."""
        # Looked at first: what it said right before it ended is read all the same.
        ended = self._process.poll() is not None
        chunks, closed = self._read()
        *lines, self._buffer = (self._buffer + chunks).split(b"\n")
        events = [json.loads(line) for line in lines]
        for event in events:
            self._take(event)
        if closed or ended:
            self._leave()
        elif self.left_s() == 0.0:
            self.hung = self._why_late()
            self.kill()
        return events

    def kill(self) -> None:
        """Ends it at once, if it has not ended. Workers end with their session."""
        if self.code is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.code = self._process.wait()
        self._wire.close()
        os.close(self._ended)

    def ended_how(self) -> str:
        """In words how it ended."""
        if self.hung is not None:
            return self.hung
        assert self.code is not None
        if self.code < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"it was killed by {names.get(-self.code, f'signal {-self.code}')}"
        return f"{_ENDS.get(self.code, 'it ended')} (exit code {self.code})"

    def tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:])

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "plan":
                self.plan, self._silence_s = event["cases"], event["turn_s"]
                self._prolong()
            case "ready":
                self.wants = event["case"]
            case "done":
                self.ran[event["case"]] = event
                self.run = Path(event["run"])
                self._prolong()
            case "end":
                self.wants = END
                self.run = self.run if event["run"] is None else Path(event["run"])

    def _give_time_to_end(self) -> None:
        self.was_stopped = True
        self._deadline = time.monotonic() + _STOP_S

    def _prolong(self) -> None:
        if not self.was_stopped:
            self._deadline = time.monotonic() + self._silence_s

    def _answer(self, answer: Mapping[str, Any]) -> None:
        self.wants = None
        self._prolong()
        # That it is gone is noticed when it is listened to.
        with contextlib.suppress(OSError):
            self._wire.send(json.dumps(answer).encode() + b"\n")

    def _read(self) -> tuple[bytes, bool]:
        """What there is to read, and whether there will be no more."""
        found = b""
        while True:
            try:
                chunk = self._wire.recv(65536)
            except BlockingIOError:
                return found, False
            except OSError:
                return found, True
            if not chunk:
                return found, True
            found += chunk

    def _leave(self) -> None:
        """It has ended, or has only its way out before it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVE_S)
        self.wants = None
        self.kill()

    def _why_late(self) -> str:
        if self.was_stopped:
            return f"it did not end within {_STOP_S:g} s after it was stopped"
        if self.plan is None:
            return f"it did not say within {self._silence_s:g} s which cases it has (--start-timeout)"
        return f"it was not heard of for {self._silence_s:g} s"
