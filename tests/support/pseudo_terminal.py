"""A terminal of any width, whose output a test reads."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator


class PseudoTerminal:
    """A stream that is a terminal, and what was written to it.

    Args:
        columns: width.
        encoding: of the stream.
    """

    def __init__(self, columns: int, encoding: str = "utf-8") -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream = os.fdopen(theirs, "w", encoding=encoding)
        self._read = b""
        # Its buffer is small, and a full one would stop whoever writes.
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def _collect(self) -> None:
        with contextlib.suppress(OSError):  # the other end was closed
            while part := os.read(self._ours, 1 << 16):
                self._read += part

    def close(self) -> str:
        """Return all that was written, with line ends as a program writes them."""
        self.stream.close()
        self._reader.join(timeout=10)
        os.close(self._ours)
        return self._read.decode("utf-8").replace("\r\n", "\n")


@contextlib.contextmanager
def terminal(columns: int, encoding: str = "utf-8") -> Iterator[PseudoTerminal]:
    """Open a terminal; the test closes it to read what was written."""
    opened = PseudoTerminal(columns, encoding)
    try:
        yield opened
    finally:
        if not opened.stream.closed:
            opened.close()


def plain(text: str) -> str:
    """Return a text without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
