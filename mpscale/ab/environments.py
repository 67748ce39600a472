"""The two environments of ``mpscale ab``: finds them, asks what they contain, refuses those that cannot be compared.

It also checks the arguments that both pytest sessions are started with.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpscale.ab import turns
from mpscale.core.columns import SCHEMA_VERSION
from mpscale.core.files.reading import parse_json
from mpscale.core.files.temporary import TemporaryFolder
from mpscale.core.processes.process import Child

LETTERS = ("A", "B")

_ABOUT = Path(__file__).with_name("about.py")
_NAMED = ("tensorflow", "keras", "mpscale")
_SHOWN = 8


class Refused(ValueError):
    """The request cannot be run. The message explains what to do."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One of the two environments.

    Args:
        letter: ``A``, the baseline, or ``B``.
        given: its interpreter as the command line names it.
        python: its absolute path, with links unresolved, because a venv's interpreter is a link.
        about: what it contains; see :func:`mpscale.ab.about.about`.
    """

    letter: str
    given: str
    python: Path
    about: Mapping[str, Any]

    def __str__(self) -> str:
        packages = self.about["packages"]
        named = ", ".join(f"{name} {packages.get(name, 'missing')}" for name in _NAMED)
        return f"{self.letter}: {self.given} (Python {self.about['python']}, {named})"


def examine(pythons: Sequence[str], seconds: float, force: bool) -> list[Environment]:
    """Return the environments of two interpreters.

    Args:
        pythons: paths, or names on PATH.
        seconds: how long each may take to report what it contains.
        force: accept environments that measure by different methods.

    Raises:
        Refused: there are not two of them, or one could not take part.
    """
    if len(pythons) != 2:
        raise Refused(
            f"ab compares two environments, and {len(pythons) or 'none'} was given: give --python twice, the baseline "
            "first (naming the same one twice shows the noise of the machine)"
        )
    found = [_find(python) for python in pythons]
    asked: list[Child] = []
    environments: list[Environment] = []
    with TemporaryFolder("ab") as folder:
        try:
            # Both at the same time: each imports TensorFlow.
            for letter, python in zip(LETTERS, found, strict=True):
                asked.append(_ask(python, folder / letter))
            for letter, given, python, process in zip(LETTERS, pythons, found, asked, strict=True):
                about = _about(python, folder / letter, process, seconds)
                environments.append(Environment(letter, given, python, about))
        finally:
            for process in asked:
                process.kill()
    methods = [each.about["method_version"] for each in environments]
    if methods[0] != methods[1] and not force:
        raise Refused(
            f"A measures by method {methods[0]} and B by method {methods[1]}, so their runs could not be compared: "
            "install the same mpscale in both, or use --force"
        )
    return environments


def differences(environments: Sequence[Environment]) -> str:
    """Describe in one line what else differs between the two."""
    one, two = (each.about["packages"] for each in environments)
    names = [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
    if not names and environments[0].about["python"] == environments[1].about["python"]:
        return "both contain the same, so any difference will be noise"
    others = [name for name in names if name not in _NAMED]
    moved = [f"{name} {one[name]} and {two[name]}" for name in others if name in one and name in two]
    parts = [", ".join(moved[:_SHOWN]) + _more(len(moved) - _SHOWN)] if moved else []
    for letter, mine, theirs in (("A", one, two), ("B", two, one)):
        alone = sum(name in mine and name not in theirs for name in others)
        if alone:
            parts.append(f"{alone} package{'' if alone == 1 else 's'} only in {letter}")
    return f"also differ: {'; '.join(parts)}" if parts else "nothing else differs"


def _more(number: int) -> str:
    return f" and {number} more" if number > 0 else ""


def _find(given: str) -> Path:
    """Return the absolute path of an interpreter, without resolving links."""
    if os.sep not in given:
        named = shutil.which(given)
        if named is None and not Path(given).exists():
            raise Refused(f"--python {given}: no program of this name is on PATH; give a path such as .venv/bin/python")
        given = named or given
    path = Path(given).expanduser().absolute()
    if path.is_dir():
        inside = path / "bin" / "python"
        hint = f"did you mean {inside}?" if inside.exists() else "give the interpreter itself"
        raise Refused(f"--python {given}: this is a folder; {hint}")
    if not path.exists():
        raise Refused(f"--python {given}: no such file; give a path such as .venv/bin/python, or a name on PATH")
    if not os.access(path, os.X_OK):
        raise Refused(f"--python {given}: this cannot be executed; give a Python interpreter")
    return path


def _ask(python: Path, folder: Path) -> Child:
    """Start an interpreter that writes into ``folder`` what it contains."""
    folder.mkdir()
    try:
        with (folder / "output").open("wb") as output, (folder / "errors").open("wb") as errors:
            # -P: a folder mpscale/ in the working directory must not stand in for the environment's own.
            return Child([python, "-P", _ABOUT], {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, output, errors)
    except OSError as error:
        raise Refused(f"--python {python}: cannot be started: {error.strerror}") from error


def _about(python: Path, folder: Path, process: Child, seconds: float) -> Mapping[str, Any]:
    """Return what an interpreter has reported; refuse it if it cannot take turns."""
    install = f"install this mpscale there: {python} -m pip install FOLDER_OF_MPSCALE"
    code = process.wait(seconds)
    if code is None:
        raise Refused(f"{python} did not report what is installed there within {seconds:g} s (--start-timeout)")
    output, errors = ((folder / name).read_text("utf-8", "replace").strip() for name in ("output", "errors"))
    try:
        about = parse_json(output.splitlines()[-1]) if code == 0 else None  # libraries may have printed before it
    except (ValueError, IndexError):
        about = None
    if not isinstance(about, dict):
        last = (errors or "it printed nothing").splitlines()[-1]
        raise Refused(f"{python} is not a Python of 3.11 or newer in which mpscale works: {last}")
    if about["turns"] is None:
        why = about["broken"].get("mpscale", "it is too old")
        raise Refused(f"{python} has no mpscale that can take turns ({why}): {install}")
    if about["turns"] != turns.VERSION:
        raise Refused(
            f"{python} has an mpscale that takes turns by version {about['turns']} of the protocol, and this one uses "
            f"version {turns.VERSION}: {install}"
        )
    if about["schema_version"] > SCHEMA_VERSION:
        raise Refused(
            f"{python} writes runs of schema version {about['schema_version']}, and this mpscale reads up to "
            f"{SCHEMA_VERSION}: start `mpscale ab` from there"
        )
    for name, reason in about["broken"].items():
        raise Refused(f"{name} does not work in {python} ({reason}): {install}")
    return about


_BY_AB = {
    "--mp-baseline": "A is the baseline; --fail-on has the gates",
    "--mp-fail-on": "write --fail-on",
    "--mp-strict": "write --strict",
    "--mp-compare-by": "write --compare-by",
    "--mp-force": "write --force",
    "--mp-results": "write --results",
    "--mp-name": "both runs would have it; `mpscale name` gives each its own",
    "--mp-resume": "its two runs take turns, so neither can go on alone",
}
_SIDE_BY_SIDE = ("-n", "--numprocesses", "--dist", "--tx")
_RUNS_NOTHING = (
    "--collect-only", "--co", "--setup-only", "--setup-plan", "--fixtures", "--fixtures-per-test", "--markers",
    "--version", "-V",
)  # fmt: skip
_ASKS = ("--pdb", "--trace")
_ONE_FILE = ("--basetemp", "--junit-xml", "--junitxml", "--benchmark-json", "--log-file")
_TAKES_A_VALUE = (
    "-k", "-m", "-p", "-c", "-r", "-W", "--config-file", "--confcutdir", "--deselect", "--ignore", "--ignore-glob",
    "--import-mode", "--rootdir",
)  # fmt: skip
"""Options of pytest whose value may be the name of a folder, which is then not a test path."""


def pytest_arguments(given: Sequence[str], results: Path | None) -> list[str]:
    """Return the arguments of pytest. Adds ``bench/``, if it exists, when no test path is named.

    Args:
        given: all arguments on the command line that are not options of ``mpscale ab``.
        results: the results folder; None for the default of the plug-in.

    Raises:
        Refused: an argument makes no sense with two interleaved sessions.
    """
    for argument in given:
        why = _why_not(argument)
        if why is not None:
            raise Refused(f"{argument} does not go with `mpscale ab`: {why}")
    arguments = list(given)
    if not any(map(_is_test_path, arguments, ["", *arguments])) and Path("bench").is_dir():
        arguments.append("bench")
    if results is not None:
        # As a single argument, because pytest would take a separate value for a test path.
        arguments.append(f"--mp-results={results.absolute()}")
    return arguments


def _why_not(argument: str) -> str | None:
    name = argument.partition("=")[0]
    if name in _BY_AB:
        return _BY_AB[name]
    if name in _SIDE_BY_SIDE or argument.startswith("-n"):
        return "cases side by side would disturb each other; leave it out"
    if name in _RUNS_NOTHING:
        return "nothing would be run; give it to pytest itself"
    if name in _ASKS:
        return "nobody could answer; give it to pytest itself"
    if name in _ONE_FILE:
        return "both sessions would write to one place; leave it out"
    return None


def _is_test_path(argument: str, before: str) -> bool:
    valued = before in _TAKES_A_VALUE or (before.startswith("--mp-") and "=" not in before)
    return not argument.startswith("-") and not valued and Path(argument.partition("::")[0]).exists()
