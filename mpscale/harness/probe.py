"""Runs a probe: one short training in float32, in a process of its own, whose gradients are looked at."""

from __future__ import annotations

from collections.abc import Callable

from mpscale.analysis.probe import Look, Probe
from mpscale.core.case import Case, Settings
from mpscale.core.magnitudes import Magnitudes, Place
from mpscale.core.processes.events import Looked
from mpscale.core.reason import Code, Reason
from mpscale.harness.trial import Runner, attempt

STEPS, LOOKS = 200, 8


def settings(steps: int, looks: int, batch: int | None, jit: bool) -> Settings:
    """Those of the case of a probe."""
    return Settings(jit=jit, train_steps=steps, batch_size=batch, looks=looks, timing_s=0.0, energy_s=0.0)


def run(
    probe: Probe, settings: Settings, seed: int, runner: Runner, fall_back: Callable[[str], None] | None = None
) -> None:
    """Train, while :func:`note` adds the looks; afterwards the probe says whether it has all of them.

    After an exception, such as the user's interrupt, the probe has the looks so far. ``fall_back``: see
    :func:`mpscale.harness.trial.attempt`.
    """
    # A repeat, because only those evaluate nothing.
    case = Case(probe.workload, "fp32", seed, 1, 0, settings)
    probe.problem = Reason(Code.NOT_REACHED, "the probe was stopped before its training had ended")
    try:
        record = attempt(runner, case, fall_back).record
    finally:
        runner.close()
    status, text = record["status"], str(record["status_reason"])
    probe.digest = record["workload_digest"]
    match status:
        case "ok":
            probe.problem = None
        case "diverged":
            cure = "this is float32, so no loss scale helps; look at the data, or try a smaller learning rate"
            probe.problem = Reason(Code.NOT_FINITE, f"the training diverged: {text}", cure)
        case "oom":
            probe.problem = Reason(Code.OUT_OF_MEMORY, text, "try a smaller --batch-size")
        case _:
            probe.problem = Reason(Code.OTHER, f"{status}: {text}")


def note(probe: Probe, event: Looked) -> Look:
    """Add a look to a probe."""
    gradients = {Place(*(row[name] for name in Place._fields)): Magnitudes.from_json(row) for row in event.gradients}
    kept = event.in_float32
    probe.unsure = kept if isinstance(kept, Reason) else None
    look = Look(event.step, event.loss, gradients, frozenset(() if isinstance(kept, Reason) else kept))
    # A case that is tried again begins anew.
    probe.looks[:] = [each for each in probe.looks if each.step < look.step]
    probe.looks.append(look)
    return look
