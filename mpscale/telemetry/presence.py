"""Runs that use one GPU at the same time notice each other, even at moments in which neither computes.

Each leaves a note in a folder that the whole machine shares: a file with its process id and the time, which it keeps
locked. The kernel drops the lock when the process ends, however that happens, so a note without a lock is a dead one's.
Nobody writes to the note of another, so notes of other users, or files that only look like one, do no harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mpscale.core.device import Device

FOLDER = "MPSCALE_NOTES"
"""The environment variable that names the folder; containers that share a GPU can share one. By default it is /tmp."""
_MOST_BYTES = 1000
_PREFIX = "mpscale-gpu-"


@dataclass(frozen=True, slots=True)
class Other:
    """Another run on the GPU.

    Args:
        pid: its process id, None if its note does not say.
        since: when it came.
    """

    pid: int | None
    since: datetime | None

    def __str__(self) -> str:
        who = "a process that does not say which" if self.pid is None else f"process {self.pid}"
        return who if self.since is None else f"{who}, since {self.since:%Y-%m-%d %H:%M:%S} UTC"


class Presence:
    """This run's note on a GPU, as long as it is open. A folder that cannot be used costs the note and nothing else.

    Args:
        device: where the run trains; on a CPU there is no note and nobody else.
        pair: the id that two sessions share that take turns; they are no strangers to each other.
    """

    def __init__(self, device: Device, pair: str | None = None) -> None:
        self._uuid, self._pair = device.uuid, pair
        self._note: Path | None = None
        self._file: int | None = None
        if self._uuid is not None:
            with contextlib.suppress(OSError):
                self._leave_note()

    def others(self) -> list[Other]:
        """The other runs that are there now, the longest there first."""
        return [] if self._uuid is None else _others(self._uuid, self._pair, self._note)

    def close(self) -> None:
        """Remove the note."""
        if self._note is not None:
            with contextlib.suppress(OSError):
                self._note.unlink()
        if self._file is not None:
            os.close(self._file)
        self._note = self._file = None

    def _leave_note(self) -> None:
        name = f"{_begin(str(self._uuid))}{os.getpid()}-{secrets.token_hex(4)}"
        new, note = _folder() / f".{name}", _folder() / name
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            os.fchmod(file, 0o644)  # whatever the umask is: other users shall read it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            about = {"pid": os.getpid(), "since": datetime.now(UTC).isoformat(), "pair": self._pair}
            os.write(file, json.dumps(about).encode())
            new.rename(note)  # once it is locked, or others would take it for a dead one's
        except OSError:
            os.close(file)
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        self._note, self._file = note, file


def words(device: Device, pair: str | None = None) -> str | None:
    """A warning if other runs use the GPU now; None if there are none, or on a CPU."""
    return None if device.uuid is None else beside(_others(device.uuid, pair, None))


def beside(others: list[Other]) -> str | None:
    """Say that other runs use the GPU; None if there are none."""
    if not others:
        return None
    runs = "another run of mpscale uses" if len(others) == 1 else f"{len(others)} other runs of mpscale use"
    return f"{runs} this GPU ({'; '.join(map(str, others))})"


def _folder() -> Path:
    return Path(os.environ.get(FOLDER) or "/tmp")


def _begin(uuid: str) -> str:
    return f"{_PREFIX}{re.sub(r'[^A-Za-z0-9-]', '_', uuid)[:80]}--"


def _others(uuid: str, pair: str | None, own: Path | None) -> list[Other]:
    begin, found = _begin(uuid), []
    try:
        notes = [Path(entry.path) for entry in os.scandir(_folder()) if entry.name.startswith(begin)]
    except OSError:
        return []
    for note in notes:
        if note != own and (about := _held(note)) is not None and (pair is None or about.get("pair") != pair):
            found.append(Other(_pid(about), _since(about)))
    return sorted(found, key=lambda other: (other.since or datetime.max.replace(tzinfo=UTC), other.pid or 0))


def _held(note: Path) -> dict[str, object] | None:
    """What a note says if its process lives; that of a dead one is removed, if it is ours to remove."""
    try:
        # A link or a pipe of this name is none of ours, and must not lead anywhere or hang.
        file = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parsed(os.read(file, _MOST_BYTES))
        note.unlink()
    except OSError:
        pass  # it is another user's
    finally:
        os.close(file)
    return None


def _parsed(text: bytes) -> dict[str, object]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _pid(about: dict[str, object]) -> int | None:
    pid = about.get("pid")
    return pid if type(pid) is int and 0 < pid < 2**31 else None


def _since(about: dict[str, object]) -> datetime | None:
    try:
        return datetime.fromisoformat(str(about.get("since"))).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
