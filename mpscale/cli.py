"""The ``mpscale`` command: reads runs that pytest has made, examines the machine, and drives two pytest sessions.

Each command is a pair of functions: one adds its arguments to the parser, the other runs it. Whatever is slow to import
is imported inside them, so that ``mpscale --help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mpscale import __version__
from mpscale.config import (
    RUN,
    SettingsError,
    add_gate_options,
    add_results_option,
    load,
    memory,
    number,
    seconds,
    why_not_writable,
)
from mpscale.core.journal import RunError
from mpscale.terminal import LiveLine, Screen, adapt_standard_streams, as_typed

if TYPE_CHECKING:
    from mpscale.analysis.gates import Gate
    from mpscale.core.case import Case
    from mpscale.core.device import Device
    from mpscale.core.wire import Progressed
    from mpscale.telemetry.client import Driver
    from mpscale.workloads import Workload

_OK = 0
_FAILED = 1
_USAGE_ERROR = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE has ended

_RESULTS = Path("results")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse's own method prints the whole usage first.
        self.exit(_USAGE_ERROR, f"mpscale: error: {message}; see `{self.prog} --help`\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process.

    Returns:
        0 for success, 2 after an error message; `ab`, `compare` and `doctor` have exit codes of their own.
    """
    adapt_standard_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            parser = _parser(arguments)
            options, unknown = parser.parse_known_args(arguments)
            if unknown and options.run_command is not _ab:
                parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            options.unknown = unknown
            return int(options.run_command(options))
        finally:
            # Not at exit, where a closed pipe could no longer be handled.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough, for instance in `mpscale report latest --print | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (RunError, SettingsError) as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mpscale",
        description="Compare training in mixed precision with float32: speed, memory, overflow and accuracy. "
        "pytest makes the runs (`make bench`, or `pytest bench/ --benchmark-only`); this command reads them.",
    )
    parser.add_argument("--version", action="version", version=f"mpscale {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (text, add_arguments, run) in _COMMANDS.items():
        command = subparsers.add_parser(name, help=text)
        command.set_defaults(run_command=run)
        if name == chosen:
            add_arguments(command)
    return parser


def _workloads_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List workloads and modes."
    parser.add_argument(
        "names",
        nargs="*",
        type=as_typed,
        metavar="NAME",
        help="list only these workloads; module:attribute names one of your own, which is looked for on Python's path "
        "and then in the working directory",
    )


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
    print(tabulate(rows, ["workload", "batch", "steps", "target", "description"], disable_numparse=True))
    for name in filter(registry.is_own, options.names):
        print(f"{name} is in {registry.source(name, here)}")
    for name, why in broken.items():
        _say(f"broken: {name}: {why}")
    print()
    by_default = dict.fromkeys(DEFAULT_MODES, "yes") | {"tf32": "with TF32"}
    modes = [(mode.name, by_default.get(mode.name, "no"), mode.summary) for mode in MODES.values()]
    print(tabulate(modes, ["mode", "by default", "description"]))
    return _OK


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what a run on this machine would measure, what it could not measure and why, and what to change. "
        "Exit code: 0 nothing to do, 1 something to do, 2 wrong use."
    )
    parser.add_argument("--json", action="store_true", help="print the same facts as a JSON object")
    parser.add_argument("--gpu", action="store_true", help="also train on the GPU briefly, which may take minutes")


def _doctor(options: argparse.Namespace) -> int:
    from mpscale.doctor.examine import examine
    from mpscale.doctor.page import render

    found = examine(train=options.gpu)
    print(render(found, options.json), end="")
    return found.verdict


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make the tables and the report of a run again, from its journal."
    parser.add_argument("run", metavar="RUN", help="name of the run or its first characters, its folder, or `latest`")
    add_results_option(parser.add_argument, default=_RESULTS)
    parser.add_argument(
        "--format",
        choices=("markdown", "github-summary"),
        default="markdown",
        help="github-summary writes no files and prints text for $GITHUB_STEP_SUMMARY (default: markdown)",
    )
    parser.add_argument("--print", action="store_true", help="print the report instead of the names of its files")


def _report(options: argparse.Namespace) -> int:
    from mpscale.core.runs import read_run, resolve_run
    from mpscale.report.document import artifacts_page, github_summary
    from mpscale.report.files import WRITTEN, rebuild

    path = resolve_run(options.run, options.results)
    if options.format == "github-summary":
        run = read_run(path)
        print(github_summary(run, artifacts=artifacts_page(os.environ)), end="")
        _warn(run.problems)
        return _OK
    run = rebuild(path)
    _warn(run.problems)
    if options.print:
        print((run.path / "report.md").read_text(encoding="utf-8"), end="")
    else:
        print(*(run.path / name for name in WRITTEN), sep="\n")
    return _OK


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare runs with a baseline, the first one. Runs on one kind of device get verdicts row by row; runs on "
        "different devices are shown side by side. Exit code: 0 all well, 1 a gate fired, 2 wrong use, 3 a gate could "
        "not tell."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"the baseline, then the others: {RUN}")
    add_results_option(parser.add_argument, default=_RESULTS)
    _add_output_options(parser)
    _add_comparison_options(parser)


