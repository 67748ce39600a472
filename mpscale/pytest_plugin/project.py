"""``[tool.mpscale]`` of pyproject.toml: every option of the plug-in has a key there, its name without ``--mp-``.

The keys are made of the options themselves, so an option that is added is a key, too.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mpscale.config import (
    KINDS,
    NAMES,
    NUMBER,
    TEXT,
    OptionType,
    ProjectSettings,
    SettingsError,
    Written,
    load,
    results_of,
    shown,
)
from mpscale.pytest_plugin import origin, resume
from mpscale.terminal.streams import visible

_PREFIX = "--mp-"
_FLAG = Written("true or false")
_OF_ONE_RUN = ("resume", "name", "note", "shard")
"""Options that belong to one run, and so are no settings of a project."""
_OF_A_MACHINE = ("cores",)
"""People share the file but not the machine: such a value must not stop sessions that measure nothing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of ``[tool.mpscale]``, made of an option.

    Args:
        option: of pytest.
        how: what argparse knows of it.
    """

    option: str
    how: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Its key in the table."""
        return self.option.removeprefix(_PREFIX)

    @property
    def written(self) -> Written:
        """How the table may have its value."""
        if self._is_flag:
            return _FLAG
        if self._repeats:
            return NAMES
        if choices := self.how.get("choices"):
            return Written(f"one of {', '.join(map(repr, choices))}")
        kind = self.how.get("type")
        return kind.written if isinstance(kind, OptionType) else TEXT

    @property
    def _is_flag(self) -> bool:
        return self.how.get("action") in ("store_true", argparse.BooleanOptionalAction)

    @property
    def _repeats(self) -> bool:
        return self.how.get("action") == "append"

    def text(self, value: Any) -> Any:
        """Return a value of the table as texts of a command line, as :class:`Invocation` has them.

        Raises:
            argparse.ArgumentTypeError: it is of a type that this option cannot have.
        """
        kinds = self.written.kinds

        def plain(one: Any) -> bool:
            return isinstance(one, (str, *kinds)) and not isinstance(one, bool)

        if self._is_flag and isinstance(value, bool):
            return value
        if not self._is_flag:
            if plain(value):
                return [value] if self._repeats else str(value)
            if self.written.several and isinstance(value, list) and all(map(plain, value)):
                return value if self._repeats else ",".join(map(str, value))
            if self.written.table and isinstance(value, dict) and all(map(_number_or_text, value.values())):
                return ",".join(f"{name}={one}" for name, one in value.items())
        shown_as = str(value).lower() if isinstance(value, bool) else f"{value!r:.200}"
        if self.written is NUMBER:
            self._parsed(shown_as)  # its own message has the limits
        raise argparse.ArgumentTypeError(f"expected {self.written.words}, not {shown_as}")

    def value(self, text: Any) -> Any:
        """Return the value of the option, from its text.

        Raises:
            argparse.ArgumentTypeError: the option does not accept it.
        """
        if self._is_flag:
            return text
        if self._repeats:
            return [self._parsed(one) for one in text]
        choices = self.how.get("choices")
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(f"expected {self.written.words}, not {shown(text)}")
        return self._parsed(text)

    def _parsed(self, text: str) -> Any:
        return self.how.get("type", str)(text)


def _number_or_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


@cache
def every() -> Mapping[str, Setting]:
    """All options of the plug-in, by their names."""
    found: dict[str, Setting] = {}

    def add(option: str, **how: Any) -> None:
        found[option] = Setting(option, how)

    resume.add_every_option(add)
    return found


@cache
def settings() -> Mapping[str, Setting]:
    """The settings that are options of the plug-in, by key."""
    return {setting.key: setting for setting in every().values() if setting.key not in _OF_ONE_RUN}


def read(start: Path) -> tuple[ProjectSettings, dict[str, tuple[Any, Any]], dict[str, str]]:
    """Read the table for the folder ``start``; see :func:`mpscale.config.load`.

    Returns:
        The settings of a comparison, as they are; those that are other options of the plug-in, by key, as texts of a
        command line and as values; and why a key cannot be used on this machine.

    Raises:
        SettingsError: as :func:`~mpscale.config.load`, or a key is unknown, or has a value that it cannot have.
    """
    found, values, unfit = load(start), dict[str, tuple[Any, Any]](), dict[str, str]()
    for key, given in found.others.items():
        assert found.path is not None
        try:
            values[key] = parsed(found.path, key, given)
        except SettingsError as error:
            if key not in _OF_A_MACHINE:
                raise
            unfit[key] = str(error)
    return found, values, unfit


def parsed(path: Path, key: str, given: Any) -> tuple[Any, Any]:
    """Return an option in the table of the file ``path`` as texts of a command line, and as its value.

    Raises:
        SettingsError: the key is unknown, or has a value that it cannot have.
    """
    if (setting := settings().get(key)) is None:
        raise SettingsError(f"{path}: {_unknown(key)}")
    if key == "results":
        folder = results_of(path, given)
        return str(folder), folder
    try:
        text = setting.text(given)
        return text, setting.value(text)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"{path}: {key} of [tool.mpscale]: {error}") from error


def _unknown(key: str) -> str:
    if key in _OF_ONE_RUN:
        return f"{key} of [tool.mpscale] would be that of every run: give it on the command line, {_PREFIX}{key}"
    keys = dict.fromkeys([*settings(), *KINDS])
    plain = key.lower().replace("_", "-").removeprefix("--").removeprefix("mp-")
    close = difflib.get_close_matches(plain, keys, n=1)
    hint = f"; did you mean {close[0]}?" if close else f", only {', '.join(sorted(keys))}"
    return f"[tool.mpscale] has no setting {shown(key)}{hint}"


def take(config: pytest.Config) -> None:
    """Give a session the options in its project's table that the command line has not.

    A session that goes on with a run takes only those that may differ: the others are the run's.

    Raises:
        pytest.UsageError: the table is not valid.
    """
    try:
        found, values, unfit = read(config.rootpath)
    except SettingsError as error:
        raise pytest.UsageError(visible(str(error))) from error
    if found.path is None or not (values or unfit):
        return
    given = resume.given(config)
    goes_on = config.getoption("mp_resume") is not None
    texts, overridden = {}, []
    for key, (text, value) in values.items():
        option = settings()[key].option
        if option in given:
            overridden.append(key)
        elif not goes_on or option in resume.MAY_DIFFER:
            setattr(config.option, option.removeprefix("--").replace("-", "_"), value)
            texts[option] = text
    config.stash[origin.PROJECT] = origin.FromProject(found.path, texts, overridden)
    if problems := [why for key, why in unfit.items() if settings()[key].option not in given and not goes_on]:
        config.stash[origin.UNFIT] = "; ".join(problems)
