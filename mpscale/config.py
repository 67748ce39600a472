"""Where a user's choices come from: ``[tool.mpscale]``, and options that the plug-in and the command share."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from mpscale.core.files.errors import why
from mpscale.core.files.reading import MOST_STEPS, SETTINGS, RunError, read_text
from mpscale.core.loss_scale import parse_number

N = TypeVar("N", int, float)
T = TypeVar("T", covariant=True)

MOST_SHOWN = 60
"""Characters of a value that a message repeats."""


class SettingsError(ValueError):
    """``[tool.mpscale]`` is not valid. The message names the file, the key and what is allowed."""


@dataclass(frozen=True, slots=True)
class ProjectSettings:
    """The table ``[tool.mpscale]`` of a pyproject.toml.

    Args:
        baseline: run that a pytest run is compared with; a path is relative to the working directory.
        fail_on: gates.
        strict: whether a gate that cannot tell also fails the build.
        threshold: smallest change of step time worth reporting, as text.
        compare_by: ``name`` to compare all versions of a workload, ``model`` to compare only the same model.
        others: values of the other keys, which are those of the plug-in's options and are not checked here.
        path: of the file; None without one.
    """

    baseline: str | None = None
    fail_on: Sequence[str] = ()
    strict: bool = False
    threshold: str | None = None
    compare_by: str = "model"
    others: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def override(self, **given: Any) -> ProjectSettings:
        """Return these settings with values from the command line, which win; None means not given."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


KINDS: dict[str, str] = {
    "baseline": "a string",
    "fail-on": "a list of strings",
    "strict": "true or false",
    "threshold": 'a string such as "5%"',
    "compare-by": '"model" or "name"',
}
"""Settings that a comparison has, too."""


def load(start: Path) -> ProjectSettings:
    """Read the nearest pyproject.toml in ``start`` or above it. Without that file or table, return the defaults.

    Keys other than those of a comparison are returned as they are: :mod:`mpscale.pytest_plugin.project` knows them.

    Raises:
        SettingsError: the file cannot be read, or a setting of a comparison has the wrong type.
    """
    path, table = table_of(start)
    if path is None:
        return ProjectSettings()
    for key in KINDS:
        if key in table and (problem := why_unfit(key, table[key])):
            raise SettingsError(f"{path}: {problem}")
    return ProjectSettings(
        baseline_of(path, table["baseline"]) if "baseline" in table else None,
        tuple(table.get("fail-on", ())),
        table.get("strict", False),
        table.get("threshold"),
        table.get("compare-by", "model"),
        {key: value for key, value in table.items() if key not in KINDS},
        path,
    )


