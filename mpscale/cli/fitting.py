"""The command ``fit``, which finds the largest batch that trains in each mode."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mpscale.cli.output import FAILED, INTERRUPTED, OK, fail, live_line, surface, write
from mpscale.cli.trial import add_training_options, add_workload, prepared, supervisor_options
from mpscale.config import batch_size, memory
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.analysis.fit import Try
    from mpscale.core.case import Case
    from mpscale.core.device import Device
    from mpscale.core.processes.events import Progressed
    from mpscale.telemetry.client import Driver
    from mpscale.workloads import Workload


def fit_arguments(parser: argparse.ArgumentParser) -> None:
    from mpscale.core.mode import DEFAULT_MODES, MODES

    parser.description = (
        "Find the largest batch that trains in each mode, and how many examples per second it trains: what the memory "
        "that a mode saves is good for. Every batch is tried in a process of its own: powers of two, and then between "
        "two of them in eighths. The result is kept in the folder fit/ of the results folder. Exit code: 0 the limit "
        "of every mode was found, 1 not of every mode, 2 wrong use."
    )
    add_workload(parser)
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
    parser.add_argument(
        "--max-batch",
        type=batch_size,
        default=2**20,
        metavar="N",
        help="largest batch to try (default: 1048576); one that is larger than the training set repeats its examples",
    )
    add_training_options(parser, "each try")


def fit(options: argparse.Namespace) -> int:
    from mpscale.core.mode import default_modes, select_modes

    with prepared(options, "fit") as (workload, device, driver):
        if device.kind == "gpu" and options.memory_limit is not None:
            return fail("--memory-limit is for a CPU; on a GPU its own memory is the limit")
        modes = select_modes(options.mode) if options.mode else default_modes(device)
        return _search(options, workload, [mode.name for mode in modes], device, driver)


def _search(
    options: argparse.Namespace, workload: Workload, modes: Sequence[str], device: Device, driver: Driver
) -> int:
    """Search, show each try on standard error, keep all in a folder, and print the result."""
    from mpscale.analysis.fit import Fit
    from mpscale.core.processes.events import PhaseReached
    from mpscale.harness import fit as fitting
    from mpscale.harness.supervisor import Supervisor
    from mpscale.harness.trial import new_folder
    from mpscale.report import fit as report
    from mpscale.telemetry.presence import words

    limit_mib = options.memory_limit or fitting.default_limit_mib(device)
    fit = Fit(options.workload, modes, device, limit_mib)
    settings = replace(fitting.SETTINGS, jit=options.jit != "off")
    how = supervisor_options(options, limit_mib)
    asked = {**settings.to_json(), "max_batch": options.max_batch, "timeout_s": options.timeout}
    asked |= {"memory_limit_mib": limit_mib, "gpu_allocator": options.gpu_allocator}
    folder, about = new_folder(options.results, "fit", device, driver, asked)
    line = live_line()
    limit = f", up to {limit_mib:,.0f} MiB" if limit_mib else ""
    line.add(visible(f"on {device.name} ({device.kind.upper()}){limit}"))
    if beside := words(device):
        line.add(visible(beside))
    if workload.synthetic:
        line.add(f"{options.workload} has synthetic inputs")

    def show(case: Case, event: Progressed) -> None:
        if isinstance(event, PhaseReached):
            line.update(f"{case.mode}, batch {case.settings.batch_size}: {event.phase}")

    def tried(each: Try) -> None:
        line.add(visible(report.line(each)))
        report.write(folder, fit, about)

    def fall_back(what: str) -> None:
        line.add(visible(f"XLA cannot compile {what}: {options.workload} is tried without XLA, in all modes"))

    question = fitting.Question(workload.batch_size, options.max_batch, settings)
    interrupted = False
    try:
        runner = Supervisor(device, driver, how, show)
        fitting.Fitter(fit, question, runner, tried, fall_back if options.jit == "auto" else None).run()
    except KeyboardInterrupt:
        interrupted = True
    line.update("")
    report.write(folder, fit, {**about, "finished": not interrupted})
    print(f"report: {folder / 'report.html'}\n", file=sys.stderr)
    write(report.render(fit, options.format, surface(options.output)), options.output, options.format)
    if interrupted:
        return INTERRUPTED
    return OK if all(fit.ends.get(mode, True) is None for mode in modes) else FAILED
