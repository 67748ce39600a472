"""What the commands that train outside of a run have in common: `fit`, `probe` and `lint`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mpscale.cli import completion
from mpscale.cli.output import RESULTS, add_output_options, check_output
from mpscale.config import SettingsError, add_results_option, seconds, why_not_writable
from mpscale.core.given import Given, take
from mpscale.terminal.streams import as_typed

if TYPE_CHECKING:
    from mpscale.core.device import Device
    from mpscale.harness.supervisor import Options
    from mpscale.telemetry.client import Driver
    from mpscale.workloads import Workload


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Add the workload, an argument that has no option's name."""
    workload = parser.add_argument(
        "workload",
        metavar="WORKLOAD",
        type=as_typed,
        help="one that `mpscale workloads` lists, or module:attribute: a workload of yours, or a function that returns "
        "a compiled Keras model",
    )
    completion.completed_by(workload, completion.workloads)
    for part in ("train", "validation"):
        parser.add_argument(
            f"--{part}",
            metavar="DATA",
            type=as_typed,
            help=f"data for {part if part == 'validation' else 'training'}, if WORKLOAD is a function that returns a "
            "compiled model: module:attribute, or an attribute of its module",
        )


def add_training_options(parser: argparse.ArgumentParser, what: str, results: bool = True) -> None:
    """Add the options that say how to train and where the result goes.

    Args:
        parser: of the command.
        what: has the time limit, for the help.
        results: whether the command leaves a folder.
    """
    parser.add_argument(
        "--jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile train steps with XLA; auto: without, if XLA cannot compile them (default: auto)",
    )
    parser.add_argument(
        "--timeout", type=seconds, default=900.0, metavar="SECONDS", help=f"time limit for {what} (default: 900)"
    )
    parser.add_argument(
        "--gpu-allocator",
        choices=("auto", "cuda_malloc_async", "bfc"),
        default="auto",
        help="TensorFlow's GPU memory allocator (default: auto, which is cuda_malloc_async, or bfc if that fails)",
    )
    if results:
        add_results_option(parser.add_argument, default=RESULTS)
    add_output_options(parser)


@contextmanager
def prepared(
    options: argparse.Namespace, kind: Literal["fit", "probe"] | None
) -> Iterator[tuple[Workload, Device, Driver]]:
    """Check what can be checked before a training, and open the driver for as long as it lasts.

    ``kind`` names the folder in the results folder; None for a command that leaves none.

    Raises:
        SettingsError: the workload, the results folder or the device that is asked for cannot be used.
    """
    from mpscale.core.device import NoSuchDevice, find_device
    from mpscale.telemetry import host
    from mpscale.telemetry.client import open_driver
    from mpscale.workloads import registry

    check_output(options.output)
    take(Given(options.train, options.validation))
    try:
        with registry.without_gpus():
            workload = registry.get(options.workload, [Path.cwd()])
    except registry.UnknownWorkload as error:
        raise SettingsError(str(error)) from error
    if kind is not None and (why_not := why_not_writable(options.results / kind)):
        raise SettingsError(f"--results: {options.results} is not a folder that can be written to ({why_not})")
    driver = open_driver()
    try:
        yield workload, find_device(driver.devices, os.environ, host.cpu()), driver
    except NoSuchDevice as error:
        raise SettingsError(str(error)) from error
    finally:
        driver.close()


def supervisor_options(options: argparse.Namespace, memory_limit_mib: float | None = None) -> Options:
    """How the cases of a trial are made."""
    from mpscale.harness.supervisor import Options

    return Options(
        results=getattr(options, "results", RESULTS),
        project=Path.cwd(),
        start_method="fork",
        timeout_s=options.timeout,
        asked={},
        gpu_allocator=options.gpu_allocator,
        keep_suspect=True,
        memory_limit_mib=memory_limit_mib,
    )
