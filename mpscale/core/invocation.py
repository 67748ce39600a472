"""How a run was started, as run.json keeps it, and the command that goes on with a run that was stopped."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpscale.core.runs import Run

RESUME = "--mp-resume"
SCRIPT = "mpscale.compare"
"""The program of a run that a script or a notebook has made."""
_PROGRAM = re.compile(r"pytest|mpscale run|mpscale\.compare|python[\d.]* -m pytest")
RENAMED = {"name": "run_name"}
"""Options whose argument of :func:`mpscale.compare` has another name: its ``name`` is the workload's."""
_PREFIX = "--mp-"
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SETTING = rf"(?:[a-z_]+=)?{_NUMBER}(?:\*\*[0-9]+)?"
_MENTION = re.compile(
    # A value is a number, a list or a table of them, or a word that options have; what else follows is the sentence.
    rf"--mp-([a-z]+(?:-[a-z]+)*)(?:[ =]({_SETTING}(?:[,/]{_SETTING})*|[a-z0-9-]+(?:,[a-z0-9-]+)+"
    r"|on|off|auto|fork|fresh|shared|none|mirrored|multiworker)(?![\w-]))?"
)
_OPTION = re.compile(r"--mp-[a-z0-9-]+")
_FLAGS = re.compile(r"-[lqsvx]*x[lqsvx]*")
"""Options of one letter without values, written together, such as ``-xvs``."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """The command of a run.

    Args:
        program: ``pytest``, ``mpscale run`` or the like; :data:`SCRIPT` for a run that no command can go on with.
        arguments: as they were typed.
        folder: where it was started, relative to the folder of the run, so that a published run does not tell where
            its user works.
        options: mpscale's options that the user gave there, in pytest's settings or in its environment variable, as
            texts by name: ``{"--mp-seeds": "3"}``. True for one without a value, a list for a repeated one.
    """

    program: str
    arguments: Sequence[str]
    folder: str
    options: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {**asdict(self), "arguments": list(self.arguments), "options": dict(self.options)}

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Invocation | None:
        """The invocation in a run.json; None if an older mpscale wrote it, or if it is not as it should be."""
        found = info.get("invocation")
        if not isinstance(found, dict):
            return None
        program, arguments, folder = (found.get(name) for name in ("program", "arguments", "folder"))
        options = found.get("options")
        if not (isinstance(program, str) and isinstance(folder, str)):
            return None
        if not (isinstance(options, dict) and all(_is_option(*option) for option in options.items())):
            return None
        if not (isinstance(arguments, list) and all(isinstance(argument, str) for argument in arguments)):
            return None
        return cls(program, arguments, folder, options)


def for_reader(text: str, info: Mapping[str, Any]) -> str:
    """A text on a run, with options as who made the run gives them: to a script, ``--mp-jit off`` is ``jit='off'``.

    Whoever writes a text, in whatever process, names options of a command line.

    Args:
        text: for people; not the output of a program.
        info: the run.json.
    """
    if _PREFIX not in text or (found := Invocation.of(info)) is None or found.program != SCRIPT:
        return text
    return as_arguments(text)


def as_arguments(text: str) -> str:
    """A text in which each option of a command line is an argument of :func:`mpscale.compare`."""
    return _MENTION.sub(_as_argument, text)


def _as_argument(found: re.Match[str]) -> str:
    name, value = found.groups()
    argument = RENAMED.get(name, name.replace("-", "_"))
    return argument if value is None else f"{argument}={value if re.fullmatch(_NUMBER, value) else repr(value)}"


def _is_option(name: str, value: Any) -> bool:
    """Whether an option is as a run writes it. A stranger's could name a file from which options are read."""
    values = value if isinstance(value, list) else [value]
    texts = bool(values) and all(isinstance(one, str) for one in values)
    return _OPTION.fullmatch(name) is not None and (texts or value is True)


@dataclass(frozen=True, slots=True)
class GivenOption:
    """An option that a session would have, as ``mpscale doctor`` shows it.

    Args:
        option: as it is written there: ``--mp-seeds``, or ``seeds`` in pyproject.toml.
        value: as text; empty if it has none, or cannot be read.
        where: it is given: a file, an environment variable, or the command line.
        problem: why a session refuses it; None if it does not.
        overridden_by: the place that wins; None if this one does.
    """

    option: str
    value: str
    where: str
    problem: str | None = None
    overridden_by: str | None = None


def resume_command(run: Run, here: Path | None = None) -> str | None:
    """Return the command that goes on with a run, quoted for a shell; None if there is none.

    For a run of ``mpscale.compare`` it is a call in Python: only the script has the model and the data.

    Args:
        run: in its folder.
        here: the working directory of the reader; None if it is not known. If it is another than that in which the
            run was started, the command begins with a ``cd``.
    """
    invocation = _shown(run)
    if invocation is None or run.path.resolve().parent.name != "runs" or not str(run.path.resolve()).isprintable():
        return None
    if invocation.program == SCRIPT:
        return f"{SCRIPT}(..., resume={run.path.resolve().name!r})"
    command = _command(invocation, _without_limits(invocation.arguments), [f"{RESUME}={run.path.resolve().name}"])
    if here is None:
        return command
    folder = Path(os.path.realpath(run.path / invocation.folder))
    return command if folder == Path(os.path.realpath(here)) else f"cd {shlex.quote(str(folder))} && {command}"


def command_with(run: Run, options: Sequence[str]) -> str | None:
    """Return the command that makes a run once more with other options, quoted for a shell; None if there is none.

    Args:
        run: it, made by a command; a script has its own way to say so.
        options: such as ``["--mp-seeds", "16"]``, which replace those of the run.
    """
    invocation = _shown(run)
    if invocation is None or invocation.program == SCRIPT:
        return None
    replaced = {RESUME, "--mp-name", "--mp-note", *(option for option in options if option.startswith(_PREFIX))}
    # `mpscale run` has short forms of some.
    replaced |= {option.replace(_PREFIX, "--") for option in replaced}
    return _command(invocation, _without(replaced, invocation.arguments), options)


def _shown(run: Run) -> Invocation | None:
    """The invocation of a run, if it can be shown as a command: it may be a stranger's, and people copy it."""
    invocation = Invocation.of(run.info)
    if invocation is None or "interleaved" in run.info or not _PROGRAM.fullmatch(invocation.program):
        return None
    return invocation if all(map(str.isprintable, (*invocation.arguments, invocation.folder))) else None


def _command(invocation: Invocation, arguments: Iterable[str], more: Sequence[str]) -> str:
    known = list(arguments)
    # What comes after -- are paths.
    place = known.index("--") if "--" in known else len(known)
    return shlex.join([*invocation.program.split(), *known[:place], *more, *known[place:]])


def _without(options: Container[str], arguments: Sequence[str]) -> Iterator[str]:
    """Leave out options with their values, which may be arguments of their own."""
    left_out = False
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        if left_out and not argument.startswith("-"):
            left_out = False
            continue
        left_out = name in options and not has_value
        if name not in options:
            yield argument


def _without_limits(arguments: Sequence[str]) -> Iterator[str]:
    """Leave out options that end pytest at a failure: a case that failed for good would end each session at once."""
    for before, argument in itertools.pairwise(["", *arguments]):
        if argument == "--exitfirst" or "--maxfail" in (before, argument.partition("=")[0]):
            continue
        kept = argument.replace("x", "") if _FLAGS.fullmatch(argument) else argument
        if kept != "-" or argument == "-":
            yield kept
