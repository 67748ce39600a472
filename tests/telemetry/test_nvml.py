"""NVML: no hardware needed. ``Library`` stands in for nvidia-ml-py, not for anything of mpscale."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from mpscale.telemetry.device import Device
from mpscale.telemetry.nvml import NoNvml, Nvml, open_nvml

MIB = 2**20
UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


class Library:
    """Answers as ``pynvml`` does for two GPUs; an exception in place of an answer is raised."""

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlShutdown": None,
            "nvmlDeviceGetCount": 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: 0,
            "nvmlDeviceGetUUID": lambda handle: [UUID, "GPU-11111111-0000-0000-0000-000000000000"][handle],
            "nvmlDeviceGetName": "NVIDIA H200",
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=143_771 * MIB),
            "nvmlDeviceGetComputeRunningProcesses_v3": [],
            "nvmlDeviceGetGraphicsRunningProcesses_v3": [],
            "nvmlSystemGetDriverVersion": "570.86.15",
            "nvmlSystemGetCudaDriverVersion": 12080,
            **answers,
        }

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            raise AttributeError(name)
        answer = self.answers[name]

        def call(*arguments: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer(*arguments) if callable(answer) else answer

        return call


def listed(pid: int, mib: float | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=None if mib is None else int(mib * MIB))


def memory(**answers: Any) -> tuple[float | None, str | None]:
    return Nvml(Library(**answers), 2).process_memory_mib(UUID, 42)


@pytest.mark.skipif(isinstance(open_nvml(), Nvml), reason="this machine has a working NVML")
def test_a_machine_without_nvml_gives_a_reason_and_no_values() -> None:
    nvml = open_nvml()
    assert isinstance(nvml, NoNvml)
    assert nvml.reason
    assert nvml.devices() == []
    assert nvml.process_memory_mib(UUID, os.getpid()) == (None, nvml.reason)
    assert (nvml.driver_version(), nvml.cuda_driver_version()) == (None, None)
    nvml.close()


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"nvmlInit": pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)}, "no NVIDIA driver library"),
        ({"nvmlInit": pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)}, "driver is not loaded"),
        ({"nvmlInit": pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)}, "different versions"),
        ({"nvmlInit": pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)}, "no permission"),
        ({"nvmlInit": pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)}, "Unknown Error"),
        ({"nvmlInit": pynvml.NVMLLibraryMismatchError("too old")}, "too old"),
        ({"nvmlInit": OSError("wrong ELF class")}, "wrong ELF class"),
        ({"nvmlDeviceGetCount": pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)}, "GPU is lost"),
    ],
)
def test_every_failure_to_open_gives_a_reason(
    answers: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Library(**answers))
    nvml = open_nvml()
    assert isinstance(nvml, NoNvml)
    assert words in nvml.reason


@pytest.mark.parametrize("module", [None, SimpleNamespace()])
def test_a_missing_or_foreign_pynvml_gives_a_reason(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    nvml = open_nvml()
    assert isinstance(nvml, NoNvml)
    assert "nvidia-ml-py" in nvml.reason


def test_opens_lists_and_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Library())
    nvml = open_nvml()
    assert nvml.devices() == [
        Device("gpu", "NVIDIA H200", UUID, (9, 0), 143_771.0),
        Device("gpu", "NVIDIA H200", "GPU-11111111-0000-0000-0000-000000000000", (9, 0), 143_771.0),
    ]
    assert (nvml.driver_version(), nvml.cuda_driver_version()) == ("570.86.15", "12.8")
    nvml.close()


def test_strings_may_be_bytes() -> None:
    nvml = Nvml(Library(nvmlDeviceGetName=b"Tesla V100", nvmlDeviceGetUUID=UUID.encode()), 1)
    assert [(gpu.name, gpu.uuid) for gpu in nvml.devices()] == [("Tesla V100", UUID)]


def test_a_gpu_that_does_not_answer_keeps_its_place() -> None:
    def handle(index: int) -> int:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    lost, fine = Nvml(Library(nvmlDeviceGetHandleByIndex=handle), 2).devices()
    assert lost.uuid is None
    assert "GPU is lost" in lost.name
    assert fine.uuid is not None


def test_what_a_gpu_does_not_tell_is_none() -> None:
    no = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    nvml = Nvml(
        Library(
            nvmlDeviceGetCudaComputeCapability=no,
            nvmlDeviceGetMemoryInfo=no,
            nvmlSystemGetDriverVersion=no,
            nvmlSystemGetCudaDriverVersion=no,
        ),
        1,
    )
    assert nvml.devices() == [Device("gpu", "NVIDIA H200", UUID, None, None)]
    assert (nvml.driver_version(), nvml.cuda_driver_version()) == (None, None)


COMPUTE, GRAPHICS = "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"
COMPUTE_V2, GRAPHICS_V2 = "nvmlDeviceGetComputeRunningProcesses_v2", "nvmlDeviceGetGraphicsRunningProcesses_v2"
NOT_FOUND = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


@pytest.mark.parametrize(
    ("answers", "mib"),
    [
        ({COMPUTE: [listed(7, 1), listed(42, 512)]}, 512.0),
        ({GRAPHICS: [listed(42, 96.5)]}, 96.5),
        ({COMPUTE: [listed(42, 512)], GRAPHICS: [listed(42, 512)]}, 512.0),
        ({COMPUTE: [listed(42, None)], GRAPHICS: [listed(42, 8)]}, 8.0),
        ({COMPUTE: NOT_FOUND, GRAPHICS: NOT_FOUND, COMPUTE_V2: [listed(42, 3)], GRAPHICS_V2: []}, 3.0),
    ],
)
def test_memory_of_a_process(answers: dict[str, Any], mib: float) -> None:
    assert memory(**answers) == (mib, None)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({COMPUTE: [listed(7, 512)]}, "PID namespace"),
        ({COMPUTE: [listed(42, None)]}, "not its memory"),
        ({COMPUTE: [listed(42, 0)]}, "not its memory"),
        ({COMPUTE: NOT_FOUND}, "too old"),
        ({COMPUTE: pynvml.NVMLLibraryMismatchError("no match")}, "no match"),
        ({"nvmlDeviceGetHandleByUUID": pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)}, UUID),
    ],
)
def test_no_memory_figure_without_a_reason_and_never_zero(answers: dict[str, Any], words: str) -> None:
    value, reason = memory(**answers)
    assert value is None
    assert reason is not None
    assert words in reason


def test_importing_telemetry_imports_neither_nvml_nor_tensorflow() -> None:
    code = (
        "import sys, mpscale.telemetry.fingerprint, mpscale.telemetry.sampler;"
        "print([name for name in ('tensorflow', 'keras', 'pynvml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
