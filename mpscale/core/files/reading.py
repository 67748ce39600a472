"""How a file of unknown origin is opened and read.

A run may come from anywhere: another machine, an artifact, a disk that was full, a stranger. Only regular files are
opened, since a pipe may never begin and a device never end. No more is read than such a file can hold, after unpacking
too. JSON comes without what breaks its readers later: deep nesting, integers of any length, text that no file can hold.
"""

from __future__ import annotations

import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscale.core.reason import encodable

_MIB = 2**20


class RunError(Exception):
    """A run that does not exist, or has a broken file. The message names it, and what to do."""


class NoSuchFileError(RunError):
    """There is no file at the path."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds.

    Args:
        name: for messages, with its article.
        most_mib: the largest such file that is read, in MiB, unpacked too.
    """

    name: str
    most_mib: int

    @property
    def most(self) -> int:
        """The largest such file in bytes."""
        return self.most_mib * _MIB


MOST_CASES = 50_000
"""The largest number of cases of a run. At five seconds each they take three days."""
# A case takes 8 kB of a journal and 5 kB of a cases.csv.
JOURNAL = Content("a journal", 512)
CASES = Content("a cases.csv", 256)
MOST_LINE = 8 * _MIB
"""The longest line of a journal or row of a table in bytes. A usual one has 5 kB."""
INFO = Content("a run.json", 16)
"""The plan of 50,000 cases takes 3 MB, and the rest of such a file a few kB."""
MOST_STEPS = 10_000_000
"""The largest number of steps of a training."""
STEPS = Content("a log of steps", 512)
"""A step takes up to 50 bytes."""
MOST_SAMPLES = 1_000_000
"""The largest number of GPU samples of a file that is read. While power changes all the time, there are 20 a second, so
that this is half a day; one that would repeat the one before is not written, so most cases have a few thousand."""
SAMPLES = Content("a file of GPU samples", 256)
"""A sample takes up to 250 bytes."""
SETTINGS = Content("a file of settings", 4)
SUMMARY = Content("a probe.json, comparison.json or list of files", 16)
REPORT = Content("a report", 256)

_DEEPEST = 32
"""Nesting of JSON. What mpscale writes has six levels; Python's own functions fail at some hundreds."""
_LARGEST = 2**63
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_UTF_8 = {
    b"\xff\xfe": "UTF-16, as spreadsheets save `Unicode text`",
    b"\xfe\xff": "UTF-16, as spreadsheets save `Unicode text`",
    b"PK": "a zip archive, as spreadsheets save their own files",
    b"\x1f\x8b": "compressed with gzip",
}


def opened(path: Path) -> io.FileIO:
    """Open a regular file, or a link to one.

    Raises:
        RunError: there is no such file, it is something else, or it cannot be opened.
    """
    try:
        # Opening a device may already do something.
        _check_regular(path, os.stat(path).st_mode)  # noqa: PTH116
        # A pipe may have taken its place in the meantime; opening that would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoSuchFileError(f"{path}: no such file") from error
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise NoSuchFileError(f"{path}: no such file: {error}") from error
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except RunError:
        os.close(descriptor)
        raise
    return io.FileIO(descriptor)


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = next((name for is_one, name in _KINDS if is_one(mode)), "something else")
        raise RunError(f"{path}: is {what} and not a file, so it is not read; remove it, or put the file in its place")


def read_bytes(path: Path, content: Content) -> bytes:
    """Read a whole file.

    Raises:
        RunError: as :func:`opened`, or it is too large, or it cannot be read.
    """
    with opened(path) as file:
        try:
            if os.fstat(file.fileno()).st_size > content.most:
                raise _too_large(path, content)
            parts, left = [], content.most + 1
            # Files of /proc say that they are empty.
            while left and (part := file.read(min(left, 4 * _MIB))):
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from error
    if not left:
        raise _too_large(path, content)
    return b"".join(parts)


def read_lines(path: Path, content: Content) -> Iterator[tuple[bytes, bool]]:
    """Read a file line by line; yield each with its end, and whether it is whole.

    A line longer than :data:`MOST_LINE` is not whole: only its beginning comes, with an end.

    Raises:
        RunError: as :func:`read_bytes`.
    """
    with io.BufferedReader(opened(path)) as file:
        try:
            if os.fstat(file.fileno()).st_size > content.most:
                raise _too_large(path, content)
            first, left = True, content.most
            while line := file.readline(MOST_LINE):
                left -= len(line)
                whole = len(line) < MOST_LINE or line.endswith(b"\n")
                rest = line
                while not whole and left >= 0 and rest and not rest.endswith(b"\n"):
                    rest = file.readline(MOST_LINE)
                    left -= len(rest)
                if left < 0:
                    raise _too_large(path, content)
                yield (line.removeprefix(_BYTE_ORDER_MARK) if first else line), whole
                first = False
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from error


