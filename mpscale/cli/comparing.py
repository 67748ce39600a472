"""The commands ``compare`` and ``ab``: both end with a comparison and its gates."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpscale.cli import completion
from mpscale.cli.output import (
    FAILED,
    INTERRUPTED,
    OK,
    RESULTS,
    add_output_options,
    check_output,
    fail,
    live_line,
    say,
    surface,
    warn,
    write,
)
from mpscale.config import RUN_OR_CSV, add_gate_options, add_results_option, seconds
from mpscale.terminal.progress import Screen
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.analysis.compare import Comparison
    from mpscale.analysis.gates import Finding, Gate


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare runs with a baseline, the first one. Runs on one kind of device get verdicts row by row; runs on "
        "different devices are shown side by side. With a single run, judge it by the limits of --fail-on, such as "
        "speedup>=1.5, which need no baseline. Exit code: 0 all well, 1 a gate fired, 2 wrong use, 3 a gate could not "
        "tell."
    )
    runs = parser.add_argument(
        "runs", nargs="+", metavar="RUN", help=f"the baseline, then the others; or one run, for limits: {RUN_OR_CSV}"
    )
    completion.completed_by(runs, completion.runs)
    add_results_option(parser.add_argument, default=RESULTS)
    add_output_options(parser)
    _add_comparison_options(parser)


def compare(options: argparse.Namespace) -> int:
    from mpscale.core.runs import resolve_run

    try:
        rules = _rules(options)
        judged = _limits(rules[0], options) if len(options.runs) == 1 else []
        paths = [resolve_run(name, options.results) for name in options.runs]
        return _print_limits(paths[0], judged, rules, options) if judged else _print_comparison(paths, rules, options)
    except ValueError as error:
        return fail(str(error))


def _add_comparison_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the comparison as a page of HTML")
    parser.add_argument("--force", action="store_true", help="compare even if method, settings or device differ")
    parser.add_argument("--threshold", metavar="5%", help="smallest change of step time worth reporting (default: 5%%)")
    add_gate_options(parser.add_argument)


_Rules = tuple[list["Gate"], bool, float | None, bool]
"""Gates, whether a gate that cannot tell fails, the threshold, and whether to compare by name."""


def _rules(options: argparse.Namespace) -> _Rules:
    """Read the rules of a comparison from the command line, or else from ``[tool.mpscale]``.

    Raises:
        ValueError: one of them is not valid.
    """
    from mpscale.analysis.gates import parse_gates, parse_share
    from mpscale.pytest_plugin import project

    settings = project.read(Path.cwd())[0].override(
        fail_on=options.fail_on,
        strict=options.strict,
        threshold=options.threshold or None,
        compare_by=options.compare_by,
    )
    threshold = None if settings.threshold is None else parse_share(settings.threshold)
    return parse_gates(settings.fail_on), settings.strict, threshold, settings.compare_by == "name"


def _limits(gates: Sequence[Gate], options: argparse.Namespace) -> list[Gate]:
    """Return the gates that judge a run alone.

    Raises:
        ValueError: there is none, or the command line asks for what takes two runs.
    """
    name_it = "name it before the run"
    limits = [gate for gate in gates if not gate.needs_baseline]
    if not limits and not (gates and options.fail_on):
        raise ValueError(
            "one run has nothing to be compared with: name two or more, the baseline first, or judge this one by "
            'limits, such as --fail-on "speedup>=1.5"'
        )
    if options.fail_on and (changes := [str(gate) for gate in gates if gate.needs_baseline]):
        raise ValueError(f"--fail-on: {', '.join(changes)} needs a baseline: {name_it}")
    for option in ("--force", "--threshold", "--compare-by"):
        if getattr(options, option.removeprefix("--").replace("-", "_")):
            raise ValueError(f"{option} needs a baseline: {name_it}")
    if options.format == "csv":
        raise ValueError("--format csv has a line for each change since a baseline: for limits, use json or markdown")
    return limits


def _print_limits(path: Path, limits: Sequence[Gate], rules: _Rules, options: argparse.Namespace) -> int:
    """Judge a run alone; see :func:`_print_comparison`."""
    from mpscale.analysis.gates import judge_alone
    from mpscale.core.runs import read_run
    from mpscale.report.comparison import render_alone

    run = read_run(path)
    findings = judge_alone(run, limits)
    write(render_alone(run, findings, options.format, surface(options.output)), options.output, options.format)
    if options.html is not None:
        from mpscale.report.comparison_page import limits_page

        write(limits_page(run, findings), options.html)
    changes = ", ".join(str(gate) for gate in rules[0] if gate.needs_baseline)
    left = [f"without a baseline, {changes} was not judged"] if changes else []
    if not run.plan_known:
        left.append(f"{run.name} does not show which cases were planned, so some may be missing")
    return _outcome(findings, run.problems, rules, options, "; ".join(left))


def _print_comparison(paths: Sequence[Path], rules: _Rules, options: argparse.Namespace) -> int:
    """Compare runs with the first one, and print the result or write it to a file.

    Returns:
        The exit code for the outcome of the gates.

    Raises:
        RunError: a run cannot be read, or they cannot be compared.
        ValueError: the gates cannot judge them.
    """
    from mpscale.analysis.compare import compare_all
    from mpscale.analysis.gates import judge_gates
    from mpscale.analysis.pairs import NotComparable
    from mpscale.core.runs import RunError, read_run
    from mpscale.report.comparison import render, unread

    gates, _, threshold, by_name = rules
    runs = [read_run(path) for path in paths]
    how = {"force": options.force, "threshold": threshold, "results": options.results, "by_name": by_name}
    try:
        comparisons = compare_all(runs, **how, over_replicas=True)
    except NotComparable as error:
        raise RunError(error.with_cure()) from error
    # Limits are judged whatever the other run is: they are about one run.
    apart = "" if options.force else _apart(comparisons)
    judged = [gate for gate in gates if not apart or not gate.needs_baseline]
    if len(judged) < len(gates) and options.fail_on is not None:
        raise ValueError(
            f"{apart}, so gates on a change cannot judge them; leave those out of --fail-on, or use --force"
        )
    findings = [finding for each in comparisons for finding in judge_gates(each, judged)]
    write(render(comparisons, findings, options.format, surface(options.output)), options.output, options.format)
    if options.html is not None:
        from mpscale.report.comparison_page import comparison_page

        write(comparison_page(comparisons, findings), options.html)
    left = f"{apart}: no gate of [tool.mpscale] on a change was judged" if len(judged) < len(gates) else ""
    return _outcome(findings, unread(comparisons), rules, options, left)


def _apart(comparisons: Sequence[Comparison]) -> str:
    """Why gates on a change cannot judge the runs; empty if they can."""
    from mpscale.analysis.pairs import State
    from mpscale.core.columns import MEASURED

    if not all(comparison.same_device for comparison in comparisons):
        return "the runs are on different devices"
    for comparison in comparisons:
        is_paired = any(
            row.pair.state is State.PAIRED and any(case["status"] in MEASURED for case in row.pair.other)
            for row in comparison.rows
        )
        if not is_paired and any(row.scaling is not None for row in comparison.rows):
            return "the runs differ in the number of replicas"
    return ""


def _outcome(
    findings: Sequence[Finding], problems: Sequence[str], rules: _Rules, options: argparse.Namespace, left: str
) -> int:
    """Say on standard error what the result itself does not show; return the exit code.

    Args:
        findings: what gates found.
        problems: what could not be read.
        rules: of the comparison.
        options: of the command line.
        left: why gates of ``[tool.mpscale]`` were not judged; empty if all were.
    """
    from mpscale.analysis.gates import COULD_NOT_TELL, FIRED, exit_code

    if options.output is not None or options.format in ("csv", "json"):
        # Tables and Markdown show this themselves.
        warn(problems)
        for finding in findings:
            if finding.outcome != "passed":
                say(f"{finding.outcome}: {finding}")
    strict = rules[1]
    code = exit_code(findings, strict) if findings else OK
    if left:
        say(left)
        return FIRED if strict or code == FIRED else COULD_NOT_TELL
    return code


def ab_arguments(parser: argparse.ArgumentParser) -> None:
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
    add_output_options(parser)
    _add_comparison_options(parser)
    parser.add_argument(
        "--start-timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="time limit for an environment to import TensorFlow, and to collect its cases (default: 300)",
    )


def ab(options: argparse.Namespace) -> int:
    from mpscale.ab.environments import LETTERS, differences, examine, pytest_arguments
    from mpscale.ab.referee import Referee

    try:
        rules = _rules(options)
        check_output(options.output)
        check_output(options.html, "--html")
        arguments = pytest_arguments(options.unknown, options.results)
        environments = examine(options.python, options.start_timeout, options.force)
    except ValueError as error:
        return fail(str(error))
    # Standard output is for the comparison.
    for line in (*environments, differences(environments)):
        print(visible(str(line)), file=sys.stderr)
    referee = Referee(environments, arguments, Screen(LETTERS, live_line(), time.monotonic), options.start_timeout)
    referee.run()
    for letter, run in zip(LETTERS, referee.runs, strict=True):
        if run is not None:
            print(visible(f"{letter}: {run}"), file=sys.stderr)
    for problem in referee.problems:
        print(visible(f"mpscale: {problem}"), file=sys.stderr)
    if referee.interrupted:
        return INTERRUPTED
    paths = [run for run in referee.runs if run is not None]
    if len(paths) < len(environments):
        return fail("there is nothing to compare")
    print(file=sys.stderr)
    try:
        code = _print_comparison(paths, rules, options)
    except ValueError as error:
        return fail(str(error))
    return FAILED if referee.problems else code
