"""``--mp-resume``: a session that goes on with a run takes that run's options, and refuses others."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

import mpscale
from mpscale import config as project
from mpscale.core.given import given as was_given
from mpscale.core.invocation import RESUME, SCRIPT, Invocation
from mpscale.pytest_plugin import baseline, handed, options, origin
from mpscale.pytest_plugin.plan import NO_XDIST
from mpscale.terminal.streams import visible

ARGUMENTS = pytest.StashKey[list[str]]()
"""All arguments of the session: of the command line, of pytest's settings and of its environment variable."""
MAY_DIFFER = (
    "--mp-baseline", "--mp-fail-on", "--mp-strict", "--mp-compare-by", "--mp-force", "--mp-results",
    "--mp-benchmark-table", "--mp-timeout", "--mp-retries", "--mp-gpu-retries", "--mp-cool-down", "--mp-coordinator",
    RESUME,
)  # fmt: skip
"""Options that change no figure: they judge the run, show it, say where it is, or how long a case may take."""


def add_options(add: Callable[..., Any]) -> None:
    """Add the option."""
    add(
        RESUME,
        metavar="RUN",
        help=f"go on with a run that was stopped, in its folder ({project.RUN}): run what has no result, was "
        "interrupted, or failed for a reason that may pass. Options are those of the run; device, versions and "
        "workloads must be the same",
    )


def add_every_option(add: Callable[..., Any]) -> None:
    """Add all options of the plug-in, to whatever needs them: pytest, a run that goes on, pyproject.toml, compare."""
    options.add_options(add)
    handed.add_options(add)
    baseline.add_options(add)
    add_options(add)


class _Parser(argparse.ArgumentParser):
    """A parser of mpscale's options alone, which has no defaults."""

    def __init__(self, as_typed: bool) -> None:
        super().__init__(add_help=False, allow_abbrev=False, fromfile_prefix_chars="@")

        def add(*names: str, **how: Any) -> None:
            how["default"] = argparse.SUPPRESS
            if as_typed:
                how.pop("type", None)
                how.pop("choices", None)
            self.add_argument(*names, **how)

        add_every_option(add)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def given(config: pytest.Config) -> dict[str, Any]:
    """Return the options of mpscale that the user gave, as texts by name; see :class:`Invocation`."""
    arguments = config.stash.get(ARGUMENTS, [str(argument) for argument in config.invocation_params.args])
    return typed(arguments)[0]


def typed(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of mpscale in arguments of pytest, as :func:`given` does, and the other arguments.

    Raises:
        ValueError: an option lacks its value, or a file of arguments cannot be read.
    """
    found, rest = _Parser(as_typed=True).parse_known_args(arguments)
    return {f"--{name.replace('_', '-')}": value for name, value in vars(found).items()}, rest


def invocation(config: pytest.Config) -> dict[str, Any]:
    """Return how the session was started, for run.json."""
    arguments = [str(argument) for argument in config.invocation_params.args]
    program, suite = "pytest", str(Path(mpscale.__file__).with_name("suite.py"))
    if arguments[:2] == ["-c", os.devnull] and suite in arguments:
        # What `mpscale run` puts before the user's arguments.
        program, arguments = "mpscale run", arguments[arguments.index(suite) + 1 :]
        arguments.remove("--benchmark-only")
        if was_given().parcel is not None:
            program = SCRIPT
    elif Path(sys.argv[0]).parts[-2:] == ("pytest", "__main__.py"):
        program = f"{Path(sys.executable).name} -m pytest"
    project = config.stash.get(origin.PROJECT, None)
    texts = {} if project is None else {name: text for name, text in project.texts.items() if name not in MAY_DIFFER}
    # False is a flag that was taken back, which is what it is without being given.
    used = {name: value for name, value in {**texts, **given(config)}.items() if name != RESUME and value is not False}
    return Invocation(program, arguments, str(config.invocation_params.dir), used).to_json()


class Resumption:
    """The run that the session goes on with.

    Args:
        path: its folder.
        planned: ids of its cases, in order.
    """

    def __init__(self, path: Path, planned: Sequence[str]) -> None:
        self.path, self.planned = path, list(planned)

    @property
    def results(self) -> Path:
        """The results folder that the run is in."""
        return self.path.parent.parent

    @classmethod
    def of(cls, config: pytest.Config) -> Resumption | None:
        """Find the run that the user named, and give the session its options; None if the user named none.

        Raises:
            pytest.UsageError: the run cannot be gone on with, or other options were given.
        """
        wanted = config.getoption("mp_resume")
        if wanted is None:
            return None
        if any(str(argument).partition("=")[0] == RESUME for argument in config.getini("addopts")):
            raise pytest.UsageError(f"{RESUME} is for one session: give it on the command line, not in addopts")
        if config.getoption("numprocesses", None):
            raise pytest.UsageError(NO_XDIST)
        # Imported here: a session that goes on with nothing does not need them.
        from mpscale.core.runs import RunError, read_run, resolve_run
        from mpscale.harness.resume import refuse_other_versions

        results = config.getoption("mp_results") or config.rootpath / "results"
        try:
            run = read_run(Path(os.path.realpath(resolve_run(wanted, results))))
            refuse_other_versions(run)
        except RunError as error:
            text = str(error)
            raise pytest.UsageError(visible(text if text.startswith(RESUME) else f"{RESUME}: {text}")) from error
        recorded = Invocation.of(run.info)
        assert recorded is not None  # just checked
        if recorded.program == SCRIPT and was_given().parcel is None:
            raise pytest.UsageError(
                visible(
                    f"{RESUME}: {run.name} was made by a script or notebook, and only that has the model and the data: "
                    f"call {SCRIPT} there again, with resume={run.name!r}"
                )
            )
        _take_over(config, run.name, recorded.options)
        return cls(run.path, run.info["planned"])


def _take_over(config: pytest.Config, name: str, recorded: Mapping[str, Any]) -> None:
    """Give the session the options of a run; refuse if the user gave others."""
    now = given(config)
    try:
        values = vars(_Parser(as_typed=False).parse_args(_typed(recorded)))
    except ValueError as error:
        text = f"{RESUME}: an option in run.json of {name} cannot be used here: {error}"
        raise pytest.UsageError(visible(text)) from error
    differing = []
    for option in dict.fromkeys([*now, *recorded]):
        key = option.removeprefix("--").replace("-", "_")
        if option not in now:
            setattr(config.option, key, values[key])
        elif option not in MAY_DIFFER:
            there = values[key] if key in values else _default(key)
            if (getattr(config.option, key) or None) != (there or None):
                differing.append(f"{option} is {_words(now[option])}, and was {_words(recorded.get(option))}")
    if differing:
        text = (
            f"{RESUME}: other options than those of {name}: {'; '.join(differing)}. Leave them out, since a run goes "
            "on with its own, or make a new run"
        )
        raise pytest.UsageError(visible(text))


def _typed(recorded: Mapping[str, Any]) -> list[str]:
    """Write options as on a command line."""
    typed = []
    for name, value in recorded.items():
        values = value if isinstance(value, list) else [value]
        typed += [name if one is True else f"{name}={one}" for one in values]
    return typed


def _default(key: str) -> Any:
    found: dict[str, Any] = {}

    def add(*names: str, **how: Any) -> None:
        found[names[0].removeprefix("--").replace("-", "_")] = how.get("default", False if "action" in how else None)

    options.add_options(add)
    return found.get(key)


def _words(value: Any) -> str:
    return "not given" if value is None else "given" if value is True else str(value)
