"""A pytest session that takes turns with another one, case by case: its end of the wire. ``ab/`` has the other.

Both ends write JSON objects, one a line. The session writes

- ``{"event": "plan", "cases": [{"id": ..., "workload": ..., "mode": ..., "seed": ..., "repeat": ...}], "turn_s": ...}``
  when its cases are collected; ``turn_s`` is the longest that it may be silent in a turn;
- ``{"event": "ready", "case": id}`` before each case, and waits for an answer;
- ``{"event": "done", "case": id, "status": ..., "reason": ..., "step_time_ms": ..., "run": folder}`` after it;
- ``{"event": "end", "run": folder}`` before it makes its reports, and waits for an answer; the folder is null where no
  case was run.

The answer is ``{"go": true}`` or ``{"stop": why}``. A turn lasts until the session waits again or has ended, so that
nothing it does in between falls into the other's turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from mpscale.core.wire import die_with_parent

VERSION = 1
"""Of the above; raised when the two ends of different versions would not understand each other."""

VARIABLE = "MPSCALE_TURNS"
"""The environment variable that invites a session."""


class Stopped(Exception):
    """No turn is given any more. The message says why."""


def invitation(descriptor: int, seed: int, entry: Mapping[str, Any]) -> str:
    """The value of :data:`VARIABLE` for a session.

    Args:
        descriptor: of its end of a pair of sockets.
        seed: of the order of its cases.
        entry: what its run.json says of it under ``interleaved``.
    """
    return json.dumps({"descriptor": descriptor, "seed": seed, "entry": dict(entry)})


def join(environ: MutableMapping[str, str]) -> Turns | None:
    """This process's end where it has been invited, else None.

    The invitation is taken out of ``environ``: a pytest that a test starts is not the one that is meant.
    """
    text = environ.pop(VARIABLE, None)
    if text is None:
        return None
    told = json.loads(text)
    # A process that a shell has put into the background ignores SIGINT, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    die_with_parent()
    return Turns(told["descriptor"], told["seed"], told["entry"])


class Turns:
    """Asks for turns.

    Args:
        descriptor: of the socket.
        seed: of the order of the cases, the same for both sessions.
        entry: for run.json.
    """

    def __init__(self, descriptor: int, seed: int, entry: Mapping[str, Any]) -> None:
        # Held open by a process that the session left behind, it would say that the session lives.
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self.seed, self.entry = seed, dict(entry)

    def plan(self, cases: Sequence[Mapping[str, Any]], turn_s: float) -> None:
        """Says which cases there will be.

        Args:
            cases: with the keys that the head of this module names.
            turn_s: the longest that this session may be silent in a turn.
        """
        self._send("plan", cases=[dict(case) for case in cases], turn_s=turn_s)

    def wait(self, case: str) -> None:
        """Waits until it is this session's turn.

        Args:
            case: id of the case that it is for.

        Raises:
            Stopped: it is not to be run.
        """
        self._send("ready", case=case)
        self._answer()

    def done(self, case: str, **facts: Any) -> None:
        """Says how a case came out."""
        self._send("done", case=case, **facts)

    def end(self, run: str | None) -> None:
        """Waits until the other session does nothing that reports made here would disturb.

        Args:
            run: the run's folder, None where no case was run.
        """
        self._send("end", run=run)
        # Who stops the wait for the end wants the end.
        with contextlib.suppress(Stopped, KeyboardInterrupt):
            self._answer()

    def _send(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        # Whether the other end is gone is noticed when an answer is waited for.
        with contextlib.suppress(OSError):
            while line:
                line = line[os.write(self._descriptor, line) :]

    def _answer(self) -> None:
        line = b""
        while not line.endswith(b"\n"):
            try:
                byte = os.read(self._descriptor, 1)
            except OSError:
                byte = b""
            if not byte:
                raise Stopped("mpscale ab is gone")
            line += byte
        answer = json.loads(line)
        if "stop" in answer:
            raise Stopped(str(answer["stop"]))


def about() -> dict[str, Any]:
    """What this environment says of itself before anything is run: versions, and what of it does not work."""
    import importlib
    import platform
    import re
    from importlib import metadata

    from mpscale import __version__
    from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION

    broken: dict[str, str] = {}
    modules = {}
    for name in ("pytest", "pytest_benchmark", "tensorflow"):
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:  # a broken installation fails in any way
            broken[name] = f"{type(error).__name__}: {error}"
    packages: dict[str, str] = {}
    for distribution in metadata.distributions():
        # Of two of one name the first is the one that is imported.
        packages.setdefault(re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower(), distribution.version)
    if "tensorflow" in modules:
        # It comes under several names: tensorflow-cpu, tf-nightly.
        packages["tensorflow"] = modules["tensorflow"].__version__
    if not any(entry.name == "mpscale" for entry in metadata.entry_points(group="pytest11")):
        broken["mpscale"] = "it is not installed, so its pytest plug-in is not found"
    return {
        "turns": VERSION,
        "method_version": METHOD_VERSION,
        "schema_version": SCHEMA_VERSION,
        "python": platform.python_version(),
        "packages": {**packages, "mpscale": __version__},
        "broken": broken,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(about()) + "\n")
