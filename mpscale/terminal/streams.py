"""Standard streams: the characters, the colours and the width that they can show."""

from __future__ import annotations

import codecs
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ERRORS = "mpscale"
"""Name of the error handler: without it, Python stops at a character that the terminal's encoding lacks."""

_REPLACEMENTS = {"–": "-", "—": "-", "−": "-", "…": "...", "°": "deg ", "×": "x", "±": "+/-", "²": "2", "·": "|"}  # noqa: RUF001
"""Any other character that the encoding lacks is shown as an escape such as \\xf6."""


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    first = error.object[error.start]
    if first in _REPLACEMENTS:
        return _REPLACEMENTS[first], error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )


codecs.register_error(_ERRORS, _replace)


_UNSEEN = re.compile(
    "[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u2800\\u3164\\ufe00-\\ufe0f\\uffa0\\U000e0100-\\U000e01ef]"
)
"""Characters that Python takes for printable and that nobody sees: fillers, joiners, choices of a glyph."""


def visible(text: str) -> str:
    r"""Return ``text`` with an escape such as ``\u202e`` for each character that is not seen, or changes what is seen.

    These are control characters, which a terminal obeys; those that turn the direction of the text; spaces of other
    kinds and of no width; and what no font has. Line ends and tabs stay. Names and errors come from users' own suites
    and from strangers' runs, and may hold anything.
    """
    if (text.isascii() and text.isprintable()) or (text.isprintable() and not _UNSEEN.search(text)):
        return text
    return "".join(
        c if c in "\n\t" or (c.isprintable() and not _UNSEEN.match(c)) else c.encode("unicode_escape").decode()
        for c in text
    )


def on_one_line(text: str) -> str:
    """Return ``text`` as :func:`visible` does, on one line: a run of spaces, tabs and line ends becomes a space."""
    return visible(re.sub(r"[ \t\n\r\f\v]+", " ", text).strip(" "))


def adapt_standard_streams() -> None:
    """Make standard output and standard error replace characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        # Absent if the process has no such stream, or if it was replaced by some other object.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def as_typed(text: str) -> str:
    """Return a command-line argument as the user typed it, even if Python mistook a UTF-8 terminal for ASCII."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


@dataclass(frozen=True, slots=True)
class Surface:
    """What a stream can show.

    Args:
        columns: width of the terminal; None if it is none, so that lines may have any length.
        colour: whether text may be coloured.
        live: whether a line may be updated in place.
        encoding: of the stream; None if it is unknown.
    """

    columns: int | None = None
    colour: bool = False
    live: bool = False
    encoding: str | None = None

    def printable(self, text: str) -> str:
        """Return ``text`` without characters that the encoding lacks."""
        return text.encode(self.encoding, _ERRORS).decode(self.encoding) if self.encoding else text

    def paint(self, text: str, style: str) -> str:
        """Return ``text`` in a style of rich, such as ``bold red``, if there is colour."""
        if not (self.colour and style and text):
            return text
        from rich.color import ColorSystem
        from rich.style import Style

        return Style.parse(style).render(text, color_system=ColorSystem.STANDARD)

    def wrapped(self, text: str) -> str:
        """Return ``text`` with its lines broken between words, where the terminal would break them anywhere.

        What is not seen becomes visible, as in :func:`visible`.
        """
        text = visible(text)
        if self.columns is None:
            return text
        wrapper = textwrap.TextWrapper(
            self.columns, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
        )
        return "\n".join(wrapper.fill(line) for line in text.split("\n"))


PIPE = Surface()
"""A file, or a pipe to a program: everything in full, in plain text."""


def surface_of(stream: Any, environ: Mapping[str, str] = os.environ) -> Surface:
    """Return what ``stream`` can show.

    ``NO_COLOR``, ``TERM=dumb`` and ``CI`` switch off colours and live lines; ``FORCE_COLOR`` brings colours back, even
    into a pipe, but nothing beats ``NO_COLOR``.
    """
    try:
        terminal = bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream, or a closed one
        terminal = False
    forced = bool(environ.get("FORCE_COLOR")) and not environ.get("NO_COLOR")
    return Surface(
        columns=_columns(stream, environ) if terminal else None,
        colour=forced or (terminal and not is_plain(environ)),
        live=terminal and not is_plain(environ),
        encoding=getattr(stream, "encoding", None),
    )


_MOST_DIGITS = 6
"""Of a width; no terminal has a million columns."""


def is_plain(environ: Mapping[str, str]) -> bool:
    """Whether the environment switches off colours and live lines."""
    return bool(environ.get("NO_COLOR")) or environ.get("TERM") == "dumb" or in_ci(environ)


def in_ci(environ: Mapping[str, str]) -> bool:
    """Whether this is a job of continuous integration: nobody watches, and a log keeps every version of a line."""
    return environ.get("CI", "").lower() not in ("", "0", "false")


def _columns(stream: Any, environ: Mapping[str, str]) -> int:
    asked = environ.get("COLUMNS", "")
    if asked.isdecimal() and len(asked) <= _MOST_DIGITS and int(asked) > 0:
        return int(asked)
    try:
        # A terminal whose width is unknown says 0.
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80
