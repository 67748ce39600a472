"""The ``mpscale`` command: reads what runs have left, and examines the machine. Making a run is pytest's part, which
``ab`` has two sessions do.

Everything heavy is imported inside the commands, so that ``mpscale --help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mpscale import __version__
from mpscale.analysis.quantities import QUANTITIES
from mpscale.config import folder
from mpscale.terminal import adapt_standard_streams, as_typed

if TYPE_CHECKING:
    from mpscale.analysis.gates import Gate


_FAILED = 1
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
        0 if it worked, 2 after a line on standard error if not; `ab`, `compare` and `doctor` have codes of their own.
    """
    adapt_standard_streams()
    try:
        try:
            parser = _parser()
            options, unknown = parser.parse_known_args(arguments)
            if unknown and options.command is not _ab:
                parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            options.unknown = unknown
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
    workloads.add_argument(
        "names",
        nargs="*",
        type=as_typed,
        metavar="NAME",
        help="only these; module:attribute names one of your own, found on Python's path or in this folder",
    )
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
    _add_judging(compare)
    compare.set_defaults(command=_compare)

    ab = commands.add_parser(
        "ab",
        usage="mpscale ab --python A --python B [options] [options and places of pytest]",
        help="run the same cases in two environments in turns, and compare them",
        description="Runs pytest in two environments, two versions of TensorFlow, say, in turns: each case in both, "
        "one right after the other, so that what slows the machine hits both alike. Then compares B with A. What is "
        "not listed here goes to pytest, and `bench` where no place of tests is named and there is one; pytest's -o is "
        "--override-ini here. Exit code: 0 all well, 1 a gate fired or a session failed, 2 bad use or nothing to "
        "compare, 3 a gate could not tell.",
        # An option of pytest may begin as one of these does.
        allow_abbrev=False,
    )
    ab.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="interpreter of an environment with mpscale, a path or a name on PATH: first A, the baseline, then B; the "
        "same one twice shows what the machine's noise makes of no change",
    )
    ab.add_argument(
        "--results",
        type=folder,
        metavar="DIR",
        help="where both runs go (default: results/ under pytest's root directory)",
    )
    _add_output(ab)
    _add_judging(ab)
    ab.add_argument(
        "--start-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="time that an environment may take to import TensorFlow, or to collect its cases (default: 300)",
    )
    ab.set_defaults(command=_ab)

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
    history.add_argument(
        "--workload", action="append", default=[], type=as_typed, metavar="A", help="only this; may be repeated"
    )
    history.add_argument("--mode", action="append", default=[], metavar="B", help="only this; may be repeated")
    history.add_argument(
        "--quantity",
        choices=tuple(QUANTITIES),
        default="step_time",
        help="default: step_time",
    )
    _add_output(history)
    history.add_argument("--figure", type=Path, metavar="FILE", help="draw it as well: a file ending in .svg or .png")
    history.set_defaults(command=_history)
    return parser


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=folder, default=Path("results"), metavar="DIR", help="where runs are (default: results)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), default="table", help="default: table"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there instead of to the terminal")


def _add_judging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="compare although method, settings or device differ")
    parser.add_argument("--threshold", metavar="5%", help="change of step time from which on it matters (default: 5%%)")
    parser.add_argument(
        "--fail-on",
        action="append",
        metavar="GATE",
        help='such as "step_time>5%%", "gpu_memory>3%%", "metric", "overflow_rate>0.01", "missing", "energy>10%%", '
        '"host_memory>20%%"; several with commas, or the option again',
    )
    parser.add_argument("--strict", action="store_true", default=None, help="what could not be told fails too")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, not {text!r}")
    return seconds


