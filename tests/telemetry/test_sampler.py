"""The memory sampler, against real child processes and an NVML written by hand."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpscale.telemetry.device import Device
from mpscale.telemetry.nvml import NoNvml
from mpscale.telemetry.sampler import GPU_COLUMN, HOST_COLUMN, MemorySampler

GPU = Device("gpu", "NVIDIA H200", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", (9, 0), 143_771.0)
CPU = Device("cpu", "Intel")
THREAD = "mpscale-memory-sampler"

Answer = tuple[float | None, str | None]


class FakeNvml:
    """Answers with whatever ``answer`` returns at that moment."""

    def __init__(self, answer: Callable[[], Answer]) -> None:
        self.answer = answer

    def process_memory_mib(self, uuid: str, pid: int) -> Answer:
        assert uuid == GPU.uuid
        return self.answer()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that waits to be killed."""
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def sampler_threads() -> int:
    return sum(thread.name == THREAD for thread in threading.enumerate())


def sampler(answer: Callable[[], Answer], device: Device = GPU) -> MemorySampler:
    nvml: Any = FakeNvml(answer)
    return MemorySampler(nvml, device)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("device", "nvml", "words"),
    [
        (CPU, NoNvml("no driver"), "CPU"),
        (CPU, FakeNvml(lambda: (1.0, None)), "CPU"),
        (GPU, NoNvml("no driver"), "no driver"),
        (Device("gpu", "nameless"), FakeNvml(lambda: (1.0, None)), "UUID"),
    ],
)
def test_without_gpu_or_nvml_no_thread_and_the_host_peak(
    device: Device, nvml: Any, words: str, child: subprocess.Popen[bytes]
) -> None:
    watch = MemorySampler(nvml, device)
    watch.start(child.pid)
    watch.mark("idle")
    assert sampler_threads() == 0
    child.kill()
    child.wait()
    found = watch.stop()
    assert list(found["values"]) == [HOST_COLUMN]
    assert found["values"][HOST_COLUMN] > 1
    assert list(found["unavailable"]) == [GPU_COLUMN]
    assert words in found["unavailable"][GPU_COLUMN]


def test_a_process_that_is_gone_leaves_reasons(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    watch = MemorySampler(NoNvml("no driver"), CPU)
    watch.start(child.pid)
    watch.mark("idle")
    found = watch.stop()
    assert found["values"] == {}
    assert "ended before" in found["unavailable"][HOST_COLUMN]


def test_never_started() -> None:
    found = MemorySampler(NoNvml("no driver"), CPU).stop()
    assert found["values"] == {}
    assert set(found["unavailable"].values()) == {"no process was watched"}


def test_a_mark_catches_a_peak_that_lasts_only_for_it(child: subprocess.Popen[bytes]) -> None:
    used: list[Answer] = [(100.0, None)]
    watch = sampler(lambda: used[0])
    watch.start(child.pid)
    watch.mark("model built")
    used[0] = (900.0, None)
    watch.mark("warm-up done")
    used[0] = (None, "gone")
    watch.mark("done")
    found = watch.stop()
    assert found["values"][GPU_COLUMN] == 900.0
    assert GPU_COLUMN not in found["unavailable"]
    assert sampler_threads() == 0


def test_samples_between_marks(child: subprocess.Popen[bytes]) -> None:
    peaks = iter([10.0, 20.0, 70.0, 30.0])
    sampled = threading.Event()

    def answer() -> Answer:
        used = next(peaks, None)
        if used is None:
            sampled.set()
        return used or 5.0, None

    watch = sampler(answer)
    watch.start(child.pid)
    assert sampled.wait(5)
    assert watch.stop()["values"][GPU_COLUMN] == 70.0


def test_reasons_are_kept_once_each(child: subprocess.Popen[bytes]) -> None:
    answers: Iterator[Answer] = iter([(None, "not listed"), (None, "no figure"), (None, "no figure")])
    watch = sampler(lambda: next(answers, (None, "not listed")))
    watch.start(child.pid)
    for phase in "abcd":
        watch.mark(phase)
    assert watch.stop()["unavailable"][GPU_COLUMN] == "not listed; no figure"


def test_an_exception_is_a_reason_and_sampling_goes_on(child: subprocess.Popen[bytes]) -> None:
    broken = [True]

    def answer() -> Answer:
        if broken[0]:
            raise OSError("bus error")
        return 50.0, None

    watch = sampler(answer)
    watch.start(child.pid)
    watch.mark("idle")
    first = watch.stop()
    assert "bus error" in first["unavailable"][GPU_COLUMN]
    watch.start(child.pid)
    broken[0] = False
    watch.mark("idle")
    assert watch.stop()["values"][GPU_COLUMN] == 50.0


def test_a_hanging_nvml_hangs_nothing_and_leaves_no_figure(child: subprocess.Popen[bytes]) -> None:
    hang, wake = threading.Event(), threading.Event()

    def answer() -> Answer:
        if hang.is_set():
            wake.wait()
        return 300.0, None

    watch = sampler(answer)
    watch.start(child.pid)
    watch.mark("model built")
    hang.set()
    began = time.monotonic()
    for _ in range(20):
        watch.mark("timing end")
    assert time.monotonic() - began < 2  # one wait of 0.2 s and not twenty
    began = time.monotonic()
    found = watch.stop()
    assert time.monotonic() - began < 3
    assert GPU_COLUMN not in found["values"]
    assert "stopped answering after model built; 300 MiB" in found["unavailable"][GPU_COLUMN]

    # The next case: no second thread while the first hangs, a fresh one once it is back.
    watch.start(child.pid)
    assert sampler_threads() == 1
    assert "earlier case" in watch.stop()["unavailable"][GPU_COLUMN]
    hang.clear()
    wake.set()
    for _ in range(100):
        if not sampler_threads():
            break
        time.sleep(0.01)
    watch.start(child.pid)
    watch.mark("idle")
    assert watch.stop()["values"][GPU_COLUMN] == 300.0
