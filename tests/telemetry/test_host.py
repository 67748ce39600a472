"""The host, against real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpscale.core.columns import Topic, measured_columns
from mpscale.core.reason import Code
from mpscale.telemetry import host

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


# What else the processors did while a case was timed.


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@linux
def test_own_time_is_not_counted_as_others() -> None:
    """This process works: for a watch of itself that is its own time, for a watch of an idle worker it is others'."""
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
