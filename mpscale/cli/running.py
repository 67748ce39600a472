"""The command ``run``, which needs no suite: pytest runs the one in the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mpscale import suite
from mpscale.cli import completion
from mpscale.cli.output import fail
from mpscale.core import extras


def run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mpscale run [options of pytest]"
    parser.description = (
        "Train every workload in every mode, and leave a run in results/runs/ of the current folder. This is "
        "`pytest --benchmark-only` on a suite that comes with mpscale, so a project needs none of its own. All options "
        "go to pytest, such as --mp-preset, --mp-workloads, --mp-modes, --mp-name, --mp-baseline, --mp-fail-on, "
        "--mp-resume and --junitxml; "
        "`pytest --help` lists them, mpscale's under its name. Settings of pytest in the current folder do not apply; "
        "[tool.mpscale] in its pyproject.toml does. The exit code is pytest's: 0 all well, 1 a case failed or a gate "
        "fired, 2 interrupted, 4 wrong use."
    )
    # An option for pytest may be the beginning of --help.
    parser.allow_abbrev = False
    if completion.words_to_complete() is not None:
        # Only for a shell that completes: pytest reads its options itself.
        for option, completer in (("--mp-resume", completion.made_runs), ("--mp-baseline", completion.runs)):
            completion.completed_by(parser.add_argument(option), completer)


def command(arguments: list[str], here: Path) -> list[str]:
    """Return the command line that runs the suite in the folder ``here``.

    pytest looks for its settings above the suite, which may lie in an environment within any project. So it gets none
    (``-c``), and ``here`` as its root, where mpscale looks for ``[tool.mpscale]`` and makes ``results``.
    """
    # -P: a file in the current folder must not hide a module of Python's.
    pytest = [sys.executable, "-P", "-m", "pytest", "-c", os.devnull, f"--rootdir={here}", "-p", "no:cacheprovider"]
    return [*pytest, suite.__file__, "--benchmark-only", *arguments]


def run(options: argparse.Namespace) -> int:
    if packages := extras.missing():
        return fail(extras.lacks(packages))
    line = command(options.unknown, Path.cwd())
    sys.stdout.flush()
    # In place of this process, so that signals and the terminal are pytest's.
    os.execv(line[0], line)
