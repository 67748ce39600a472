"""The end of a pytest run with a baseline: compare, measure again what looks slower, and fail the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from mpscale import config as project
from mpscale.core.case import Case, Variant
from mpscale.terminal.streams import on_one_line, visible

if TYPE_CHECKING:
    from mpscale.analysis.compare import Comparison
    from mpscale.analysis.gates import Finding, Gate
    from mpscale.core.case import Settings
    from mpscale.core.device import Device
    from mpscale.core.runs import Run

FILE, JSON_FILE = "comparison.md", "comparison.json"
"""In the run's folder."""


def add_options(add: Callable[..., Any]) -> None:
    """Add the options of the comparison, which override ``[tool.mpscale]``."""
    add(
        "--mp-baseline",
        metavar="RUN",
        help=f"compare with this run at the end, and measure again what looks slower: {project.RUN}",
    )
    project.add_gate_options(add, "mp-")


class BaselineCheck:
    """The comparison that the options and ``[tool.mpscale]`` ask for, and its result.

    Args:
        config: of pytest.

    Raises:
        pytest.UsageError: a gate or a setting is not valid, or there are gates but no baseline.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self._is_part = option("mp_shard") is not None
        self._named = option("mp_baseline") is not None
        """Whether the user named the baseline for this run, and not in a file that is shared with other machines."""
        self._gates: list[Gate] = []
        self._threshold: float | None = None
        if self._is_part and (self._named or option("mp_fail_on")):
            given = "--mp-baseline" if self._named else "--mp-fail-on"
            raise _refused(
                f"{given} does not go with --mp-shard: a part has too few seeds for a verdict, and lacks rows; run the "
                "parts without it, then `mpscale merge` them, then `mpscale compare BASELINE RUN --fail-on ...`"
            )
        try:
            self._settings = project.load(config.rootpath).override(
                baseline=option("mp_baseline") or None, fail_on=option("mp_fail_on"), strict=option("mp_strict")
            )
            if option("mp_fail_on"):
                if self._settings.baseline is None:
                    raise ValueError("--mp-fail-on has nothing to compare with: give --mp-baseline RUN")
                self._parse()
        except ValueError as error:
            raise _refused(str(error)) from error
        self._baseline: Run | None = None
        self.note: str | None = None
        """Why no gate was judged."""
        self._unjudged = False
        """Whether a baseline of this machine could not be compared, wherever it was named."""
        self.left_out: list[tuple[str, str]] = []
        """Unreadable runs that ``latest`` skipped: folder and reason."""
        self.findings: list[Finding] = []
        self.comparison: Comparison | None = None

    def _parse(self) -> None:
        # Imported here, since it is slow, and a project with a baseline has many pytest runs without cases.
        from mpscale.analysis.gates import parse_gates, parse_share

        self._gates = parse_gates(self._settings.fail_on)
        threshold = self._settings.threshold
        self._threshold = None if threshold is None else parse_share(threshold)

    def open(self, results: Path, device: Device, before: str | None = None) -> None:
        """Read the baseline, before anything runs.

        A baseline in ``[tool.mpscale]`` that was made on another machine, or does not exist yet, does not stop the run.

        Args:
            results: the results folder.
            device: where the run will train.
            before: name of a run that goes on, which is not its own baseline; None for a new one.

        Raises:
            pytest.UsageError: the baseline cannot be used.
        """
        if self._settings.baseline is None:
            return
        if self._is_part:
            self.note = "a part of a plan is not compared with its baseline: merge the parts, and compare that run"
            return
        from mpscale.core import runs
        from mpscale.core.columns import METHOD_VERSION
        from mpscale.telemetry import host

        try:
            self._parse()
            # Resolved now: once this run has begun, it is itself the latest.
            baseline = runs.read_run(runs.resolve_run(self._settings.baseline, results, self.left_out, before))
            there = runs.hardware(baseline)
        except runs.NoRunYet as error:
            if self._named:
                raise _refused(f"baseline: {error}") from error
            self.note = f"baseline: there is no run in {results / 'runs'} yet: not compared"
            return
        except ValueError as error:
            raise _refused(str(error)) from error
        except runs.RunError as error:
            raise _refused(f"baseline: {error}") from error
        if baseline.name == before:
            raise _refused(f"baseline {baseline.name} is the run that goes on: name another")
        if there["kind"] is None and there["name"] is None:
            raise _refused(f"baseline {baseline.name} does not name its machine: use the original file")
        here = runs.machine(device.kind, device.name, {"cpu": host.cpu_facts(), "variables": os.environ})
        if not runs.same_machine(there, here):
            machines = f"{runs.machine_words(there)}, and this is {runs.machine_words(here)}"
            problem = f"baseline {baseline.name} was made on {machines}"
            if self._named:
                raise _refused(f"{problem}; gates judge one kind of device")
            self.note = f"{problem}: not compared"
            return
        # Checked last: on another machine the method does not matter.
        methods = baseline.methods - {METHOD_VERSION}
        if methods:
            raise _refused(
                f"baseline {baseline.name} was measured by method {', '.join(map(str, sorted(methods)))}, and this is "
                f"method {METHOD_VERSION}; make a new baseline"
            )
        self._baseline = baseline

    def judge(self, path: Path, run_more: Callable[[list[Case]], None], settings_of: Callable[[str], Settings]) -> None:
        """Compare the run with the baseline. Rows that look slower are measured again; only that counts.

        Args:
            path: the run's folder; the run is not finished yet.
            run_more: runs further cases of it.
            settings_of: returns those of a workload.
        """
        if self._baseline is None:
            return
        from mpscale.analysis.compare import compare, floors_for
        from mpscale.analysis.gates import judge_gates
        from mpscale.analysis.quantities import COSTS, Outcome
        from mpscale.core.runs import RunError, read_run

        baseline = self._baseline

        def look(run: Run, again: Mapping[tuple[str, str], int]) -> tuple[Comparison, list[Finding]]:
            comparison = compare(baseline, run, threshold=self._threshold, floors=floors, anew=again)
            return comparison, judge_gates(comparison, self._gates) if comparison.same_device else []

        try:
            run = read_run(path)
            floors = floors_for(baseline, run, path.parent.parent)
            self.comparison, self.findings = look(run, {})
            fired = [found for found in self.findings if found.outcome is Outcome.FIRED and found.gate.name in COSTS]
            again = {found.row for found in fired if found.row and COSTS[found.gate.name].can_be_remeasured}
            if again:
                first_repeats = {row: _next_repeat(run, row) for row in again}
                run_more(further_cases(run, first_repeats, settings_of))
                self.comparison, self.findings = look(read_run(path), first_repeats)
            if not self.comparison.same_device:
                self.note = f"baseline {baseline.name} was made on another machine: no gate was judged"
        except RunError as error:
            self.note = str(error)
            self.findings = []
            self._unjudged = True

    def write(self, path: Path) -> None:
        """Write the comparison into the run's folder, for people and for programs."""
        from mpscale.core.writing import write
        from mpscale.report.comparison import of_a_run, render
        from mpscale.report.table import escape

        compared = [] if self.comparison is None else [self.comparison]
        if compared or self.note is not None:
            text = of_a_run(compared, self.findings, self.note, self.fails)
            write(path / JSON_FILE, text)
        if self.comparison is not None:
            title = f"# {escape(path.name)} against {escape(self.comparison.baseline.name)}\n\n"
            text = title + render([self.comparison], self.findings, "markdown")
            write(path / FILE, text)

    def reports(self) -> list[pytest.TestReport]:
        """Return what the gates found as reports of tests: one for each gate and row, or why they were not judged."""
        if self.note is not None:
            return _reports("baseline", "failed" if self.fails else "skipped", self.note)
        from mpscale.analysis.quantities import Outcome

        outcomes: dict[Outcome, Literal["passed", "failed", "skipped"]]
        outcomes = {Outcome.FIRED: "failed", Outcome.PASSED: "passed"}
        outcomes[Outcome.CANNOT_TELL] = "failed" if self._settings.strict else "skipped"
        return [
            report
            for finding in self.findings
            if finding.outcome in outcomes
            for report in _reports(
                f"{finding.gate}[{'-'.join(finding.row or ('no row',))}]",
                outcomes[finding.outcome],
                f"{finding.outcome}: {finding}",
            )
        ]

    @property
    def fails(self) -> bool:
        """Whether the run fails."""
        if self.note is not None:
            return (self._named or self._unjudged) and bool(self._gates)
        if not self.findings:
            return False
        from mpscale.analysis.gates import FIRED, exit_code

        return exit_code(self.findings, self._settings.strict) == FIRED

    def lines(self) -> list[str]:
        """Return the lines for the terminal."""
        from mpscale.analysis.quantities import Outcome

        lines = [f"{folder} cannot be the baseline: {reason}" for folder, reason in self.left_out]
        if self.note is not None:
            lines.append(self.note)
        if self.comparison is not None:
            lines.append(f"against {self.comparison.baseline.name}:")
        quiet = (Outcome.PASSED, Outcome.NOT_APPLICABLE)
        lines += [f"{finding.outcome}: {finding}" for finding in self.findings if finding.outcome not in quiet]
        if self.findings:
            outcomes = [finding.outcome for finding in self.findings]
            apply = len(outcomes) - outcomes.count(Outcome.NOT_APPLICABLE)
            text = f"{outcomes.count(Outcome.PASSED)} of {apply} gated figures passed"
            if apply < len(outcomes):
                text += f"; {len(outcomes) - apply} are not in their workload"
            if unknown := outcomes.count(Outcome.CANNOT_TELL):
                effect = "fails the run" if self._settings.strict else "fails a run with --mp-strict only"
                text += f"; {unknown} could not be judged, which {effect}"
            lines.append(text)
        if self.comparison is not None:
            from mpscale.report.comparison import unread

            lines += unread([self.comparison])
        return lines


