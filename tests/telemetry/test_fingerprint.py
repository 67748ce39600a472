"""The environment of a run."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.client import NoDriver
from mpscale.telemetry.fingerprint import environment, run_slug

CPU = Device("cpu", "Intel(R) Xeon(R) Processor", memory_mib=1024.0)


def look(directory: Path) -> dict[str, Any]:
    return environment(CPU, NoDriver(Reason(Code.NO_LIBRARY, "no driver")), directory)


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, env=variables, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_survives_json(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["numpy"] == metadata.version("numpy")
    assert found["python"]["version"] == platform.python_version()
    assert Device.from_json(found["device"]) == CPU
    assert (found["nvidia_driver"], found["cuda_driver"]) == (None, None)


def test_nvidia_wheels_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "site" / "nvidia_cudnn_cu12-9.3.0.75.dist-info"
    wheel.mkdir(parents=True)
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cudnn-cu12\nVersion: 9.3.0.75\n")
    (tmp_path / "site" / "broken-1.dist-info").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    packages = look(tmp_path)["packages"]
    assert packages["nvidia-cudnn-cu12"] == "9.3.0.75"
    assert packages["tensorflow"] is None


def test_only_listed_variables_and_no_host_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_GPU_ALLOCATOR", "cuda_malloc_async")
    monkeypatch.setenv("TF_SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/hunter2")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    found = look(tmp_path)
    assert found["variables"]["TF_GPU_ALLOCATOR"] == "cuda_malloc_async"
    assert "XLA_FLAGS" not in found["variables"]
    assert "hunter2" not in json.dumps(found)
    assert str(tmp_path) not in json.dumps(found)
    assert not {"node", "host", "hostname"} & set(found)


def test_git_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a git hook
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    before = look(tmp_path)["git"]
    assert (before["commit"], before["dirty"]) == (None, True)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert look(tmp_path)["git"] == {"commit": commit, "dirty": False}
    digests = []
    for text in ("2\n", "3\n", "2\n"):
        (tmp_path / "code.py").write_text(text)
        found = look(tmp_path)["git"]
        assert (found["commit"], found["dirty"]) == (commit, True)
        digests.append(found["changes_digest"])
    assert digests[0] == digests[2] != digests[1]


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(tmp_path)["git"] is None
    assert look(tmp_path / "missing")["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert look(tmp_path)["git"] is None


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon-processor"),
        ("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", "intel-core-i7-8650u-cpu-1-90ghz"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-64-core-processor"),
        ("  --..//Ω  ", "cpu"),
        ("", "cpu"),
        ("x" * 39 + " yz", "x" * 39),
        ("../../etc", "etc"),
    ],
)
def test_slug(name: str, slug: str) -> None:
    assert run_slug(Device("cpu", name)) == slug
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert len(slug) <= 40
