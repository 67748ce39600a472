"""The command ``run``, which needs no suite: pytest runs the one in the package."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mpscale import suite
from mpscale.cli import completion
from mpscale.cli.output import fail
from mpscale.config import SettingsError
from mpscale.core import extras

_SHORT = ("train", "validation", "modes", "seeds", "steps", "batch-size", "repeats", "preset")
"""Options of mpscale that need no ``mp-`` here, since pytest has none of these names."""


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mpscale run [WORKLOAD ...] [--train DATA] [--validation DATA] [options of pytest]"
    parser.description = (
        "Train every workload in every mode, and leave a run with its report in the folder runs/ of the results "
        "folder. A WORKLOAD is one that `mpscale workloads` lists, or module:attribute: a workload of yours, or a "
        "function that returns a compiled Keras model, and then --train names its data. Without one, those of "
        "[tool.mpscale] are trained, else those of the preset.\n\n"
        "    mpscale run\n"
        "    mpscale run mnist1d-cnn --modes fp32,mixed-bf16 --seeds 5 --mp-name before\n"
        "    mpscale run my_models:build --train train_data --validation validation_data\n\n"
        "This is `pytest --benchmark-only` on a suite that comes with mpscale, so a project needs none of its own. "
        "`pytest --help` lists all options, mpscale's under its name: --mp-name, --mp-baseline, --mp-fail-on, "
        f"--mp-resume and more. {_in_words(_SHORT)} need no mp-. Settings of pytest in the current folder do not "
        "apply; [tool.mpscale] in its pyproject.toml does, and `mpscale doctor` shows it.\n\n"
        "The exit code is pytest's: 0 all well, 1 a case failed or a gate fired, 2 interrupted, 4 wrong use."
    )
    # An option for pytest may be the beginning of --help.
    parser.allow_abbrev = False
    if completion.words_to_complete() is not None:
        # Only for a shell that completes: pytest reads its options itself.
        for option, completer in (("--mp-resume", completion.made_runs), ("--mp-baseline", completion.runs)):
            completion.completed_by(parser.add_argument(option), completer)


def _in_words(names: Sequence[str]) -> str:
    options = [f"--{name}" for name in names]
    return f"{', '.join(options[:-1])} and {options[-1]}"


def in_full(arguments: Sequence[str]) -> list[str]:
    """Return the arguments as pytest takes them: the workloads that come first, and short names of options.

    Raises:
        SettingsError: workloads are named in two ways.
    """
    named = list(itertools.takewhile(_is_workload, arguments))
    full = [f"--mp-workloads={','.join(named)}"] if named else []
    if named and any(argument.partition("=")[0] == "--mp-workloads" for argument in arguments):
        raise SettingsError(f"workloads are named twice, as {' '.join(named)} and by --mp-workloads; leave out one")
    rest = list(arguments[len(named) :])
    options = rest[: rest.index("--")] if "--" in rest else rest  # what follows are paths
    for option in options:
        name, equals, value = option.partition("=")
        full.append(f"--mp-{name[2:]}{equals}{value}" if name[:2] == "--" and name[2:] in _SHORT else option)
    return [*full, *rest[len(options) :]]


def _is_workload(argument: str) -> bool:
    """Whether an argument is the name of a workload or module:attribute, and no option or path of pytest's."""
    if argument.startswith(("-", "@")) or "/" in argument or "::" in argument or argument.endswith(".py"):
        return False
    return ":" in argument or not Path(argument).exists()


def command(arguments: list[str], here: Path) -> list[str]:
    """Return the command line that runs the suite in the folder ``here``.

    pytest looks for its settings above the suite, which may lie in an environment within any project. So it gets none
    (``-c``), and ``here`` as its root, where mpscale looks for ``[tool.mpscale]`` and makes ``results``.
    """
    # -P: a file in the current folder must not hide a module of Python's.
    pytest = [sys.executable, "-P", "-m", "pytest", "-c", os.devnull, f"--rootdir={here}", "-p", "no:cacheprovider"]
    return [*pytest, suite.__file__, "--benchmark-only", *in_full(arguments)]


def run(options: argparse.Namespace) -> int:
    if packages := extras.missing():
        return fail(extras.lacks(packages))
    line = command(options.unknown, Path.cwd())
    sys.stdout.flush()
    # In place of this process, so that signals and the terminal are pytest's.
    os.execv(line[0], line)
