"""Presets: what a run trains where the options do not say."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """One preset. ``train_steps`` None leaves each workload its own number."""

    workloads: tuple[str, ...]
    seeds: int
    timing_s: float
    timing_blocks: int
    train_steps: int | None
    summary: str
    energy_s: float = 10.0


PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        "smoke": Preset(
            ("mnist1d-mlp", "article-mlp"),
            1,
            0.3,
            10,
            100,
            "seconds a case: shows that everything works, measures nothing well",
            energy_s=0.0,
        ),
        "small": Preset(
            ("mnist1d-mlp", "mnist1d-cnn", "article-mlp"),
            3,
            2.0,
            50,
            None,
            "the default: whole trainings, minutes on two cores",
        ),
        "full": Preset(
            ("mnist1d-mlp", "mnist1d-cnn", "mnist1d-gru", "article-mlp"),
            5,
            4.0,
            50,
            None,
            "more seeds and a recurrent network",
        ),
    }
)
DEFAULT_PRESET = "small"


# What a project's pyproject.toml says under ``[tool.mpscale]``. The command line stands above it.

_KINDS: dict[str, str] = {
    "baseline": "a string",
    "fail-on": "a list of strings",
    "strict": "true or false",
    "threshold": 'a string such as "5%"',
}


class SettingsError(ValueError):
    """The file says something that cannot be. The message names file and key, and what is allowed."""


@dataclass(frozen=True, slots=True)
class ProjectSettings:
    """What is set, and what holds where nothing is.

    Args:
        baseline: run to compare with at the end of a pytest run; a path as seen from the current folder.
        fail_on: gates.
        strict: whether what could not be told fails like a gate that fired.
        threshold: change of step time from which on it matters, as text.
    """

    baseline: str | None = None
    fail_on: tuple[str, ...] = ()
    strict: bool = False
    threshold: str | None = None


def load(folder: Path) -> ProjectSettings:
    """The settings of the nearest pyproject.toml in ``folder`` or above it; none where it has no such table.

    Raises:
        SettingsError: the file cannot be read, or a setting is unknown or of the wrong kind.
    """
    path = next((f / "pyproject.toml" for f in (folder, *folder.parents) if (f / "pyproject.toml").is_file()), None)
    if path is None:
        return ProjectSettings()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("mpscale", {})
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from error
    for key, value in table.items():
        if key not in _KINDS:
            raise SettingsError(f"{path}: [tool.mpscale] knows no {key!r}, only {', '.join(_KINDS)}")
        if not _fits(key, value):
            raise SettingsError(f"{path}: {key} of [tool.mpscale] must be {_KINDS[key]}, not {value!r}")
    baseline = table.get("baseline")
    # A path in the file goes from the folder of the file, wherever pytest is called.
    if baseline is not None and path.parent != Path.cwd() and (path.parent / baseline).exists():
        baseline = str(path.parent / baseline)
    return ProjectSettings(
        baseline, tuple(table.get("fail-on", ())), table.get("strict", False), table.get("threshold")
    )


def _fits(key: str, value: Any) -> bool:
    if key == "fail-on":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, bool) if key == "strict" else isinstance(value, str)


# Folders that users name, and whether a run can be kept in them.

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
