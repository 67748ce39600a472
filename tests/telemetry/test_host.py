"""The machine of a run, against real processes and repositories."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mpscale.core.columns import Topic, measured_columns
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.telemetry import host
from mpscale.telemetry.client import NoDriver

CPU = Device("cpu", "Intel(R) Xeon(R) Processor", memory_mib=1024.0)

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

HOLDS_64_MIB_THEN_LETS_GO = """
import sys
block = bytearray(64 * 2**20)
block[::4096] = b"x" * len(block[::4096])
del block
print("done", flush=True)
sys.stdin.read()
"""


@linux
def test_peak_survives_the_release_of_memory_but_not_the_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS_64_MIB_THEN_LETS_GO], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        peak = host.peak_resident_mib(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = host.peak_resident_mib(child.pid)
    assert peak is not None
    assert 64 < peak < 200
    assert zombie is None
    assert host.peak_resident_mib(child.pid) is None


def test_peak_of_no_process_is_unknown() -> None:
    assert host.peak_resident_mib(2**31 - 1) is None


@linux
def test_memory_and_load() -> None:
    memory, load = host.memory_mib(), host.load_average()
    assert memory is not None
    assert memory * 2**20 == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), rel=0.01)
    assert load is not None
    assert len(load) == 3


@linux
def test_cpu_facts() -> None:
    facts = host.cpu_facts()
    assert facts["model"]
    assert facts["logical_cores"] == len(os.sched_getaffinity(0))
    assert facts["physical_cores"] is None or facts["physical_cores"] >= 1
    in_cpuinfo = set(Path("/proc/cpuinfo").read_text().split())
    if facts["flags"] is not None:
        assert facts["flags"] == [flag for flag in host.PRECISION_FLAGS if flag in in_cpuinfo]


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@linux
def test_own_time_is_not_counted_as_others() -> None:
    """This process works: that is its own time when it is watched, and others' time when an idle worker is."""
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as idle:
        busy_worker, idle_worker = host.HostNoise(os.getpid()), host.HostNoise(idle.pid)
        for noise in (busy_worker, idle_worker):
            noise.mark("timing-start")
        spin(1.0)
        for noise in (busy_worker, idle_worker):
            noise.mark("timing-end")
        idle.kill()
    own, others = (noise.columns().values["host_other_cpu_share"] for noise in (busy_worker, idle_worker))
    assert others > own
    assert others - own > 0.1 / (os.cpu_count() or 1)
    found = busy_worker.columns()
    assert set(found.values) | set(found.unavailable) == set(measured_columns(Topic.HOST_NOISE))


@linux
def test_reasons_if_nothing_was_timed() -> None:
    noise = host.HostNoise(os.getpid())
    found = noise.columns()
    assert found.unavailable["host_other_cpu_share"].code is Code.NOT_REACHED
    noise.mark("timing-start")
    noise.mark("timing-end")
    assert noise.columns().unavailable["host_steal_share"].code is Code.WINDOW_TOO_SHORT


@linux
def test_ended_process_has_no_times() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert host.cpu_times(done.pid) is None


@linux
def test_times_only_grow() -> None:
    before = host.cpu_times(os.getpid())
    spin(0.1)
    after = host.cpu_times(os.getpid())
    assert before is not None and after is not None
    assert after.own_s >= before.own_s
    assert after.total_s > before.total_s
    assert after.busy_s <= after.total_s


@linux
def test_clock_is_plausible_or_unknown() -> None:
    clock = host.clock_mhz()
    assert clock is None or 100 < clock < 10_000


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(0.4, 1, False), (0.6, 1, True), (2.0, 4, False), (2.1, 4, True), (None, 4, False)]
)
def test_busy_is_more_than_half_of_the_cores(load: float | None, cores: int, busy: bool) -> None:
    assert host.is_busy(load, cores) is busy


def look(directory: Path) -> dict[str, Any]:
    return host.environment(CPU, NoDriver(Reason(Code.NO_LIBRARY, "no driver")), directory)


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
    assert host.run_slug(Device("cpu", name)) == slug
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert len(slug) <= 40
