"""The pytest plug-in: options, parametrisation and the fixture ``mp_case``, for suites here and elsewhere.

Registered by entry point, so it is loaded by every pytest run of an environment that mpscale is installed in. Until a
test asks for ``mp_case`` it imports and does next to nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpscale import pytest_options as options
from mpscale.modes import MODES

if TYPE_CHECKING:
    from mpscale.analysis.runs import Run
    from mpscale.harness.case import Case
    from mpscale.harness.run import BenchmarkRun
    from mpscale.harness.supervisor import Outcome
    from mpscale.progress import Progress
    from mpscale.records import Record
    from mpscale.telemetry.device import Device

_PARAMETERS = ("workload", "mode", "seed", "repeat")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, all under ``--mp-``."""
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Checks the names that were given, and makes the session's own object."""
    config.addinivalue_line("markers", "mpscale: a case of mpscale; added by the plug-in")
    if config.getoption("mp_modes") is not None:
        options.named_modes(config)
    if config.getoption("mp_workloads") is not None:
        options.workloads(config)
    config.pluginmanager.register(_Session(config), "mpscale-session")


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


class MeasuredCase:
    """What the fixture ``mp_case`` gives to a test: one case, and a way to run it."""

    def __init__(self, case: Case, session: _Session, clock: ReplayClock) -> None:
        self.case = case
        self._session, self._clock = session, clock

    def measure(self, benchmark: Any) -> Record:
        """Runs the case in a process of its own and hands its step times to pytest-benchmark.

        Args:
            benchmark: pytest-benchmark's fixture.

        Returns:
            The case's record; it is in the journal whatever happens here.
        """
        outcome = self._session.run(self.case)
        record = outcome.record
        status, reason = record["status"], record["status_reason"]
        if status == "unsupported":
            pytest.skip(reason)
        if _fails(self.case, record):
            tail = f"\nIts output ends with:\n{record['output_tail']}" if record["output_tail"] else ""
            pytest.fail(f"{self.case.id}: {status}: {reason}{tail}", pytrace=False)
        benchmark.extra_info.update({name: record[name] for name in _EXTRA_INFO if record[name] is not None})
        self._clock.load(outcome.step_s)
        benchmark.pedantic(lambda: None, rounds=max(len(outcome.step_s), 1))
        return record


_EXTRA_INFO = (
    "case_id", "status", "workload", "mode", "seed", "repeat", "device_name", "jit", "batch_size", "dispatch_share",
    "attempted_steps", "overflow_steps", "skipped_steps", "timed_overflow_steps", "loss_scale_final",
    "gpu_memory_nvml_peak_mib", "host_memory_peak_mib", "final_accuracy", "metric_name", "metric_value",
)  # fmt: skip


