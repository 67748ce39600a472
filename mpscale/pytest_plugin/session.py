"""One pytest session of mpscale: its plan, its run, its progress, and the hooks that go with them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpscale.config import why_not_writable
from mpscale.pytest_plugin import options
from mpscale.pytest_plugin.baseline import FILE, BaselineCheck
from mpscale.terminal import printable

if TYPE_CHECKING:
    from mpscale.ab.turns import Turns
    from mpscale.core.case import Case
    from mpscale.core.device import Device
    from mpscale.core.runs import Run
    from mpscale.harness.run import BenchmarkRun
    from mpscale.harness.supervisor import Outcome
    from mpscale.telemetry.client import Driver
    from mpscale.terminal import Progress


PARAMETERS = ("workload", "mode", "seed", "repeat")
CLOCK = pytest.StashKey["ReplayClock"]()
_TURN_MORE_S = 600.0
"""What a turn may take beside its case: the import of TensorFlow, reports, tests of the suite that are no cases."""


class ReplayClock:
    """A clock for pytest-benchmark that replays what the worker measured.

    pytest-benchmark asks for the time before and after each round; the difference is the next recorded step time.
    """

    __name__ = "ReplayClock"

    def __init__(self) -> None:
        self._now = 0.0
        self._inside = False
        self._steps: Iterator[float] = iter(())

    def load(self, step_s: list[float]) -> None:
        """Takes the step times of the rounds to come, in seconds."""
        self._steps = iter(step_s)

    def __call__(self) -> float:
        """Seconds since some time or other."""
        if self._inside:
            self._now += next(self._steps, 0.0)
        self._inside = not self._inside
        return self._now


class Session:
    """What one pytest session knows: its plan, its run, its progress."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.cases: dict[tuple[str, str, int, int], Case] = {}
        self._run: BenchmarkRun | None = None
        self._progress: Progress | None = None
        self._selected: list[Case] = []
        self._nodes: set[str] = set()
        self._suite: set[Path] = set()
        self._device: Device | None = None
        self._driver: Driver | None = None
        # Resolved now: a test may change the working directory.
        # Not by Path.resolve, which raises where links go in a circle; that is told with all that is wrong.
        self._results = Path(os.path.realpath(config.getoption("mp_results") or config.rootpath / "results"))
        self._own: dict[str, str] = {}
        self._live_line = False
        self._restore = contextlib.ExitStack()
        self._problem: str | None = None
        self._finished: Run | None = None
        self._troubles: list[str] = []
        """Why this session is no success although its tests may have passed."""
        self._check = BaselineCheck(config)
        self._turns = _join()

    def parameters(self) -> list[Any]:
        """One pytest.param a case, in the order in which they run."""
        self._plan()
        return [
            pytest.param(
                *key,
                id=f"{case.workload}-{case.mode}-" + (f"seed{case.seed}" if case.trains else f"repeat{case.repeat}"),
            )
            for key, case in self.cases.items()
        ]

    def run(self, case: Case) -> Outcome:
        """Runs a case, with progress on the terminal."""
        measured = None if self._run is None else self._run.measured(case)
        if measured is not None:
            return measured
        self._wait_for_turn(case)
        run, progress = self._open()
        progress.started(case)
        outcome = run.run(case)
        progress.finished(case, outcome.record)
        self._tell_troubles(run)
        if self._turns is not None:
            record = outcome.record
            facts = {"status": record["status"], "reason": record["status_reason"]}
            self._turns.done(case.id, **facts, step_time_ms=record["step_time_ms_median"], run=str(run.path))
        return outcome

    def _tell_troubles(self, run: BenchmarkRun) -> None:
        """Says at once what went wrong with the run's files, and again at the end."""
        for trouble in run.troubles:
            if trouble not in self._troubles:
                self._troubles.append(trouble)
                self._write(f"mpscale: {trouble}\n")

    def _wait_for_turn(self, case: Case) -> None:
        """Where another session runs the same cases, waits until it is this one's turn."""
        if self._turns is None:
            return
        from mpscale.ab.turns import Stopped

        try:
            self._turns.wait(case.id)
        except Stopped as why:
            pytest.exit(f"mpscale ab: {why}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Gives every case its clock, and puts cases back into their order where another plug-in has changed it."""
        if self._problem is not None:
            return
        places = [place for place, item in enumerate(items) if _is_case(item)]
        ours = sorted((items[place] for place in places), key=lambda item: self._case(item).order)
        for place, item in zip(places, ours, strict=True):
            items[place] = item
            item.stash[CLOCK] = ReplayClock()
            marker = item.get_closest_marker("benchmark")
            own = {"group": self._case(item).workload, **(marker.kwargs if marker else {}), "timer": item.stash[CLOCK]}
            if hasattr(self._config.option, "benchmark_disable"):
                # First, since pytest-benchmark goes by the closest one: the test's own options stay, but for the timer.
                item.add_marker(pytest.mark.benchmark(**own), append=False)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Notes what is left after -k, -m and the like, which is what progress counts."""
        if self._problem is None:
            items = [item for item in session.items if _is_case(item)]
            self._nodes = {item.nodeid for item in items}
            self._suite = {item.path for item in items}
            chosen = [self._case(item) for item in items]
            self._selected = list({case.id: case for case in chosen}.values())
            self._problem = self._wrong_use() if chosen else None
        if self._problem is not None:
            # Raised here and not where it is found: pytest reports it as wrong use only outside collectors.
            raise pytest.UsageError(self._problem)
        if self._turns is not None:
            option = self._config.getoption
            longest = (option("mp_gpu_retries") + 2) * (option("mp_timeout") + option("mp_cool_down")) + _TURN_MORE_S
            self._turns.plan([{"id": c.id, **{n: getattr(c, n) for n in PARAMETERS}} for c in self._selected], longest)

    def _find_own_workloads(self) -> None:
        """Imports the suite's own workloads among those that were chosen, and notes where they are."""
        from mpscale.workloads import registry

        names = dict.fromkeys(case.workload for case in self._selected if registry.is_own(case.workload))
        folders = options.workload_folders(self._config, self._suite)
        options.check_workloads(names, folders)
        self._own = {name: registry.source(name, folders) for name in names}

    def _wrong_use(self) -> str | None:
        if not hasattr(self._config.option, "benchmark_disable"):
            return (
                "mpscale hands the times of training steps to pytest-benchmark, which is switched off: leave out "
                "`-p no:benchmark`, or load it with `-p pytest_benchmark.plugin`; --benchmark-disable trains "
                "without timing"
            )
        if self._config.getoption("numprocesses", None):
            return "mpscale times training steps, and cases side by side would disturb each other: run without -n"
        stand_in = self._device is not None and self._device.is_stand_in
        if self._on_gpu and not stand_in and self._config.getoption("mp_start_method") == "fork":
            return "--mp-start-method fork does not work on a GPU; use fresh or auto"
        if not self._config.invocation_params.dir.is_relative_to(self._config.rootpath):
            taken = options.taken_for_a_place(self._config)
            if taken is not None:
                option, value = taken
                return (
                    f"pytest takes {value} for a place of tests and its root directory from it; write {option}={value}"
                )
        if not self._config.option.collectonly:
            why_not = why_not_writable(self._results / "runs")
            if why_not is not None:
                return f"--mp-results: {self._results} is not a folder that can be written to ({why_not})"
        try:
            self._find_own_workloads()
        except pytest.UsageError as error:
            return str(error)
        if self._device is not None and self._turns is None:
            try:
                self._check.open(self._results, self._device)
            except ValueError as error:
                return str(error)
        return None

    @property
    def _on_gpu(self) -> bool:
        return self._device is not None and self._device.kind == "gpu"

    def _case(self, item: pytest.Item) -> Case:
        parameters = item.callspec.params  # type: ignore[attr-defined]
        return self.cases[tuple(parameters[name] for name in PARAMETERS)]

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Leaves out the dot of a case that did not fail: its own line says more."""
        shown = self._progress is not None and self._config.get_verbosity() == 0
        plain = report.when == "call" and report.outcome != "failed" and not hasattr(report, "wasxfail")
        if shown and plain and report.nodeid in self._nodes:
            return report.outcome, "", report.outcome.upper()
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Compares the run with its baseline, ends it and writes its reports."""
        try:
            if self._turns is not None:
                path = None if self._run is None else self._run.path
                self._turns.end(None if path is None else str(path))
            self._end(session, exitstatus)
        finally:
            if self._driver is not None:
                self._driver.close()
            self._restore.close()

    def _end(self, session: pytest.Session, exitstatus: int) -> None:
        run = self._run
        if run is None:
            return
        try:
            if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                session.exitstatus = self._judge(run, exitstatus)
        except Exception as error:
            self._troubles.append(f"{run.path} could not be compared with its baseline: {_words(error)}")
        try:
            run.finish(int(session.exitstatus))
            self._tell_troubles(run)
            if run.path is not None:
                from mpscale.core.runs import read_run
                from mpscale.report.files import write_reports

                self._finished = read_run(run.path)
                self._troubles += self._finished.problems
                write_reports(self._finished)
                self._check.write(run.path)
        except Exception as error:
            # The tests are done, and what the journal holds is there whatever a report stumbles over.
            self._troubles.append(f"no report could be made of {run.path}: {_words(error)}")
        if self._troubles and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _judge(self, run: BenchmarkRun, exitstatus: int) -> int:
        """The exit status of the session with what the gates have to say."""
        if run.path is None:
            return exitstatus
        try:
            self._check.judge(run.path, self._run_anew, options.settings(self._config))
        except KeyboardInterrupt:
            self._check.note = "stopped while rows were measured anew: no gate was judged"
            return pytest.ExitCode.INTERRUPTED
        return pytest.ExitCode.TESTS_FAILED if self._check.fails else exitstatus

    def _run_anew(self, cases: list[Case]) -> None:
        """Runs cases that were not planned."""
        run, progress = self._open()
        self._write(f"mpscale: slower than the baseline, measured anew in {len(cases)} further processes\n")
        for workload, number in Counter(case.workload for case in cases).items():
            progress.plan(workload, number, further=True)
        for case in cases:
            progress.started(case)
            progress.finished(case, run.run(case).record)
            self._tell_troubles(run)

    @pytest.hookimpl(wrapper=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        """The result table, below pytest-benchmark's; also where that ends in a regression."""
        try:
            return (yield)
        finally:
            if self._finished is not None:
                _show(terminalreporter, self, self._finished, self._check)
            elif self._troubles:
                terminalreporter.section("mpscale")
            for trouble in self._troubles:
                terminalreporter.line("")
                terminalreporter.write_line(self.printable(f"mpscale: {trouble}"), red=True, bold=True)

    def _plan(self) -> None:
        if self.cases:
            return
        from mpscale.core.case import plan
        from mpscale.core.device import find_device
        from mpscale.core.mode import default_modes
        from mpscale.telemetry import host
        from mpscale.telemetry.client import open_driver

        config = self._config
        cores = config.getoption("mp_cores")
        if cores is not None:
            # Here, so that all that is started from here on inherits it, and the fingerprint sees what is left.
            os.sched_setaffinity(0, cores)
        self._driver = open_driver()
        try:
            self._device = find_device(self._driver.devices, os.environ, host.cpu())
        except ValueError as error:
            self._problem = str(error)
            return
        modes = options.named_modes(config) if config.getoption("mp_modes") else default_modes(self._device)
        cases = plan(
            options.workloads(config),
            modes,
            config.getoption("mp_seeds") or options.preset(config).seeds,
            config.getoption("mp_repeats"),
            options.settings(config),
            shuffle_seed=_seed(config) if self._turns is None else self._turns.seed,
        )
        self.cases = {(case.workload, case.mode, case.seed, case.repeat): case for case in cases}

    def _open(self) -> tuple[BenchmarkRun, Progress]:
        if self._run is None or self._progress is None:
            from mpscale.harness.run import BenchmarkRun
            from mpscale.harness.supervisor import Options
            from mpscale.telemetry.host import busy_words
            from mpscale.terminal import Progress

            config, device, driver = self._config, self._device, self._driver
            assert device is not None and driver is not None  # _plan found both
            start_method = config.getoption("mp_start_method")
            if start_method == "auto":
                start_method = "fresh" if self._on_gpu else "fork"
            how = Options(
                results=self._results,
                project=config.rootpath,
                start_method=start_method,
                timeout_s=config.getoption("mp_timeout"),
                asked={
                    "preset": config.getoption("mp_preset"),
                    **{
                        f"{name}s": list(dict.fromkeys(getattr(c, name) for c in self._selected)) for name in PARAMETERS
                    },
                    "start_method": start_method,
                    "timeout_s": config.getoption("mp_timeout"),
                    **options.settings(config).to_json(),
                    "gpu_allocator": config.getoption("mp_gpu_allocator"),
                    "cores": sorted(config.getoption("mp_cores") or ()) or None,
                },
                gpu_allocator=config.getoption("mp_gpu_allocator"),
                gpu_retries=config.getoption("mp_gpu_retries"),
                cool_down_s=config.getoption("mp_cool_down"),
                keep_suspect=config.getoption("mp_keep_suspect"),
                interleaved=None if self._turns is None else self._turns.entry,
            )
            reporter = config.pluginmanager.getplugin("terminalreporter")
            live = reporter is not None and reporter.isatty
            columns = config.get_terminal_writer().fullwidth if live else 80
            self._progress = Progress(len(self._selected), self._write, live, time.monotonic, columns)
            for workload, cases in Counter(case.workload for case in self._selected).items():
                self._progress.plan(workload, cases)
            self._write(f"mpscale: on {device.name} ({device.kind.upper()}){self._why_no_gpu()}\n")
            busy = busy_words()
            if busy:
                self._write(f"mpscale: {busy}\n")
            for name, where in self._own.items():
                self._write(f"mpscale: {name} is in {where}\n")
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                # As a CI has it that cancels a job: the run is ended like one that the user stops.
                self._restore.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            self._run = BenchmarkRun(self._selected, device, driver, how, self._progress.event)
        return self._run, self._progress

    def _why_no_gpu(self) -> str:
        """A GPU that the driver's library does not find is measured as a CPU, which must not go unsaid."""
        reason = None if self._driver is None else self._driver.reason
        return f"; no GPU: {reason}" if reason and not self._on_gpu else ""

    def printable(self, text: str) -> str:
        """``text`` as the terminal can show it. Else pytest would write all of it as escapes, line ends too."""
        if self._config.pluginmanager.getplugin("terminalreporter") is None:
            return text
        return printable(text, getattr(self._config.get_terminal_writer(), "_file", None))

    def _write(self, text: str) -> None:
        """Writes past pytest's capture of standard output, on a line of its own."""
        plugins = self._config.pluginmanager
        capture = plugins.getplugin("capturemanager")
        if self._config.get_verbosity() < 0 or plugins.getplugin("terminalreporter") is None:
            return
        terminal = self._config.get_terminal_writer()
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            if terminal.width_of_current_line and not self._live_line:
                terminal.line()
            terminal.write(self.printable(text), flush=True)
        self._live_line = not text.endswith("\n")


def _join() -> Turns | None:
    """The turns that this session takes with another one, None in an ordinary session."""
    if "MPSCALE_TURNS" not in os.environ:
        return None
    from mpscale.ab.turns import join

    return join(os.environ)


def _seed(config: pytest.Config) -> int:
    """Of the order of the cases. Workers of pytest-xdist have to agree on it, or they end before any test says why."""
    worker: dict[str, str] = getattr(config, "workerinput", {})
    return int(worker["testrunuid"], 16) if "testrunuid" in worker else int(time.time())


def _words(error: Exception) -> str:
    """What was raised, with its kind where that is not one that is made for people."""
    from mpscale.core.runs import RunError

    return str(error) if isinstance(error, RunError | OSError) else f"{type(error).__name__}: {error}"


def _is_case(item: pytest.Item) -> bool:
    return "mp_case" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")


def _show(terminalreporter: pytest.TerminalReporter, session: Session, run: Run, check: BaselineCheck) -> None:
    from mpscale.report.table import result_table

    path = run.path
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    terminalreporter.section("mpscale")

    def show(text: str, **markup: bool) -> None:
        terminalreporter.write_line(session.printable(text), **markup)

    show(result_table(run))
    said = check.lines()
    if said:
        show("\n" + "\n".join(said), red=check.fails)
    report = path / "report.html"
    show(f"\nrun: {path}" + (f"\nreport: {report}" if report.is_file() else ""))
    if check.comparison is not None:
        show(f"comparison: {path / FILE}")
