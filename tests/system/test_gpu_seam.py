"""The GPU path as far as it goes without one: NVML names a GPU, the modes follow, TensorFlow cannot use it."""

import json
import os
import subprocess
import sys

import pytest

STAND_IN = '''
"""NVML of a machine with one A100, for what mpscale asks of it."""

from types import SimpleNamespace


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return 1


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetUUID(handle):
    return "GPU-5b0c4a1e-0000-1111-2222-333344445555"


def nvmlDeviceGetName(handle):
    return "NVIDIA A100-SXM4-40GB"


def nvmlDeviceGetCudaComputeCapability(handle):
    return (8, 0)


def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(total=40 * 2**30, used=0, free=40 * 2**30)


def nvmlSystemGetDriverVersion():
    return "570.86.15"


def nvmlSystemGetCudaDriverVersion():
    return 12080


def nvmlDeviceGetComputeRunningProcesses_v3(handle):
    # Whichever process is asked for has three GiB.
    return [SimpleNamespace(pid=pid, usedGpuMemory=3 * 2**30) for pid in range(1, 2**16)]


def nvmlDeviceGetGraphicsRunningProcesses_v3(handle):
    return []
'''
SUITE = "def test_training(mp_case, benchmark):\n    mp_case.measure(benchmark)\n"


@pytest.fixture
def on_gpu(tmp_path):
    """Runs pytest where ``import pynvml`` finds the stand-in."""
    (tmp_path / "nvml").mkdir()
    (tmp_path / "nvml" / "pynvml.py").write_text(STAND_IN)
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "nvml")}
    environ.pop("CUDA_VISIBLE_DEVICES", None)

    def run(*options, **variables):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--mp-workloads", "mnist1d-mlp", *options],
            cwd=tmp_path,
            env={**environ, **variables},
            capture_output=True,
            text=True,
            timeout=120,
        )

    run.folder = tmp_path
    return run


def test_ampere_adds_tf32_to_the_plan(on_gpu):
    assert "mnist1d-mlp-tf32-seed0" in on_gpu("--collect-only", "-q").stdout
    assert "tf32" not in on_gpu("--collect-only", "-q", CUDA_VISIBLE_DEVICES="-1").stdout


def test_gpu_that_does_not_exist_is_a_usage_error(on_gpu):
    done = on_gpu("--collect-only", "-q", CUDA_VISIBLE_DEVICES="3")
    assert done.returncode == 4
    assert "NVIDIA A100-SXM4-40GB" in done.stdout + done.stderr


def test_forking_is_refused_on_a_gpu(on_gpu):
    done = on_gpu("--mp-modes", "fp32", "--mp-seeds", "1", "--mp-start-method", "fork")
    assert done.returncode == 4
    assert "use fresh or auto" in done.stdout + done.stderr
    assert not (on_gpu.folder / "results").exists()


def test_cpu_figures_never_pass_for_those_of_the_gpu(on_gpu):
    """TensorFlow without CUDA beside a GPU: the case is an error that says what to install."""
    done = on_gpu("--mp-modes", "fp32", "--mp-seeds", "1", "--benchmark-disable")
    assert done.returncode == 1
    (run,) = (on_gpu.folder / "results" / "runs").iterdir()
    assert "-nvidia-a100-sxm4-40gb-" in run.name
    info = json.loads((run / "run.json").read_text())
    assert info["environment"]["device"]["compute_capability"] == [8, 0]
    assert info["environment"]["nvidia_driver"] == "570.86.15"
    assert info["settings"]["start_method"] == "fresh"
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (record,) = [event["record"] for event in events if event["event"] == "case_finished"]
    assert record["status"] == "error"
    assert "tensorflow[and-cuda]" in record["status_reason"]
    assert record["gpu_memory_nvml_peak_mib"] == 3 * 1024
