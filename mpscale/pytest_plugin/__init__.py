"""The pytest plug-in: options, parametrisation and the fixture ``mp_case``, for suites here and elsewhere.

Registered by entry point, so it is loaded by every pytest run of an environment that mpscale is installed in. Until a
test asks for ``mp_case`` it imports and does next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mpscale.core.mode import MODES
from mpscale.pytest_plugin import options
from mpscale.pytest_plugin.session import CLOCK, PARAMETERS, ReplayClock, Session

if TYPE_CHECKING:
    from mpscale.core.case import Case
    from mpscale.core.record import Record


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, all under ``--mp-``."""
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Checks the names that were given, and makes the session's own object."""
    if config.getoption("mp_modes") is not None:
        options.named_modes(config)
    if config.getoption("mp_workloads") is not None:
        options.workloads(config)
    config.pluginmanager.register(Session(config), "mpscale-session")


class MeasuredCase:
    """What the fixture ``mp_case`` gives to a test: one case, and a way to run it."""

    def __init__(self, case: Case, session: Session, clock: ReplayClock) -> None:
        self.case = case
        self._session, self._clock = session, clock

    def measure(self, benchmark: Any) -> Record:
        """Runs the case in a process of its own and hands its step times to pytest-benchmark.

        Two tests may ask for the same case, for its speed, say, and for its accuracy: it is measured once.

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
            # Used, without a figure: pytest-benchmark would warn of a fixture that was not.
            benchmark.disabled = True
            benchmark.pedantic(lambda: None)
            tail = f"\nIts output ends with:\n{record['output_tail']}" if record["output_tail"] else ""
            pytest.fail(self._session.printable(f"{self.case.id}: {status}: {reason}{tail}"), pytrace=False)
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
    if hasattr(request.config, "workerinput"):
        pytest.fail("mpscale times training steps, and cases side by side would disturb each other: run without -n")
    return MeasuredCase(session.cases[workload, mode, seed, repeat], session, request.node.stash[CLOCK])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises a test that asks for ``mp_case``."""
    if "mp_case" in metafunc.fixturenames:
        metafunc.parametrize(PARAMETERS, _session(metafunc.config).parameters())


def _session(config: pytest.Config) -> Session:
    session = config.pluginmanager.getplugin("mpscale-session")
    assert isinstance(session, Session)
    return session


def _fails(case: Case, record: Record) -> bool:
    """Whether the case's status is a failure of the test and not a result of the trial."""
    from mpscale.core.columns import FAILED

    if record["status"] in FAILED:
        return True
    mode = MODES[case.mode]
    extreme = bool(mode.scale_arguments(case.settings))
    return record["status"] in ("diverged", "stalled") and not (mode.on_trial or extreme)
