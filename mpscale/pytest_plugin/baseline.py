"""The end of a pytest run that has a baseline: compares, measures anew what looks worse, and fails the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mpscale import config as project_settings

if TYPE_CHECKING:
    from mpscale.analysis.compare import Comparison
    from mpscale.analysis.gates import Finding, Gate
    from mpscale.core.case import Case, Settings
    from mpscale.core.device import Device
    from mpscale.core.runs import Run


FILE = "comparison.md"
"""In the run's folder."""


class BaselineCheck:
    """What the options and ``[tool.mpscale]`` ask for, and what came of it.

    Args:
        config: of pytest.

    Raises:
        pytest.UsageError: a gate or a setting is not understood, or there are gates and no baseline.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        try:
            settings = project_settings.load(config.rootpath)
            asked, texts = option("mp_baseline"), option("mp_fail_on")
            self._wanted: str | None = asked or settings.baseline
            self._named = asked is not None
            self._strict = settings.strict if option("mp_strict") is None else option("mp_strict")
            self._texts = settings.fail_on if texts is None else tuple(texts)
            self._threshold_text = settings.threshold
            if texts and self._wanted is None:
                raise ValueError("--mp-fail-on has nothing to compare with: give --mp-baseline RUN")
            self._gates: list[Gate] = []
            self._threshold: float | None = None
            if texts:
                self._parse()
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        self._baseline: Run | None = None
        self.note: str | None = None
        self._unjudged = False
        self.left_out: list[tuple[str, str]] = []
        """Runs that ``latest`` passed over because they cannot be read: folder and reason."""
        self.findings: list[Finding] = []
        self.comparison: Comparison | None = None

    def _parse(self) -> None:
        # Not for every pytest run in a project that has a baseline: this imports pandas.
        from mpscale.analysis.gates import parse_gates, parse_share

        self._gates = parse_gates(self._texts)
        self._threshold = None if self._threshold_text is None else parse_share(self._threshold_text)

    def open(self, results: Path, device: Device) -> None:
        """Reads the baseline before anything is run, so that one that cannot serve is known at once.

        Args:
            results: the results folder.
            device: where the run will train.

        Raises:
            ValueError: it cannot be read, does not say of which machine it is, or is of another method; or, if the
                command line named it, of another machine or not there yet.
        """
        if self._wanted is None:
            return
        from mpscale.core.columns import METHOD_VERSION
        from mpscale.core.runs import (
            NoRunYet,
            RunError,
            hardware,
            machine,
            machine_words,
            read_run,
            resolve_run,
            same_machine,
        )
        from mpscale.telemetry import host

        self._parse()
        try:
            # What `latest` means changes with the run that is about to begin.
            baseline = read_run(resolve_run(self._wanted, results, self.left_out))
            there = hardware(baseline)
        except NoRunYet as error:
            if self._named:
                raise ValueError(f"baseline: {error}") from error
            # `latest` in a file of settings must not keep the first run from being made.
            self.note = f"baseline: there is no run in {results / 'runs'} yet: not compared"
            return
        except RunError as error:
            raise ValueError(f"baseline: {error}") from error
        if there["kind"] is None and there["name"] is None:
            raise ValueError(f"baseline {baseline.name} does not say of which machine it is: take the original file")
        here = machine(device.kind, device.name, {"cpu": host.cpu_facts(), "variables": os.environ})
        if not same_machine(there, here):
            problem = f"baseline {baseline.name} is of {machine_words(there)}, and this is {machine_words(here)}"
            if self._named:
                raise ValueError(f"{problem}; gates judge one kind of device")
            # From a file that people on other machines share: no reason not to let them run.
            self.note = f"{problem}: not compared"
            return
        # Only now: to people on another machine it is all the same by which method the baseline was measured.
        methods = baseline.methods - {METHOD_VERSION}
        if methods:
            raise ValueError(
                f"baseline {baseline.name} was measured by method {', '.join(map(str, sorted(methods)))}, and this is "
                f"method {METHOD_VERSION}; make a new baseline"
            )
        self._baseline = baseline

    def judge(self, path: Path, run_more: Callable[[list[Case]], None], settings: Settings) -> None:
        """Compares the run with the baseline; rows that look worse are measured anew before that is believed.

        Args:
            path: the run's folder, still open.
            run_more: runs further cases of it.
            settings: those of the run.
        """
        if self._baseline is None:
            return
        from mpscale.analysis.compare import compare, floors_for
        from mpscale.analysis.gates import judge_gates
        from mpscale.analysis.quantities import COSTS, Outcome
        from mpscale.core.runs import RunError, read_run

        def look(run: Run, anew: Mapping[tuple[str, str], int]) -> tuple[Comparison, list[Finding]]:
            assert self._baseline is not None
            comparison = compare(self._baseline, run, threshold=self._threshold, floors=floors, anew=anew)
            return comparison, judge_gates(comparison, self._gates) if comparison.same_device else []

        try:
            run = read_run(path)
            floors = floors_for(self._baseline, run, path.parent.parent)
            self.comparison, self.findings = look(run, {})
            fired = [found for found in self.findings if found.outcome is Outcome.FIRED and found.gate.name in COSTS]
            again = {found.row for found in fired if found.row and COSTS[found.gate.name].can_be_remeasured}
            if again:
                first_repeats = {row: _next_repeat(run, row) for row in again}
                run_more(_further_cases(run, first_repeats, settings))
                self.comparison, self.findings = look(read_run(path), first_repeats)
            if not self.comparison.same_device:
                self.note = f"baseline {self._baseline.name} is of another machine: no gate was judged"
        except RunError as error:
            self.note = str(error)
            self.findings = []
            # Of this very machine, so it should have been comparable: nothing was judged, whoever named the baseline.
            self._unjudged = True

    def write(self, path: Path) -> None:
        """Writes the comparison into the run's folder."""
        if self.comparison is not None:
            from mpscale.report.comparison import render

            text = f"# {path.name} against {self.comparison.baseline.name}\n\n"
            (path / FILE).write_text(
                text + render([self.comparison], self.findings, "markdown"), encoding="utf-8", errors="backslashreplace"
            )

    @property
    def fails(self) -> bool:
        """Whether the run has to fail."""
        if self.note is not None:
            # No gate was judged. Who named the baseline for this very run counts on them.
            return (self._named or self._unjudged) and bool(self._gates)
        if not self.findings:
            return False
        from mpscale.analysis.gates import FIRED, exit_code

        return exit_code(self.findings, self._strict) == FIRED

    def lines(self) -> list[str]:
        """What the terminal says of it."""
        from mpscale.analysis.quantities import Outcome

        passed_over = [f"{folder} is no baseline: {reason}" for folder, reason in self.left_out]
        if self.comparison is None and self.note is None:
            return passed_over
        found = [f"{finding.outcome}: {finding}" for finding in self.findings if finding.outcome is not Outcome.PASSED]
        passed = sum(finding.outcome is Outcome.PASSED for finding in self.findings)
        untold = sum(finding.outcome is Outcome.CANNOT_TELL for finding in self.findings)
        if self.findings:
            found.append(f"{passed} of {len(self.findings)} gated figures passed" + _untold(untold, self._strict))
        if self.comparison is not None:
            from mpscale.report.comparison import unread

            found.insert(0, f"against {self.comparison.baseline.name}:")
            found += unread([self.comparison])
        return [*passed_over, *([self.note] if self.note else []), *found]


