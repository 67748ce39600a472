"""The lock of a run's folder: only one process writes it. The kernel frees the lock when that process dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import stat
from pathlib import Path
from typing import Any

NAME = "run.lock"
"""In the folder of a run, as long as a process writes there, and after one that was killed. Holds its pid and host."""

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_TRIES = 10


class RunIsHeld(Exception):
    """Another process writes the run. The message says which one."""


class RunLock:
    """A held lock.

    Args:
        path: the file.
        descriptor: of the open file.
        works: whether the file system has locks. Without them, only a live process on this host is noticed.
    """

    def __init__(self, path: Path, descriptor: int, works: bool) -> None:
        self._path, self._descriptor, self.works = path, descriptor, works

    @classmethod
    def take(cls, folder: Path) -> RunLock:
        """Take the lock of a run.

        Raises:
            RunIsHeld: another process has it.
            OSError: the file cannot be made, or is something else than a file.
        """
        path = folder / NAME
        for _ in range(_TRIES):
            # A link could lead to any file. O_NONBLOCK: a FIFO must not make this wait.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path, flags, 0o644)
            try:
                works = _locked(descriptor, path)
                if _is_at(path, descriptor):
                    _sign(descriptor, path)
                    return cls(path, descriptor, works)
            except BaseException:
                os.close(descriptor)
                raise
            # Its holder removed the file just now.
            os.close(descriptor)
        raise RunIsHeld(f"other processes take and free {path} all the time")

    @property
    def is_in_place(self) -> bool:
        """Whether the file is still there; not if the folder was deleted or moved."""
        return self._descriptor >= 0 and _is_at(self._path, self._descriptor)

    def free(self) -> None:
        """Free the lock and remove its file: it names a host, and folders of runs get published."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            if self.is_in_place:
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1


def _locked(descriptor: int, path: Path) -> bool:
    """Lock the open file; return whether the file system can."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "is not a plain file", str(path))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read(descriptor)
        if error.errno in _TAKEN:
            raise RunIsHeld(_words(holder)) from None
        if _is_alive(holder):
            raise RunIsHeld(_words(holder)) from None
        return False
    return True


def _sign(descriptor: int, path: Path) -> None:
    """Write into the file who holds the lock; remove it if that is impossible, as on a full disk."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there, here = path.lstat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "start": _start(os.getpid())}


def _start(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks: a later process may have the same pid."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote the file runs on this host. Of another host that cannot be known."""
    pid = holder.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31 or holder.get("host") != platform.node() or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _start(pid) == holder.get("start")


def _words(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on host {holder.get('host') or 'unknown'}"
