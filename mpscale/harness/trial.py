"""Trials: cases that belong to no run, as `mpscale fit` and `mpscale probe` need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from mpscale.core import run_folder
from mpscale.core.case import Case
from mpscale.core.cause import Cause
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.device import Device
from mpscale.core.record import Record
from mpscale.harness.run import worth_retrying
from mpscale.harness.supervisor import Outcome
from mpscale.harness.without_xla import refused, without_xla
from mpscale.telemetry.client import Driver
from mpscale.telemetry.host import environment, run_slug


class Runner(Protocol):
    """What runs a case: a :class:`~mpscale.harness.supervisor.Supervisor`."""

    def run(self, case: Case, steps_path: None, gpu_path: None, outcome: Outcome, attempt: int = 1) -> None:
        """Run a case to its end, and say in ``outcome`` what became of it."""

    def close(self) -> None:
        """End whatever outlives a case."""


def attempt(runner: Runner, case: Case, fall_back: Callable[[str], None] | None = None) -> Outcome:
    """Run a case, again as long as a failure may be due to the allocator that it was started with.

    Once again, too, if it failed for another cause that may pass, except lack of memory, which may be what is asked.

    Args:
        runner: runs it.
        case: to run.
        fall_back: called with what XLA refuses, if it does; the case then runs again without XLA. None: it fails.
    """
    retried, what = False, None
    for number in range(1, 7):
        outcome = Outcome(Record({**case.identity(), "batch_size": case.settings.batch_size, "xla_refused": what}))
        runner.run(case, None, None, outcome, number)
        if refused(case, outcome.record):
            if fall_back is None:
                cure = "--jit auto goes on without XLA then, and --jit off never uses it"
                outcome.record.update({"status_reason": f"{outcome.record['status_reason']}. {cure}"})
                break
            case, what = without_xla(case), outcome.record["xla_refused"] or "an operation"
            fall_back(what)
            continue
        passing = worth_retrying(outcome.record) and outcome.record.cause is not Cause.OOM_KILLER and not retried
        if outcome.again is None and not passing:
            break
        retried = retried or outcome.again is None
    return outcome


def new_folder(
    results: Path, kind: Literal["fit", "probe"], device: Device, driver: Driver, asked: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Make the folder of a trial, ``<results>/<kind>/<name>/``; return it and what its JSON file says about it.

    It is not among the runs, which are trainings as their workloads ask for: `latest`, comparisons and histories must
    not meet it.

    Raises:
        OSError: it cannot be made.
    """
    where = environment(device, driver, Path.cwd())  # first: it takes a moment, in which the user may press Ctrl-C
    started, folder = run_folder.new_folder(results / kind, run_slug(device))
    return folder, {
        kind: folder.name,
        "method_version": METHOD_VERSION,
        "started": started.isoformat(timespec="microseconds"),
        "finished": False,
        "environment": where,
        "settings": dict(asked),
    }