def _untold(number: int, strict: bool) -> str:
    if not number:
        return ""
    return f"; {number} could not be told, which {'fails the run' if strict else 'fails a run with --mp-strict only'}"


def _next_repeat(run: Run, row: tuple[str, str]) -> int:
    return 1 + max(int(r["repeat"]) for r in run.records if (r["workload"], r["mode"]) == row)


def _further_cases(run: Run, first_repeats: Mapping[tuple[str, str], int], settings: Settings) -> list[Case]:
    """Twice as many timing-only processes as each row had, the rows in turns so that a drift hits all of them.

    Of a seed that was not lost: times of one that was do not count.
    """
    from mpscale.core.case import Case
    from mpscale.core.record import of_good_trainings

    rows = run.records
    cases: list[tuple[int, Case]] = []
    for (workload, mode), first in first_repeats.items():
        good = of_good_trainings(row for row in rows if (row["workload"], row["mode"]) == (workload, mode))
        timed = [row for row in good if row["step_time_ms_median"] is not None]
        seed = min((row["seed"] for row in timed), default=0)
        for turn in range(max(2 * len(timed), 2)):
            cases.append((turn, Case(workload, mode, seed, first + turn, 0, settings)))
    return [case for _, case in sorted(cases, key=lambda entry: entry[0])]
