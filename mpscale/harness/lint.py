"""Looks for what is wrong or slow about a workload: a case per mode, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mpscale.core.case import Case, Settings
from mpscale.core.device import Device
from mpscale.core.lint import Finding, InModes, Severity, merged, of_cell
from mpscale.core.reason import Code, Reason
from mpscale.harness.trial import Runner, attempt

_STEPS = 8
"""Length of the order of the data; a few steps are taken, again and again."""


@dataclass
class Linted:
    """What was found.

    Args:
        workload: its name.
        device: where it was built.
        modes: in which it was to be looked at.
        found: the findings by mode.
        failed: why a mode could not be looked at, or not to the end.
    """

    workload: str
    device: Device
    modes: Sequence[str]
    found: dict[str, list[Finding]] = field(default_factory=dict)
    failed: dict[str, Reason] = field(default_factory=dict)

    @property
    def findings(self) -> list[InModes]:
        """All findings, the worst first."""
        return merged(self.found)

    @property
    def has_problem(self) -> bool:
        """Whether there is more than cautions and notes."""
        return any(each.finding.severity is Severity.PROBLEM for each in self.findings)


def settings(batch: int | None, jit: bool) -> Settings:
    """Those of the case of a mode."""
    return Settings(jit=jit, train_steps=_STEPS, batch_size=batch, timing_s=0.0, energy_s=0.0, lint=True)


def run(linted: Linted, settings: Settings, runner: Runner) -> None:
    """Look at the workload mode by mode. After an exception, such as the user's interrupt, the rest is missing."""
    linted.failed |= dict.fromkeys(linted.modes, Reason(Code.NOT_REACHED, "stopped before that"))
    try:
        for number, mode in enumerate(linted.modes):
            # A repeat, because only those evaluate nothing.
            record = attempt(runner, Case(linted.workload, mode, 0, 1, number, settings)).record
            linted.found[mode] = of_cell(record["lint"])
            del linted.failed[mode]
            if record["status"] != "ok":
                code = Code.UNSUPPORTED if record["status"] == "unsupported" else Code.OTHER
                linted.failed[mode] = Reason(code, f"{record['status']}: {record['status_reason']}")
    finally:
        runner.close()
