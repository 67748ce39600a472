"""Two runs on one GPU, or on one CPU, notice each other."""

import subprocess
import sys

import pytest
from support.gpu_machine import FINE, QUICK
from support.small_suite import SUITE, command, environment

import mpscale
from mpscale.core.columns import COLUMNS

BESIDE = """
import sys, time
from mpscale.core.device import Device
from mpscale.telemetry.presence import Presence

there = Presence(Device("gpu", "A100", uuid=sys.argv[1]))
print("there", flush=True)
time.sleep(60)
"""
UUID = "GPU-6f1f1d6a-0000-4a2b-9c3d-000000000005"


@pytest.mark.slow
def test_a_run_says_at_its_start_who_is_on_its_gpu(machine):
    machine.script.set(uuid=UUID)
    with subprocess.Popen([sys.executable, "-c", BESIDE, UUID], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "there\n"
        # An A100 has no float8, so no process is needed.
        done = machine.run(SUITE, *QUICK, "--mp-modes=mixed-fp8", "--benchmark-disable")
        other.kill()
    assert f"another run of mpscale uses this GPU (process {other.pid}, since 20" in " ".join(done.stdout.split())


def start_two(folders, *options, **variables):
    """Start a session in each folder; return what they made."""
    runs = []
    for folder in folders:
        runs.append(
            subprocess.Popen(
                command(*options),
                cwd=folder,
                env=environment(**variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    return outputs, [mpscale.read_run(next(folder.glob("results/runs/*"))) for folder in folders], runs


@pytest.mark.slow
def test_rows_of_two_runs_on_one_gpu_say_so(machine, tmp_path, write_suite):
    machine.script.no_processes()  # a driver that does not see them
    folders = [write_suite(tmp_path / name) for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        outputs, runs, processes = start_two(
            folders, FINE, *QUICK, "--mp-modes=fp32", "--mp-gpu-retries=0", **machine.script.environ(machine.library)
        )
    for run, other, output in zip(runs, reversed(processes), outputs, strict=True):
        (record,) = run.records
        assert (record["status"], record["gpu_suspicion"]) == ("invalid", record["status_reason"]), output
        assert f"another run of mpscale uses this GPU (process {other.pid}, since 20" in record["gpu_suspicion"]


@pytest.mark.slow
def test_rows_of_two_runs_on_one_cpu_say_that_the_machine_was_busy(tmp_path, write_suite):
    folders = [write_suite(tmp_path / name) for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    _, runs, _ = start_two(folders, FINE, "--mp-modes=fp32", "--mp-seeds=1", "--mp-timing=4")
    for run in runs:
        (record,) = run.records
        assert record["host_other_cpu_share"] > COLUMNS["host_other_cpu_share"].warn_above
        assert "machine was busy" in (run.path / "report.md").read_text().lower()
