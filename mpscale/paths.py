"""Folders that users name, and whether a run can be kept in them."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

_PROBE = bytes(1 << 16)
"""More than a file system keeps beside the name of a file: one that is full has no room for it."""


def folder(text: str) -> Path:
    """The type of a command line's option that takes a folder.

    Raises:
        argparse.ArgumentTypeError: it can be none.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, and nothing was given")
    try:
        # A shell leaves ~ alone in --option=~/folder.
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} names the home of a user whom this machine does not know") from None


def why_not_writable(wanted: Path) -> str | None:
    """Why no file can be made in the folder ``wanted``, None where one can. Leaves nothing behind.

    Found out by doing it: permissions say yes to root also in /proc, and tell nothing of a full file system.
    """
    made: list[Path] = []
    try:
        for each in (*reversed(wanted.parents), wanted):
            if not each.is_dir():
                each.mkdir()
                made.append(each)
        with tempfile.TemporaryFile(dir=wanted) as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        culprit = Path(error.filename) if isinstance(error.filename, str) else wanted
        # What is in the way of a folder, and not the temporary file that could not be made in it.
        place = culprit if culprit == wanted or culprit in wanted.parents else wanted
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        return f"{place}: {'something else has this name' if in_the_way else error.strerror}"
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
    return None


def file_name(text: str) -> str:
    """``text`` as the name of a file. It is UTF-8 on the disk, also where Python takes the file system for ASCII."""
    return os.fsdecode(text.encode("utf-8"))
