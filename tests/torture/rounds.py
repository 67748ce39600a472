"""A round: a run is disturbed, continued until it is complete, and compared with an undisturbed one."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from torture.found import Journal, Reference, compare, is_complete, kept, unfinished_files
from torture.suite import Place
from torture.victims import SIGNALS, Victim, left, strike, victims

MOST_SESSIONS = 8
"""After the last disturbance one session should do; the others are for disturbed ones."""
LIMIT_S = 300.0
"""A session that takes longer hangs."""
_END_S = 10.0
"""How long processes may take to end when their session has ended."""
EXIT_CODES = (0, 1, 2)
"""All passed, something failed, stopped; docs/ci.md has them."""


@dataclass(frozen=True)
class Blow:
    """A signal that was sent."""

    session: int
    at_s: float
    phase: str
    kind: str
    signal: str


@dataclass
class Result:
    """What became of a round.

    Args:
        name: its number and layout.
        blows: the signals, or the fillings of a disk, in their order.
        sessions: the exit codes of its sessions.
        compared: how many finished cases were compared.
        violations: what should not be.
    """

    name: str
    blows: list[Blow] = field(default_factory=list)
    sessions: list[int | None] = field(default_factory=list)
    compared: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Session:
    """One pytest of a round.

    Args:
        place: where it runs.
        number: which one of the round it is.
        cases: how many cases the run has.
        options: for pytest, beside those of the layout.
    """

    def __init__(self, place: Place, number: int, cases: int, *options: str) -> None:
        self.place, self.number, self._cases = place, number, cases
        self.output = place.folder / f"session-{number}.txt"
        self._earlier = len(self.journal().events)
        self.start = time.monotonic()
        self.process = place.start(self.output, *options)
        self.seen: list[Journal] = []
        """What the journal was at each disturbance."""

    def journal(self) -> Journal:
        """The journal as it is now."""
        runs = self.place.runs()
        return Journal.read(runs[0] / "journal.jsonl") if runs else Journal()

    def events(self, kind: str) -> int:
        """How many events this session has added to the journal."""
        return sum(event.get("event") == kind for event in self.journal().events[self._earlier :])

    def phase(self) -> str:
        """Where it is, in words."""
        events = [each.get("event") for each in self.journal().events[self._earlier :]]
        if "case_started" not in events:
            return "start"
        if events[-1] == "run_finished":
            return "reports"
        if events[-1] == "case_started":
            return "case" if "case_finished" in events else "first case"
        return "between cases" if len(self.journal().good()) < self._cases else "end"

    def reach(self, finished: int, seconds: float) -> bool:
        """Wait until so many cases have finished, and some seconds more; return whether the session still runs.

        Args:
            finished: -1 for the start of the session, 0 for that of its first case.
            seconds: how much longer.
        """
        while self.process.poll() is None and time.monotonic() < self.start + LIMIT_S:
            if finished < 0 or (self.events("case_finished") >= finished and self.events("case_started") > 0):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
                break
            time.sleep(0.03)
        return self.process.poll() is None

    def look(self) -> None:
        """Note what is in the journal: it must stay there."""
        self.seen.append(self.journal())

    def wait(self) -> int | None:
        """Return the exit code; None if it had to be killed because it hung."""
        try:
            return self.process.wait(max(0.0, self.start + LIMIT_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def blow(self, rng: Random, target: str | None = None, number: signal.Signals | None = None) -> Blow | None:
        """Send a signal to a process of the run; None if there is no such process.

        Args:
            rng: chooses what is not given.
            target: a kind of process.
            number: the signal.
        """
        number = number or rng.choices(SIGNALS, (4, 2, 2, 2))[0]
        alive = victims(self.place.token, self.process.pid)
        kinds = sorted({victim.kind for victim in alive})
        if not kinds or (target not in (None, "all at once") and target not in kinds):
            return None
        # The session is what matters most, and the only one that is always there.
        kind = (
            target or rng.choices([*kinds, "all at once"], [2 if each == "session" else 1 for each in kinds] + [1])[0]
        )
        chosen: Sequence[Victim] = [victim for victim in alive if kind in (victim.kind, "all at once")]
        if kind != "all at once":
            chosen = [rng.choice(chosen)]
        phase, at = self.phase(), time.monotonic() - self.start
        hit = [strike(victim, number) for victim in chosen]
        return Blow(self.number, round(at, 2), phase, kind, number.name) if any(hit) else None


Disturb = Callable[[Session, Random], Iterator[Blow]]
"""Disturbs a session; yields what it did."""


class Round:
    """A round.

    Args:
        place: where it happens.
        reference: the undisturbed run.
        rng: chooses everything.
        disturb: for each session that is disturbed, how.
        name: of the round.
        told: called with a line about each thing that happened.
    """

    def __init__(self, place: Place, reference: Reference, rng: Random, disturb: Sequence[Disturb], name: str) -> None:
        self._place, self._reference, self._rng, self._disturb = place, reference, rng, disturb
        self.result = Result(name)
        self._around = place.outside()

    def play(self) -> Result:
        """Play the round; the result has all that went wrong. Processes that are left are killed."""
        begun = time.monotonic()
        try:
            self._play()
        except Exception as error:  # such as a file that is other than all that is expected: the round is kept
            self._wrong(f"the round could not be played to its end: {type(error).__name__}: {error}")
        finally:
            for victim in victims(self._place.token):
                strike(victim, signal.SIGKILL)
            self.result.seconds = round(time.monotonic() - begun, 1)
        return self.result

    def _play(self) -> None:
        for number in range(MOST_SESSIONS):
            disturbed = number < len(self._disturb)
            runs = self._place.runs()
            options = [f"--mp-resume={runs[0].name}"] if runs else []
            session = Session(self._place, number, len(self._reference.cases), *options)
            session.look()
            blows = []
            for blow in self._disturb[number](session, self._rng) if disturbed else ():
                blows.append(blow)
                self.result.blows.append(blow)
            code = session.wait()
            self.result.sessions.append(code)
            self._check_session(session, code, blows)
            if code is None:
                return
            runs = self._place.runs()
            if runs and is_complete(runs[0], self._reference):
                break
            if not disturbed and not blows:
                self._wrong("an undisturbed session did not complete the run", session)
                break
        else:
            self._wrong(f"the run was not complete after {MOST_SESSIONS} sessions")
        self._check_end()

    def _check_session(self, session: Session, code: int | None, blows: Sequence[Blow]) -> None:
        if code is None:
            self._wrong(f"a session hung for {LIMIT_S:g} s", session)
            return
        own = [blow for blow in blows if blow.kind in ("session", "all at once")]
        deaths = {-signal.Signals[blow.signal] for blow in own if not self._should_be_heard(blow)}
        # A results folder on a full disk is refused before anything runs.
        refused = {4} if any(blow.signal == "ENOSPC" and blow.phase == "start" for blow in blows) else set()
        if code not in (*EXIT_CODES, *deaths, *refused):
            self._wrong(f"exit code {code}", session)
        if code == 2 and not own:
            self._wrong("it says that it was stopped, and was not", session)
        if code != 0 and not blows:
            self._wrong(f"exit code {code} although nothing was done to it", session)
        for victim in left(self._place.token, _END_S):
            self._wrong(f"a process is left: {victim.kind}, {victim.command}", session)
            strike(victim, signal.SIGKILL)
        journal = session.journal()
        for before in session.seen:
            for why in kept(before, journal):
                self._wrong(why, session)
        for why in [*journal.broken, *journal.odd_attempts()]:
            self._wrong(why, session)
        if journal.torn and not blows:
            self._wrong(f"the journal ends in a torn line: {journal.torn[-80:]!r}", session)
        if len(self._place.runs()) > 1:
            self._wrong("there is a second run", session)
        text = session.output.read_text(errors="replace")
        if "INTERNALERROR" in text:
            self._wrong("pytest reports an internal error", session)
        # A process that was hit may have said so; what it printed is in the output of the session.
        if "Traceback (most recent call last)" in text and all(
            blow.kind == "session" and blow.phase != "start" for blow in blows
        ):
            self._wrong("it prints a traceback", session)
        if len(blows) == 1 and own and self._should_be_heard(own[0]):
            self._check_stop(session, code, text)
        if len(blows) == 1 and own and own[0].phase == "reports" and own[0].signal != "SIGKILL":
            for why in unfinished_files(self._place.runs()[0]):
                self._wrong(f"told to stop while it wrote its reports: {why}", session)

    @staticmethod
    def _should_be_heard(blow: Blow) -> bool:
        """Whether a session must end in order: it is at work, and the signal can be caught."""
        return blow.phase in ("first case", "case", "between cases", "end") and blow.signal != "SIGKILL"

    def _check_stop(self, session: Session, code: int | None, text: str) -> None:
        """Check a session that was told to stop while it was at work."""
        if session.events("run_finished") == 0:
            self._wrong("a session that was told to stop did not end its journal", session)
        if code == 2 and "--mp-resume" not in text:
            self._wrong("a session that was told to stop does not say how to go on", session)
        if not (session.place.runs()[0] / "report.html").is_file():
            self._wrong("a session that was told to stop wrote no report", session)
        if left_over := self._temporary():
            self._wrong(f"a session that was told to stop left {left_over}", session)

    def _temporary(self) -> list[str]:
        """What is in the folder for temporary files, but for results that a session said it keeps there."""
        said = "".join(path.read_text(errors="replace") for path in self._place.folder.glob("session-*.txt"))
        found = sorted(self._place.temporary.iterdir())
        return [path.name for path in found if not (list(path.glob("*/journal.jsonl")) and str(path) in said)]

    def _check_end(self) -> None:
        runs = self._place.runs()
        if not runs:
            self._wrong("there is no run")
            return
        if self.result.sessions[-1] == -signal.SIGKILL:
            # As its user does, if it was killed when nothing but its reports was left to do.
            subprocess.run(
                [sys.executable, "-m", "mpscale", "report", runs[0]],
                env=self._place.environment(),
                stdout=subprocess.DEVNULL,
                check=True,
            )
        full_disk = any(blow.signal == "ENOSPC" for blow in self.result.blows)
        for why in compare(runs[0], self._reference, full_disk):
            self._wrong(why)
        if self._temporary():
            # Those of a session that was killed are removed by the next run.
            options = (f"--mp-results={self._place.folder / 'next'}", "--mp-modes=fp32", "--mp-repeats=0")
            Session(self._place, len(self.result.sessions), len(self._reference.cases), *options).wait()
        if names := self._temporary():
            self._wrong(f"temporary files are left: {names}")
        if names := sorted(self._place.outside() ^ self._around):
            self._wrong(f"changed outside the results folder: {names}")
        self.result.compared = len(Journal.read(runs[0] / "journal.jsonl").good())

    def _wrong(self, what: str, session: Session | None = None) -> None:
        where = "" if session is None else f"session {session.number}: "
        self.result.violations.append(where + what)


def undisturbed(place: Place) -> tuple[Reference, list[str]]:
    """Make the run with which others are compared; return it, and what it left behind.

    Raises:
        RuntimeError: it failed.
    """
    around, begun = place.outside(), time.time()
    session = Session(place, 0, 0)
    code, ended = session.wait(), time.time()
    wrong = [f"a process is left: {each.kind}, {each.command}" for each in left(place.token, _END_S)]
    wrong += [f"a temporary file is left: {path.name}" for path in place.temporary.iterdir()]
    wrong += [f"written outside the results folder: {name}" for name in sorted(place.outside() ^ around)]
    for victim in victims(place.token):
        strike(victim, signal.SIGKILL)
    runs = place.runs()
    if code != 0 or len(runs) != 1:
        raise RuntimeError(f"the undisturbed run failed:\n{session.output.read_text(errors='replace')}")
    return Reference.of(runs[0], begun, ended), wrong


def keep(place: Place, evidence: Path) -> Path:
    """Copy the folder of a round to where it is kept."""
    target = evidence / place.folder.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place.folder, target, symlinks=True)
    return target