def _compare(options: argparse.Namespace) -> int:
    from mpscale.core.runs import resolve_run

    try:
        if len(options.runs) < 2:
            raise ValueError("compare needs two or more runs, the baseline first")
        rules = _rules(options)
        return _print_comparison([resolve_run(name, options.results) for name in options.runs], rules, options)
    except ValueError as error:
        return _fail(str(error))


def _add_comparison_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="compare even if method, settings or device differ")
    parser.add_argument("--threshold", metavar="5%", help="smallest change of step time worth reporting (default: 5%%)")
    add_gate_options(parser.add_argument)


_Rules = tuple[list["Gate"], bool, float | None]
"""Gates, whether a gate that cannot tell fails, and the threshold."""


def _rules(options: argparse.Namespace) -> _Rules:
    """Read the rules of a comparison from the command line, or else from ``[tool.mpscale]``.

    Raises:
        ValueError: one of them is not valid.
    """
    from mpscale.analysis.gates import parse_gates, parse_share

    settings = load(Path.cwd()).override(
        fail_on=options.fail_on, strict=options.strict, threshold=options.threshold or None
    )
    threshold = None if settings.threshold is None else parse_share(settings.threshold)
    return parse_gates(settings.fail_on), settings.strict, threshold


def _print_comparison(paths: Sequence[Path], rules: _Rules, options: argparse.Namespace) -> int:
    """Compare runs with the first one, and print the result or write it to a file.

    Returns:
        The exit code for the outcome of the gates.

    Raises:
        RunError: a run cannot be read, or they cannot be compared.
        ValueError: the gates cannot judge them.
    """
    from mpscale.analysis.compare import compare_all
    from mpscale.analysis.gates import COULD_NOT_TELL, FIRED, exit_code, judge_gates
    from mpscale.core.runs import read_run
    from mpscale.report.comparison import render, unread

    gates, strict, threshold = rules
    runs = [read_run(path) for path in paths]
    comparisons = compare_all(runs, force=options.force, threshold=threshold, results=options.results)
    alike = options.force or all(comparison.same_device for comparison in comparisons)
    if gates and not alike and options.fail_on is not None:
        raise ValueError(
            "gates judge runs of one kind of device, and these are of different ones; leave out --fail-on, "
            "or use --force"
        )
    findings = [finding for each in comparisons for finding in judge_gates(each, gates)] if alike else []
    _write(render(comparisons, findings, options.format), options.output)
    if options.output is not None or options.format in ("csv", "json"):
        # Tables and Markdown show this themselves.
        _warn(unread(comparisons))
        for finding in findings:
            if finding.outcome != "passed":
                _say(f"{finding.outcome}: {finding}")
    if gates and not alike:
        _say("the runs are on different devices: no gate of [tool.mpscale] was judged")
        return FIRED if strict else COULD_NOT_TELL
    return exit_code(findings, strict) if findings else _OK


def _ab_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mpscale ab --python A --python B [options] [options and test paths for pytest]"
    parser.description = (
        "Run pytest in two environments, for instance with two versions of TensorFlow, and compare the runs. The two "
        "are interleaved: each case runs in one environment and right after that in the other, so that whatever slows "
        "the machine down affects both. Arguments not listed here go to pytest (for its -o, write --override-ini); "
        "without a test path, `bench` is run if it exists. Exit code: 0 all well, 1 a gate fired or a session failed, "
        "2 wrong use or nothing to compare, 3 a gate could not tell."
    )
    # An option for pytest may be the beginning of one of these.
    parser.allow_abbrev = False
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="interpreter of an environment with mpscale, as a path or a name on PATH: first A, the baseline, then B; "
        "the same one twice shows the noise of this machine",
    )
    add_results_option(parser.add_argument)
    _add_output_options(parser)
    _add_comparison_options(parser)
    parser.add_argument(
        "--start-timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="time limit for an environment to import TensorFlow, and to collect its cases (default: 300)",
    )


