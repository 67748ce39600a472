"""The watch over a process, where there is no GPU: the host's memory, and reasons for all else."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscale.core.device import Device
from mpscale.telemetry.client import NoDriver
from mpscale.telemetry.watch import GPU_COLUMNS, HOST_COLUMN, CaseWatch, Told

GPU = Device("gpu", "NVIDIA H200", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (9, 0), 143_771.0)
CPU = Device("cpu", "Intel")
PEAK = "gpu_memory_nvml_peak_mib"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that waits to be killed."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("device", "words"), [(CPU, "no GPU: no driver"), (GPU, "no driver")])
def test_peak_of_the_host_outlives_the_process(device: Device, words: str, child: subprocess.Popen[bytes]) -> None:
    watch = CaseWatch(NoDriver("no driver"), device)
    watch.start(child.pid, time.monotonic())
    watch.mark("idle")
    child.kill()
    child.wait()
    found = watch.stop(Told(), None).findings
    assert set(found.values) <= {HOST_COLUMN, "host_load"}
    assert found.values[HOST_COLUMN] > 1
    assert words in found.unavailable[PEAK]
    assert set(GPU_COLUMNS) <= set(found.unavailable)
    watch.close()


def test_process_that_is_gone_leaves_reasons(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    watch = CaseWatch(NoDriver("no driver"), CPU)
    watch.start(child.pid, time.monotonic())
    watch.mark("idle")
    found = watch.stop(Told(), None).findings
    assert HOST_COLUMN not in found.values
    assert "ended before" in found.unavailable[HOST_COLUMN]


def test_never_started() -> None:
    found = CaseWatch(NoDriver("no driver"), CPU).stop(Told(), None).findings
    assert found.values == {}
    assert found.unavailable[HOST_COLUMN] == "no process was watched"


def test_importing_telemetry_imports_neither_nvml_nor_tensorflow() -> None:
    code = (
        "import sys, mpscale.telemetry.fingerprint, mpscale.telemetry.watch, mpscale.worker.device;"
        "print([name for name in ('tensorflow', 'keras', 'pynvml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
