"""Results folders that cannot hold a run: detected before the first case, without leaving anything behind."""

from __future__ import annotations

import errno
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.small_suite import SUITE, pytest_here, write

from mpscale.config import folder, why_not_writable
from mpscale.core.files.errors import why


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Run pytest on a suite, in a folder with all kinds of obstacles; return exit code and output."""
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
        ("/proc/nope", "there is no such file or folder"),
        ("/proc/self/nope/deeper", "there is no such file or folder"),
        ("/sys/nope", ""),
        ("file", "it exists and is not a folder"),
        ("file/below/it", "it exists and is not a folder"),
        ("/dev/full", "it exists and is not a folder"),
        ("circle", ""),
        ("broken", "/proc/nowhere"),
        ("held", "it exists and is not a folder"),
        ("n" * 300, "the name is too long"),
    ],
)
def test_an_unusable_folder_is_a_usage_error_before_anything_runs(called, given, why):
    code, said = called(f"--mp-results={given}")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --mp-results: " in said
    assert "is not a folder that can be written to (" in said
    assert why in said
    assert "[1/1]" not in said


@pytest.mark.parametrize("given", ["", "~nobody-knows-me/results"])
def test_text_that_cannot_name_a_folder_is_refused(called, given):
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


def words(code):
    return why(OSError(code, os.strerror(code)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=os.strerror)
def test_a_full_file_system_is_noticed(tmp_path, monkeypatch, code):
    def refuse(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    assert why_not_writable(tmp_path / "new" / "runs") == f"{tmp_path}/new/runs: {words(code)}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=os.strerror)
def test_a_read_only_file_system_is_noticed(tmp_path, monkeypatch, code):
    def refuse(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert why_not_writable(tmp_path / "new" / "runs") == f"{tmp_path}/new: {words(code)}"


def test_sessions_that_look_at_the_same_time_do_not_refuse_each_other(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: why_not_writable(tmp_path / "new" / "runs"), range(400)))
    assert set(found) == {None}
