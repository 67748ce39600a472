"""The lock of a run's folder: one process at a time, freed by the death of its holder."""

import errno
import fcntl
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpscale.core import run_lock
from mpscale.core.run_lock import NAME, RunIsHeld, RunLock

HOLD = (
    "import sys, pathlib\nfrom mpscale.core.run_lock import RunLock\nlock = RunLock.take(pathlib.Path(sys.argv[1]))\n"
)
HOLD += "print('held', flush=True)\nsys.stdin.read()\n"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, such as some network file systems."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("locks", ["locks", "no_locks"])
def test_who_holds_it_is_named_and_its_death_frees_it(tmp_path, holder, locks, request):
    if locks == "no_locks":
        request.getfixturevalue("no_locks")
    with pytest.raises(RunIsHeld, match=f"^process {holder.pid} on host {platform.node()}$"):
        RunLock.take(tmp_path)
    holder.kill()
    holder.wait()
    lock = RunLock.take(tmp_path)
    assert lock.works == (locks == "locks")
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.free()
    assert list(tmp_path.iterdir()) == []
    lock.free()


def test_children_of_a_killed_holder_do_not_keep_it(tmp_path):
    child = "subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL)"
    code = HOLD.replace("print('held'", f"import subprocess\nprint({child}.pid")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.communicate()
        os.kill(pid, 0)
        RunLock.take(tmp_path).free()
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    "text", ["", "[]", '{"pid": "1"}', '{"pid": 1e400}', '{"pid": -1, "host": null}', "\0\xff" * 600]
)
def test_without_locks_a_file_that_names_no_live_process_here_holds_nothing(tmp_path, text):
    (tmp_path / NAME).write_text(text, encoding="latin-1")
    lock = RunLock.take(tmp_path)
    assert not lock.works
    lock.free()


@pytest.mark.usefixtures("no_locks")
def test_another_process_that_got_the_same_number_does_not_hold_it(tmp_path):
    held = {"pid": os.getppid(), "host": platform.node(), "start": "1"}
    (tmp_path / NAME).write_text(json.dumps(held))
    RunLock.take(tmp_path).free()


def test_a_link_or_a_fifo_in_its_place_is_refused_and_left_alone(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / NAME).symlink_to(target)
    with pytest.raises(OSError, match=NAME):
        RunLock.take(tmp_path)
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(OSError, match="not a plain file"):
        RunLock.take(tmp_path)
    assert target.read_text() == "precious"


def test_a_folder_that_was_moved_is_no_longer_held(tmp_path):
    (tmp_path / "run").mkdir()
    lock = RunLock.take(tmp_path / "run")
    assert lock.is_in_place
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert not lock.is_in_place
    lock.free()
    assert (tmp_path / "elsewhere" / NAME).exists()


def test_it_survives_that_its_holder_removes_the_file_while_it_waits(tmp_path, monkeypatch):
    """Between opening the file and locking it, the holder may have removed it: then another file is the lock."""
    plain, removed = run_lock._locked, []

    def locked(descriptor: int, path: Path) -> bool:
        if not removed:
            removed.append(path)
            path.unlink()
        return plain(descriptor, path)

    monkeypatch.setattr(run_lock, "_locked", locked)
    lock = RunLock.take(tmp_path)
    assert removed and lock.is_in_place
    with pytest.raises(RunIsHeld):
        RunLock.take(tmp_path)
    lock.free()


def test_a_file_that_cannot_be_written_is_removed_and_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match=NAME) as caught:
            RunLock.take(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["[" * 1000, "\0" * 5000, "[]", '{"pid": {}, "host": 1}'])
def test_a_held_file_of_odd_content_is_held(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with (tmp_path / NAME).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunIsHeld):
            RunLock.take(tmp_path)
    assert (tmp_path / NAME).read_text() == content
