"""The watch over a process without a GPU: the host's memory, and reasons for everything else."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpscale.core.columns import Source, measured_columns
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.telemetry.client import NoDriver
from mpscale.telemetry.watch import HOST_COLUMN, CaseWatch, WorkerFacts

GPU = Device("gpu", "NVIDIA H200", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (9, 0), 143_771.0)
CPU = Device("cpu", "Intel")
NO_DRIVER = NoDriver(Reason(Code.NO_LIBRARY, "no driver"))
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
@pytest.mark.parametrize(("device", "code"), [(CPU, Code.NO_GPU), (GPU, Code.NO_LIBRARY)])
def test_host_peak_survives_the_process(device: Device, code: Code, child: subprocess.Popen[bytes]) -> None:
    watch = CaseWatch(NO_DRIVER, device)
    watch.start(child.pid, time.monotonic())
    watch.mark("idle")
    child.kill()
    child.wait()
    found = watch.stop(WorkerFacts(), None).findings
    assert set(found.values) <= {HOST_COLUMN, "host_load"}
    assert found.values[HOST_COLUMN] > 1
    assert found.unavailable[PEAK].code is Code.NO_LIBRARY
    assert {found.unavailable[name].code for name in measured_columns(source=Source.MONITOR) if name != PEAK} == {code}
    watch.close()


def test_reasons_if_the_process_has_ended(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    watch = CaseWatch(NO_DRIVER, CPU)
    watch.start(child.pid, time.monotonic())
    watch.mark("idle")
    found = watch.stop(WorkerFacts(), None).findings
    assert HOST_COLUMN not in found.values
    assert found.unavailable[HOST_COLUMN].code is Code.HOST_SILENT


def test_never_started() -> None:
    found = CaseWatch(NO_DRIVER, CPU).stop(WorkerFacts(), None).findings
    assert found.values == {}
    assert found.unavailable[HOST_COLUMN].code is Code.NOT_REACHED


def test_the_session_imports_neither_nvml_nor_tensorflow() -> None:
    code = (
        "import sys, mpscale.telemetry.watch;"
        "print([name for name in ('tensorflow', 'keras', 'pynvml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
