"""The ``mpscale`` command: reads what runs have left. Making a run is pytest's part.

Everything heavy is imported inside the commands, so that ``mpscale --help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpscale import __version__

_USAGE_ERROR = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse puts the whole usage before the error and "mpscale report" before the colon.
        self.exit(_USAGE_ERROR, f"mpscale: error: {message}; see `{self.prog} --help`\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments``, by default those of the process.

    Returns:
        0 if it worked, 2 after a line on standard error if not.
    """
    try:
        try:
            options = _parser().parse_args(arguments)
            return int(options.command(options))
        finally:
            # Here rather than when Python ends, where a closed pipe could no longer be handled.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, for instance `mpscale report latest --print | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpscale",
        description="What mixed precision buys, what it costs and whether it can be trusted. "
        "Runs are made with pytest (`make bench` or `pytest bench/ --benchmark-only`) and read here.",
    )
    parser.add_argument("--version", action="version", version=f"mpscale {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    workloads = commands.add_parser("workloads", help="list what can be trained, and how")
    workloads.set_defaults(command=_workloads)

    report = commands.add_parser("report", help="make the tables and the report of a run anew from its journal")
    report.add_argument("run", metavar="RUN", help="a run's name or how it begins, its folder, or `latest`")
    report.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are (default: results)"
    )
    report.add_argument("--format", choices=["markdown"], default="markdown", help="of the report (default: markdown)")
    report.add_argument("--print", action="store_true", help="print the report instead of saying where it is")
    report.set_defaults(command=_report)
    return parser


def _report(options: argparse.Namespace) -> int:
    from mpscale.analysis.runs import RunError, resolve_run
    from mpscale.report.build import rebuild

    try:
        run = rebuild(resolve_run(options.run, options.results))
    except RunError as error:
        return _fail(str(error))
    if options.print:
        print((run.path / "report.md").read_text(encoding="utf-8"), end="")
    else:
        for name in ("report.md", "summary.csv", "cases.csv"):
            print(run.path / name)
    return 0


def _workloads(_: argparse.Namespace) -> int:
    from tabulate import tabulate

    from mpscale.modes import DEFAULT_MODES, MODES
    from mpscale.report.cells import DASH
    from mpscale.workloads import registry

    try:
        found = registry.available()
    except registry.UnknownWorkload as error:
        return _fail(str(error))
    rows = [
        (w.name, w.batch_size, w.train_steps, DASH if w.target is None else f"{w.metric_name} {w.target:g}", w.summary)
        for w in found.values()
    ]
    print(tabulate(rows, ["workload", "batch", "steps", "target", "what it is"], disable_numparse=True))
    print()
    by_default = dict.fromkeys(DEFAULT_MODES, "yes") | {"tf32": "with TF32"}
    modes = [(mode.name, by_default.get(mode.name, "no"), mode.summary) for mode in MODES.values()]
    print(tabulate(modes, ["mode", "by default", "what it is"]))
    return 0


def _fail(message: str) -> int:
    print(f"mpscale: error: {' '.join(message.split())}", file=sys.stderr)
    return _USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
