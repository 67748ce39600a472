"""Results folders that cannot hold a run: known before the first case, and nothing is left of the attempt."""

from __future__ import annotations

import errno
import functools
import os
import tempfile
from pathlib import Path

import pytest
from support.small_suite import SUITE, pytest_here, write

from mpscale.config import folder, why_not_writable


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Calls pytest on a suite, in a folder with all that can be in the way; exit code and what was said."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, suite___test_it=SUITE)
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "broken").symlink_to("/proc/nowhere")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "runs").symlink_to("nowhere/at/all")
    return functools.partial(pytest_here, tmp_path, "suite")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("/proc/nope", "No such file or directory"),
        ("/proc/self/nope/deeper", "No such file or directory"),
        ("/sys/nope", ""),
        ("file", "it exists and is not a folder"),
        ("file/below/it", "it exists and is not a folder"),
        ("/dev/full", "it exists and is not a folder"),
        ("circle", ""),
        ("broken", "/proc/nowhere"),
        ("held", "it exists and is not a folder"),
        ("n" * 300, "File name too long"),
    ],
)
def test_it_is_wrong_use_before_anything_runs(called, given, why):
    code, said = called(f"--mp-results={given}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --mp-results: " in said
    assert "is not a folder that can be written to (" in said
    assert why in said
    assert "[1/1]" not in said


@pytest.mark.parametrize("given", ["", "~nobody-knows-me/results"])
def test_what_can_be_no_folder_is_refused(called, given):
    code, said = called(f"--mp-results={given}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "argument --mp-results: " in said


def test_a_tilde_is_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert folder("~/results") == Path("/home/me/results")
    assert folder("results/~") == Path("results/~")


def test_a_folder_that_can_be_made_is_not_made_yet(tmp_path):
    assert why_not_writable(tmp_path / "a" / "b" / "runs") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert why_not_writable(Path(os.path.realpath(tmp_path / "link")) / "runs") is None


class Full:
    """A file on a file system that has no room left, as the write finds out."""

    def __init__(self, code):
        self.code = code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, _):
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=os.strerror)
def test_a_file_system_without_room_is_noticed(tmp_path, monkeypatch, code):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full(code))
    assert why_not_writable(tmp_path / "new" / "runs") == f"{tmp_path}/new/runs: {os.strerror(code)}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=os.strerror)
def test_a_file_system_that_takes_nothing_is_noticed(tmp_path, monkeypatch, code):
    def refuse(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert why_not_writable(tmp_path / "new" / "runs") == f"{tmp_path}/new: {os.strerror(code)}"
