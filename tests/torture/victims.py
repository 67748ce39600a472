"""The processes of a run, as /proc has them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torture.suite import MARKER

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KINDS = ("session", "warm parent", "worker", "child of a worker", "GPU monitor", "keeper", "other", "all at once")


@dataclass(frozen=True)
class Victim:
    """A living process of a run."""

    pid: int
    parent: int
    kind: str
    command: str


def victims(token: str, session: int = -1) -> list[Victim]:
    """Return the processes of a run that are alive.

    Args:
        token: the value of the marker, or how it begins.
        session: the process of pytest.
    """
    mark = f"{MARKER}={token}".encode()
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if not any(each.startswith(mark) for each in (entry / "environ").read_bytes().split(b"\0")):
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it has ended, or is somebody else's
            continue
        if state not in "ZX":
            found[int(entry.name)] = int(parent), command
    return [Victim(pid, parent, _kind(pid, found, session), line) for pid, (parent, line) in found.items()]


def _kind(pid: int, found: Mapping[int, tuple[int, str]], session: int) -> str:
    parent, line = found[pid]
    if pid == session:
        return "session"
    if "keeper.py" in line:
        return "keeper"
    if "mpscale.telemetry.__main__" in line:
        return "GPU monitor"
    if "mpscale.worker.__main__" in line:
        # A fork has the command line of its parent.
        above = _kind(parent, found, session) if parent in found else ""
        if "--serve" in line:
            return {"warm parent": "worker", "worker": "child of a worker"}.get(above, "warm parent")
        return "child of a worker" if above == "worker" else "worker"
    return "child of a worker" if "sleep 1000" in line else "other"


def strike(victim: Victim, number: signal.Signals) -> bool:
    """Send a signal; return whether the process still existed."""
    try:
        os.kill(victim.pid, number)
    except ProcessLookupError:
        return False
    return True


def left(token: str, seconds: float) -> list[Victim]:
    """Return the processes that are still alive after so many seconds."""
    end = time.monotonic() + seconds
    while (alive := victims(token)) and time.monotonic() < end:
        time.sleep(0.1)
    return alive
