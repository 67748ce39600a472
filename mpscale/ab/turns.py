"""The protocol between ``mpscale ab`` and each of its two pytest sessions, and the session's side of it.

The session sends :data:`EVENTS`. After :class:`Ready` and :class:`End` it waits for an answer, ``{"go": true}`` or
``{"stop": why}``. Its turn lasts until it waits again or ends, so nothing it does in between disturbs the other
session's turn. The two sides may be different versions of mpscale.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from mpscale.core.processes.events import Event
from mpscale.core.processes.process import die_with_parent
from mpscale.core.processes.wire import Wire

VERSION = 1
"""Version of the protocol. Raise it if two versions would not understand each other."""

VARIABLE = "MPSCALE_TURNS"
"""The environment variable that invites a session."""


@dataclass(frozen=True)
class Plan(Event, name="plan"):
    """The cases that the session has collected.

    Args:
        cases: each with ``id``, ``workload``, ``mode``, ``seed`` and ``repeat``.
        turn_s: how long the session may be silent in a turn.
    """

    cases: list[dict[str, Any]]
    turn_s: float


@dataclass(frozen=True)
class Ready(Event, name="ready"):
    """The session waits to run a case."""

    case: str


@dataclass(frozen=True)
class Done(Event, name="done"):
    """The outcome of a case, and the folder of its run."""

    case: str
    status: str
    reason: str | None
    step_time_ms: float | None
    run: str


@dataclass(frozen=True)
class End(Event, name="end"):
    """The session waits to write its reports. ``run`` is None if it ran no case."""

    run: str | None


EVENTS = (Plan, Ready, Done, End)


class Stopped(Exception):
    """The session gets no more turns. The message says why."""


def invitation(descriptor: int, seed: int, entry: Mapping[str, Any]) -> str:
    """The value of :data:`VARIABLE` for a session.

    Args:
        descriptor: its end of the wire.
        seed: of the order of its cases.
        entry: the entry ``interleaved`` of its run.json.
    """
    return json.dumps({"descriptor": descriptor, "seed": seed, "entry": dict(entry)})


def join(environ: MutableMapping[str, str]) -> Turns | None:
    """Return this process's side if it was invited, else None.

    Removes the invitation from ``environ``, because it is not for a pytest that a test starts.
    """
    text = environ.pop(VARIABLE, None)
    if text is None:
        return None
    invited = json.loads(text)
    # A process that a shell runs in the background ignores SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    die_with_parent()
    return Turns(Wire.inherited(invited["descriptor"]), invited["seed"], invited["entry"])


class Turns:
    """Asks for turns.

    Args:
        wire: to ``mpscale ab``.
        seed: of the order of the cases, the same for both sessions.
        entry: for run.json.
    """

    def __init__(self, wire: Wire, seed: int, entry: Mapping[str, Any]) -> None:
        self._wire = wire
        self.seed, self.entry = seed, dict(entry)

    def send(self, event: Event) -> None:
        """Report an event."""
        self._wire.send(event.to_json())

    def end(self, run: str | None) -> None:
        """Wait until reports made here would not disturb the other session; see :class:`End`."""
        # Ctrl-C here means: stop waiting and finish.
        with contextlib.suppress(Stopped, KeyboardInterrupt):
            self.wait(End(run))

    def wait(self, event: Ready | End) -> None:
        """Report what this session waits for, and wait for its turn.

        Raises:
            Stopped: there are no more turns.
        """
        self.send(event)
        try:
            answer = self._wire.receive()
        except EOFError:
            raise Stopped("mpscale ab is gone") from None
        if "stop" in answer:
            raise Stopped(str(answer["stop"]))
