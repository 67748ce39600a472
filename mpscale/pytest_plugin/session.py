"""One pytest session of mpscale: its hooks, from the plan to the reports."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpscale.ab import turns
from mpscale.core import extras
from mpscale.core.given import given
from mpscale.core.invocation import RESUME
from mpscale.core.processes import stopping
from mpscale.core.processes.process import kill_living
from mpscale.pytest_plugin import options, origin
from mpscale.pytest_plugin.baseline import FILE, BaselineCheck, InSummary, as_tests
from mpscale.pytest_plugin.live_run import LiveRun
from mpscale.pytest_plugin.machines import Following, cluster_of, lead
from mpscale.pytest_plugin.output import Output
from mpscale.pytest_plugin.plan import CASE, PARAMETERS, Plan, check_use, shows_benchmark_table, shuffle_seed
from mpscale.pytest_plugin.resume import Resumption, invocation
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.core.case import Case, Settings
    from mpscale.core.cluster import Cluster
    from mpscale.core.runs import Run
    from mpscale.harness.coordinator import Coordinator
    from mpscale.harness.supervisor import Outcome


class Session:
    """The hooks of a session. The plan is made for the first test that asks for a case, the run for the first case.

    Args:
        config: of the session.
        resumption: the run that it goes on with; None for a new one.
    """

    def __init__(self, config: pytest.Config, resumption: Resumption | None = None) -> None:
        self._config, self._resumption = config, resumption
        self._parcel = given().parcel
        self.output = Output(config)
        # Resolved now: a test may change the working directory. realpath does not raise for a circle of links; such a
        # folder is refused later, together with all others that cannot be written.
        self._results = Path(os.path.realpath(config.getoption("mp_results") or config.rootpath / "results"))
        if resumption is not None:
            self._results = resumption.results
        self._check = BaselineCheck(config)
        self._turns = turns.join(os.environ)
        if self._turns is not None and cluster_of(config) is not None:
            raise pytest.UsageError("`mpscale ab` compares runs of one machine: unset TF_CONFIG")
        if resumption is not None and self._turns is not None:
            raise pytest.UsageError(f"{RESUME}: neither of the two runs of `mpscale ab` can go on alone")
        self._plan: Plan | None = None
        self._problem: str | None = None
        """Why no plan could be made. pytest only reports a UsageError as such if no collector raises it."""
        self._run: LiveRun | None = None
        self._others: Coordinator | None = None
        """The machines that this session leads."""
        self._finished: Run | None = None
        self._judged = False
        """Whether the gates were judged, or it is known why they could not be."""
        self._cleanup = contextlib.ExitStack()
        self._listening = contextlib.ExitStack()
        self._listens = False
        self._pytest: pytest.Session | None = None
        if config.getoption("benchmark_only", False):
            self._listen()

    def _listen(self) -> None:
        """Have SIGTERM and SIGHUP do what Ctrl-C does; in a session that may have cases, and in no other."""
        if self._listens or hasattr(self._config, "workerinput"):
            return
        self._listens = True
        # At the very end: pytest-benchmark and the terminal still write after the reports.
        self._config.add_cleanup(self._stop_listening)
        self._listening.enter_context(stopping.listening(int(pytest.ExitCode.INTERRUPTED)))
        stopping.before_ending_at_once(self._last_word)

    def _stop_listening(self) -> None:
        stopping.taken()
        with contextlib.suppress(KeyboardInterrupt):
            self._listening.close()
        if stopping.asked() is not None and self._run is not None:
            kill_living()  # a process may have been started in the moment of the signal
            if self._pytest is not None:
                self._pytest.exitstatus = pytest.ExitCode.INTERRUPTED

    def _last_word(self) -> None:
        path = None if self._run is None else self._run.path
        kept = "" if path is None else f"; {path} keeps every case that had ended"
        self.output.say(f"stopped twice, so ended at once{kept}")

    def parameters(self) -> tuple[Sequence[str], list[Any]]:
        """Return the names of the parameters, and one pytest.param per case, in the order in which they run."""
        self._listen()
        if packages := extras.missing():
            self._problem = extras.lacks(packages)
        self._problem = self._problem or self._config.stash.get(origin.UNFIT, None)
        if self._plan is None and self._problem is None:
            try:
                self._plan = self._make_plan()
            except (ValueError, pytest.UsageError) as error:
                self._problem = str(error)
        return (PARAMETERS, []) if self._plan is None else (self._plan.parameter_names, self._plan.parameters())

    def _make_plan(self) -> Plan:
        from mpscale.telemetry import client

        cores = self._config.getoption("mp_cores")
        if cores is not None:
            # Before anything is started: other processes inherit it, and the fingerprint shows what is left.
            os.sched_setaffinity(0, cores)
        driver = client.open_driver()
        self._cleanup.callback(driver.close)
        seed = shuffle_seed(self._config) if self._turns is None else self._turns.seed
        planned = None if self._resumption is None else self._resumption.planned
        return Plan(self._config, driver, seed, planned)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Give each test its case, in the planned order."""
        if self._plan is not None:
            self._plan.prepare(items)
            self._plan.deal(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Choose the cases, and refuse what cannot work before anything runs."""
        if self._problem is not None:
            raise pytest.UsageError(visible(self._problem))
        plan = self._plan
        chosen = [] if plan is None else plan.choose(session.items)
        machines = options.cluster(self._config)
        if plan is not None and chosen and machines is not None and not machines.leads:
            self._follow(plan, machines)
        elif plan is not None and chosen:
            check_use(self._config, plan, self._results)
            if self._turns is None:
                before = None if self._resumption is None else self._resumption.path.name
                self._check.check_rows([case.place for case in chosen])
                self._check.open(self._results, plan.device, before)
            if machines is not None and not self._config.option.collectonly:
                self._others = lead(self._config, machines, plan.device, self.output.say)
                self._cleanup.callback(self._others.close)
            if self._resumption is not None and not self._config.option.collectonly:
                self._run = self._start_run()
        if self._turns is not None:
            cases = [
                {"id": case.id, **dict(zip(PARAMETERS, (*case.place, case.seed, case.repeat), strict=True))}
                for case in chosen
            ]
            self._turns.send(turns.Plan(cases, options.longest_turn_s(self._config)))

    def _follow(self, plan: Plan, cluster: Cluster) -> None:
        """Have the session of another machine say which cases run, in place of this one's tests."""
        if not self._config.option.collectonly:
            how = options.run_options(self._config, self._results, {}, None)
            following = Following(self._config, cluster, plan.device, plan.driver, how, self.output.say)
            self._config.pluginmanager.register(following)

    def pytest_report_collectionfinish(self, items: list[pytest.Item]) -> list[str]:
        """Say what the project sets, which preset was chosen unless it is the usual one, and what will surprise."""
        plan = self._plan
        # pytest may ask before the cases are chosen.
        if plan is None or not (plan.share is not None or any(CASE in item.stash for item in items)):
            return []
        told = self._config.option.collectonly or (plan.on_gpu and self._config.getoption("mp_preset") is None)
        part = [] if plan.share is None else [plan.share.words()]
        preset = [plan.preset] if told else []
        lines = [*origin.told(self._config), *preset, *plan.left_out, *plan.notes(items), *part]
        return [self.output.printable(visible(f"mpscale: {line}")) for line in lines]

    def run(self, case: Case) -> Outcome:
        """Run a case, unless it has run and did not fail."""
        if stopping.asked() is not None:
            # Once more: somebody's code has caught the first one and gone on.
            raise KeyboardInterrupt(stopping.asked())
        measured = None if self._run is None else self._run.measured(case)
        if measured is not None:
            return measured
        if self._turns is not None:
            try:
                self._turns.wait(turns.Ready(case.id))
            except turns.Stopped as why:
                pytest.exit(f"mpscale ab: {why}")
        if self._run is None:
            self._run = self._start_run()
        try:
            try:
                outcome = self._run.run(case)
            finally:
                if self._parcel is not None and self._run.path is not None:
                    self._parcel.note_run(self._run.path)
        except OSError as error:
            # Neither a folder of the run nor one for temporary files could be made: nothing was measured.
            text = f"{case.id} was not started: {_describe(error)}"
            pytest.fail(self.output.printable(text), pytrace=False)
        if self._turns is not None:
            status, reason, ms = (outcome.record[name] for name in ("status", "status_reason", "step_time_ms_median"))
            self._turns.send(turns.Done(case.id, status, reason, ms, str(self._run.path)))
        return outcome

    def when_replaced(self, case: Case, act: Callable[[Outcome], str | None]) -> None:
        """See :meth:`LiveRun.when_replaced`."""
        if self._run is not None:
            self._run.when_replaced(case, act)

    def _start_run(self) -> LiveRun:
        assert self._plan is not None  # a case comes from it
        interleaved = None if self._turns is None else self._turns.entry
        plan = self._plan
        started = invocation(self._config)
        selected = plan.selection()
        how = options.run_options(self._config, self._results, selected, interleaved, started, plan.share, self._others)
        if self._resumption is None:
            return LiveRun(plan, how, self.output)
        from mpscale.core.files.reading import RunError
        from mpscale.harness.resume import resume

        try:
            resumed = resume(self._resumption.path, plan.chosen, plan.device, plan.driver, how)
        except RunError as error:
            raise pytest.UsageError(visible(str(error))) from error
        except OSError as error:
            text = f"{RESUME}: the run cannot be written: {_describe(error)}"
            raise pytest.UsageError(visible(text)) from error
        try:
            return LiveRun(plan, how, self.output, resumed)
        except BaseException:  # a signal above all
            resumed.journal.free()
            raise

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Leave out the dot of a case that did not fail: its own line says more."""
        plain = report.when == "call" and report.outcome != "failed" and not hasattr(report, "wasxfail")
        shown = self._run is not None and self._config.get_verbosity() == 0
        if plain and shown and self._plan is not None and report.nodeid in self._plan.tests:
            return report.outcome, "", report.outcome.upper()
        return None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """After the last case, let signals wait: outside of this loop pytest would end without a report."""
        self._pytest = session
        try:
            return (yield)
        finally:
            if self._run is not None:
                self._listening.enter_context(stopping.held())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Compare the run with its baseline, end it and write its reports."""
        try:
            if self._turns is not None:
                path = None if self._run is None else self._run.path
                with contextlib.suppress(KeyboardInterrupt), stopping.opened():
                    self._turns.end(None if path is None else str(path))
            if self._run is not None:
                self._end(self._run, session, exitstatus)
            elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._plan is not None and self._plan.is_empty:
                # A part without cases has done what it should. Else its job of a matrix would fail.
                session.exitstatus = pytest.ExitCode.OK
        finally:
            if self._others is not None:
                # A run that was stopped may go on, and those that follow have to be started again for it.
                is_over = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
                self._others.close(over=is_over)
            self._cleanup.close()

    def _end(self, run: LiveRun, session: pytest.Session, exitstatus: int) -> None:
        try:
            if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                session.exitstatus = self._judge(run, exitstatus)
        except Exception as error:
            run.troubles.append(f"{run.path} could not be compared with its baseline: {_describe(error)}")
        if stopping.taken() is not None:
            session.exitstatus = pytest.ExitCode.INTERRUPTED
            self.output.say(f"stopped by {stopping.asked()}: writing the report; a second signal ends this at once")
        try:
            run.finish(int(session.exitstatus))
            if run.path is not None:
                from mpscale.core.record import to_csv
                from mpscale.core.runs import read_run
                from mpscale.report.files import write_reports

                self._finished = read_run(run.path)
                run.troubles += self._finished.problems
                write_reports(self._finished, to_csv(self._finished.records))
                self._check.write(self._finished)
        except Exception as error:
            # A report that fails must not stop pytest: the journal has all results.
            run.troubles.append(f"no report could be made of {run.path}: {_describe(error)}")
        finally:
            run.free()
        if run.troubles and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self._tell_pytest(run.troubles)

    def _judge(self, run: LiveRun, exitstatus: int) -> int:
        """Return the exit status of the session, given the gates."""
        if run.path is None:
            return exitstatus
        try:
            with stopping.opened():
                self._check.judge(run.path, run.run_again, self._settings_of)
        except KeyboardInterrupt:
            self._check.note = f"stopped while rows were measured again: no gate was judged; {RESUME} goes on with them"
            return pytest.ExitCode.INTERRUPTED
        self._judged = True
        return pytest.ExitCode.TESTS_FAILED if self._check.fails else exitstatus

    def _tell_pytest(self, troubles: Sequence[str]) -> None:
        """Count gates and problems with the run's files in pytest's last line, and as test cases of ``--junitxml``.

        The file is written after this. Other plug-ins are not told, since these are no tests.

        Args:
            troubles: why the session fails, even if its tests have passed.
        """
        reports = self._check.reports() if self._judged else []
        if troubles:
            reports += as_tests("run", "files", "failed", "; ".join(troubles))
        plugins = self._config.pluginmanager
        others = [plugin for plugin in plugins.get_plugins() if type(plugin).__name__ != "LogXML"]
        log = plugins.subset_hook_caller("pytest_runtest_logreport", others)
        for report in reports:
            log(report=report)
        plugins.register(InSummary(reports))

    def _settings_of(self, workload: str) -> Settings:
        """Return the settings of a workload of the run."""
        assert self._plan is not None  # the run has cases of it
        return options.settings(self._config, workload, self._plan.device.memory_mib)

    @pytest.hookimpl(wrapper=True, optionalhook=True)
    def pytest_benchmark_group_stats(self) -> Generator[None, Any, Any]:
        """Leave cases out of pytest-benchmark's table: ours has what it says of them, and fits the terminal."""
        groups = yield
        if self._plan is None or shows_benchmark_table(self._config):
            return groups
        ours = self._plan.tests
        others = [(name, [one for one in group if one["fullname"] not in ours]) for name, group in groups]
        return [(name, group) for name, group in others if group]

    @pytest.hookimpl(wrapper=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        """Show the result table below pytest-benchmark's, even if that raises because of a regression."""
        try:
            return (yield)
        finally:
            troubles = [] if self._run is None else self._run.troubles
            if self._finished is not None or troubles:
                terminalreporter.section("mpscale")
            if self._finished is not None:
                self._show(terminalreporter, self._finished)
            for trouble in troubles:
                terminalreporter.line("")
                terminalreporter.write_line(self.output.printable(visible(f"mpscale: {trouble}")), red=True, bold=True)

    def _show(self, terminalreporter: pytest.TerminalReporter, run: Run) -> None:
        from mpscale.analysis.summary import summary_of
        from mpscale.report.first_screen import first_screen, plain
        from mpscale.report.missing import go_on
        from mpscale.report.sections import doubts_note, results

        def show(text: str, **markup: bool) -> None:
            terminalreporter.write_line(self.output.printable(text), **markup)

        path = run.path
        with contextlib.suppress(ValueError):
            path = path.relative_to(Path.cwd())
        surface = self.output.surface
        show(results(run).text(surface))
        if note := doubts_note(summary_of(run)):
            show(f"\n{surface.wrapped(note)}")
        show(f"\n{surface.wrapped(plain(first_screen(run)))}")
        lines = self._check.lines()
        if lines:
            show("\n" + "\n".join(map(surface.wrapped, lines)), red=self._check.fails)
        report = path / "report.html"
        if (signal := stopping.asked()) is not None:
            lacking = len(run.not_started) + sum(record["status"] == "interrupted" for record in run.records)
            show(f"\nstopped by {signal}: {lacking} of {len(run.info['planned'])} planned cases have no result")
        called = f" ({run.given_name})" if run.given_name else ""
        show(visible(f"\nrun: {path}{called}" + (f"\nreport: {report}" if report.is_file() else "")))
        if self._check.comparison is not None:
            show(visible(f"comparison: {path / FILE}"))
        if command := go_on(run, Path.cwd()):
            # Unbroken, to be copied.
            show(f"to go on: {command}")


def _describe(error: Exception) -> str:
    """Return the message of an error, with its type unless it was written for people."""
    from mpscale.core.files.errors import in_words
    from mpscale.core.runs import RunError

    if isinstance(error, OSError):
        return in_words(error)
    return str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
