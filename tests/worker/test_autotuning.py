"""The flags for XLA's autotuning that a worker adds, and what it reports of them."""

import pytest

from mpscale.core.device import Device
from mpscale.core.reason import Code
from mpscale.worker import autotuning

GPU, CPU = Device("gpu", "NVIDIA H200", "GPU-1", (9, 0)), Device("cpu", "Some CPU")
SAVE, LOAD = "--xla_gpu_dump_autotune_results_to='/a b/c'", "--xla_gpu_load_autotune_results_from='/a b/c'"


@pytest.fixture
def flags(monkeypatch):
    """Set XLA_FLAGS, and forget what is added to it."""
    monkeypatch.setattr(autotuning, "_added", "")
    monkeypatch.setattr(autotuning, "_users", "")
    return lambda value: monkeypatch.setenv("XLA_FLAGS", value)


@pytest.mark.parametrize(
    ("device", "jit", "users", "added", "found"),
    [
        (GPU, True, "", None, "tuned"),
        (GPU, True, "--xla_a=1", SAVE, "tuned"),
        (GPU, True, "--xla_a=1", LOAD, "reused"),
        (GPU, True, "--xla_gpu_load_autotune_results_from=mine", None, "reused"),
        (GPU, True, "--xla_gpu_autotune_level=0", SAVE, Code.NOT_ASKED_FOR),
        (GPU, True, "--xla_gpu_autotune_level=0 --xla_gpu_autotune_level=4", SAVE, "tuned"),
        (GPU, False, "", None, Code.NOT_ASKED_FOR),
        (CPU, True, "", SAVE, Code.NO_GPU),
    ],
)
def test_column_says_whether_this_process_tuned(flags, device, jit, users, added, found):
    flags(users)
    autotuning.begin(added)
    columns = autotuning.columns(device, jit)
    if isinstance(found, Code):
        assert columns.unavailable["autotuning"].code is found
    else:
        assert columns.values == {"autotuning": found}
    assert autotuning.users_variable("XLA_FLAGS") == users


def test_flags_that_the_user_keeps_in_a_file_are_kept(flags, tmp_path):
    file = tmp_path / "flags"
    file.write_text("--xla_a=1\n--xla_gpu_autotune_level=0\n")
    flags(str(file))
    autotuning.begin(LOAD)
    assert autotuning.os.environ["XLA_FLAGS"].split(" --") == [
        "--xla_a=1", "xla_gpu_autotune_level=0 ", LOAD.removeprefix("--")
    ]  # fmt: skip
    assert autotuning.users_variable("XLA_FLAGS") == str(file)


def test_a_later_change_by_the_workload_is_seen(flags):
    flags("--xla_a=1")
    autotuning.begin(LOAD)
    flags(f"{autotuning.os.environ['XLA_FLAGS']} --xla_cpu_enable_fast_math=true")
    assert autotuning.users_variable("XLA_FLAGS") == "--xla_a=1 --xla_cpu_enable_fast_math=true"
