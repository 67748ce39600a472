"""Completion in a shell, by argcomplete if that is installed: names of runs, workloads and modes.

A shell asks by starting ``mpscale`` with a variable set, so ``mpscale`` itself costs nothing more. What a completer
needs is imported when it is asked.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mpscale.config import RESULTS, SettingsError, results_folder
from mpscale.terminal.streams import visible

Completer = Callable[..., Iterable[str]]

SWITCH_ON = 'eval "$(register-python-argcomplete mpscale)"'
"""What a user of bash or zsh puts into the start-up file of the shell."""


def words_to_complete() -> list[str] | None:
    """Return the words of a command line that a shell wants to complete; None if this is a command to run."""
    if "_ARGCOMPLETE" not in os.environ:
        return None
    return os.environ.get("COMP_LINE", "").split()[1:]


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and end this process. Without argcomplete there is no answer."""
    try:
        import argcomplete
    except ImportError:
        raise SystemExit(1) from None
    argcomplete.autocomplete(parser, always_complete_options="long")


def completed_by(argument: argparse.Action, completer: Completer) -> None:
    """Let a completer offer the values of an argument."""
    argument.completer = completer  # type: ignore[attr-defined]


def runs(prefix: str, parsed_args: Any, **_: Any) -> list[str]:
    """Names of runs, the newest first, and ``latest``; with a slash in the prefix, paths."""
    if "/" in prefix:
        return [f"{path}/" if path.is_dir() else str(path) for path in sorted(Path().glob(f"{prefix}*"))]
    named = getattr(parsed_args, "results", None)
    results = _results() if named is None or named is RESULTS else Path(named)
    return _named(prefix, results / "runs", results / "reference")


def made_runs(prefix: str, **_: Any) -> list[str]:
    """The same without those in ``reference/``, which are kept as they are."""
    return _named(prefix, _results() / "runs")


def _results() -> Path:
    try:
        return results_folder(Path.cwd())
    except SettingsError:  # the command itself will say so
        return RESULTS


def _named(prefix: str, *folders: Path) -> list[str]:
    from mpscale.core.naming import name_in
    from mpscale.core.runs import by_age

    made = by_age(path.parent for folder in folders for path in folder.glob("*/run.json"))
    # Those that people gave come first: they are what somebody types.
    given = filter(None, map(name_in, reversed(made)))
    names = dict.fromkeys(["latest", *given, *(folder.name for folder in reversed(made))])
    # A shell shows what it is offered, and a line end would be an offer of its own.
    plain = [name for name in names if visible(name) == name and "\n" not in name and "\t" not in name]
    return [name for name in plain if name.startswith(prefix)]


def workloads(prefix: str, **_: Any) -> list[str]:
    """Names of workloads: mpscale's own, and those that installed packages offer."""
    from mpscale.workloads import registry

    return [name for name in registry.names() if name.startswith(prefix)]


def modes(prefix: str, **_: Any) -> list[str]:
    """Names of modes."""
    from mpscale.core.mode import MODES

    return [name for name in MODES if name.startswith(prefix)]