def table_of(start: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the nearest pyproject.toml in ``start`` or above it, and its table ``[tool.mpscale]``, empty without one.

    Raises:
        SettingsError: the file cannot be read.
    """
    path = next((f / "pyproject.toml" for f in (start, *start.parents) if (f / "pyproject.toml").is_file()), None)
    if path is None:
        return None, {}
    try:
        table = tomllib.loads(read_text(path, SETTINGS))
        for name in ("tool", "mpscale"):
            table = table.get(name, {})
            if not isinstance(table, dict):
                raise SettingsError(f"{path}: {name} must be a table, not {table!r:.40}")
    except RunError as error:
        raise SettingsError(str(error)) from error
    except SettingsError:
        raise
    except (ValueError, RecursionError) as error:  # also an integer with thousands of digits
        raise SettingsError(f"{path}: cannot be read: {error}") from error
    return path, table


def baseline_of(path: Path, value: str) -> str:
    """The run that ``baseline`` in the file ``path`` names. A path is relative to the file, wherever it is read."""
    beside = path.parent / value
    if path.parent != Path.cwd() and os.path.exists(beside):  # noqa: PTH110 - Path.exists raises for a long name
        return str(beside)
    return value


def results_folder(here: Path) -> Path:
    """The results folder of the project in ``here``: ``results`` of ``[tool.mpscale]``, else ``results/``.

    Raises:
        SettingsError: as :func:`load`, or ``results`` names no folder.
    """
    found = load(here)
    if found.path is None or "results" not in found.others:
        return RESULTS
    named = results_of(found.path, found.others["results"])
    # Relative, as the user thinks of it, if it is below.
    return named.relative_to(here) if named.is_relative_to(here) else named


def results_of(path: Path, value: Any) -> Path:
    """The folder that ``results`` of ``[tool.mpscale]`` in the file ``path`` names, relative to that file.

    Raises:
        SettingsError: it names no folder.
    """
    try:
        if not isinstance(value, str):
            raise argparse.ArgumentTypeError(f"expected a string, the name of a folder, not {value!r:.200}")
        return path.parent / folder(value)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"{path}: results of [tool.mpscale]: {error}") from error


def why_unfit(key: str, value: Any) -> str | None:
    """Return why a setting of a comparison, one of :data:`KINDS`, cannot have a value; None if it can."""
    if key == "fail-on":
        fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
    elif key == "compare-by":
        fits = value in COMPARE_BY
    else:
        fits = isinstance(value, bool) if key == "strict" else isinstance(value, str)
    return None if fits else f"{key} of [tool.mpscale] must be {KINDS[key]}, not {value!r:.200}"


_LONGEST_PATH = 4096
"""What Linux allows."""

RUN = "id of a run or its first characters, the name that it was given, its folder, or `latest`"
"""Every way to name a run on the command line."""
RUN_OR_CSV = RUN.replace("or `latest`", "a cases.csv, or `latest`")
"""The same where a table of cases is enough."""

RESULTS = Path("results")
"""The default results folder."""


def add_results_option(add: Callable[..., Any], prefix: str = "", *, default: Path | None = None) -> None:
    """Add ``--results``; without a default it is that of the project, or ``results/`` in pytest's root directory."""
    add(
        f"--{prefix}results",
        type=folder,
        default=default,
        metavar="DIR",
        help="results folder (default: `results` of [tool.mpscale] in pyproject.toml, else "
        f"{default or 'results/ in the root directory of pytest'})",
    )


COMPARE_BY = ("model", "name")
"""What rows of two runs must share, besides mode and settings: the same model, or the name of workload or series."""


def add_compare_by_option(add: Callable[..., Any], prefix: str = "") -> None:
    """Add ``--compare-by``, which overrides ``[tool.mpscale]``."""
    add(
        f"--{prefix}compare-by",
        choices=COMPARE_BY,
        help="model: compare rows only if model, batch, optimizer, loss and data are the same, unless the workload "
        "names a series; name: compare all versions of a workload, and say what changed (default: model)",
    )


def add_gate_options(add: Callable[..., Any], prefix: str = "") -> None:
    """Add ``--fail-on``, ``--strict`` and ``--compare-by``, which override ``[tool.mpscale]``."""
    add(
        f"--{prefix}fail-on",
        action="append",
        metavar="GATE",
        help="fail if a figure is worse than in the baseline: step_time>5%%, gpu_memory>3%%, host_memory>20%%, "
        "energy>10%%, compile_time>20%%, metric or missing; or beyond a limit, without a baseline: step_time<=12ms, "
        "gpu_memory<=8000MiB, speedup>=1.5, accuracy>=95%%, metric>=0.9, overflow_rate>0.01; of some rows only: "
        "speedup[mixed-*]>=1.5, metric[signs/fp32]; separate several by commas, or repeat the option",
    )
    flag = argparse.BooleanOptionalAction
    add(f"--{prefix}strict", action=flag, default=None, help="also fail if a gate cannot tell")
    add_compare_by_option(add, prefix)


def folder(text: str) -> Path:
    """The type of an option that takes a folder.

    Raises:
        argparse.ArgumentTypeError: the text cannot name one.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, and nothing was given")
    if len(text) > _LONGEST_PATH or "\0" in text:
        raise argparse.ArgumentTypeError(f"no folder can have this name: {shown(text)}")
    try:
        # A shell does not expand ~ in --option=~/folder.
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} names the home of a user unknown to this machine") from None


@dataclass(frozen=True, slots=True)
class Written:
    """How pyproject.toml may have the value of an option, besides as the text of the command line.

    Args:
        words: what is allowed, for messages.
        kinds: types of a value.
        several: whether a list of these, or of strings, may take its place.
        table: whether a table of these by name may.
    """

    words: str
    kinds: tuple[type, ...] = ()
    several: bool = False
    table: bool = False


TEXT = Written("a string")
NUMBER = Written("a number", (int, float))
NUMBERS = Written("a number or a list of numbers", (int, float), several=True)
NAMES = Written("a list of strings", several=True)


@dataclass(frozen=True, slots=True)
class OptionType(Generic[T]):
    """The type of an option, which also says how pyproject.toml may have its value.

    Args:
        parse: converts a text to a value, or raises argparse.ArgumentTypeError.
        written: in pyproject.toml.
    """

    parse: Callable[[str], T]
    written: Written

    def __call__(self, text: str) -> T:
        return self.parse(text)


def number(parse: Callable[[str], N], fits: Callable[[N], bool], expected: str) -> Callable[[str], N]:
    """Return the type of an option that takes a number.

    Args:
        parse: converts a text to a number, or raises ValueError.
        fits: whether the option accepts the number.
        expected: describes what it accepts, for the message.
    """

    def parsed(text: str) -> N:
        with contextlib.suppress(ValueError):
            value = parse(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, not {shown(text)}")

    return OptionType(parsed, NUMBER)


def shown(text: str) -> str:
    """A value that a message repeats, in quotation marks; of a long one only the beginning."""
    return repr(text) if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]!r}... ({len(text):,} characters)"


def whole_number(text: str) -> int:
    """Parse a whole number: `int` would also take 1_000 and digits of other scripts.

    Raises:
        ValueError: it is none, or has more than 30 digits.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()):
        raise ValueError
    return int(text)


