"""Text on its way to and from a terminal that is not UTF-8, where Python would stop with a UnicodeEncodeError."""

from __future__ import annotations

import codecs
import os
import sys
from typing import TextIO

_ERRORS = "mpscale"
_PLAIN = {"–": "-", "—": "-", "−": "-", "…": "...", "°": "deg ", "×": "x", "±": "+/-"}  # noqa: RUF001
"""What stands for a character that the terminal does not have; any other is shown by its escape, such as \\xf6."""


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    first = error.object[error.start]
    if first in _PLAIN:
        return _PLAIN[first], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )


codecs.register_error(_ERRORS, _plain)


def adapt_standard_streams() -> None:
    """Has standard output and standard error of this process show what their encoding lacks in another way."""
    for stream in (sys.stdout, sys.stderr):
        # Absent where the process has no such stream, or somebody has put another object in its place.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def printable(text: str, stream: TextIO | None) -> str:
    """``text`` as ``stream`` can show it; as it is where the stream's encoding is unknown."""
    encoding = getattr(stream, "encoding", None)
    return text.encode(encoding, _ERRORS).decode(encoding) if encoding else text


def as_typed(text: str) -> str:
    """An argument of the command line as its user typed it, where Python took the terminal's UTF-8 for ASCII."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text