def _refused(text: str) -> pytest.UsageError:
    """Return the error that ends a session before it begins; pytest prints it as it is."""
    return pytest.UsageError(visible(text))


def _reports(name: str, outcome: Literal["passed", "failed", "skipped"], text: str) -> list[pytest.TestReport]:
    """Return the two reports of a test that has run: of its call, and of its end."""
    name = on_one_line(name)
    nodeid = f"mpscale/gates.py::{name}"
    place = ("mpscale/gates.py", None, name)
    text = visible(text)
    why = {"passed": None, "failed": text, "skipped": (place[0], 0, text)}[outcome]
    return [
        pytest.TestReport(nodeid, place, {}, outcome, why, "call"),
        pytest.TestReport(nodeid, place, {}, "passed", None, "teardown"),
    ]


def _next_repeat(run: Run, row: tuple[str, str]) -> int:
    return 1 + max(int(record["repeat"]) for record in run.records if record.place == row)


def further_cases(
    run: Run, first_repeats: Mapping[tuple[str, str], int], settings_of: Callable[[str], Settings]
) -> list[Case]:
    """Return the cases that measure rows again: twice as many timing-only processes as each row had.

    Rows are interleaved, so that a drift affects them all. Each case uses a seed whose training was not lost, since the
    step times of a lost one do not count.

    Args:
        run: the run so far.
        first_repeats: {workload and mode as tables name them: the first repeat that is free}.
        settings_of: returns those of a workload.
    """
    from mpscale.core.record import of_good_trainings

    cases: list[tuple[int, Case]] = []
    for place, first in first_repeats.items():
        rows = [row for row in run.records if row.place == place]
        workload, mode = rows[0]["workload"], rows[0]["mode"]
        variant = Variant(rows[0]["swept_batch"], rows[0]["swept_scale"])
        settings = variant.applied_to(settings_of(workload))
        good = of_good_trainings(rows)
        timed = [row for row in good if row["step_time_ms_median"] is not None]
        seed = min((row["seed"] for row in timed), default=0)
        for turn in range(max(2 * len(timed), 2)):
            cases.append((turn, Case(workload, mode, seed, first + turn, 0, settings, variant)))
    return [case for _, case in sorted(cases, key=lambda entry: entry[0])]