def _ab(options: argparse.Namespace) -> int:
    from mpscale.ab.environments import LETTERS, Refused, differences, examine, pytest_arguments
    from mpscale.ab.referee import Referee

    try:
        rules = _rules(options)
        if options.output is not None and not options.output.parent.is_dir():
            raise Refused(f"--output {options.output}: there is no folder {options.output.parent}")
        arguments = pytest_arguments(options.unknown, options.results)
        environments = examine(options.python, options.start_timeout, options.force)
    except ValueError as error:
        return _fail(str(error))
    # Standard output is for the comparison.
    for line in (*environments, differences(environments)):
        print(line, file=sys.stderr)
    # CI sends SIGTERM to cancel a job: keep what was measured, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    line = LiveLine(_write_error, sys.stderr.isatty(), shutil.get_terminal_size().columns)
    referee = Referee(environments, arguments, Screen(LETTERS, line, time.monotonic), options.start_timeout)
    referee.run()
    for letter, run in zip(LETTERS, referee.runs, strict=True):
        if run is not None:
            print(f"{letter}: {run}", file=sys.stderr)
    for problem in referee.problems:
        print(f"mpscale: {problem}", file=sys.stderr)
    if referee.interrupted:
        return _INTERRUPTED
    paths = [run for run in referee.runs if run is not None]
    if len(paths) < len(environments):
        return _fail("there is nothing to compare")
    print(file=sys.stderr)
    try:
        code = _print_comparison(paths, rules, options)
    except ValueError as error:
        return _fail(str(error))
    return _FAILED if referee.problems else code


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    from mpscale.analysis.quantities import QUANTITIES

    parser.description = (
        "Show a quantity over runs, oldest first. Each machine and each set of settings is a series of its own: "
        "figures that were measured differently are never joined."
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help=f"{RUN} (default: all in runs/ and reference/ of the results folder)"
    )
    add_results_option(parser.add_argument, default=_RESULTS)
    parser.add_argument(
        "--workload", action="append", default=[], type=as_typed, metavar="A", help="only this workload; repeatable"
    )
    parser.add_argument("--mode", action="append", default=[], metavar="B", help="only this mode; repeatable")
    parser.add_argument("--quantity", choices=tuple(QUANTITIES), default="step_time", help="default: step_time")
    _add_output_options(parser)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw it, into a file ending in .svg or .png")


def _history(options: argparse.Namespace) -> int:
    from mpscale.analysis.history import make_history, read_folder
    from mpscale.core.runs import read_run, resolve_run
    from mpscale.report.figures import FigureError, check_suffix
    from mpscale.report.history import draw_history, render

    broken: list[tuple[str, str]] = []
    try:
        if options.figure is not None:
            check_suffix(options.figure)
    except FigureError as error:
        return _fail(str(error))
    if options.runs:
        runs = [read_run(resolve_run(name, options.results)) for name in options.runs]
    else:
        runs, broken = read_folder(options.results)
    history = make_history(runs, options.quantity, options.workload, options.mode, broken)
    _warn([problem for run in runs for problem in run.problems])
    for what, reason in history.skipped:
        _say(f"skipped {what}: {reason}")
    if options.figure is not None:
        draw_history(history, options.figure)
    _write(render(history, options.format), options.output)
    return _OK


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    from mpscale.core.mode import DEFAULT_MODES, MODES

    parser.description = (
        "Find the largest batch that trains in each mode, and how many examples per second it trains: what the memory "
        "that a mode saves is good for. Every batch is tried in a process of its own: powers of two, and then between "
        "two of them in eighths. The result is kept in the folder fit/ of the results folder. Exit code: 0 the limit "
        "of every mode was found, 1 not of every mode, 2 wrong use."
    )
    parser.add_argument("workload", metavar="WORKLOAD", type=as_typed, help="`mpscale workloads` lists them")
    parser.add_argument(
        "--mode",
        action="append",
        metavar="B",
        choices=tuple(MODES),
        help=f"a mode to search; repeatable (default: {', '.join(DEFAULT_MODES)}, and tf32 on devices that have it)",
    )
    parser.add_argument(
        "--memory-limit",
        type=memory,
        metavar="SIZE",
        help="memory that a process may use on a CPU, such as 800MiB or 4GiB; TensorFlow alone takes some 700 MiB "
        "(default: 80 %% of what is free; on a GPU its own memory is the limit)",
    )
    at_least_1 = number(int, lambda value: value >= 1, "an integer of at least 1")
    parser.add_argument(
        "--max-batch",
        type=at_least_1,
        default=2**20,
        metavar="N",
        help="largest batch to try (default: 1048576); one that is larger than the training set repeats its examples",
    )
    parser.add_argument(
        "--jit", choices=("auto", "on", "off"), default="auto", help="compile train steps with XLA (default: auto: on)"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=900.0, metavar="SECONDS", help="time limit for each try (default: 900)"
    )
    parser.add_argument(
        "--gpu-allocator",
        choices=("auto", "cuda_malloc_async", "bfc"),
        default="auto",
        help="TensorFlow's GPU memory allocator (default: auto, which is cuda_malloc_async, or bfc if that fails)",
    )
    add_results_option(parser.add_argument, default=_RESULTS)
    _add_output_options(parser)


