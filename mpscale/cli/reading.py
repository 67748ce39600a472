"""The commands ``workloads``, ``doctor``, ``report`` and ``history``, which show what is there."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpscale.cli import completion
from mpscale.cli.output import OK, RESULTS, add_json_option, add_output_options, fail, say, surface, warn, write
from mpscale.config import RUN, RUN_OR_CSV, add_compare_by_option, add_results_option, load
from mpscale.terminal.streams import as_typed, visible

if TYPE_CHECKING:
    from mpscale.core.runs import Run
    from mpscale.workloads import Workload


def workloads_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List workloads and modes: mpscale's, those of installed packages, and those of the project."
    names = parser.add_argument(
        "names",
        nargs="*",
        type=as_typed,
        metavar="NAME",
        help="list only these workloads; module:attribute names one of your own, which is looked for on Python's path "
        "and then in the working directory",
    )
    completion.completed_by(names, completion.workloads)
    add_json_option(parser)


def workloads(options: argparse.Namespace) -> int:
    from mpscale.core.mode import DEFAULT_MODES, MODES
    from mpscale.report.table import Table, json_document
    from mpscale.workloads import large, registry

    here = [Path.cwd()]
    broken: dict[str, str] = {}
    try:
        with registry.without_gpus():
            found = {name: registry.get(name, here) for name in options.names}
            offered = registry.Offered() if found else registry.offered()
    except registry.UnknownWorkload as error:
        return fail(str(error))
    if not found:
        own, broken_here = _of_the_project()
        found, broken = {**offered.workloads, **own}, {**offered.broken, **broken_here}
    by_default = dict.fromkeys(DEFAULT_MODES, "yes") | {"tf32": "with TF32"}
    modes = [(mode.name, by_default.get(mode.name, "no"), mode.summary) for mode in MODES.values()]
    if options.json:
        content = {
            "workloads": [_facts(name, workload) for name, workload in found.items()],
            "broken": [{"workload": name, "problem": why} for name, why in broken.items()],
            "modes": [{"mode": name, "by_default": default, "description": text} for name, default, text in modes],
        }
        print(json_document("workloads", content), end="")
        return OK
    small = [] if options.names else [workload.name for workload in large.TINY]
    rows = [
        (name, w.batch_size, w.train_steps, _target(w), w.summary) for name, w in found.items() if name not in small
    ]
    # Stable: those with synthetic inputs come last.
    rows.sort(key=lambda row: found[row[0]].synthetic)
    print(Table(["workload", "batch", "steps", "target", "description"], rows).text(surface()))
    if small:
        print(surface().wrapped(f"in small, for tests: {', '.join(small)}"))
    for name in filter(registry.is_own, found):
        print(f"{name} is in {registry.source(name, here)}")
    for name, why in broken.items():
        say(f"broken: {name}: {why}")
    print()
    print(Table(["mode", "by default", "description"], modes).text(surface()))
    return OK


def _of_the_project() -> tuple[dict[str, Workload], dict[str, str]]:
    """The workloads that ``[tool.mpscale]`` names as module:attribute, and why one of them cannot be used."""
    from mpscale.pytest_plugin import project
    from mpscale.workloads import registry

    settings, values, _ = project.read(Path.cwd())
    found, broken = {}, {}
    with registry.without_gpus():
        for name in filter(registry.is_own, values.get("workloads", ("", []))[1]):
            try:
                found[name] = registry.get(name, [Path.cwd(), *([settings.path.parent] if settings.path else [])])
            except registry.UnknownWorkload as error:
                broken[name] = str(error)
    return found, broken


def _facts(name: str, workload: Workload) -> dict[str, Any]:
    return {
        "workload": name,
        "batch_size": workload.batch_size,
        "train_steps": workload.train_steps,
        "metric": workload.metric_name if workload.compiled is None else workload.metric,
        "target": workload.target,
        "synthetic_inputs": workload.synthetic,
        "description": workload.summary,
    }


def _target(workload: Workload) -> str:
    from mpscale.report.table import DASH

    if workload.compiled is not None and workload.compiled.evaluated:
        # Which metric comes first is known when the model is built.
        return DASH if workload.target is None else f"{workload.metric or 'first metric'} {workload.target:g}"
    if workload.metric is None:
        return "none: synthetic inputs" if workload.synthetic else "none: no metric"
    return DASH if workload.target is None else f"{workload.metric_name} {workload.target:g}"


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what a run on this machine would measure, what it could not measure and why, which options it would have "
        "in this folder and where they come from, and what to change. It takes options of a run, such as --mp-modes, "
        "and checks them with the others. Exit code: 0 nothing to do, 1 something to do, 2 wrong use."
    )
    parser.usage = "mpscale doctor [-h] [--json] [--gpu] [options of a run]"
    add_json_option(parser)
    parser.add_argument("--gpu", action="store_true", help="also train on the GPU briefly, which may take minutes")


def doctor(options: argparse.Namespace) -> int:
    from mpscale.doctor.examine import examine
    from mpscale.doctor.page import render
    from mpscale.pytest_plugin import sources

    try:
        given, about = sources.look(Path.cwd(), options.unknown, os.environ)
    except ValueError as error:
        return fail(f"{error}; see `mpscale doctor --help`")
    found = examine(options.gpu, given, about)
    print(render(found, options.json, surface()), end="")
    return found.verdict


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make the tables and the report of a run again, from its journal."
    run = parser.add_argument("run", metavar="RUN", help=RUN)
    completion.completed_by(run, completion.runs)
    add_results_option(parser.add_argument, default=RESULTS)
    parser.add_argument(
        "--format",
        choices=("markdown", "github-summary"),
        default="markdown",
        help="github-summary writes no files and prints text for $GITHUB_STEP_SUMMARY (default: markdown)",
    )
    parser.add_argument(
        "--print",
        action="store_true",
        help="print the results instead of the names of the files: to a terminal the table of results, to a pipe the "
        "whole report in markdown",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def report(options: argparse.Namespace) -> int:
    from mpscale.core.files.reading import REPORT, read_text
    from mpscale.core.runs import read_run, resolve_run
    from mpscale.report.files import WRITTEN, rebuild
    from mpscale.report.github_summary import artifacts_page, github_summary

    if options.json and options.format != "markdown":
        return fail(f"--json does not go with --format {options.format}: both say what is printed")
    path = resolve_run(options.run, options.results)
    if options.format == "github-summary":
        run = read_run(path)
        print(github_summary(run, artifacts=artifacts_page(os.environ)), end="")
        warn(run.problems)
        return OK
    run = rebuild(path, options.results)
    warn(run.problems)
    _say_how_it_goes_on(run)
    files = [str(run.path / name) for name in WRITTEN]
    if options.json:
        print(_summary(run, files), end="")
    elif not options.print:
        print(*map(visible, files), sep="\n")
    elif surface().columns is None:
        print(read_text(run.path / "report.md", REPORT), end="")
    else:
        _show(run)
    return OK


def _say_how_it_goes_on(run: Run) -> None:
    """Say what a run that was stopped lacks, and the command that goes on with it."""
    from mpscale.report.missing import go_on, lacks

    if said := lacks(run):
        command = go_on(run, Path.cwd())
        say(f"{run.name} is not complete. {said}{' To go on:' if command else ''}")
        if command:
            # A line of its own, never broken: it is copied.
            print(visible(command), file=sys.stderr)


def _summary(run: Run, files: Sequence[str]) -> str:
    from mpscale.analysis.answer import speed_verdict
    from mpscale.analysis.summary import summary_of
    from mpscale.report.missing import go_on
    from mpscale.report.table import json_document

    rows = [{**row, "speed_verdict": speed_verdict(row)} for row in summary_of(run)]
    about = {"run": run.name, "name": run.given_name, "note": run.note, "started": run.info.get("started")}
    about |= {"finished": run.finished, "problems": run.problems, "go_on": go_on(run, Path.cwd()) or None}
    return json_document("report", {**about, "files": files, "rows": rows})


def _show(run: Run) -> None:
    """Print the results of a run for the terminal, and where the rest is."""
    from mpscale.analysis.summary import summary_of
    from mpscale.report.first_screen import first_screen, plain
    from mpscale.report.sections import doubts_note, results

    here = surface()
    parts = [
        visible(run.shown),
        here.wrapped(run.note or ""),
        results(run).text(here),
        here.wrapped(doubts_note(summary_of(run))),
    ]
    parts.append(here.wrapped(plain(first_screen(run))))
    print("\n\n".join(filter(None, [*parts, visible(f"report: {run.path / 'report.html'}")])))


def history_arguments(parser: argparse.ArgumentParser) -> None:
    from mpscale.analysis.quantities import QUANTITIES

    parser.description = (
        "Show a quantity over runs, oldest first. Each machine and each set of settings is a series of its own: "
        "figures that were measured differently are never joined. Versions of a model are, if the workload names a "
        "series, or with --compare-by name."
    )
    named = parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help=f"{RUN_OR_CSV} (default: all in runs/ and reference/ of the results folder)",
    )
    completion.completed_by(named, completion.runs)
    add_results_option(parser.add_argument, default=RESULTS)
    workload = parser.add_argument(
        "--workload", action="append", default=[], type=as_typed, metavar="A", help="only this workload; repeatable"
    )
    completion.completed_by(workload, completion.workloads)
    mode = parser.add_argument("--mode", action="append", default=[], metavar="B", help="only this mode; repeatable")
    completion.completed_by(mode, completion.modes)
    parser.add_argument("--quantity", choices=tuple(QUANTITIES), default="step_time", help="default: step_time")
    add_compare_by_option(parser.add_argument)
    add_output_options(parser)
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw it, into a file ending in .svg or .png")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write it as a page of HTML")


def history(options: argparse.Namespace) -> int:
    from mpscale.analysis.history import make_history, read_folder
    from mpscale.core.runs import read_run, resolve_run, without_parts
    from mpscale.report.figures import FigureError, check_suffix
    from mpscale.report.history import draw_history, render

    broken: list[tuple[str, str]] = []
    try:
        if options.figure is not None:
            check_suffix(options.figure)
    except FigureError as error:
        return fail(str(error))
    if options.runs:
        runs = without_parts(read_run(resolve_run(name, options.results)) for name in options.runs)
    else:
        runs, broken = read_folder(options.results)
    by_name = load(Path.cwd()).override(compare_by=options.compare_by).compare_by == "name"
    history = make_history(runs, options.quantity, options.workload, options.mode, broken, by_name)
    warn([problem for run in runs for problem in run.problems])
    for what, reason in history.skipped:
        say(f"skipped {what}: {reason}")
    if options.figure is not None:
        draw_history(history, options.figure)
    if options.html is not None:
        from mpscale.analysis.neighbours import Neighbours
        from mpscale.report.history_page import history_page

        write(history_page([history], Neighbours(runs, by_name)), options.html)
    write(render(history, options.format, surface(options.output)), options.output, options.format)
    return OK
