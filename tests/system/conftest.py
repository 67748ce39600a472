"""Whole runs: pytest in its own process, on a suite outside the repository."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import small_suite, suite_workloads
from support.gpu_machine import Machine

import mpscale


@pytest.fixture(scope="session")
def write_suite():
    """Write somebody else's suite into a folder, with workloads of its own."""

    def write_suite(folder, suite=small_suite.SUITE):
        return small_suite.write(folder, test_suite=suite, suite_workloads=Path(suite_workloads.__file__).read_text())

    return write_suite


@pytest.fixture(scope="session")
def run_suite(tmp_path_factory, write_suite):
    """Run pytest with options on a fresh suite; return its output, its exit code, and the run it made, if any.

    Without ``page``, the page of the run is not drawn.
    """
    # The user's own cache is used: generating mnist1d takes longer than a test.

    def run(*options, suite=small_suite.SUITE, slow_cases=0, page=True, **more):
        folder = write_suite(tmp_path_factory.mktemp("suite"), suite)
        variables = {"SUITE_LOG": str(folder / "cases.log"), "SUITE_SLOW_CASES": str(slow_cases), **more}
        variables = variables if page else small_suite.without_page(**variables)
        done = small_suite.pytest_in(folder, *options, **variables)
        runs = sorted((folder / "results" / "runs").glob("*"))
        return SimpleNamespace(
            code=done.returncode,
            output=done.stdout,
            folder=folder,
            path=runs[-1] if runs else None,
            run=mpscale.read_run(runs[-1]) if runs else None,
        )

    return run


@pytest.fixture
def interruptible():
    """Restore SIGINT: what a shell starts in the background ignores it, and so would all that these tests start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def machine(tmp_path, stand_in_nvml, write_suite):
    """A machine with one GPU."""
    return Machine(write_suite(tmp_path), stand_in_nvml)
