"""Temporary folders: there whenever they are needed, gone in the end, and nobody else's is touched."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mpscale.core.files.temporary import NoTemporaryFile, TemporaryFolder, remove_left_behind, temporary_file

HOLDER = """
import sys, time
from mpscale.core.files.temporary import TemporaryFolder
folder = TemporaryFolder("held")
(folder.path / "file").touch()
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The folder of temporary files."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TMPDIR", str(place))
    return place


@pytest.fixture
def holder():
    """Another process with a temporary folder, and that folder."""
    with subprocess.Popen([sys.executable, "-P", "-c", HOLDER], stdout=subprocess.PIPE, text=True) as process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def replace_by_a_link(folder):
    shutil.rmtree(folder)
    folder.symlink_to(folder.parent.parent)


@pytest.mark.parametrize("disturb", [shutil.rmtree, lambda folder: folder.rename(f"{folder}.old"), replace_by_a_link])
def test_a_folder_that_is_gone_is_made_anew(disturb):
    folder = TemporaryFolder("gpu")
    before = folder.path
    assert folder.path == before
    disturb(before)
    assert not folder.exists
    (folder.path / "file").touch()
    assert folder.path != before
    assert before.name.startswith("mpscale-gpu-")


def test_closing_removes_the_folder_and_not_what_has_taken_its_place(place, tmp_path):
    (tmp_path / "precious").touch()
    folder, replaced = TemporaryFolder(), TemporaryFolder()
    (folder.path / "file").touch()
    replace_by_a_link(replaced.path)
    folder.close()
    replaced.close()
    assert [path.is_symlink() for path in place.iterdir()] == [True]
    assert (tmp_path / "precious").exists()


def test_nothing_is_made_before_it_is_needed(place):
    TemporaryFolder().close()
    assert list(place.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_and_one_in_use_stays(holder, tmp_path):
    process, folder = holder
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").touch()
    (folder / "link").symlink_to(tmp_path / "outside")
    mine = TemporaryFolder().path
    assert remove_left_behind() == []
    assert folder.exists()
    process.kill()
    process.wait()
    assert remove_left_behind() == [folder]
    assert not folder.exists()
    assert mine.exists()
    assert (tmp_path / "outside" / "precious").exists()


def unmarked(folder):
    (folder / ".made-by-mpscale").unlink()


def marked_by_a_link(folder):
    (folder / ".made-by-mpscale").rename(folder.parent / "mark")
    (folder / ".made-by-mpscale").symlink_to(folder.parent / "mark")


def of_another_user(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(folder, 12345, 12345)


def with_another_users_mark(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(folder / ".made-by-mpscale", 12345, 12345)


def a_link(folder):
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


def of_another_name(folder):
    folder.rename(folder.parent / "other")


NOT_OURS = [unmarked, marked_by_a_link, of_another_user, with_another_users_mark, a_link, of_another_name]


@pytest.mark.parametrize("change", NOT_OURS)
def test_a_folder_stays_if_it_is(change, holder, place):
    process, folder = holder
    change(folder)
    process.kill()
    process.wait()
    (place / "mpscale-file").touch()
    before = sorted(place.rglob("*"))
    assert remove_left_behind() == []
    assert sorted(place.rglob("*")) == before


def test_a_folder_that_cannot_be_removed_yet_is_removed_by_the_next_run(place, monkeypatch):
    folder = TemporaryFolder()
    (folder.path / "busy").mkdir()
    plain = os.rmdir

    def rmdir(path, **how):
        if Path(path).name == "busy":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        plain(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        folder.close()
    (left,) = place.iterdir()
    assert remove_left_behind() == [left]
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("make", [lambda: TemporaryFolder().path, temporary_file])
@pytest.mark.parametrize("where", ["gone", "file", "full"])
def test_no_place_is_an_error_in_words(where, make, tmp_path, monkeypatch, request):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / where))
    (tmp_path / "file").touch()
    if where == "full":
        (tmp_path / "full").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "none", tmp_path / "full"]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("tmpfs cannot be mounted")
        request.addfinalizer(lambda: subprocess.run(["umount", tmp_path / "full"], check=True))
    with pytest.raises(NoTemporaryFile) as caught:
        make()
    why = {"gone": "there is no such", "file": "a part of the path is a file", "full": "the disk is full"}[where]
    text = f"no temporary file can be made in {tmp_path / where}: {why}"
    assert text in str(caught.value)
    assert "or set TMPDIR to another folder" in str(caught.value)
