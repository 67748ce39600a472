"""What both pytest sessions are started with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpscale.ab.environments import Refused

_BY_AB = {
    "--mp-baseline": "A is the baseline; --fail-on has the gates",
    "--mp-fail-on": "write --fail-on",
    "--mp-strict": "write --strict",
    "--mp-results": "write --results",
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
"""Options of pytest whose value may well be the name of a folder, which is then no place of tests."""


def pytest_arguments(given: Sequence[str], results: Path | None) -> list[str]:
    """The arguments of pytest, ``bench/`` among them where no place of tests is named and there is one.

    Args:
        given: from the command line, all that is not an option of ``mpscale ab``.
        results: the results folder, None for pytest's own default.

    Raises:
        Refused: one of them makes no sense with two sessions in turns.
    """
    for argument in given:
        why = _why_not(argument)
        if why is not None:
            raise Refused(f"{argument} does not go with `mpscale ab`: {why}")
    arguments = list(given)
    if not any(map(_is_place, arguments, ["", *arguments])) and Path("bench").is_dir():
        arguments.append("bench")
    if results is not None:
        # In one argument: pytest takes a value that stands alone for a place of tests.
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


def _is_place(argument: str, before: str) -> bool:
    valued = before in _TAKES_A_VALUE or (before.startswith("--mp-") and "=" not in before)
    return not argument.startswith("-") and not valued and Path(argument.partition("::")[0]).exists()