def _fit(options: argparse.Namespace) -> int:
    from mpscale.core.device import NoSuchDevice, find_device
    from mpscale.core.mode import default_modes, select_modes
    from mpscale.telemetry import host
    from mpscale.telemetry.client import open_driver
    from mpscale.workloads import registry

    if options.output is not None and not options.output.parent.is_dir():
        return _fail(f"--output {options.output}: there is no folder {options.output.parent}")
    try:
        with registry.without_gpus():
            workload = registry.get(options.workload, [Path.cwd()])
    except registry.UnknownWorkload as error:
        return _fail(str(error))
    if why_not := why_not_writable(options.results / "fit"):
        return _fail(f"--results: {options.results} is not a folder that can be written to ({why_not})")
    # As after Ctrl-C: keep what is known.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    driver = open_driver()
    try:
        device = find_device(driver.devices, os.environ, host.cpu())
        if device.kind == "gpu" and options.memory_limit is not None:
            return _fail("--memory-limit is for a CPU; on a GPU its own memory is the limit")
        modes = select_modes(options.mode) if options.mode else default_modes(device)
        return _search(options, workload, [mode.name for mode in modes], device, driver)
    except NoSuchDevice as error:
        return _fail(str(error))
    finally:
        driver.close()


def _search(
    options: argparse.Namespace, workload: Workload, modes: Sequence[str], device: Device, driver: Driver
) -> int:
    """Search, show each try on standard error, keep all in a folder, and print the result."""
    from mpscale.analysis.fit import Fit, Try
    from mpscale.core.wire import PhaseReached
    from mpscale.harness import fit as fitting
    from mpscale.harness.supervisor import Options, Supervisor
    from mpscale.report import fit as report

    limit_mib = options.memory_limit or fitting.default_limit_mib(device)
    fit = Fit(options.workload, modes, device, limit_mib)
    settings = replace(fitting.SETTINGS, jit=options.jit != "off")
    how = Options(
        results=options.results,
        project=Path.cwd(),
        start_method="fork",
        timeout_s=options.timeout,
        asked={},
        gpu_allocator=options.gpu_allocator,
        keep_suspect=True,
        memory_limit_mib=limit_mib,
    )
    asked = {**settings.to_json(), "max_batch": options.max_batch, "timeout_s": options.timeout}
    asked |= {"memory_limit_mib": limit_mib, "gpu_allocator": options.gpu_allocator}
    folder, about = fitting.new_folder(options.results, device, driver, asked)
    line = LiveLine(_write_error, sys.stderr.isatty(), shutil.get_terminal_size().columns)
    line.add(f"on {device.name} ({device.kind.upper()})" + (f", up to {limit_mib:,.0f} MiB" if limit_mib else ""))

    def show(case: Case, event: Progressed) -> None:
        if isinstance(event, PhaseReached):
            line.update(f"{case.mode}, batch {case.settings.batch_size}: {event.phase}")

    def tried(each: Try) -> None:
        line.add(report.line(each))
        report.write(folder, fit, about)

    question = fitting.Question(workload.batch_size, options.max_batch, settings)
    interrupted = False
    try:
        fitting.Fitter(fit, question, Supervisor(device, driver, how, show), tried).run()
    except KeyboardInterrupt:
        interrupted = True
    line.update("")
    report.write(folder, fit, {**about, "finished": not interrupted})
    print(f"report: {folder / 'report.md'}\n", file=sys.stderr)
    _write(report.render(fit, options.format), options.output)
    if interrupted:
        return _INTERRUPTED
    return _OK if all(fit.ends.get(mode, True) is None for mode in modes) else _FAILED


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "workloads": ("list workloads and modes", _workloads_arguments, _workloads),
    "doctor": ("show what can be measured on this machine, and what to change", _doctor_arguments, _doctor),
    "report": ("make the tables and the report of a run again", _report_arguments, _report),
    "compare": ("compare runs with a baseline; can fail a build", _compare_arguments, _compare),
    "ab": ("run two environments interleaved, and compare them", _ab_arguments, _ab),
    "fit": ("find the largest batch that trains in each mode", _fit_arguments, _fit),
    "history": ("show a quantity over runs, as a table and a figure", _history_arguments, _history),
}


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), default="table", help="output format (default: table)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write to this file, not to the terminal")


def _write(text: str, file: Path | None) -> None:
    if file is None:
        print(text, end="")
    else:
        file.write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_error(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _say(message: str) -> None:
    """Write one line to standard error."""
    print(f"mpscale: {' '.join(message.split())}", file=sys.stderr)


def _warn(problems: Sequence[str]) -> None:
    for problem in problems:
        _say(f"warning: {problem}")


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return _USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
