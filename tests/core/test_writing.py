"""Files are written whole or not at all, and never through a link that leads out of their folder."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.runfolder import NAME, finished, record, write_run, write_steps

from mpscale.cli import main
from mpscale.core.case import Case, Settings
from mpscale.core.files.writing import open_to_append, remove, remove_leftovers, replacing, write, write_named
from mpscale.core.run_folder import Journal, gpu_path, steps_path
from mpscale.core.runs import RunError, read_run

SECRET = "of the user"


@pytest.fixture
def secret(tmp_path):
    """A file of the user, to which links in a stranger's folder lead."""
    path = tmp_path / "home" / ".bashrc"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "results", finished([record(step_time_ms_median=2.0), record("mixed-static")]))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


WRITTEN = ("report.html", "report.md", "summary.csv", "cases.csv")


@pytest.mark.parametrize("name", [*WRITTEN, *(f".{name}.partial" for name in WRITTEN)])
def test_a_report_on_a_strangers_run_leaves_what_its_links_lead_to(run, secret, name):
    (run / name).symlink_to(secret)
    assert main(["report", NAME]) == 0
    assert secret.read_text() == SECRET
    assert not any((run / name).is_symlink() for name in WRITTEN)


def test_a_dangling_link_makes_no_file_elsewhere(run, tmp_path):
    (run / "report.md").symlink_to(tmp_path / "planted")
    assert main(["report", NAME]) == 0
    assert not (tmp_path / "planted").exists()


def test_a_run_in_the_results_folder_is_no_link_out_of_it_but_a_path_may_be_one(run, tmp_path, capsys):
    run.rename(elsewhere := tmp_path / "elsewhere")
    run.symlink_to(elsewhere)
    assert main(["report", NAME]) == 2
    assert f"is a link to {elsewhere}" in capsys.readouterr().err
    assert names_in(elsewhere) == ["journal.jsonl", "run.json"]
    (tmp_path / "named").symlink_to(elsewhere)
    assert main(["report", "named"]) == 0
    assert (elsewhere / "report.html").is_file()


def test_the_results_folder_is_the_users_own_and_may_be_a_link(run, tmp_path):
    (tmp_path / "results").rename(tmp_path / "scratch")
    (tmp_path / "results").symlink_to("scratch")
    assert main(["report", NAME]) == 0


@pytest.mark.parametrize("place", ["steps", "gpu"])
def test_a_folder_in_a_run_that_is_a_link_is_refused_with_the_reason(tmp_path, secret, place):
    (tmp_path / place).symlink_to(secret.parent)
    with pytest.raises(OSError, match="it is a link, and mpscale writes only into the folder itself") as refused:
        write(tmp_path / place / ".bashrc", "alias ls=rm", tmp_path)
    assert refused.value.filename == str(tmp_path / place)
    with pytest.raises(OSError, match="it is a link"):
        remove(tmp_path / place / ".bashrc", tmp_path)
    assert secret.read_text() == SECRET


@pytest.mark.parametrize("name", ["..", "steps/..", "steps/../../x", "."])
def test_a_path_cannot_leave_its_root(tmp_path, name):
    root = tmp_path / "run"
    root.mkdir()
    with pytest.raises(OSError, match="it does not name a file in its folder"):
        write(Path(f"{root}/{name}"), "", root)
    assert names_in(tmp_path) == ["run"]


BAD_IDS = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b--fp32--s0--r0",
    "n\0l",
    "x" * 300,
    "é" * 150,
    "\ud800",
    ".hidden",
]


@pytest.mark.parametrize("case_id", BAD_IDS)
def test_the_id_of_a_case_names_a_file_in_its_folder(tmp_path, case_id):
    for path in (steps_path(tmp_path, case_id), gpu_path(tmp_path, case_id, 1)):
        assert path.parent.parent == tmp_path and Path(os.path.normpath(path)) == path
        write(path, "", tmp_path)
        assert len(names_in(path.parent)) == 1
    assert len({steps_path(tmp_path, other) for other in BAD_IDS}) == len(BAD_IDS)


@pytest.mark.parametrize("case_id", ["../../x", "/etc/passwd", "n\0l", "x" * 300])
def test_steps_outside_of_a_run_are_not_read(tmp_path, case_id):
    one = record()
    one.update({"case_id": case_id})
    path = write_run(tmp_path / "results", finished([one]))
    write_steps(path, "x", "step,loss,loss_scale,overflow\n")
    (path / "steps" / "x.csv.gz").rename(path.parent / "x.csv.gz")
    with pytest.raises(RunError, match="no such file; only a case that trained to its end has steps"):
        read_run(path).steps(case_id)


def test_the_id_of_a_case_that_is_a_good_name_stays_one(tmp_path):
    assert steps_path(tmp_path, "pkg.mod+toy--fp32--s0--r0").name == "pkg.mod+toy--fp32--s0--r0.csv.gz"


def link(path, secret):
    path.symlink_to(secret)


def fifo(path, secret):
    os.mkfifo(path)


def folder(path, secret):
    path.mkdir()


def missing(path, secret):
    pass


@pytest.mark.parametrize(
    ("make", "why"),
    [(link, "it is a link"), (fifo, "No such device"), (folder, "directory"), (missing, "No such file")],
)
def test_only_a_regular_file_is_appended_to(tmp_path, secret, make, why):
    make(tmp_path / "journal.jsonl", secret)
    with pytest.raises(OSError, match=why) as refused:
        open_to_append(tmp_path / "journal.jsonl")
    assert refused.value.filename == str(tmp_path / "journal.jsonl")
    assert secret.read_text() == SECRET


