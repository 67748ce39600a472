"""What a project's pyproject.toml says under ``[tool.mpscale]``. The command line stands above it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