def _too_large(path: Path, content: Content) -> RunError:
    return RunError(
        f"{path}: is larger than {content.most_mib} MiB, and {content.name} is not, so it is not read; take the "
        "original file"
    )


def unpack(path: Path, content: Content) -> bytes:
    """Read a whole file that was compressed with gzip. It is checked by its own checksum.

    Raises:
        RunError: as :func:`read_bytes`, or it was cut off or changed.
    """
    packed = read_bytes(path, content)
    # Not the module gzip, which reads a header byte by byte, and takes what follows the end of the data for more.
    engine = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        found = engine.decompress(packed, content.most + 1)
    except zlib.error as error:
        raise RunError(f"{path}: was changed, or is not compressed with gzip: {error}") from error
    if len(found) > content.most:
        raise _too_large(path, content)
    if not engine.eof:
        raise RunError(f"{path}: was cut off: the end of the compressed data is missing")
    if engine.unused_data:
        raise RunError(f"{path}: was changed: something follows the end of the compressed data")
    return found


def text_of(path: Path, content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        RunError: it is something else; the message says what, and in which line.
    """
    check_text(path, content)
    return content.decode("utf-8-sig")


def check_text(path: Path, content: bytes, cure: str = "save it as UTF-8, or take the original file") -> None:
    """Check that a file holds UTF-8 without zero bytes.

    Args:
        path: for messages.
        content: of the file.
        cure: what to do otherwise.

    Raises:
        RunError: it holds something else.
    """
    if (what := other_encoding(content)) is not None:
        raise RunError(f"{path}: it is not UTF-8 but {what}; {cure}")
    if b"\0" in content:
        raise RunError(f"{path}: it holds zero bytes, as UTF-16 does; {cure}")
    # Text would take up to four times as much memory as these bytes; a character of UTF-8 never holds a line end.
    start = 0
    while start < len(content):
        end = content.find(b"\n", start + _MIB) + 1 or len(content)
        try:
            content[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            place = start + error.start
            line = content.count(b"\n", 0, place) + 1
            raise RunError(
                f"{path}, line {line}: it is not UTF-8, with the byte 0x{content[place]:02x}; {cure}"
            ) from error
        start = end


def other_encoding(content: bytes) -> str | None:
    """What the beginning of a file shows it to be, if that is known and not UTF-8."""
    return next((what for start, what in _NOT_UTF_8.items() if content.startswith(start)), None)


def read_text(path: Path, content: Content) -> str:
    """Read a whole file of UTF-8.

    Raises:
        RunError: as :func:`read_bytes` and :func:`text_of`.
    """
    return text_of(path, read_bytes(path, content))


def lines_of(path: Path, content: bytes) -> Iterator[str]:
    """Yield the lines of UTF-8 with their ends, without the text as a whole, which takes up to four times its bytes.

    Raises:
        RunError: a line is longer than :data:`MOST_LINE`. One of nothing but commas would fill the memory.
    """
    text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    number = 0
    while line := text.readline(MOST_LINE):
        number += 1
        if len(line) == MOST_LINE:
            raise RunError(f"{path}, line {number}: is longer than {MOST_LINE:,} characters; no row of a run is")
        yield line


def read_json(path: Path, content: Content) -> Any:
    """Read a file of JSON; see :func:`parse_json`.

    Raises:
        RunError: as :func:`read_text`, or it is not JSON that can be used.
    """
    try:
        return parse_json(read_text(path, content))
    except ValueError as error:
        raise RunError(f"{path}: not readable as JSON: {error}; take the original file") from error


def parse_json(text: str) -> Any:
    """Return plain values from JSON of unknown origin. Lone surrogates are escaped, so that any file can hold the text.

    Raises:
        ValueError: it is not JSON, is nested deeper than 32 levels, or holds an integer that does not fit into 64 bits.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer with thousands of digits
        raise ValueError(_TOO_LONG) from error
    _clean(found)
    return encodable(found) if isinstance(found, str) else found


_TOO_DEEP = f"its values are nested deeper than {_DEEPEST} levels"
_TOO_LONG = "it holds an integer that does not fit into 64 bits"


def _clean(top: Any) -> None:
    """Check plain values and make their text safe, in place. Not by recursion, which deep nesting would exhaust."""
    level = [top]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key, part in list(value.items()):
                    if not key.isascii() and (safe := encodable(key)) != key:
                        del value[key]
                        key = safe
                    value[key] = encodable(part) if isinstance(part, str) else part
                below += value.values()
            elif isinstance(value, list):
                value[:] = [encodable(part) if isinstance(part, str) else part for part in value]
                below += value
            elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
                raise ValueError(_TOO_LONG)
        level = [value for value in below if not isinstance(value, str | float | bool | None)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
