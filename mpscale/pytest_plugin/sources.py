"""Where the options of a session would come from here, before there is one, and which of them it would refuse."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpscale.config import KINDS, RESULTS, SettingsError, baseline_of, shown, table_of, why_unfit
from mpscale.core.invocation import RESUME, GivenOption
from mpscale.core.mode import select_modes
from mpscale.core.runs import NoRunYet, RunError, resolve_run
from mpscale.pytest_plugin import project, resume

_PREFIX = "--mp-"
_VARIABLE, _COMMAND_LINE = "PYTEST_ADDOPTS", "command line"


# With mpscale's plug-in, pytest would end at the first option that has a wrong value.
_WITHOUT_PLUGINS = ("--disable-plugin-autoload", "-p", "no:mpscale", "-o", "required_plugins=")


class _Seen(Exception):
    """Ends a pytest that has read its settings and nothing else."""


class _Look:
    config: pytest.Config | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self, early_config: pytest.Config) -> None:
        self.config = early_config
        raise _Seen


def look(here: Path, arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[list[GivenOption], list[str]]:
    """Find the options that a session in a folder would have, in the order in which a later one wins.

    Nothing of the project is imported: a workload of its own is looked up when it is trained.

    Args:
        here: the working directory.
        arguments: options as for pytest.
        environ: environment variables.

    Returns:
        The options, and sentences about where they were looked for.

    Raises:
        ValueError: an argument is no option of mpscale.
    """
    path, found, notes = *_of_table(here), list[str]()
    config, problem = _settings_of_pytest()
    if problem is not None:
        found.append(GivenOption("addopts or other settings", "", "pytest", problem))
    elif config is not None:
        typed = [str(one) for one in config.getini("addopts")]
        of_pytest = list(_typed(typed, f"addopts of {config.inipath}")) if config.inipath is not None else []
        found += [_not_there(one) if one.option == RESUME else one for one in of_pytest]
        if of_pytest:
            notes.append("`mpscale run` does not read the settings of pytest, so it has no options of addopts.")
        with contextlib.suppress(SettingsError):
            if (other := table_of(config.rootpath)[0]) != path:
                notes.append(
                    f"The root directory of pytest is {config.rootpath}, so it takes [tool.mpscale] of "
                    f"{other or 'no file'}; `mpscale run` takes that of {path or 'no file'}."
                )
    with contextlib.suppress(ValueError):  # what pytest could not split either, and has said so
        found += _typed(shlex.split(environ.get(_VARIABLE, "")), _VARIABLE)
    found += _typed(arguments, _COMMAND_LINE, all_are_options=True)
    used = _used(found)
    if not found:
        table = "no pyproject.toml here or above" if path is None else f"no [tool.mpscale] in {path}"
        notes.insert(0, f"None is given: {table}, and none in addopts or {_VARIABLE}. The preset decides.")
    return [_checked(one, used, here) for one in found], notes


def _of_table(here: Path) -> tuple[Path | None, list[GivenOption]]:
    """The options in the project's table, and its file."""
    try:
        path, table = table_of(here)
    except SettingsError as error:
        file, _, why = str(error).partition(": ")
        return Path(file), [GivenOption("[tool.mpscale]", "", file, why)]
    found = []
    for key, value in table.items():
        assert path is not None
        problem: str | None = None
        if key in KINDS:
            problem = why_unfit(key, value)
            text = baseline_of(path, value) if key == "baseline" and problem is None else _text(value)
        else:
            try:
                text = _text(project.parsed(path, key, value)[0])
            except SettingsError as error:
                text, problem = f"{value!r:.60}", str(error).removeprefix(f"{path}: ")
        found.append(GivenOption(key, text, str(path), problem))
    return path, found


def _settings_of_pytest() -> tuple[pytest.Config | None, str | None]:
    """What pytest has read here, before it imports anything of the project; or why it cannot start."""
    found, said = _Look(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            pytest.main([*_WITHOUT_PLUGINS], plugins=[found])
    except _Seen:
        return found.config, None
    except Exception as error:  # of a plug-in that addopts names
        return None, f"{type(error).__name__}: {error}"
    return None, " ".join(said.getvalue().split()) or "pytest cannot start here"


def _typed(arguments: Sequence[str], where: str, all_are_options: bool = False) -> Iterator[GivenOption]:
    """The options in arguments of pytest; with ``all_are_options``, any other argument raises ValueError."""
    try:
        texts, rest = resume.typed(arguments)
    except ValueError as error:
        yield GivenOption(_PREFIX, shlex.join(arguments), where, str(error))
        return
    known = project.every()
    for option, value in texts.items():
        problem = None
        try:
            known[option].value(value)
        except argparse.ArgumentTypeError as error:
            problem = str(error)
        yield GivenOption(option, _text(value), where, problem)
    for before, argument in itertools.pairwise(["", *rest]):
        name = argument.partition("=")[0]
        if name.startswith(_PREFIX):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "`pytest --help` lists them"
            yield GivenOption(name, argument.partition("=")[2], where, f"there is no option {shown(name)}; {hint}")
        elif all_are_options and not before.startswith(_PREFIX):
            raise ValueError(f"unrecognized arguments: {argument}")


def _text(value: Any) -> str:
    """The value of an option as a person would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _not_there(one: GivenOption) -> GivenOption:
    return replace(one, problem=f"{RESUME} is for one session: give it on the command line")


def _key(one: GivenOption) -> str:
    return one.option.removeprefix(_PREFIX)


def _used(found: Sequence[GivenOption]) -> dict[str, GivenOption]:
    """The last place of each option, by its key."""
    return {_key(one): one for one in found if one.problem is None}


def _checked(one: GivenOption, used: Mapping[str, GivenOption], here: Path) -> GivenOption:
    """The option with what becomes of it: another place may override it, and a session may refuse its value."""
    if one.problem is not None:
        return one
    last = used[_key(one)]
    adds_up = _key(one) == "fail-on" and one.option == last.option
    if last is not one and not adds_up:
        return replace(one, overridden_by=last.where)
    named = one.option.startswith(_PREFIX)
    return replace(one, problem=_why_refused(_key(one), one.value, used, here, named))


def _why_refused(key: str, value: str, used: Mapping[str, GivenOption], here: Path, named: bool) -> str | None:
    """Why a session with cases refuses a value that its type allows; None if it does not.

    ``named``: whether it is not from a file, but for the next run.
    """
    from mpscale.analysis.gates import parse_gates, parse_share
    from mpscale.workloads import registry

    names = [name.strip() for name in value.split(",") if name.strip()]
    try:
        if key == "modes":
            select_modes(names)
        elif key == "workloads":
            for name in names:
                if not registry.is_own(name) and name not in registry.names():
                    registry.get(name)
        elif key == "fail-on" and value:
            parse_gates([value])
        elif key == "threshold":
            parse_share(value)
        elif key == "baseline" and value:
            results = used["results"].value if "results" in used else here / RESULTS
            # That of a file need not exist before the first run.
            with contextlib.suppress(*[] if named else [NoRunYet]):
                resolve_run(value, results)
    except (ValueError, RunError, registry.UnknownWorkload) as error:
        return str(error)
    return None
