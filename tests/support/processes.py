"""Processes that a run may have left behind."""

from __future__ import annotations

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
