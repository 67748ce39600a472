"""What the commands have in common: exit codes, options for output, and messages."""

from __future__ import annotations

import argparse
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from mpscale.config import RESULTS as RESULTS
from mpscale.config import SettingsError, results_folder
from mpscale.core.files.writing import write_named
from mpscale.terminal.progress import LiveLine
from mpscale.terminal.streams import PIPE, Surface, on_one_line, surface_of, visible

OK = 0
FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130

_HALF = 1000
"""Characters of each half of the longest message."""


def take_results_of_the_project(options: argparse.Namespace) -> None:
    """Replace the default results folder by that of ``[tool.mpscale]``, which is read only if it is needed.

    Raises:
        SettingsError: it cannot be read.
    """
    # By identity: a user who gives the same folder means that one.
    if getattr(options, "results", None) is RESULTS:
        options.results = results_folder(Path.cwd())


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` to a command that has no ``--format``."""
    parser.add_argument("--json", action="store_true", help=_JSON)


_JSON = "print one JSON object"


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--format``, ``--json`` and ``--output``."""
    parser.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), default="table", help="output format (default: table)"
    )
    parser.add_argument("--json", dest="format", action="store_const", const="json", help=f"{_JSON}: --format json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to this file, not to the terminal")


def surface(file: Path | None = None) -> Surface:
    """What the place of a result can show: a file, or without one standard output."""
    return PIPE if file is not None else surface_of(sys.stdout)


def write(text: str, file: Path | None, form: str = "table") -> None:
    """Write a result in one of the output formats to a file, or without one to standard output."""
    if file is None:
        # CSV holds names as they are, which a program wants, and a terminal would obey.
        print(visible(text) if form == "csv" and surface().columns is not None else text, end="")
    else:
        write_named(file, text)


def check_output(file: Path | None, option: str = "--output") -> None:
    """Check that the folder of a file to write exists and can have such a file, before a command that takes long.

    Raises:
        SettingsError: it does not, or cannot.
    """
    if file is None:
        return
    try:
        if not file.parent.is_dir():
            raise SettingsError(f"{option} {file}: there is no folder {file.parent}")
        if stat.S_ISDIR(file.stat().st_mode):
            raise SettingsError(f"{option} {file}: it is a folder")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{option} {file}: {getattr(error, 'strerror', None) or error}") from error


def live_line() -> LiveLine:
    """A live line on standard error: standard output is for the result."""

    def write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

    return LiveLine(write, surface_of(sys.stderr))


def say(message: str) -> None:
    """Write a message to standard error, on one line. One that repeats a name without end loses its middle."""
    line = on_one_line(message)
    if len(line) > 2 * _HALF:
        line = f"{line[:_HALF]} ... {line[-_HALF:]}"
    print(f"mpscale: {line}", file=sys.stderr)


def warn(problems: Sequence[str]) -> None:
    """Warn of problems, a line for each."""
    for problem in problems:
        say(f"warning: {problem}")


def fail(message: str) -> int:
    """Write an error message; return the exit code of the command."""
    say(f"error: {message}")
    return USAGE_ERROR
