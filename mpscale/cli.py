"""The ``mpscale`` command: reads what runs have left, and examines the machine. Making a run is pytest's part.

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
        0 if it worked, 2 after a line on standard error if not; `compare` and `doctor` have codes of their own.
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

    doctor = commands.add_parser(
        "doctor",
        help="say what can be measured on this machine, and what to change",
        description="Says what a run on this machine would measure and why not the rest, and what to change. "
        "Exit code: 0 a run here is complete for its device, 1 something is to be done, 2 bad use.",
    )
    doctor.add_argument("--json", action="store_true", help="the same facts as a JSON object")
    doctor.add_argument(
        "--gpu", action="store_true", help="train on the GPU for a moment, too, which takes up to minutes"
    )
    doctor.set_defaults(command=_doctor)

    report = commands.add_parser("report", help="make the tables and the report of a run anew from its journal")
    report.add_argument("run", metavar="RUN", help="a run's name or how it begins, its folder, or `latest`")
    _add_results(report)
    report.add_argument(
        "--format",
        choices=("markdown", "github-summary"),
        default="markdown",
        help="github-summary writes no file and prints what $GITHUB_STEP_SUMMARY takes (default: markdown)",
    )
    report.add_argument("--print", action="store_true", help="print the report instead of saying where it is")
    report.set_defaults(command=_report)

    compare = commands.add_parser(
        "compare",
        help="what changed from one run to another, and on which hardware",
        description="Compares runs with the first one. Exit code: 0 all well, 1 a gate fired, 2 bad use, 3 a gate "
        "could not tell.",
    )
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the baseline first: names or how they begin, folders, cases.csv, `latest`",
    )
    _add_results(compare)
    _add_output(compare)
    compare.add_argument("--force", action="store_true", help="compare although method, settings or device differ")
    compare.add_argument(
        "--threshold", metavar="5%", help="change of step time from which on it matters (default: 5%%)"
    )
    compare.add_argument(
        "--fail-on",
        action="append",
        metavar="GATE",
        help='such as "step_time>5%%", "gpu_memory>3%%", "metric", "overflow_rate>0.01", "missing", "energy>10%%", '
        '"host_memory>20%%"; several with commas, or the option again',
    )
    compare.add_argument("--strict", action="store_true", default=None, help="what could not be told fails too")
    compare.set_defaults(command=_compare)

    history = commands.add_parser(
        "history",
        help="how a quantity went from run to run, as table and picture",
        description="Lays runs one behind the other, oldest first. Runs measured in different ways or on different "
        "hardware are never joined: each way and machine is a series of its own.",
    )
    history.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="names or how they begin, folders, cases.csv, `latest` (default: all in runs/ and reference/)",
    )
    _add_results(history)
    history.add_argument("--workload", action="append", default=[], metavar="A", help="only this; may be repeated")
    history.add_argument("--mode", action="append", default=[], metavar="B", help="only this; may be repeated")
    history.add_argument(
        "--quantity",
        choices=("step_time", "gpu_memory", "energy", "host_memory", "metric", "overflow_rate", "speedup"),
        default="step_time",
        help="default: step_time",
    )
    _add_output(history)
    history.add_argument("--figure", type=Path, metavar="FILE", help="draw it as well: a file ending in .svg or .png")
    history.set_defaults(command=_history)
    return parser


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="where runs are (default: results)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), default="table", help="default: table"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there instead of to the terminal")


def _put_out(text: str, file: Path | None) -> None:
    if file is None:
        print(text, end="")
    else:
        file.write_text(text, encoding="utf-8")


def _report(options: argparse.Namespace) -> int:
    from mpscale.analysis.runs import RunError, read_run, resolve_run
    from mpscale.report import github_summary
    from mpscale.report.build import rebuild

    try:
        path = resolve_run(options.run, options.results)
        if options.format == "github-summary":
            page = github_summary.artifacts_page(os.environ)
            print(github_summary.render(read_run(path), artifacts=page), end="")
            return 0
        run = rebuild(path)
    except RunError as error:
        return _fail(str(error))
    if options.print:
        print((run.path / "report.md").read_text(encoding="utf-8"), end="")
    else:
        for name in ("report.md", "summary.csv", "cases.csv"):
            print(run.path / name)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from mpscale.analysis.compare import compare_all
    from mpscale.analysis.gates import WELL, exit_code, judge_gates, parse_gates, parse_share
    from mpscale.analysis.runs import RunError, read_run, resolve_run
    from mpscale.project_settings import SettingsError, load
    from mpscale.report.comparison import render

    try:
        if len(options.runs) < 2:
            raise ValueError("compare takes two runs or more, the baseline first")
        settings = load(Path.cwd())
        threshold = options.threshold or settings.threshold
        gates = parse_gates(settings.fail_on if options.fail_on is None else options.fail_on)
        strict = settings.strict if options.strict is None else options.strict
        runs = [read_run(resolve_run(name, options.results)) for name in options.runs]
        limit = None if threshold is None else parse_share(threshold)
        comparisons = compare_all(runs, force=options.force, threshold=limit)
        alike = all(comparison.same_device or options.force for comparison in comparisons)
        if gates and not alike and options.fail_on is not None:
            raise ValueError(
                "gates judge runs of one kind of device, and these are of different ones; leave out --fail-on, "
                "or use --force"
            )
        findings = [finding for each in comparisons for finding in judge_gates(each, gates)] if alike else []
    except (RunError, SettingsError, ValueError) as error:
        return _fail(str(error))
    text = render(comparisons, findings, options.format)
    _put_out(text, options.output)
    for finding in findings:
        if finding.outcome != "passed" and (options.output is not None or options.format in ("csv", "json")):
            print(f"mpscale: {finding.outcome}: {finding}", file=sys.stderr)
    return exit_code(findings, strict) if findings else WELL


def _history(options: argparse.Namespace) -> int:
    from mpscale.analysis.history import make_history, read_folder
    from mpscale.analysis.runs import RunError, read_run, resolve_run
    from mpscale.report.figures import FigureError, check_suffix, draw_history
    from mpscale.report.history import render

    broken: list[tuple[str, str]] = []
    try:
        if options.figure is not None:
            check_suffix(options.figure)
        if options.runs:
            runs = [read_run(resolve_run(name, options.results)) for name in options.runs]
        else:
            runs, broken = read_folder(options.results)
        history = make_history(runs, options.quantity, options.workload, options.mode, broken)
    except (RunError, FigureError) as error:
        return _fail(str(error))
    for what, reason in history.skipped:
        print(f"mpscale: skipped {what}: {' '.join(reason.split())}", file=sys.stderr)
    if options.figure is not None:
        draw_history(history, options.figure)
    text = render(history, options.format)
    _put_out(text, options.output)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from mpscale.doctor.examine import examine
    from mpscale.report.doctor import render

    found = examine(train=options.gpu)
    print(render(found, options.json), end="")
    return found.verdict


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
