"""Whole runs: pytest in its own process, on a suite outside the repository."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mpscale

HERE = Path(__file__).parent

SUITE = '''
def test_training(mp_case, benchmark):
    """What somebody else's suite looks like."""
    mp_case.measure(benchmark)
'''


@pytest.fixture(scope="session")
def run_suite(tmp_path_factory):
    """Run pytest with options on a fresh suite; return its output, its exit code, and the run it made, if any."""
    # The user's own cache is used: generating mnist1d takes longer than a test.

    def run(*options, timeout=240, suite=SUITE, pyproject="", environ=None):
        folder = tmp_path_factory.mktemp("suite")
        (folder / "test_suite.py").write_text(suite)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "pyproject.toml").write_text(pyproject)
        (folder / "suite_workloads.py").write_text((HERE.parent / "support" / "suite_workloads.py").read_text())
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        variables |= {"SUITE_LOG": str(folder / "cases.log"), "SUITE_SLOW_CASES": "0", **(environ or {})}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        runs = sorted((folder / "results" / "runs").glob("*"))
        return SimpleNamespace(
            code=done.returncode,
            output=done.stdout + done.stderr,
            folder=folder,
            path=runs[-1] if runs else None,
            run=mpscale.read_run(runs[-1]) if runs else None,
        )

    return run


QUICK = ("--mp-timing", "0.05")
