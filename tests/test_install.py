"""What an installation has: the base, the extra `bench`, the version, and what is said where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import mpscale
from mpscale import suite
from mpscale.cli import running
from mpscale.core import extras

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
IN_THE_BASE = {"packaging", "pytest", "rich"}
"""Keras requires two of these, and a test of the base needs the third."""

_BLOCK = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {gone!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


def names(requirements):
    return {re.match(r"[\w-]+", each)[0] for each in requirements}


def test_the_base_is_what_the_loss_scale_needs():
    assert names(PROJECT["dependencies"]) == {"tensorflow", "keras", "numpy"}


def test_the_extra_bench_is_described_once():
    assert names(PROJECT["optional-dependencies"]["bench"]) == set(extras.BENCH.values())
    (base,) = (each for each in SETTINGS["tool"]["importlinter"]["contracts"] if each["id"] == "base")
    assert set(base["forbidden_modules"]) == extras.BENCH.keys()


def test_there_is_one_version():
    assert SETTINGS["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mpscale.__version__"}
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mpscale.__version__
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]


@pytest.fixture
def in_the_base(tmp_path):
    """Run Python in a folder with a test, as if nothing but the base and pytest were installed."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_BLOCK.format(gone=extras.BENCH.keys() - IN_THE_BASE))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pytest.ini").touch()
    (tmp_path / "project" / "test_any.py").write_text("def test_any():\n    assert True\n")

    def run(*arguments):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environ = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-P", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path / "project", env=kept | environ, capture_output=True, text=True, timeout=60
        )

    return run


RUN = max((ROOT / "results" / "reference").glob("*/run.json")).parent
PYTEST = ("-m", "pytest", "-p", "mpscale.pytest_plugin", "-p", "no:cacheprovider", "-q")
MISSING = r"not installed: .*orjson.*pytest-benchmark.*pip install 'mpscale\[bench\]'"


def test_tests_of_any_project_run_without_the_extra(in_the_base):
    done = in_the_base(*PYTEST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((*PYTEST, "--pyargs", "mpscale.suite"), pytest.ExitCode.USAGE_ERROR),
        ((*PYTEST, "--benchmark-only"), pytest.ExitCode.USAGE_ERROR),
        (("-m", "mpscale.cli", "run", "--mp-seeds", "1"), 2),
        (("-m", "mpscale.cli", "workloads"), 2),
        (("-c", f"import mpscale; mpscale.read_run('{RUN}')"), 1),
    ],
)
def test_what_needs_the_extra_says_so(in_the_base, arguments, code):
    done = in_the_base(*arguments)
    assert done.returncode == code
    assert re.search(MISSING, done.stderr + done.stdout), done.stderr + done.stdout
    assert "-m" not in arguments or "Traceback" not in done.stderr


def test_what_needs_only_the_base_works_without_the_extra(in_the_base):
    code = "import mpscale; print(mpscale.__version__, len(mpscale.MODES), mpscale.Workload, mpscale.Data)"
    done = in_the_base("-c", code)
    assert done.returncode == 0, done.stderr
    assert in_the_base("-m", "mpscale.cli", "--help").returncode == 0


def test_another_module_that_is_missing_keeps_its_own_message():
    assert extras.why_not_imported(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    # Broken, not missing: the cure would be another.
    assert extras.why_not_imported(ModuleNotFoundError("No module named 'scipy.x'", name="scipy.x")) is None


def test_mpscale_run_takes_neither_settings_nor_tests_from_the_folder(tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("raise RuntimeError\n")
    (tmp_path / "test_mine.py").write_text("def test_mine():\n    assert False\n")
    options = ["--mp-workloads=diabetes-sum", "--mp-modes=fp32,mixed-static", "--mp-seeds=2", "--collect-only", "-q"]
    line = running.command(options, tmp_path)
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"::test_training\[diabetes-sum-", done.stdout)) == 4
    assert "test_mine" not in done.stdout
    # The command itself ends as that process.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", lambda program, given: ran.append((program, given)))
    ran = []
    running.run(type("Options", (), {"unknown": options}))
    assert ran == [(sys.executable, line)]
    assert suite.__file__ in line
