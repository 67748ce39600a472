"""The end of a pytest run with gates or a baseline: compare, measure again what looks slower, and fail the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from mpscale import config as project
from mpscale.core.case import Case, Variant
from mpscale.terminal.streams import on_one_line, visible

if TYPE_CHECKING:
    from mpscale.analysis.compare import Comparison
    from mpscale.analysis.gates import Finding, Gate
    from mpscale.core.case import Place, Settings
    from mpscale.core.device import Device
    from mpscale.core.runs import Run

_SHOWN = 5
"""Most rows that a message names."""

ReportOutcome = Literal["passed", "failed", "skipped"]

FILE, JSON_FILE = "comparison.md", "comparison.json"
"""In the run's folder."""


def add_options(add: Callable[..., Any]) -> None:
    """Add the options of the comparison, which override ``[tool.mpscale]``."""
    add(
        "--mp-baseline",
        metavar="RUN",
        help=f"compare with this run at the end, and measure again what looks slower: {project.RUN_OR_CSV}",
    )
    project.add_gate_options(add, "mp-")
    add(
        "--mp-force",
        action="store_true",
        help="compare with the baseline even if method, settings or device differ",
    )


class BaselineCheck:
    """The comparison that the options and ``[tool.mpscale]`` ask for, and its result.

    Args:
        config: of pytest.

    Raises:
        pytest.UsageError: a gate or a setting is not valid, or a gate on a change has no baseline.
    """

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self._is_part = option("mp_shard") is not None
        self._named = option("mp_baseline") is not None
        """Whether the user named the baseline for this run, and not in a file that is shared with other machines."""
        self._gates: list[Gate] = []
        self._threshold: float | None = None
        self._force = bool(option("mp_force"))
        if self._is_part and (self._named or option("mp_fail_on")):
            given = "--mp-baseline" if self._named else "--mp-fail-on"
            raise _refused(
                f"{given} does not go with --mp-shard: a part has too few seeds for a verdict, and lacks rows; run the "
                "parts without it, then `mpscale merge` them, then `mpscale compare [BASELINE] RUN --fail-on ...`"
            )
        try:
            self._settings = project.load(config.rootpath).override(
                baseline=option("mp_baseline") or None,
                fail_on=option("mp_fail_on"),
                strict=option("mp_strict"),
                compare_by=option("mp_compare_by"),
            )
            if option("mp_fail_on"):
                self._parse()
                if (changes := self._changes) and self._settings.baseline is None:
                    raise ValueError(
                        f"--mp-fail-on has nothing to compare with: give --mp-baseline RUN, for {', '.join(changes)}"
                    )
            elif self._force and self._settings.baseline is None:
                raise ValueError("--mp-force has nothing to compare with: give --mp-baseline RUN")
        except ValueError as error:
            raise _refused(str(error)) from error
        self._baseline: Run | None = None
        self.note: str | None = None
        """Why no gate was judged."""
        self._unjudged = False
        """Whether a baseline of this machine could not be compared, wherever it was named."""
        self._unread = False
        """Whether the run itself could not be read, so that not even limits were judged."""
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

    @property
    def _changes(self) -> list[str]:
        """The gates that need a baseline."""
        return [str(gate) for gate in self._gates if gate.needs_baseline]

    def check_rows(self, places: Iterable[Place]) -> None:
        """Check that limits on the command line are about rows of this run; a file may be shared by several runs.

        Args:
            places: the rows that will be measured.

        Raises:
            pytest.UsageError: no row fits one of them.
        """
        rows = list(dict.fromkeys(places))
        for gate in self._gates:
            if not gate.needs_baseline and not any(gate.covers(row) for row in rows):
                more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
                there = ", ".join("/".join(row) for row in rows[:_SHOWN])
                raise _refused(f"--mp-fail-on: {gate}: no row of this run fits [{gate.rows}], only {there}{more}")

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
        if self._settings.baseline is None and not self._settings.fail_on:
            return
        if self._is_part:
            self.note = "a part of a plan is not compared with its baseline: merge the parts, and compare that run"
            return
        from mpscale.core import machines, runs
        from mpscale.core.columns import METHOD_VERSION
        from mpscale.telemetry import host

        try:
            self._parse()
            if self._settings.baseline is None:
                if changes := self._changes:
                    self.note = f"there is no baseline: {', '.join(changes)} not judged"
                return
            # Resolved now: once this run has begun, it is itself the latest.
            baseline = runs.read_run(runs.resolve_run(self._settings.baseline, results, self.left_out, before))
            there = machines.hardware(baseline)
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
        here = machines.machine(device.kind, device.name, {"cpu": host.cpu_facts(), "variables": os.environ})
        if not self._force and not machines.same_machine(there, here):
            both = f"{machines.machine_words(there)}, and this is {machines.machine_words(here)}"
            problem = f"baseline {baseline.name} was made on {both}"
            if self._named:
                raise _refused(f"{problem}; gates judge one kind of device; --mp-force compares all the same")
            self.note = f"{problem}: not compared"
            return
        # Checked last: on another machine the method does not matter.
        methods = baseline.methods - {METHOD_VERSION}
        if methods and not self._force:
            raise _refused(
                f"baseline {baseline.name} was measured by method {', '.join(map(str, sorted(methods)))}, and this is "
                f"method {METHOD_VERSION}; make a new baseline, or use --mp-force to compare all the same"
            )
        self._baseline = baseline

    def judge(self, path: Path, run_more: Callable[[list[Case]], None], settings_of: Callable[[str], Settings]) -> None:
        """Judge the run by its gates. Rows that look slower are measured again; only that counts.

        In a run that was stopped while rows were measured again, the same rows are, and only the rest of these cases
        runs.

        Args:
            path: the run's folder; the run is not finished yet.
            run_more: runs further cases of it that have no result yet.
            settings_of: returns those of a workload.
        """
        if self._baseline is None and len(self._changes) == len(self._gates):
            return
        from mpscale.analysis.quantities import COSTS, Outcome
        from mpscale.core.runs import RunError, read_run

        try:
            run = _as_planned(read_run(path))
            self._look(run, {})
            fired = [found for found in self.findings if found.outcome is Outcome.FIRED and found.gate.name in COSTS]
            again = {found.row for found in fired if found.row and COSTS[found.gate.name].can_be_remeasured}
            if again:
                first_repeats = {row: _next_repeat(run, row) for row in again}
                run_more(further_cases(run, first_repeats, settings_of))
                self._look(read_run(path), first_repeats)
        except RunError as error:
            self._cannot_judge(str(error))
            self.findings, self._unread = [], True

    def _look(self, run: Run, again: Mapping[tuple[str, str], int]) -> None:
        """Compare a run with the baseline, if there is one, and judge it.

        Args:
            run: as far as it has come.
            again: rows that were measured again, with the first repeat that counts.
        """
        from mpscale.analysis.compare import compare, floors_for
        from mpscale.analysis.gates import judge_alone, judge_gates
        from mpscale.analysis.pairs import NotComparable
        from mpscale.core.runs import RunError

        baseline, by_name = self._baseline, self._settings.compare_by == "name"
        if baseline is not None:
            floors = floors_for(baseline, run, run.path.parent.parent)
            how: dict[str, Any] = {"threshold": self._threshold, "floors": floors, "anew": again}
            try:
                self.comparison = compare(baseline, run, force=self._force, by_name=by_name, **how)
            except NotComparable as error:
                self._cannot_judge(error.with_cure("mp-"))
            except RunError as error:
                self._cannot_judge(str(error))
        if self.comparison is None:
            # Limits are about the run alone.
            self.findings = judge_alone(run, self._gates, again)
            return
        judged = [gate for gate in self._gates if self._force or self.comparison.same_device or not gate.needs_baseline]
        self.findings = judge_gates(self.comparison, judged, again)
        if len(judged) < len(self._gates):
            name = self.comparison.baseline.name
            self.note = f"baseline {name} was made on another machine: {', '.join(self._changes)} not judged"

    def _cannot_judge(self, why: str) -> None:
        self.note, self._unjudged, self.comparison = why, True, None

    def write(self, run: Run) -> None:
        """Write the comparison into the folder of the run, which has ended, for people and for programs."""
        from mpscale.core.files.writing import write
        from mpscale.report.comparison import gates_part, of_a_run, render
        from mpscale.report.table import escape

        path = run.path
        # It was judged before it ended.
        compared = [] if self.comparison is None else [replace(self.comparison, other=run)]
        if compared or self.note is not None or self.findings:
            write(path / JSON_FILE, of_a_run(compared, self.findings, self.note, self.fails))
        if compared:
            title = f"# {escape(run.shown)} against {escape(compared[0].baseline.shown)}\n\n"
            write(path / FILE, title + render(compared, self.findings, "markdown"))
        elif self.findings:
            write(path / FILE, f"# {escape(run.shown)}\n\n{gates_part(self.findings).markdown()}\n")

    def reports(self) -> list[pytest.TestReport]:
        """Return what the gates found as reports of tests: one for each gate and row, or why they were not judged."""
        from mpscale.analysis.quantities import Outcome

        outcomes: dict[Outcome, ReportOutcome]
        outcomes = {Outcome.FIRED: "failed", Outcome.PASSED: "passed"}
        outcomes[Outcome.CANNOT_TELL] = "failed" if self._settings.strict else "skipped"
        reports = []
        if self.note is not None:
            outcome: ReportOutcome = "failed" if self._note_fails else "skipped"
            reports += as_tests("gates", "baseline", outcome, self.note, counts=self._left_gates)
        for finding in self.findings:
            if finding.outcome in outcomes:
                name = f"{finding.gate}[{'-'.join(finding.row or ('no row',))}]"
                text = f"{finding.outcome}: {finding}"
                reports += as_tests("gates", name, outcomes[finding.outcome], text)
        return reports

    @property
    def _note_fails(self) -> bool:
        return self.note is not None and (self._named or self._unjudged) and self._left_gates

    @property
    def _left_gates(self) -> bool:
        """Whether the note is the reason why a gate was not judged."""
        return bool(self._gates if self._unread else self._changes)

    @property
    def fails(self) -> bool:
        """Whether the run fails."""
        if self._note_fails or not self.findings:
            return self._note_fails
        from mpscale.analysis.gates import FIRED, exit_code

        return exit_code(self.findings, self._settings.strict) == FIRED

    def lines(self) -> list[str]:
        """Return the lines for the terminal."""
        from mpscale.analysis.quantities import Outcome

        lines = [f"{folder} cannot be the baseline: {reason}" for folder, reason in self.left_out]
        if self.note is not None:
            lines.append(self.note)
        if self.comparison is not None:
            from mpscale.report.comparison import models

            lines += [f"against {self.comparison.baseline.shown}:", *models(self.comparison)]
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


