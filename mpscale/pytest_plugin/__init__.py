"""The pytest plug-in: options, parametrisation and the fixture ``mp_case``, for any test suite.

It is registered by entry point, so every pytest run in an environment with mpscale loads it. Until a test asks for
``mp_case`` it does, and imports, almost nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from mpscale.core import extras
from mpscale.core.columns import FAILED
from mpscale.core.mode import MODES
from mpscale.pytest_plugin import handed, options, origin, project, resume
from mpscale.pytest_plugin.plan import CASE, CLOCK, NO_XDIST, ReplayClock
from mpscale.pytest_plugin.session import Session
from mpscale.terminal.streams import visible

if TYPE_CHECKING:
    from mpscale.core.case import Case
    from mpscale.core.record import Record
    from mpscale.harness.supervisor import Outcome


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, all under ``--mp-``."""
    group = parser.getgroup("mpscale", "mpscale: compare mixed precision with float32")
    resume.add_every_option(group.addoption)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, None, None]:
    """Note all arguments, and say so if pytest-benchmark is missing: pytest only says that it knows no such option."""
    early_config.stash[resume.ARGUMENTS] = list(args)
    yield
    lacking = "--benchmark-only" in args and extras.missing()
    # Another plug-in, or a conftest.py that is loaded now, may have an option of that name.
    if lacking and not hasattr(parser.parse_known_args(args), "benchmark_only"):
        raise pytest.UsageError(f"--benchmark-only: {extras.lacks(lacking)}")


def pytest_configure(config: pytest.Config) -> None:
    """Take the options of the project, check the names of modes and workloads, and register the session's hooks."""
    handed.take_parcel()
    project.take(config)
    resumption = resume.Resumption.of(config)
    handed.take_data(config)
    options.named_modes(config)
    # Those of the project are imported once a test asks for a case: most sessions of a project do not.
    if config.getoption("mp_workloads") is not None and not origin.by_project(config, "--mp-workloads"):
        options.workloads(config)
    config.pluginmanager.register(Session(config, resumption), "mpscale-session")


class MeasuredCase:
    """The value of the fixture ``mp_case``: one case, and a way to run it."""

    def __init__(self, case: Case, session: Session, clock: ReplayClock) -> None:
        self.case = case
        self._session, self._clock = session, clock

    def measure(self, benchmark: Any) -> Record:
        """Run the case in a process of its own and pass its step times to pytest-benchmark.

        If two tests ask for the same case, say one for its speed and one for its accuracy, it runs once.

        Args:
            benchmark: pytest-benchmark's fixture.

        Returns:
            The record of the case, which is in the journal even if the test is skipped or fails here.
        """
        try:
            outcome = self._session.run(self.case)
        except BaseException:  # Ctrl-C above all
            _use_without_figure(benchmark)
            raise
        self._session.when_replaced(self.case, partial(self._replace, benchmark))
        record = outcome.record
        status, reason = record["status"], record["status_reason"]
        if status == "unsupported":
            pytest.skip(visible(reason))
        if _fails(self.case, record):
            _use_without_figure(benchmark)
            tail = f"\nIts output ends with:\n{record['output_tail']}" if record["output_tail"] else ""
            text = f"{self.case.id}: {status}: {reason}{tail}"
            pytest.fail(self._session.output.printable(visible(text)), pytrace=False)
        benchmark.extra_info.update(_extra_info(record))
        self._clock.load(outcome.step_s)
        benchmark.pedantic(lambda: None, rounds=max(len(outcome.step_s), 1))
        return record

    def _replace(self, benchmark: Any, outcome: Outcome) -> str | None:
        """Give pytest-benchmark the step times of another attempt, made after the test; return why that failed."""
        record, failed = outcome.record, _fails(self.case, outcome.record)
        if benchmark.stats is not None:  # it is None if pytest-benchmark was disabled, or the test had failed
            # Without times it leaves the test out of its table, and with an error out of its files.
            benchmark.has_error = failed
            benchmark.stats.stats = times = type(benchmark.stats.stats)()
            for seconds in [] if failed else outcome.step_s or [0.0]:
                times.update(seconds)
            benchmark.extra_info.clear()
            benchmark.extra_info.update(_extra_info(record))
        if not failed:
            return None
        return f"{self.case.id}, measured again without XLA: {record['status']}: {record['status_reason']}"


def _extra_info(record: Record) -> dict[str, Any]:
    return {name: record[name] for name in _EXTRA_INFO if record[name] is not None}


def _use_without_figure(benchmark: Any) -> None:
    """Use the fixture: otherwise pytest-benchmark warns that the test does not."""
    benchmark.disabled = True
    benchmark.pedantic(lambda: None)


_EXTRA_INFO = (
    "case_id", "status", "workload", "mode", "swept_batch", "swept_scale", "swept_replicas", "seed",
    "repeat", "device_name", "strategy", "replicas",
    "jit", "xla_refused", "batch_size", "steps_per_call", "dispatch_share", "attempted_steps", "overflow_steps",
    "skipped_steps", "timed_overflow_steps", "loss_scale_final", "gpu_memory_nvml_peak_mib",
    "host_memory_peak_mib", "final_accuracy", "metric_name", "metric_value", "synthetic_inputs", "has_metric",
    "examples_per_s",
)  # fmt: skip


@pytest.fixture
def mp_variant() -> str:
    """Batch, loss scale and replicas of the case in a sweep, such as `batch64-scale8`; else empty."""
    return ""


@pytest.fixture
def mp_case(
    request: pytest.FixtureRequest, workload: str, mode: str, seed: int, repeat: int, mp_variant: str
) -> MeasuredCase:
    """One case of the run. A test that asks for it is parametrised over all cases."""
    # pytest demands that the parameters are requested; the case itself is in the stash of the test.
    if hasattr(request.config, "workerinput"):
        pytest.fail(NO_XDIST)
    return MeasuredCase(request.node.stash[CASE], _session(request.config), request.node.stash[CLOCK])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test that asks for ``mp_case``."""
    if "mp_case" in metafunc.fixturenames:
        metafunc.parametrize(*_session(metafunc.config).parameters())


def _session(config: pytest.Config) -> Session:
    session = config.pluginmanager.getplugin("mpscale-session")
    assert isinstance(session, Session)
    return session


def _fails(case: Case, record: Record) -> bool:
    """Return whether a case fails its test. A mode on trial may diverge: that is a result."""
    if record["status"] in FAILED:
        return True
    mode = MODES[case.mode]
    extreme = bool(mode.scale_arguments(case.settings))
    return record["status"] in ("diverged", "stalled") and not (mode.on_trial or extreme)
