"""Temporary files and folders for a place where others tidy up, which may be full, and where killed runs leave theirs.

A folder is locked as long as its process lives: the kernel releases the lock, also after SIGKILL, and systemd-tmpfiles
leaves locked folders alone. The next run removes folders that are marked as mpscale's and no longer locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from mpscale.core.files.errors import is_of_the_disk, why

_PREFIX = "mpscale-"
_MARK = ".made-by-mpscale"
"""The file that marks a folder. It is written once the folder is locked, so a marked folder without a lock is free."""


class NoTemporaryFile(OSError):
    """A temporary file or folder could not be made; the text says where, why and what to do."""


class TemporaryFolder:
    """A folder that exists whenever it is asked for: if it was removed, another one is made.

    As a context manager it gives its path. Nothing is made before that is asked for.

    Args:
        purpose: part of its name.
    """

    def __init__(self, purpose: str = "") -> None:
        self._prefix = f"{_PREFIX}{purpose}-" if purpose else _PREFIX
        self._path: Path | None = None
        self._lock: int | None = None

    @property
    def path(self) -> Path:
        """The folder.

        Raises:
            NoTemporaryFile: it could not be made.
        """
        if self._path is None or not self.exists:
            self.close()
            with _errors_in_words():
                self._path = Path(tempfile.mkdtemp(prefix=self._prefix))
                self._lock = _open(self._path)
                if _locked(self._lock):
                    (self._path / _MARK).touch()
        return self._path

    @property
    def exists(self) -> bool:
        """Whether the folder that was last made is in its place."""
        if self._path is None or self._lock is None:
            return False
        with contextlib.suppress(OSError):
            return os.path.samestat(self._path.lstat(), os.fstat(self._lock))
        return False

    def close(self) -> None:
        """Remove it."""
        if self.exists:
            assert self._path is not None and self._lock is not None
            _remove(self._path, self._lock)
        if self._lock is not None:
            os.close(self._lock)
        self._path = self._lock = None

    def keep(self) -> None:
        """Leave it to the user: it stays after :meth:`close`, and no run removes it."""
        if self.exists:
            assert self._lock is not None
            with contextlib.suppress(OSError):
                os.unlink(_MARK, dir_fd=self._lock)
            os.close(self._lock)
            self._path = self._lock = None

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def temporary_file() -> IO[bytes]:
    """Return a file without a name, so that nobody can remove it. What is written goes to its end.

    Raises:
        NoTemporaryFile: it could not be made.
    """
    with _errors_in_words():
        return tempfile.TemporaryFile("a+b", prefix=_PREFIX, buffering=0)


@contextlib.contextmanager
def _errors_in_words() -> Iterator[None]:
    """Raise :class:`NoTemporaryFile` in place of another error of the file system."""
    try:
        yield
    except OSError as error:
        where = tempfile.gettempdir() if tempfile.tempdir else "any of the usual folders"
        cure = "; or set TMPDIR to another folder" if is_of_the_disk(error) else ""
        raise NoTemporaryFile(error.errno, f"no temporary file can be made in {where}: {why(error)}{cure}") from error


def remove_left_behind() -> list[Path]:
    """Remove temporary folders of processes that were killed, and return them.

    Only folders of this user that are marked as mpscale's. No link is followed, and what is in use stays.
    """
    removed = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(tempfile.gettempdir()):
            path = Path(entry.path)
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False) and _remove_if_free(path):
                removed.append(path)
    return removed


def _remove_if_free(folder: Path) -> bool:
    """Remove a folder if it is ours and its process has ended; return whether it is gone."""
    try:
        opened = _open(folder)
    except OSError:
        return False
    try:
        mark = os.stat(_MARK, dir_fd=opened, follow_symlinks=False)
        ours = stat.S_ISREG(mark.st_mode) and mark.st_uid == os.fstat(opened).st_uid == os.geteuid()
        if not ours or not _locked(opened):
            return False
        # It removes links and not what they lead to, and nothing of another folder that has taken this one's place.
        _remove(folder, opened)
        return not folder.exists()
    except OSError:
        return False
    finally:
        os.close(opened)


def _remove(folder: Path, opened: int) -> None:
    """Remove a folder, its mark last: if this is cut short, or somebody still writes there, the next run goes on."""
    with contextlib.suppress(OSError):
        for name in os.listdir(opened):
            if name == _MARK:
                continue
            if stat.S_ISDIR(os.stat(name, dir_fd=opened, follow_symlinks=False).st_mode):
                shutil.rmtree(name, ignore_errors=True, dir_fd=opened)
            else:
                os.unlink(name, dir_fd=opened)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_MARK, dir_fd=opened)
        try:
            folder.rmdir()
        except OSError:
            os.close(os.open(_MARK, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=opened))


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _locked(folder: int) -> bool:
    """Lock an open folder; return whether that was possible."""
    with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