def as_tests(module: str, name: str, outcome: ReportOutcome, text: str, counts: bool = True) -> list[pytest.TestReport]:
    """Return the two reports of a test that has run: of its call, and of its end.

    Args:
        module: of mpscale, in which the test would be.
        name: of the test.
        outcome: of its call.
        text: why it failed or was skipped.
        counts: whether pytest's last line counts it.
    """
    name = on_one_line(name)
    place = (f"mpscale/{module}.py", None, name)
    nodeid = f"{place[0]}::{name}"
    text = visible(text)
    why = {"passed": None, "failed": text, "skipped": (place[0], 0, text)}[outcome]
    return [
        pytest.TestReport(nodeid, place, {}, outcome, why, "call", count_towards_summary=counts),
        pytest.TestReport(nodeid, place, {}, "passed", None, "teardown"),
    ]


class InSummary:
    """Makes pytest's last line tell, and colour, what failed besides tests.

    It adds to pytest's counts after the section FAILURES, which is about tests, and before the short summary, which
    names all that failed: mpscale's own section has the rest.

    Args:
        reports: see :func:`as_tests`.
    """

    def __init__(self, reports: Sequence[pytest.TestReport]) -> None:
        self._reports = [each for each in reports if each.when == "call" and each.count_towards_summary]

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Add what failed to the failures; what is unknown has a count of its own, which makes the line yellow."""
        failed = [report for report in self._reports if report.outcome == "failed"]
        unknown = [report for report in self._reports if report.outcome == "skipped"]
        if failed:
            terminalreporter.stats.setdefault("failed", []).extend(failed)
        if unknown:
            several = "gate" if len(unknown) == 1 else "gates"
            terminalreporter.stats.setdefault(f"{several} could not tell", []).extend(unknown)


def _as_planned(run: Run) -> Run:
    """A run without the cases that gates have added to it: which rows look slower is decided without them."""
    planned = set(run.info.get("planned", []))
    cases = [record for record in run.records if record["case_id"] in planned]
    return replace(run, records=cases) if 0 < len(cases) < len(run.records) else run


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
    from mpscale.core.journal import SWEPT
    from mpscale.core.record import of_good_trainings

    cases: list[tuple[int, Case]] = []
    for place, first in first_repeats.items():
        rows = [row for row in run.records if row.place == place]
        workload, mode = rows[0]["workload"], rows[0]["mode"]
        variant = Variant(*(rows[0][name] for name in SWEPT))
        settings = variant.applied_to(settings_of(workload))
        good = of_good_trainings(rows)
        timed = [row for row in good if row["step_time_ms_median"] is not None]
        seed = min((row["seed"] for row in timed), default=0)
        for turn in range(max(2 * len(timed), 2)):
            cases.append((turn, Case(workload, mode, seed, first + turn, 0, settings, variant)))
    return [case for _, case in sorted(cases, key=lambda entry: entry[0])]
