"""Folders of other people's, with a suite and workloads of their own, and pytest called in them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpscale.core.reason import Code, Reason
from mpscale.telemetry import client as driver

SUITE = "def test_training(mp_case, benchmark):\n    mp_case.measure(benchmark)\n"
WORKLOAD = """
import mpscale
from mpscale.workloads import registry

w = mpscale.workload("mine", data=registry.get("mnist1d-mlp").data, optimizer=lambda: None)(lambda: None)
"""
ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A terminal, and a file system, that Python takes for ASCII."""


def write(folder: Path, **files: str) -> Path:
    """Writes files, whose names have three underscores for slashes, with .py behind each."""
    for name, text in files.items():
        path = folder / f"{name.replace('___', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "pytest.ini").touch()
    return folder


def command(*options: object) -> list[str]:
    """Pytest as its own command has it: the folder of the call is not on Python's path."""
    return [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *map(str, options)]


def environment(**variables: str) -> dict[str, str]:
    """This process's, without what pytest has set in it."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}, **variables}


def pytest_in(folder: Path, *options: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """What pytest says when it is called in ``folder``; both outputs are in ``stdout``."""
    return subprocess.run(
        command(*options),
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="latin-1",
        timeout=300,
    )


def pytest_here(folder: Path, *options: object) -> tuple[int, str]:
    """Exit code and output of a session within this process: one that starts no worker, and asks for no GPU.

    Not by pytester, which has modules forgotten that cannot be imported a second time, NumPy's among them.

    Args:
        folder: where the modules are that the session imports; they are forgotten.
        options: for pytest.
    """
    before = list(sys.path)
    # Hypothesis would be imported for its summary; and pytest would collect garbage five times in the end, which takes
    # seconds in a process with many graphs of TensorFlow.
    arguments = [
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:unraisableexception",
        "--mp-modes=fp32",
        "--mp-seeds=1",
        *map(str, options),
    ]
    output = io.StringIO()
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            patch.setattr(driver, "open_driver", lambda: driver.NoDriver(Reason(Code.NO_LIBRARY, "a test")))
            code = pytest.main(arguments)
    finally:
        sys.path[:] = before
        forget(folder)
    return int(code), output.getvalue()


def forget(folder: Path) -> None:
    """Has this process import the modules in ``folder`` anew when it next needs them."""
    gone = []
    for name, module in list(sys.modules.items()):
        # Past __getattr__, upon which some modules import others.
        places = [vars(module).get("__file__"), *vars(module).get("__path__", ())]
        if any(str(place).startswith(f"{folder}/") for place in places):
            gone.append(name)
    # Not while looking: a package without __init__.py asks for its parent.
    for name in gone:
        del sys.modules[name]
