"""The command ``probe``, which looks at the gradients of a short training and recommends a static loss scale."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mpscale.cli.output import FAILED, INTERRUPTED, OK, live_line, surface, write
from mpscale.cli.trial import add_training_options, add_workload, prepared, supervisor_options
from mpscale.config import batch_size, integer, training_steps
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.core.case import Case
    from mpscale.core.device import Device
    from mpscale.core.processes.events import Progressed
    from mpscale.telemetry.client import Driver
    from mpscale.workloads import Workload


def probe_arguments(parser: argparse.ArgumentParser) -> None:
    from mpscale.harness.probe import LOOKS, STEPS

    parser.description = (
        "Train briefly in float32, look at the gradients of weights and activations at some steps, and say what "
        "float16 would make of them: what vanishes, what loses precision and what overflows, without a loss scale and "
        "with the recommended one. The result is kept in the folder probe/ of the results folder. Exit code: 0 the "
        "training went to its end, 1 it did not, 2 wrong use."
    )
    add_workload(parser)
    parser.add_argument(
        "--steps",
        type=training_steps,
        metavar="N",
        help=f"steps to train (default: {STEPS}, or the workload's own number if that is smaller)",
    )
    parser.add_argument(
        "--looks",
        type=integer(1, 1000, "since each is shown"),
        default=LOOKS,
        metavar="N",
        help=f"steps whose gradients are looked at: the first, the last and others between (default: {LOOKS})",
    )
    parser.add_argument(
        "--scale", type=_power_of_two, metavar="S", help="show this loss scale, such as 1024 or 2**10, and not the "
        "recommended one"
    )  # fmt: skip
    parser.add_argument("--batch-size", type=batch_size, metavar="N", help="default: the workload's")
    parser.add_argument(
        "--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="of weights and data (default: 0)"
    )
    add_training_options(parser, "the training")


def _power_of_two(text: str) -> float:
    from mpscale.core.loss_scale import parse_number
    from mpscale.core.magnitudes import power_of_two

    try:
        power_of_two(scale := parse_number(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return scale


def probe(options: argparse.Namespace) -> int:
    with prepared(options, "probe") as (workload, device, driver):
        return _look(options, workload, device, driver)


def _look(options: argparse.Namespace, workload: Workload, device: Device, driver: Driver) -> int:
    """Train, show each look on standard error, keep all in a folder, and print the result."""
    from mpscale.analysis.probe import Probe
    from mpscale.core.processes.events import Looked, PhaseReached
    from mpscale.harness import probe as probing
    from mpscale.harness.supervisor import Supervisor
    from mpscale.harness.trial import new_folder
    from mpscale.report import probe as report
    from mpscale.telemetry.presence import words

    steps = options.steps or min(probing.STEPS, workload.train_steps)
    settings = probing.settings(steps, min(options.looks, steps), options.batch_size, options.jit != "off")
    probe = Probe(options.workload, device, steps, options.scale)
    asked = {
        "steps": steps,
        "looks": settings.looks,
        "scale": options.scale,
        "batch_size": options.batch_size or workload.batch_size,
        "seed": options.seed,
        "jit": settings.jit,
        "timeout_s": options.timeout,
        "gpu_allocator": options.gpu_allocator,
    }
    folder, about = new_folder(options.results, "probe", device, driver, asked)
    line = live_line()
    line.add(visible(f"on {device.name} ({device.kind.upper()}), float32, {steps} steps"))
    if beside := words(device):
        line.add(visible(beside))

    def show(case: Case, event: Progressed) -> None:
        match event:
            case PhaseReached(phase):
                line.update(f"{case.workload}: {phase}")
            case Looked():
                line.add(report.line(probing.note(probe, event)))

    def fall_back(what: str) -> None:
        line.add(visible(f"XLA cannot compile {what}: {options.workload} is trained without XLA"))
        about["xla_refused"] = what

    interrupted = False
    runner = Supervisor(device, driver, supervisor_options(options), show)
    try:
        probing.run(probe, settings, options.seed, runner, fall_back if options.jit == "auto" else None)
    except KeyboardInterrupt:
        interrupted = True
    line.update("")
    report.write(folder, probe, {**about, "finished": not interrupted})
    print(f"report: {folder / 'report.html'}\n", file=sys.stderr)
    write(report.render(probe, options.format, surface(options.output)), options.output, options.format)
    if interrupted:
        return INTERRUPTED
    return OK if probe.problem is None else FAILED