def test_a_journal_that_becomes_a_link_is_written_anew(tmp_path, secret):
    case = Case("toy", "fp32", 0, 0, 0, Settings())
    journal = Journal(tmp_path, "test", {}, {}, [case])
    path = journal.path / "journal.jsonl"
    path.unlink()
    path.symlink_to(secret)
    journal.case_started(case, 1)
    journal.finish(0)
    assert secret.read_text() == SECRET
    assert not path.is_symlink()
    assert [json.loads(line)["event"] for line in path.open()] == ["run_started", "case_started", "run_finished"]


def test_a_run_that_ends_leaves_no_file_that_is_not_whole(tmp_path):
    journal = Journal(tmp_path, "test", {}, {}, [])
    left = [journal.path / place / f".x.{0:016x}.mpscale-partial" for place in ("", "steps", "gpu")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    journal.finish(0)
    assert not any(path.exists() for path in left)


# --- whole or not at all


def test_a_file_that_is_not_whole_has_another_name_and_goes_with_the_error(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old")

    def stopped():
        with replacing(path) as file:
            file.write(b"half of the n")
            file.flush()
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert names_in(tmp_path) == ["report.md"] and path.read_text() == "old"


def test_a_disk_that_fills_up_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_text("old")
    # In a process of its own, since the limit goes for all files of a process.
    program = (
        "import resource, sys; from pathlib import Path; from mpscale.core.files.writing import write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write(Path(sys.argv[1]), 'x' * 5000)\n"
        "except OSError as error:\n    print(error.errno, error.filename)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.stdout == f"{errno.EFBIG} {path}\n", done.stderr
    assert names_in(tmp_path) == ["cases.csv"] and path.read_text() == "old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_torn_gzip_of_a_killed_process_does_not_look_whole_and_the_next_file_clears_it_away(tmp_path):
    program = (
        "import gzip, os, signal, sys; from pathlib import Path; from mpscale.core.files.writing import replacing\n"
        "path = Path(sys.argv[1])\n"
        "with replacing(path, path.parent.parent) as whole, gzip.open(whole, 'wt') as file:\n"
        "    file.write('step,loss\\n' * 10**5); file.flush(); whole.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = steps_path(tmp_path, "toy--fp32--s0--r0")
    done = subprocess.run([sys.executable, "-c", program, path])
    assert done.returncode == -signal.SIGKILL
    (left,) = names_in(path.parent)
    assert left.endswith(".mpscale-partial") and not path.exists()
    write(path, gzip.compress(b"step,loss\n"), tmp_path)
    assert names_in(path.parent) == [path.name]


def test_what_somebody_still_writes_is_no_leftover(tmp_path):
    with replacing(tmp_path / "a") as file:
        file.write(b"one")
        write(tmp_path / "b", "two")
        remove_leftovers(tmp_path)
        assert len(names_in(tmp_path)) == 2
    assert (tmp_path / "a").read_text() == "one"


def test_two_that_write_one_file_at_once_leave_one_of_both_whole(tmp_path):
    path = tmp_path / "report.html"
    texts = [letter * 200_000 for letter in "abcd"]

    def often(text):
        for _ in range(20):
            write(path, text)

    threads = [threading.Thread(target=often, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and names_in(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    ("umask", "before", "after"), [(0o022, None, 0o644), (0o077, None, 0o600), (0o022, 0o600, 0o600)]
)
def test_permissions_are_those_that_open_would_give(tmp_path, umask, before, after):
    path = tmp_path / "file"
    if before is not None:
        path.touch()
        path.chmod(before)
    old = os.umask(umask)
    try:
        write(path, "")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == after


def test_the_error_names_the_file_and_not_its_other_name(tmp_path):
    (tmp_path / "cases.csv").mkdir()
    for name, culprit in (("cases.csv", "cases.csv"), ("missing/x", "missing"), ("n" * 300, "n" * 300)):
        with pytest.raises(OSError) as failed:
            write(tmp_path / name, "")
        assert failed.value.filename == str(tmp_path / culprit)


# --- files that the user names


def test_a_link_that_the_user_names_is_followed(tmp_path):
    target = tmp_path / "target"
    (tmp_path / "out").symlink_to(target)
    for text in ("one", "two"):
        write_named(tmp_path / "out", text)
        assert target.read_text() == text and (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1"])
def test_standard_output_may_be_named_and_loses_nothing(tmp_path, name):
    program = (
        "import sys; from pathlib import Path; from mpscale.core.files.writing import write_named\n"
        "print('before'); write_named(Path(sys.argv[1]), 'result\\n'); print('after')"
    )
    command = [sys.executable, "-c", program, name]
    with (tmp_path / "log").open("ab") as log:
        subprocess.run(command, stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\nresult\nafter\n"
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout == "before\nresult\nafter\n"


def test_a_pipe_and_a_device_may_be_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_named(tmp_path / "pipe", "through")
    reader.join()
    write_named(Path("/dev/null"), "gone")
    with pytest.raises(OSError) as full:
        write_named(Path("/dev/full"), "x")
    assert read == ["through"]
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/dev/full")
