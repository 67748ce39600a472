"""The ``mpscale`` command: reads runs that pytest has made, examines the machine, and drives two pytest sessions.

Each command is a pair of functions in one of the modules here: one adds its arguments to the parser, the other runs
it. Whatever is slow to import is imported inside them, so that ``mpscale --help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn

from mpscale import __version__
from mpscale.cli import (
    comparing,
    completion,
    fitting,
    linting,
    listing,
    merging,
    naming,
    probing,
    reading,
    running,
    site,
    starting,
)
from mpscale.cli.output import INTERRUPTED, USAGE_ERROR, fail, take_results_of_the_project
from mpscale.config import SettingsError
from mpscale.core import extras
from mpscale.core.files.errors import in_words
from mpscale.core.files.reading import RunError
from mpscale.core.processes import stopping
from mpscale.terminal.streams import adapt_standard_streams, visible

_BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE has ended


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse's own method prints the whole usage first.
        self.exit(USAGE_ERROR, f"mpscale: error: {visible(message)}; see `{self.prog} --help`\n")


class _Help(argparse.HelpFormatter):
    """Breaks no line within an option or a command, so that both can be copied; lines with an indent stay as typed."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            # argparse forgets the indent of commands, so the longest would have its text on the next line.
            self._action_max_length += self._indent_increment

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for line in text.splitlines():
            lines += [line] if line.startswith(" ") else self._split_lines(line, width) or [""]
        return "\n".join(f"{indent}{line}" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process.

    Returns:
        0 for success, 2 after an error message, 130 after a signal; `ab`, `compare` and `doctor` have exit codes
        of their own. Without a command, 2 after the help, as git and uv fail: where a script has lost its command, a
        build must not pass.
    """
    adapt_standard_streams()
    try:
        with stopping.listening(INTERRUPTED):
            return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    try:
        try:
            if (words := completion.words_to_complete()) is not None:
                completion.complete(_parser(words))
            parser = _parser(arguments)
            if not arguments:
                parser.print_help()
                return USAGE_ERROR
            options, unknown = parser.parse_known_args(arguments)
            if unknown and options.run_command not in (comparing.ab, running.run, reading.doctor):
                parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            options.unknown = unknown
            take_results_of_the_project(options)
            return int(options.run_command(options))
        finally:
            # Not at exit, where a closed pipe could no longer be handled.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, for instance in `mpscale report latest --print | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except ModuleNotFoundError as error:
        if (why := extras.why_not_imported(error)) is None:
            raise
        return fail(why)
    except (RunError, SettingsError) as error:
        return fail(str(error))
    except OSError as error:
        # What writes a file says which. Standard output does not.
        return fail(in_words(error, None if error.filename else "the output cannot be written"))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpscale",
        formatter_class=_Help,
        description="Compare training in mixed precision with float32: speed, memory, overflow and accuracy. "
        "`mpscale run`, or pytest on a suite of your own, trains and leaves a run. `fit`, `probe` and `lint` try one "
        "workload, and most other commands read runs. `mpscale COMMAND --help` explains a command.",
        epilog="In bash and zsh, the Tab key completes commands, options, runs, workloads and modes after\n\n"
        f'    pip install "mpscale[completion]"\n    {completion.SWITCH_ON}    # in ~/.bashrc or ~/.zshrc',
    )
    parser.add_argument("--version", action="version", version=f"mpscale {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (text, add_arguments, run) in _COMMANDS.items():
        command = subparsers.add_parser(name, help=text, formatter_class=_Help)
        command.set_defaults(run_command=run)
        if name == chosen:
            add_arguments(command)
    return parser


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "init": ("write settings, a workload and a suite into a project", starting.init_arguments, starting.init),
    "run": ("train every workload in every mode, and report", running.run_arguments, running.run),
    "workloads": ("list workloads and modes", reading.workloads_arguments, reading.workloads),
    "doctor": (
        "show what a run here would measure, its options, and what to change",
        reading.doctor_arguments,
        reading.doctor,
    ),
    "merge": ("make one run of the parts that several machines have run", merging.merge_arguments, merging.merge),
    "report": ("make the tables and the report of a run again", reading.report_arguments, reading.report),
    "list": ("list runs, and how they went", listing.list_arguments, listing.list_runs),
    "open": ("open the report of a run in the browser", listing.open_arguments, listing.open_report),
    "name": ("give a run a name or a note, or show them", naming.name_arguments, naming.name),
    "compare": (
        "compare runs with a baseline, or judge one by limits; can fail a build",
        comparing.compare_arguments,
        comparing.compare,
    ),
    "ab": ("run two environments interleaved, and compare them", comparing.ab_arguments, comparing.ab),
    "lint": ("find what is wrong or slow about a workload before a run", linting.lint_arguments, linting.lint),
    "fit": ("find the largest batch that trains in each mode", fitting.fit_arguments, fitting.fit),
    "probe": (
        "show what float16 makes of a workload's gradients, and which static loss scale fits",
        probing.probe_arguments,
        probing.probe,
    ),
    "history": ("show a quantity over runs, as a table and a figure", reading.history_arguments, reading.history),
    "site": ("write static pages over all runs: index, reports, comparisons, history", site.site_arguments, site.site),
}
