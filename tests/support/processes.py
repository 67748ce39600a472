"""Processes of a run that a test waits for, or that it may have left behind."""

from __future__ import annotations

import time
from pathlib import Path


def processes_in(folder: Path) -> list[str]:
    """Return the command lines of all living processes with this working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def wait_for(condition, what, seconds=90):
    """Return what ``condition`` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found
