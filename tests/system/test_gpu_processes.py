"""Processes of a run on a machine with a GPU, whose driver is a stand-in: how they start, in which environment."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
from support.gpu_machine import FINE, QUICK, Machine, Watched
from support.nvml_stand_in import UUID
from support.small_suite import SUITE

from mpscale.core.reason import Code


@pytest.fixture(scope="module")
def picky(tmp_path_factory, stand_in_nvml, write_suite):
    """A run whose workers end on touching the GPU with the default allocator, and save autotuning results."""
    machine = Machine(write_suite(tmp_path_factory.mktemp("picky")), stand_in_nvml)
    watched = Watched(machine)
    # Without XLA there is nothing to tune.
    shared = ("--mp-jit=on", "--mp-modes=fp32", "--mp-seeds=2", "--mp-repeats=1", "--mp-autotune=shared")
    done = machine.run(SUITE, *QUICK, FINE, *shared, **watched.variables, PICKY="1", SAVES="1")
    assert done.returncode == 0, done.stdout
    records = [event["record"] for event in machine.events("case_finished")]
    return SimpleNamespace(machine=machine, workers=watched.seen("worker"), watched=watched, done=done, records=records)


def test_allocator_that_does_not_work_is_replaced_once_and_for_all(picky):
    assert [(record["status"], record["attempts"]) for record in picky.records] == [
        ("error", 1),
        ("error", 2),
        ("ok", 3),
        ("ok", 1),
        ("ok", 1),
    ]
    assert [record.get("gpu_allocator") for record in picky.records] == [None, None, "bfc", "bfc", "bfc"]
    assert "failed on touching the GPU" in picky.done.stdout
    assert "failed with cuda_malloc_async" in picky.done.stdout
    # One parent has forked them all, and each got its own environment.
    assert len(picky.watched.seen("import")) == 1
    (parent,) = {parent for parent, *_ in picky.workers}
    pools = ["cuda_malloc_async", "cuda_malloc_async", None, None, None]
    assert [worker[:3] for worker in picky.workers] == [(parent, "-1", pool) for pool in pools]


def test_later_processes_reuse_what_the_first_good_one_has_tuned(picky):
    # The first two saved something and failed before their first step.
    assert [record.get("autotuning") for record in picky.records] == [None, None, "tuned", "reused", "reused"]
    assert ["load" in str(flags) for *_, flags in picky.workers] == [False, False, False, True, True]
    assert {record["process_settings"] for record in picky.records[2:]} == {"none"}
    path = picky.machine.path()
    assert json.loads((path / "run.json").read_text())["settings"]["autotune"] == "shared"
    (row,) = re.findall(r"^\| suite.*fine .*reused.*$", (path / "report.md").read_text(), re.MULTILINE)
    assert len(re.findall(r"[\d.]+ \(2 reused: [\d.]+\)", row)) == 2


@pytest.mark.slow
def test_on_a_cpu_flags_reach_the_worker_and_nothing_is_tuned(machine):
    watched = Watched(machine)
    users = "--xla_cpu_enable_fast_min_max=false"
    done = machine.run(
        SUITE, *QUICK, "--mp-jit=on", "--mp-modes=fp32", "--mp-autotune=shared", **watched.variables,
        CUDA_VISIBLE_DEVICES="-1", XLA_FLAGS=users,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (record,) = [event["record"] for event in machine.events("case_finished")]
    ((*_, flags),) = watched.seen("worker")
    assert re.fullmatch(rf"{users} --xla_gpu_dump_autotune_results_to='.+'", flags)
    assert record["unavailable"]["autotuning"]["code"] == Code.NO_GPU
    assert record["process_settings"] == f"XLA_FLAGS={users}"
    assert "autotune=shared" in record["series_key"]


def test_workers_are_fresh_if_the_parent_has_touched_the_gpu(machine):
    library = machine.folder / "libcuda.so.1"
    # Under a name of its own, or TensorFlow would use it.
    command = ["cc", "-shared", "-Wl,-soname,libtouched.so", "-o", str(library), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    watched = Watched(machine, f"import ctypes; ctypes.CDLL({str(library)!r})\n")
    done = machine.run(SUITE, *QUICK, FINE, "--mp-modes", "fp32", "--benchmark-disable", **watched.variables)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("has touched the GPU") == 1
    assert [event["record"]["start_method"] for event in machine.events("case_finished")] == ["fresh"]
    environment = json.loads((machine.path() / "run.json").read_text())["environment"]
    assert environment["why_not_forked"]["code"] == Code.FORK_UNSAFE
    assert len(watched.seen("import")) == 2


def test_cpu_figures_never_pass_for_those_of_the_gpu(machine):
    """TensorFlow without CUDA beside a real GPU: the case is an error that says what to install."""
    machine.script.set(name="NVIDIA A100-SXM4-40GB")
    watched = Watched(machine)
    done = machine.run(SUITE, "--mp-modes", "fp32", "--mp-seeds", "1", "--benchmark-disable", **watched.variables)
    assert done.returncode == 1
    # Only the forked worker saw the GPU, not its parent.
    assert [visible for _, visible, _, _ in watched.seen("import")] == ["-1"]
    assert [values for _, *values in watched.seen("worker")] == [[UUID, "cuda_malloc_async", None]]
    assert "-nvidia-a100-sxm4-40gb-" in machine.path().name
    info = json.loads((machine.path() / "run.json").read_text())
    assert info["environment"]["device"]["compute_capability"] == [8, 0]
    assert info["environment"]["nvidia_driver"] == "570.86.15"
    assert info["settings"]["start_method"] == "fork"
    (record,) = [event["record"] for event in machine.events("case_finished")]
    assert record["status"] == "error"
    assert "tensorflow[and-cuda]" in record["status_reason"]
