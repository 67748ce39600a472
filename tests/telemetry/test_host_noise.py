"""Use of the processors by others while a case was timed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpscale.core.columns import Topic, measured_columns
from mpscale.core.reason import Code
from mpscale.telemetry.host import HostNoise, clock_mhz, cpu_times, is_busy

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_own_time_is_not_counted_as_others() -> None:
    """This process works: for a watch of itself that is its own time, for a watch of an idle worker it is others'."""
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as idle:
        busy_worker, idle_worker = HostNoise(os.getpid()), HostNoise(idle.pid)
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


def test_reasons_if_nothing_was_timed() -> None:
    noise = HostNoise(os.getpid())
    found = noise.columns()
    assert found.unavailable["host_other_cpu_share"].code is Code.NOT_REACHED
    noise.mark("timing-start")
    noise.mark("timing-end")
    assert noise.columns().unavailable["host_steal_share"].code is Code.WINDOW_TOO_SHORT


def test_ended_process_has_no_times() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert cpu_times(done.pid) is None


def test_times_only_grow() -> None:
    before = cpu_times(os.getpid())
    spin(0.1)
    after = cpu_times(os.getpid())
    assert before is not None and after is not None
    assert after.own_s >= before.own_s
    assert after.total_s > before.total_s
    assert after.busy_s <= after.total_s


def test_clock_is_plausible_or_unknown() -> None:
    clock = clock_mhz()
    assert clock is None or 100 < clock < 10_000


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(0.4, 1, False), (0.6, 1, True), (2.0, 4, False), (2.1, 4, True), (None, 4, False)]
)
def test_busy_is_more_than_half_of_the_cores(load: float | None, cores: int, busy: bool) -> None:
    assert is_busy(load, cores) is busy
