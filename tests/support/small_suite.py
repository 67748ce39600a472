"""Other people's folders: a test suite, workloads of its own, and pytest run there."""

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
QUICK = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
"""Options for a session of its own: Hypothesis takes a second, as long as all the rest of pytest's start and end."""
ASCII = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Environment variables that make Python take terminal and file system for ASCII."""


def write(folder: Path, **files: str) -> Path:
    """Write files, with .py appended to each name and three underscores standing for a slash."""
    for name, text in files.items():
        path = folder / f"{name.replace('___', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "pytest.ini").touch()
    return folder


def without_page(**variables: str | None) -> dict[str, str | None]:
    """Return the variables with those that keep a session from drawing the page of its run."""
    paths = [str(Path(__file__).parents[1]), variables.get("PYTHONPATH") or os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(path for path in paths if path)
    return {**variables, "PYTHONPATH": path, "PYTEST_ADDOPTS": "-p support.no_page"}


def command(*options: object) -> list[str]:
    """Return a command line that acts like ``pytest``: the working directory is not on Python's path."""
    return [sys.executable, "-P", "-m", "pytest", *QUICK, *map(str, options)]


def environment(**variables: str | None) -> dict[str, str]:
    """Return the environment of this process, without what pytest has set in it; None takes a variable away."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {name: value for name, value in {**own, **variables}.items() if value is not None}


def pytest_in(folder: Path, *options: object, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run pytest in ``folder``; ``stdout`` of the result holds both outputs."""
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
    """Run a session in this process that starts no worker and looks for no GPU; return its exit code and output.

    Not with pytester, which forgets modules that cannot be imported a second time, such as NumPy's.

    Args:
        folder: modules imported from here are forgotten afterwards.
        options: for pytest.
    """
    before = list(sys.path)
    # Without these, Hypothesis is imported for its summary, and pytest collects garbage five times at the end, which
    # takes seconds in a process with many TensorFlow graphs.
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
    """Make this process import the modules in ``folder`` again when it next needs them."""
    gone = []
    for name, module in list(sys.modules.items()):
        # Not by getattr, which makes some modules import others.
        places = [vars(module).get("__file__"), *vars(module).get("__path__", ())]
        if any(str(place).startswith(f"{folder}/") for place in places):
            gone.append(name)
    # Not in the loop above: the path of a package without __init__.py looks up its parent.
    for name in gone:
        del sys.modules[name]
