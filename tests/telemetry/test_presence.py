"""Runs on one GPU notice each other by notes that they hold locked, whatever else lies in that folder."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mpscale.core.device import Device
from mpscale.telemetry.presence import FOLDER, Presence, words

GPU = Device("gpu", "A100", uuid="GPU-1")
BESIDE = """
import sys, time
from mpscale.core.device import Device
from mpscale.telemetry.presence import Presence

there = Presence(Device("gpu", "A100", uuid=sys.argv[1]), sys.argv[2] or None)
print("there", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def beside():
    """Start another process on a GPU; return it."""
    started = []

    def beside(uuid="GPU-1", pair=""):
        process = subprocess.Popen([sys.executable, "-c", BESIDE, uuid, pair], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "there\n"
        return process

    yield beside
    for process in started:
        process.kill()
        process.communicate()


def test_both_see_each_other_until_one_is_killed(folder, beside):
    other = beside()
    assert f"another run of mpscale uses this GPU (process {other.pid}, since 20" in words(GPU)
    here = Presence(GPU)
    assert [each.pid for each in here.others()] == [other.pid]
    third = beside()
    assert [each.pid for each in here.others()] == [other.pid, third.pid]
    assert words(GPU).startswith("3 other runs of mpscale use this GPU")
    other.send_signal(signal.SIGKILL)
    other.wait()
    third.send_signal(signal.SIGKILL)
    third.wait()
    assert here.others() == []
    here.close()
    assert list(folder.iterdir()) == []  # the notes of the dead too


def test_a_run_on_another_gpu_or_of_the_same_pair_is_no_other(beside):
    beside("GPU-10")
    beside(pair="together")
    here = Presence(GPU, "together")
    assert here.others() == []
    assert len(Presence(GPU, "apart").others()) == 2


def test_a_cpu_has_no_note(folder):
    Presence(Device("cpu", "EPYC"))
    assert list(folder.iterdir()) == []
    assert words(Device("cpu", "EPYC")) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\0", b'{"pid": "x", "since": 3}', b"[" * 1000])
def test_a_note_of_unknown_content_counts_as_somebody(folder, content):
    import fcntl

    name = folder / "mpscale-gpu-GPU-1--1-x"
    name.write_bytes(content)
    with name.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert words(GPU) == "another run of mpscale uses this GPU (a process that does not say which)"
    assert words(GPU) is None


def test_what_only_looks_like_a_note_does_no_harm(folder):
    begin = "mpscale-gpu-GPU-1--"
    os.mkfifo(folder / f"{begin}fifo")
    (folder / f"{begin}link").symlink_to("/dev/zero")
    (folder / f"{begin}folder").mkdir()
    assert words(GPU) is None
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_without_a_folder_there_is_no_note_and_no_error(folder, monkeypatch, place):
    (folder / "file").touch()
    monkeypatch.setenv(FOLDER, str(folder / place))
    here = Presence(GPU)
    assert here.others() == []
    here.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_users_see_each_other(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:
        Path(shared).chmod(0o1777)
        monkeypatch.setenv(FOLDER, shared)
        here = Presence(GPU)
        ready, done = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                os.umask(0o077)
                there = Presence(GPU)
                os.write(done, b"yes" if [each.pid for each in there.others()] == [os.getppid()] else b"no")
                signal.pause()
            finally:
                os._exit(1)
        try:
            assert os.read(ready, 3) == b"yes"
            assert [each.pid for each in here.others()] == [child]
        finally:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            os.close(ready)
            os.close(done)
        assert here.others() == []
        here.close()


def test_cases_of_two_runs_on_one_gpu_are_suspect(gpu_case):
    here, there = gpu_case(), gpu_case()
    for case in (here, there):
        (suspicion,) = case.run().suspicions
        assert f"another run of mpscale uses this GPU (process {os.getpid()}, since 20" in suspicion.reason
        assert suspicion.passes  # once the other has ended
    there.watch.close()
    assert here.run().suspicions == []
