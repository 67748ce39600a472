"""The host, against real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
