"""How every file is written: whole or not at all, and never through a link that leads out of its folder.

A folder may come from a stranger, with links in it that lead to files of the user. Results folders, and files that the
user names on the command line, are the user's own: what leads to them may be a link. What lies below them may not.

This is safe against whatever a folder holds when it is opened. It is no protection against a process that runs as the
same user at the same time: that can write the user's files by itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_PARTIAL = re.compile(r"\..{1,40}\.[0-9a-f]{16}\.mpscale-partial", re.S)
"""Names of files that are not yet whole."""
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LINK = "it is a link, and mpscale writes only into the folder itself"


@contextlib.contextmanager
def replacing(path: Path, root: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a new file, which takes the place of ``path`` when the block ends without an error.

    Until then it has another name in the same folder. If the block fails, it is removed; if the process is killed, the
    next file that is written into that folder removes it. A link at ``path`` is replaced, not followed. A file that is
    replaced hands on its permissions.

    Args:
        path: of the file.
        root: a folder above it that may be a link. It and the folders below it are made where they are missing; those
            below it must not be links. None for the folder of the file, which must exist.

    Raises:
        OSError: the file cannot be written; ``filename`` is its path.
    """
    with _named(path), _opened(path, root) as folder:
        _remove_leftovers(folder)
        partial, file = _new_file(folder, path.name)
        try:
            with file:
                yield file
                file.flush()
                with contextlib.suppress(FileNotFoundError):
                    there = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
                    if stat.S_ISREG(there.st_mode):
                        os.fchmod(file.fileno(), there.st_mode & 0o777)
                os.fsync(file.fileno())
                # The lock goes with the file: it is held until nobody can take the file for a leftover.
                os.rename(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            # A full disk needs the space.
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder)
            raise


def write(path: Path, content: str | bytes, root: Path | None = None) -> None:
    """Write a whole file or none; see :func:`replacing`.

    Text becomes UTF-8. Names of folders need not be valid text: their lone surrogates become escapes.

    Raises:
        OSError: the file cannot be written; ``filename`` is its path.
    """
    with replacing(path, root) as file:
        file.write(_bytes(content))


def write_new(path: Path, content: bytes, root: Path) -> None:
    """Write a file that is not there yet, into a folder that nobody reads before it is whole.

    :func:`write` looks for leftovers and waits for the disk each time, which takes minutes for ten thousand files.

    Args:
        path: of the file.
        content: of the file.
        root: as in :func:`replacing`.

    Raises:
        OSError: the file cannot be written, or is there; ``filename`` is its path.
    """
    with _named(path), _opened(path, root) as folder, open(_new(path.name, folder), "wb") as file:
        file.write(content)


def write_named(path: Path, content: str | bytes) -> None:
    """Write a file that the user has named, whole or not at all.

    The name may be a link: what it leads to is replaced. It may also be a terminal, a pipe or a device: then it is
    written as it is.

    Raises:
        OSError: the file cannot be written; ``filename`` is its path.
    """
    try:
        if not _is_stream(path):
            write(Path(os.path.realpath(path)), content)
            return
        sys.stdout.flush()
        with path.open("ab") as stream:
            stream.write(_bytes(content))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_to_append(path: Path, root: Path | None = None) -> IO[bytes]:
    """Open a file for appending, without a buffer. It must exist, and must not be a link.

    Args:
        path: of the file.
        root: as in :func:`replacing`.

    Raises:
        OSError: it cannot be opened, or is not a regular file; ``filename`` is its path.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with _named(path), _opened(path, root) as folder:
        try:
            file = os.open(path.name, flags, dir_fd=folder)
        except OSError as error:
            raise OSError(error.errno, _LINK if error.errno == errno.ELOOP else error.strerror, str(path)) from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(file, "ab", buffering=0)


def remove(path: Path, root: Path) -> None:
    """Remove a file or a link, if it is there. Folders between ``root`` and it must not be links.

    Raises:
        OSError: it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError), _named(path), _opened(path, root, make=False) as folder:
        os.unlink(path.name, dir_fd=folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left in a folder: files that never became whole."""
    with contextlib.suppress(OSError), _opened(folder / "_", folder, make=False) as opened:
        _remove_leftovers(opened)


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")


def _is_stream(path: Path) -> bool:
    """Whether bytes must be written to what is there: it is no file, or one that this process already has open."""
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
    where = os.path.realpath(path.parent)
    # /dev/stdout may be a file, which whoever has opened it would lose if it were replaced.
    return not is_file or where == "/dev" or f"{where}/".startswith("/proc/")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors name the file, not a part of its path or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (isinstance(error.filename, str) and "/" in error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _opened(path: Path, root: Path | None, make: bool = True) -> Iterator[int]:
    """Open the folder of a file, without following a link below ``root``."""
    *between, name = (path.name,) if root is None else path.relative_to(root).parts or ("",)
    if name in ("", ".", "..") or ".." in between:
        raise OSError(errno.EINVAL, "it does not name a file in its folder", str(path))
    place = path.parent if root is None else root
    if make and root is not None:
        place.mkdir(parents=True, exist_ok=True)
    folder = os.open(place, _FOLDER)
    try:
        for part in between:
            place /= part
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            try:
                below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            except OSError as error:
                said = _LINK if place.is_symlink() else error.strerror
                raise OSError(error.errno, said, str(place)) from error
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


def _new(name: str, folder: int) -> int:
    return os.open(name, _NEW_FILE, 0o666, dir_fd=folder)


def _new_file(folder: int, name: str) -> tuple[str, IO[bytes]]:
    """Make a file with a name of its own, and lock it, which says that somebody writes it."""
    while True:
        partial = f".{name[:40]}.{secrets.token_hex(8)}.mpscale-partial"
        file = _new(partial, folder)
        with contextlib.suppress(OSError):  # some network drives have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return partial, os.fdopen(file, "wb")
        os.close(file)  # somebody took it for a leftover before it was locked


def _remove_leftovers(folder: int) -> None:
    """Remove files that are not whole, and that nobody writes any more."""
    try:
        names = [name for name in os.listdir(folder) if _PARTIAL.fullmatch(name)]
    except OSError:
        return  # a folder may be written without being listed
    for name in names:
        with contextlib.suppress(OSError):
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(file)
