"""What a session is handed: data for functions that make models, and the workloads of a script that has started it."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mpscale.config import shown
from mpscale.core.given import VARIABLE, Given, NoParcel, Parcel, given, take
from mpscale.core.processes.keeper import die_with_parent
from mpscale.terminal.streams import as_typed, visible

_LONGEST = 150


def add_options(add: Callable[..., Any]) -> None:
    """Add the options that name data."""
    for part, what in (("train", "training"), ("validation", "validation")):
        add(
            f"--mp-{part}",
            type=_reference,
            metavar="DATA",
            help=f"data for {what}, if --mp-workloads names a function that returns a compiled model: module:attribute "
            "or an attribute of the function's module, which is the data or a function that returns it",
        )


def _reference(text: str) -> str:
    name = as_typed(text)
    parts = [part for place in name.split(":", 1) for part in place.split(".")]
    if len(text) > _LONGEST or not all(map(str.isidentifier, parts)):
        raise argparse.ArgumentTypeError(f"expected module:attribute, such as my_data:train_data, not {shown(text)}")
    return name


def take_parcel() -> None:
    """Take what a script has sent, and end when it does; without a script, forget what an earlier session was given.

    Raises:
        pytest.UsageError: it cannot be used.
    """
    # Not for what this session starts in turn.
    folder = os.environ.pop(VARIABLE, None)
    try:
        parcel = None if folder is None else Parcel.read(folder)
    except NoParcel as error:
        raise pytest.UsageError(visible(str(error))) from error
    if parcel is not None:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != parcel.sender:
            raise pytest.UsageError("the script that started this session has ended")
    take(Given(parcel=parcel))


def take_data(config: pytest.Config) -> None:
    """Take the data that the options name, which may be those of a run that goes on. A script has sent its own."""
    if given().parcel is None:
        take(replace(given(), train=config.getoption("mp_train"), validation=config.getoption("mp_validation")))


def refuse_unused(config: pytest.Config, takes_data: bool) -> None:
    """Refuse data on the command line that no workload of the run takes.

    Raises:
        pytest.UsageError: there are such.
    """
    typed = [str(argument).partition("=")[0] for argument in config.invocation_params.args]
    if not takes_data and {"--mp-train", "--mp-validation"} & set(typed):
        raise pytest.UsageError(
            "--mp-train and --mp-validation name data for functions that return a compiled model, and no workload of "
            "this run is one; a Workload has its own data"
        )
