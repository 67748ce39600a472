"""One of the two pytest sessions, seen from outside: its process, what it says, and how long it may be silent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscale import turns
from mpscale.ab.environments import Environment

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
