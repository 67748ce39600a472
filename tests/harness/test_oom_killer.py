"""What shows that the kernel's out-of-memory killer killed a worker, and what only makes it likely."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpscale.harness import oom_killer
from mpscale.harness.oom_killer import OomKiller
from mpscale.telemetry.cgroup import ROOT, memory_group

GREEDY = """
import sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text("0")
print(flush=True)
sys.stdin.readline()
held = bytearray(2**28)
"""
GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group():
    """A memory cgroup, of version 1, of 64 MiB."""
    made = GROUPS / f"mpscale-test-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made here: {error}")
    try:
        (made / "memory.limit_in_bytes").write_text(str(2**26))
        with contextlib.suppress(OSError):
            (made / "memory.memsw.limit_in_bytes").write_text(str(2**26))
        if "oom_kill " not in (made / "memory.oom_control").read_text():
            pytest.skip("this kernel does not count what its out-of-memory killer kills")
        yield made
    finally:
        made.rmdir()


def killed_in(group, look):
    """Have the kernel kill a process for lack of memory; return its signal, and what ``look(OomKiller)`` does then."""
    command = [sys.executable, "-c", GREEDY, str(group)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with OomKiller(child.pid) as killer:
            child.stdin.write(b"\n")
            child.stdin.flush()
            return -child.wait(60), look(killer)


def test_a_real_kill_is_in_the_counter_of_its_cgroup(group, monkeypatch):
    monkeypatch.setattr(oom_killer, "_FIRST_NAMESPACE", "no log")
    number, seen = killed_in(group, lambda killer: killer.evidence(None))
    assert number == signal.SIGKILL
    assert seen.certain
    assert "a process of its memory cgroup" in seen.text


def test_a_real_kill_is_in_the_log_of_the_kernel(group):
    number, (victims, seen) = killed_in(group, lambda killer: (killer._log is not None, killer.evidence(None)))
    if not victims:
        pytest.skip("the kernel's log cannot be read here")
    assert number == signal.SIGKILL
    assert seen.certain
    assert "kernel log" in seen.text


def test_the_limit_of_a_real_cgroup_is_known(group):
    command = [sys.executable, "-c", GREEDY, str(group)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        found = memory_group(child.pid, ROOT)
        child.kill()
    assert found.limit_mib() == 64.0
    assert found.left_mib() is not None


@pytest.mark.parametrize("version", [1, 2])
def test_the_lowest_limit_on_the_way_to_the_root_counts(tmp_path, version):
    system(tmp_path, version)
    limit, used = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    group = memory_group(1234, tmp_path)
    assert (group.limit_mib(), group.left_mib()) == (None, None)
    for folder, most, now in ((group.top, 300, 250), (group.folder, 200, 100)):
        (folder / f"memory.{limit}").write_text(f"{most * 2**20}\n")
        (folder / f"memory.{used}").write_text(f"{now * 2**20}\n")
    assert (group.limit_mib(), group.left_mib()) == (200.0, 50.0)
    unlimited = "9223372036854771712\n" if version == 1 else "max\n"
    (group.folder / f"memory.{limit}").write_text(unlimited)
    assert group.limit_mib() == 300.0


def system(root, version=2, group=0, machine=0, log=None):
    """Make the files of a system: a memory cgroup with this many kills, and that many on the whole machine."""
    folder = root / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    mount = f"30 20 0:1 / /{folder.relative_to(root)} rw - "
    mount += "cgroup cgroup rw,memory" if version == 1 else "cgroup2 cgroup2 rw"
    name, text = ("memory.oom_control", "under_oom 0\n") if version == 1 else ("memory.events", "oom 0\n")
    files = {
        "proc/self/mountinfo": f"22 1 0:2 / / rw - ext4 /dev/sda rw\n{mount}\n",
        "proc/1234/cgroup": "5:cpu:/\n4:memory:/job\n" if version == 1 else "0::/job\n",
        "proc/vmstat": f"pgfault 5\noom_kill {machine}\n",
        f"{folder.relative_to(root)}/job/{name}": f"{text}oom_kill {group}\n",
        f"{folder.relative_to(root)}/job/memory.usage_in_bytes": "4096\n",
    }
    if log is not None:
        files["dev/kmsg"] = log
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)


OF_GROUP, OF_MACHINE = (True, "a process of its memory cgroup"), (False, "a process of this machine")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"group": 1, "machine": 1}, OF_GROUP),
        ({"machine": 1}, OF_MACHINE),
        ({}, None),
    ],
    ids=["its cgroup", "the machine", "nothing"],
)
def test_counters_tell_whose_kill_it_was(tmp_path, version, after, expected):
    system(tmp_path, version)
    with OomKiller(1234, root=tmp_path) as killer:
        system(tmp_path, version, **after)
        seen = killer.evidence(None)
    assert (None if seen is None else (seen.certain, expected[1] in seen.text)) == (expected and (expected[0], True))


def test_kills_before_the_case_do_not_count(tmp_path):
    system(tmp_path, group=3, machine=7)
    with OomKiller(1234, root=tmp_path) as killer:
        assert killer.evidence(None) is None


@pytest.mark.parametrize(
    ("line", "is_it"),
    [
        ("4,1,1,-;Memory cgroup out of memory: Killed process 1234 (python) total-vm:1kB\n", True),
        ("4,1,1,-;Out of memory: Kill process 1234 (python) score 900 or sacrifice child\n", True),
        ("4,1,1,-;Out of memory: Killed process 12345 (python) total-vm:1kB\n", False),
        ("6,1,1,-;process 1234 was fine\n", False),
    ],
)
def test_only_a_kill_of_this_very_process_counts_in_the_log(tmp_path, line, is_it):
    system(tmp_path, log="")
    (tmp_path / "proc/self/ns").mkdir()
    (tmp_path / "proc/self/ns/pid").symlink_to(oom_killer._FIRST_NAMESPACE)
    with OomKiller(1234, root=tmp_path) as killer:
        with (tmp_path / "dev/kmsg").open("a") as log:
            log.write(line)
        seen = killer.evidence(None)
    assert (seen is not None) == is_it


def test_in_another_namespace_the_log_has_other_process_ids(tmp_path):
    system(tmp_path, log="")
    with OomKiller(1234, root=tmp_path) as killer:
        (tmp_path / "dev/kmsg").write_text("4,1,1,-;Out of memory: Killed process 1234 (python) total-vm:1kB\n")
        assert killer.evidence(None) is None


def test_without_any_counter_a_process_that_took_most_of_the_free_memory_probably_ran_out(tmp_path, monkeypatch):
    monkeypatch.setattr(oom_killer, "available_mib", lambda: 1000.0)
    with OomKiller(1234, root=tmp_path) as killer:
        assert killer.evidence(100.0) is None
        seen = killer.evidence(900.0)
    assert not seen.certain
    assert "900 of the 1,000 MiB" in seen.text


def test_a_container_shows_its_own_part_of_the_tree(tmp_path):
    system(tmp_path)
    mount = "30 20 0:1 /docker/7 /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
    (tmp_path / "proc/self/mountinfo").write_text(mount)
    (tmp_path / "proc/1234/cgroup").write_text("0::/docker/7/job\n")
    with OomKiller(1234, root=tmp_path) as killer:
        system(tmp_path, group=1)
        (tmp_path / "proc/self/mountinfo").write_text(mount)
        assert killer.evidence(None).certain