def integer(least: int, most: int, why: str = "") -> Callable[[str], int]:
    """Return the type of an option that takes a whole number.

    Args:
        least: the smallest.
        most: the largest.
        why: the reason for the largest, to follow it.
    """
    expected = f"an integer of at least {least} and at most {most}{why and f', {why}'}"
    return number(whole_number, lambda value: least <= value <= most, expected)


WEEK_S = 604_800.0
seconds = number(
    parse_number, lambda value: 0 < value <= WEEK_S, "a number of seconds above 0 and at most 604800, a week"
)
"""The type of an option that takes a time."""

training_steps = integer(1, MOST_STEPS, "since each step of a training is recorded")
batch_size = integer(1, 2**31 - 1, "since TensorFlow counts examples in 32 bits")

_MOST_MIB = 2.0**30
"""A pebibyte."""
_UNITS_MIB = {"m": 1.0, "g": 1024.0, "t": 1024.0**2}


def memory(text: str) -> float:
    """The type of an option that takes an amount of memory; in MiB.

    Raises:
        argparse.ArgumentTypeError: it is not an amount above 0 with a unit, or more than 1024 TiB.
    """
    found = re.fullmatch(r"([0-9]{1,30}\.?[0-9]{0,30})\s*([mgt])(i?b)?", text.strip().casefold())
    mib = 0.0 if found is None else float(found[1]) * _UNITS_MIB[found[2]]
    if not 0 < mib <= _MOST_MIB:
        raise argparse.ArgumentTypeError(
            f"expected an amount of memory such as 800MiB or 4GiB, at most 1024TiB, not {shown(text)}"
        )
    return mib


_ATTEMPTS = 20
"""How often to look whether a folder can be written to, while other sessions may do the same."""
_PAUSE_S = 0.01
"""The longest pause between two looks; its length is random, so that two sessions do not meet again."""
_PROBE = bytes(1 << 16)
"""More than file systems store in the entry of a file itself, so it does not fit on a full disk."""


def why_not_writable(wanted: Path) -> str | None:
    """Return why no file can be made in the folder ``wanted``, or None if one can.

    This makes one to find out: for root, permissions allow everything, even in /proc, and a full disk has them too. It
    leaves nothing behind, unless several sessions look at the same time: then one may leave an empty folder.
    """
    for attempt in range(_ATTEMPTS):
        try:
            _make_a_file_in(wanted)
        except OSError as error:
            culprit = Path(error.filename) if isinstance(error.filename, str) else wanted
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            if attempt < _ATTEMPTS - 1 and (isinstance(error, FileNotFoundError) or (in_the_way and culprit.is_dir())):
                # Another session looks at the same time, and has made or removed its folder.
                time.sleep(random.uniform(0.0, _PAUSE_S))
                continue
            # Name the folder or what is in its way, never the temporary file.
            place = culprit if culprit == wanted or culprit in wanted.parents else wanted
            return f"{place}: {'it exists and is not a folder' if in_the_way else why(error)}"
        else:
            break
    return None


def _make_a_file_in(wanted: Path) -> None:
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
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()
