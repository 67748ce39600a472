"""The command ``lint``, which looks for what is wrong or slow about a workload before a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mpscale.cli import completion
from mpscale.cli.output import FAILED, INTERRUPTED, OK, USAGE_ERROR, live_line, surface, write
from mpscale.cli.trial import add_training_options, add_workload, prepared, supervisor_options
from mpscale.config import batch_size
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.core.case import Case
    from mpscale.core.processes.events import Progressed


def lint_arguments(parser: argparse.ArgumentParser) -> None:
    from mpscale.core.mode import MODES

    parser.description = (
        "Build a workload, look at its model, data, optimizer and train step, take a few steps, and say what is wrong "
        "or slow in mixed precision: which layer, and what to do. Nothing is kept. It looks in fp32 and in the modes "
        "of --mode. Exit code: 0 no problem (cautions and notes are none), 1 a problem, 2 it could not look, or wrong "
        "use."
    )
    add_workload(parser)
    mode = parser.add_argument(
        "--mode",
        action="append",
        metavar="B",
        choices=tuple(MODES),
        help="a mode to look in, besides fp32; repeatable (default: mixed-dynamic)",
    )
    completion.completed_by(mode, completion.modes)
    parser.add_argument("--batch-size", type=batch_size, metavar="N", help="default: the workload's")
    add_training_options(parser, "each mode", results=False)


def lint(options: argparse.Namespace) -> int:
    from mpscale.core.mode import select_modes
    from mpscale.core.processes.events import PhaseReached
    from mpscale.harness import lint as linting
    from mpscale.harness.supervisor import Supervisor
    from mpscale.report import lint as report
    from mpscale.telemetry.host import busy_words

    modes = [mode.name for mode in select_modes(dict.fromkeys(["fp32", *(options.mode or ["mixed-dynamic"])]))]
    with prepared(options, None) as (_, device, driver):
        line = live_line()
        if busy := busy_words():
            line.add(busy)

        def show(case: Case, event: Progressed) -> None:
            if isinstance(event, PhaseReached):
                line.update(visible(f"{case.workload}, {case.mode}: {event.phase}"))

        linted = linting.Linted(options.workload, device, modes)
        settings = linting.settings(options.batch_size, options.jit != "off")
        interrupted = False
        try:
            linting.run(linted, settings, Supervisor(device, driver, supervisor_options(options), show))
        except KeyboardInterrupt:
            interrupted = True
        line.update("")
        shown = surface(options.output)
        found = linted.findings, linted.failed
        text = report.render(options.workload, device.name, modes, *found, options.format, shown)
        write(text, options.output, options.format)
    if interrupted:
        return INTERRUPTED
    if linted.failed:
        return USAGE_ERROR
    return FAILED if linted.has_problem else OK
