"""A script that has used the GPU is told so before anything is measured beside it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

import mpscale
from mpscale.core.device import Device
from mpscale.core.reason import Code, Reason
from mpscale.script import comparing, gpu
from mpscale.telemetry.client import SilentDriver

GPU = Device("gpu", "mpscale stand-in GPU", "GPU-1", memory_mib=8192.0)
MAPPED = "7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/libcuda.so.550.54\n"


@pytest.fixture
def process(tmp_path):
    """The folder of a process in /proc."""
    (tmp_path / "fd").mkdir()
    (tmp_path / "maps").write_text(MAPPED)
    return tmp_path


@pytest.fixture
def driver(monkeypatch):
    """A driver that lists processes; the test says which."""
    found = SimpleNamespace(devices=[GPU], pids=[], close=lambda: None)
    found.look = lambda device: {"pids": found.pids}
    monkeypatch.setattr(gpu, "open_driver", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


NOBODY = 2**22 + 1
"""No process of this machine has such an id."""


@pytest.mark.parametrize(("pids", "is_held"), [([os.getpid()], True), ([NOBODY], True), ([], False), ([1], False)])
def test_the_driver_decides_who_holds_the_gpu(pids, is_held, process, driver):
    """A process that has only looked for GPUs is not listed; in a container it may be listed with another number."""
    driver.pids = pids
    said = gpu.held(process)
    assert (said is not None) == is_held
    if said is not None:
        assert GPU.name in said
        assert "tf.config.set_visible_devices([], 'GPU')" in said


def test_a_process_without_files_of_a_gpu_asks_no_driver(process, monkeypatch):
    monkeypatch.setattr(gpu, "open_driver", lambda: pytest.fail("the driver was asked"))
    (process / "maps").write_text("")
    assert gpu.held(process) is None
    assert gpu.held(process / "nothing") is None


@pytest.mark.parametrize("hidden", ["-1", "GPU-7"])
def test_hidden_and_unknown_gpus_are_left_to_the_session(hidden, process, driver, monkeypatch):
    driver.pids = [os.getpid()]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpu.held(process) is None


def test_a_silent_driver_is_left_to_the_session(process, driver):
    def silent(device):
        raise SilentDriver(Reason(Code.MONITOR_DIED, "it hangs"))

    driver.look = silent
    assert gpu.held(process) is None


def test_nothing_starts_while_the_script_holds_the_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "held", lambda: "this process has used the GPU")
    monkeypatch.setattr(comparing, "_run", lambda *_: pytest.fail("a session was started"))
    with pytest.raises(comparing.NotCompared, match="this process has used the GPU"):
        mpscale.compare(mpscale.Workload("own", "", lambda: None, lambda: None, "adam"))