@pytest.fixture
def mp_case(request: pytest.FixtureRequest, workload: str, mode: str, seed: int, repeat: int) -> MeasuredCase:
    """One case of the run; a test that asks for it is parametrised over all of them."""
    session = _session(request.config)
    return MeasuredCase(session.cases[workload, mode, seed, repeat], session, session.clock(request.node))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises a test that asks for ``mp_case``."""
    if "mp_case" in metafunc.fixturenames:
        metafunc.parametrize(_PARAMETERS, _session(metafunc.config).parameters())


class _Session:
    """What one pytest session knows: its plan, its run, its progress."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self.cases: dict[tuple[str, str, int, int], Case] = {}
        self._run: BenchmarkRun | None = None
        self._progress: Progress | None = None
        self._selected: list[Case] = []
        self._device: Device | None = None
        self._nvml: Any = None
        self._live_line = False
        self._problem: str | None = None
        self._finished: Run | None = None

    def parameters(self) -> list[Any]:
        """One pytest.param a case, in the order in which they run."""
        self._plan()
        return [
            pytest.param(
                *key,
                id=f"{case.workload}-{case.mode}-" + (f"seed{case.seed}" if case.trains else f"repeat{case.repeat}"),
                marks=[pytest.mark.benchmark(timer=ReplayClock(), group=case.workload), pytest.mark.mpscale],
            )
            for key, case in self.cases.items()
        ]

    @staticmethod
    def clock(item: pytest.Item) -> ReplayClock:
        """The clock that pytest-benchmark was given for this test."""
        for marker in item.iter_markers("benchmark"):
            timer = marker.kwargs.get("timer")
            if isinstance(timer, ReplayClock):
                return timer
        raise pytest.UsageError(f"{item.nodeid}: its benchmark marker sets a timer of its own, which mpscale needs")

    def run(self, case: Case) -> Outcome:
        """Runs a case, with progress on the terminal."""
        run, progress = self._open()
        progress.started(case)
        outcome = run.run(case)
        progress.finished(case, outcome.record)
        return outcome

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Notes what is left after -k, -m and the like, which is what progress counts."""
        chosen = [item for item in session.items if item.get_closest_marker("mpscale")]
        self._selected = [self.cases[tuple(item.callspec.params[name] for name in _PARAMETERS)] for item in chosen]  # type: ignore[attr-defined]
        if chosen and (self._config.getoption("numprocesses", None) or hasattr(self._config, "workerinput")):
            self._problem = (
                "mpscale times training steps, and cases side by side would disturb each other: run without -n"
            )
        on_gpu = self._device is not None and self._device.kind == "gpu"
        if on_gpu and self._config.getoption("mp_start_method") == "fork":
            self._problem = "--mp-start-method fork does not work on a GPU; use fresh or auto"
        if self._problem is not None:
            # Raised here and not where it is found: pytest reports it as wrong use only outside collectors.
            raise pytest.UsageError(self._problem)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Leaves out pytest's dot: the case's own line says more."""
        ours = "mpscale" in getattr(report, "keywords", {})
        if ours and self._progress is not None and report.when == "call" and self._config.get_verbosity() <= 0:
            return report.outcome, "", ""
        return None

    def pytest_sessionfinish(self) -> None:
        """Ends the run and writes its reports."""
        if self._run is None:
            return
        self._run.finish()
        if self._run.path is not None:
            from mpscale.report.build import rebuild

            try:
                self._finished = rebuild(self._run.path)
            except Exception as error:
                # The journal is whole whatever a report stumbles over, and the tests are done.
                self._write(f"mpscale: no report could be made of {self._run.path}: {error}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Mpscale's table, below pytest-benchmark's."""
        if self._finished is None:
            return
        from mpscale.report.tables import result_table

        path = self._finished.path
        with contextlib.suppress(ValueError):
            path = path.relative_to(Path.cwd())
        terminalreporter.section("mpscale")
        terminalreporter.write_line(result_table(self._finished))
        terminalreporter.write_line(f"\nrun: {path}\nreport: {path / 'report.md'}")

    def _plan(self) -> None:
        if self.cases:
            return
        from mpscale.harness.case import plan
        from mpscale.modes import default_modes
        from mpscale.telemetry.device import find_device
        from mpscale.telemetry.nvml import open_nvml

        config = self._config
        self._nvml = open_nvml()
        try:
            self._device = find_device(self._nvml, os.environ)
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
            shuffle_seed=int(time.time()),
        )
        self.cases = {(case.workload, case.mode, case.seed, case.repeat): case for case in cases}

    def _open(self) -> tuple[BenchmarkRun, Progress]:
        if self._run is None or self._progress is None:
            from mpscale.harness.run import BenchmarkRun, Options
            from mpscale.progress import Progress

            config, device = self._config, self._device
            assert device is not None  # _plan found it
            start_method = config.getoption("mp_start_method")
            if start_method == "auto":
                start_method = "fresh" if device.kind == "gpu" else "fork"
            how = Options(
                results=config.getoption("mp_results") or config.rootpath / "results",
                project=config.rootpath,
                start_method=start_method,
                timeout_s=config.getoption("mp_timeout"),
                asked={
                    "preset": config.getoption("mp_preset"),
                    "start_method": start_method,
                    "timeout_s": config.getoption("mp_timeout"),
                    **options.settings(config).to_json(),
                },
            )
            reporter = config.pluginmanager.getplugin("terminalreporter")
            live = reporter is not None and reporter.isatty
            self._progress = Progress(len(self._selected), self._write, live, time.monotonic)
            for workload, cases in Counter(case.workload for case in self._selected).items():
                self._progress.plan(workload, cases)
            self._run = BenchmarkRun(self._selected, device, self._nvml, how, self._progress.event)
        return self._run, self._progress

    def _write(self, text: str) -> None:
        """Writes past pytest's capture of standard output, on a line of its own."""
        capture = self._config.pluginmanager.getplugin("capturemanager")
        if self._config.get_verbosity() < 0:
            return
        terminal = self._config.get_terminal_writer()
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            if terminal.width_of_current_line and not self._live_line:
                terminal.line()
            terminal.write(text, flush=True)
        self._live_line = not text.endswith("\n")


def _session(config: pytest.Config) -> _Session:
    session = config.pluginmanager.getplugin("mpscale-session")
    assert isinstance(session, _Session)
    return session


def _fails(case: Case, record: Record) -> bool:
    """Whether the case's status is a failure of the test and not a result of the trial."""
    from mpscale.columns import FAILED

    if record["status"] in FAILED:
        return True
    extreme = bool(case.settings.dynamic_scale)
    return record["status"] in ("diverged", "stalled") and not (MODES[case.mode].on_trial or extreme)