def _write_error(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _put_out(text: str, file: Path | None) -> None:
    if file is None:
        print(text, end="")
    else:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")


def _report(options: argparse.Namespace) -> int:
    from mpscale.core.runs import RunError, read_run, resolve_run
    from mpscale.report import document as github_summary
    from mpscale.report.files import WRITTEN, rebuild

    try:
        path = resolve_run(options.run, options.results)
        if options.format == "github-summary":
            page = github_summary.artifacts_page(os.environ)
            run = read_run(path)
            print(github_summary.github_summary(run, artifacts=page), end="")
        else:
            run = rebuild(path)
    except RunError as error:
        return _fail(str(error))
    _warn(run.problems)
    if options.format == "github-summary":
        return 0
    if options.print:
        print((run.path / "report.md").read_text(encoding="utf-8"), end="")
    else:
        for name in WRITTEN:
            print(run.path / name)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from mpscale.config import SettingsError
    from mpscale.core.runs import RunError, resolve_run

    try:
        if len(options.runs) < 2:
            raise ValueError("compare takes two runs or more, the baseline first")
        judging = _judging(options)
        paths = [resolve_run(name, options.results) for name in options.runs]
        return _show_comparison(paths, judging, options)
    except (RunError, SettingsError, ValueError) as error:
        return _fail(str(error))


def _judging(options: argparse.Namespace) -> tuple[list[Gate], bool, float | None]:
    """Gates, whether they are strict, and the threshold, from the command line and else from ``[tool.mpscale]``.

    Raises:
        ValueError: one of them is not understood.
    """
    from mpscale.analysis.gates import parse_gates, parse_share
    from mpscale.config import load

    settings = load(Path.cwd())
    threshold = options.threshold or settings.threshold
    return (
        parse_gates(settings.fail_on if options.fail_on is None else options.fail_on),
        settings.strict if options.strict is None else options.strict,
        None if threshold is None else parse_share(threshold),
    )


def _show_comparison(
    paths: Sequence[Path], judging: tuple[list[Gate], bool, float | None], options: argparse.Namespace
) -> int:
    """Compares the runs with the first one, and puts that where the options say.

    Returns:
        The exit code that the gates come to.

    Raises:
        RunError: a run cannot be read, or they cannot be compared.
        ValueError: the gates cannot judge them.
    """
    from mpscale.analysis.compare import compare_all
    from mpscale.analysis.gates import COULD_NOT_TELL, FIRED, WELL, exit_code, judge_gates
    from mpscale.core.runs import read_run
    from mpscale.report.comparison import render, unread

    gates, strict, threshold = judging
    runs = [read_run(path) for path in paths]
    comparisons = compare_all(runs, force=options.force, threshold=threshold, results=options.results)
    alike = all(comparison.same_device or options.force for comparison in comparisons)
    if gates and not alike and options.fail_on is not None:
        raise ValueError(
            "gates judge runs of one kind of device, and these are of different ones; leave out --fail-on, "
            "or use --force"
        )
    findings = [finding for each in comparisons for finding in judge_gates(each, gates)] if alike else []
    _put_out(render(comparisons, findings, options.format), options.output)
    if options.output is not None or options.format in ("csv", "json"):
        _warn(unread(comparisons))
    for finding in findings:
        if finding.outcome != "passed" and (options.output is not None or options.format in ("csv", "json")):
            print(f"mpscale: {finding.outcome}: {finding}", file=sys.stderr)
    if gates and not alike:
        print("mpscale: runs of different devices: no gate of [tool.mpscale] was judged", file=sys.stderr)
        return FIRED if strict else COULD_NOT_TELL
    return exit_code(findings, strict) if findings else WELL


def _ab(options: argparse.Namespace) -> int:
    from mpscale.ab.environments import Refused, differences, examine, pytest_arguments
    from mpscale.ab.referee import run_in_turns
    from mpscale.config import SettingsError
    from mpscale.core.runs import RunError
    from mpscale.terminal import Screen

    try:
        judging = _judging(options)
        if options.output is not None and not options.output.parent.is_dir():
            raise Refused(f"--output {options.output}: there is no folder {options.output.parent}")
        arguments = pytest_arguments(options.unknown, options.results)
        environments = examine(options.python, options.start_timeout, options.force)
    except (Refused, SettingsError, ValueError) as error:
        return _fail(str(error))
    # Standard output is for the comparison.
    for line in (*environments, differences(environments)):
        print(line, file=sys.stderr)
    # As a CI has it that cancels a job: the runs are ended like those that the user stops.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    screen = Screen(_write_error, sys.stderr.isatty(), time.monotonic, shutil.get_terminal_size().columns)
    result = run_in_turns(environments, arguments, screen, options.start_timeout)
    for environment, run in zip(environments, result.runs, strict=True):
        if run is not None:
            print(f"{environment.letter}: {run}", file=sys.stderr)
    for problem in result.problems:
        print(f"mpscale: {problem}", file=sys.stderr)
    if result.interrupted:
        return _INTERRUPTED
    paths = [run for run in result.runs if run is not None]
    if len(paths) < len(environments):
        return _fail("there is nothing to compare")
    print(file=sys.stderr)
    try:
        code = _show_comparison(paths, judging, options)
    except (RunError, ValueError) as error:
        return _fail(str(error))
    return _FAILED if result.problems else code


def _history(options: argparse.Namespace) -> int:
    from mpscale.analysis.history import make_history, read_folder
    from mpscale.core.runs import RunError, read_run, resolve_run
    from mpscale.report.figures import FigureError, check_suffix
    from mpscale.report.history import draw_history, render

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
    _warn([problem for run in runs for problem in run.problems])
    for what, reason in history.skipped:
        print(f"mpscale: skipped {what}: {' '.join(reason.split())}", file=sys.stderr)
    if options.figure is not None:
        draw_history(history, options.figure)
    text = render(history, options.format)
    _put_out(text, options.output)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from mpscale.doctor.examine import examine
    from mpscale.doctor.page import render

    found = examine(train=options.gpu)
    print(render(found, options.json), end="")
    return found.verdict


def _workloads(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from mpscale.core.mode import DEFAULT_MODES, MODES
    from mpscale.report.table import DASH
    from mpscale.workloads import registry

    here = [Path.cwd()]
    broken: dict[str, str] = {}
    try:
        with registry.without_gpus():
            found = {name: registry.get(name, here) for name in options.names}
            offered = registry.Offered() if found else registry.offered()
    except registry.UnknownWorkload as error:
        return _fail(str(error))
    if not found:
        found, broken = offered.workloads, offered.broken
    rows = [
        (name, w.batch_size, w.train_steps, DASH if w.target is None else f"{w.metric_name} {w.target:g}", w.summary)
        for name, w in found.items()
    ]
    print(tabulate(rows, ["workload", "batch", "steps", "target", "what it is"], disable_numparse=True))
    for name in filter(registry.is_own, options.names):
        print(f"{name} is in {registry.source(name, here)}")
    for name, why in broken.items():
        print(f"mpscale: broken: {name}: {' '.join(why.split())}", file=sys.stderr)
    print()
    by_default = dict.fromkeys(DEFAULT_MODES, "yes") | {"tf32": "with TF32"}
    modes = [(mode.name, by_default.get(mode.name, "no"), mode.summary) for mode in MODES.values()]
    print(tabulate(modes, ["mode", "by default", "what it is"]))
    return 0


def _warn(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"mpscale: warning: {' '.join(problem.split())}", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"mpscale: error: {' '.join(message.split())}", file=sys.stderr)
    return _USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
