"""Disks that are full at random moments: a small file system in memory, and a file that fills it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from torture.found import Reference
from torture.rounds import Blow, Disturb, Session

SIZE_MIB = 8
_ENTERED = "MPSCALE_TORTURE_UNSHARED"


def why_not() -> str | None:
    """Why no file system can be mounted here; None if one can."""
    if shutil.which("mount") is None or shutil.which("unshare") is None:
        return "mount and unshare, of util-linux, are not installed"
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        return None
    return "mounting a file system needs root with CAP_SYS_ADMIN, or user namespaces (unshare -rm)"


def enter_namespace() -> None:
    """Go on in a namespace whose mounts end with it, as its root if this user is not. Do nothing if there is none."""
    how = "-m" if os.geteuid() == 0 else "-rm"
    if _ENTERED in os.environ or shutil.which("unshare") is None:
        return
    if subprocess.run(["unshare", how, "true"], capture_output=True, check=False).returncode == 0:
        os.environ[_ENTERED] = "1"
        os.execvp("unshare", ["unshare", how, sys.executable, "-m", "torture", *sys.argv[1:]])


@contextlib.contextmanager
def small_disk(folder: Path, size_mib: float = SIZE_MIB) -> Iterator[Path]:
    """Mount a small file system on a folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size_mib * 1024)}k", "none", folder], check=True)
    try:
        yield folder
    finally:
        # Lazily: a process that is being killed may still have a file open.
        subprocess.run(["umount", "-l", folder], check=True)


def unmount_below(folder: Path) -> None:
    """Unmount whatever is mounted in a folder."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if (point := line.split()[1]).startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", point], check=False)


def plan(rng: Random, reference: Reference, disk: Path) -> list[Disturb]:
    """Return how the sessions of a round are disturbed: the disk fills up one to three times in one or two of them."""
    return [_filled(disk, rng.choice([1, 1, 2, 3]), reference) for _ in range(rng.choice([1, 1, 2]))]


def _filled(disk: Path, times: int, reference: Reference) -> Disturb:
    """Return what fills a disk, leaves some bytes or none, and gives the space back after a while or at the end."""
    cases = len(reference.cases)

    def disturb(session: Session, rng: Random) -> Iterator[Blow]:
        left = cases - len(session.journal().good())
        for _ in range(times):
            after = rng.choice([-1, *range(left + 1), *range(left + 1)])  # before the run begins, less is at stake
            if not session.reach(after, rng.uniform(0, reference.pace.after(after, left))):
                return
            free = rng.choice([0, 0, rng.randrange(1 << 14), rng.randrange(1 << 18)])
            seconds = None if rng.random() < 0.4 else rng.uniform(0.1, 4.0)
            yield from _starve(session, disk, free, seconds)

    return disturb


def filled_for(disk: Path, cases: int, seconds: float) -> Disturb:
    """Return what fills a disk to the last byte for so many seconds, when so many cases have finished."""

    def disturb(session: Session, rng: Random) -> Iterator[Blow]:
        if session.reach(cases, 0.1):
            yield from _starve(session, disk, 0, seconds)

    return disturb


def _starve(session: Session, disk: Path, free: int, seconds: float | None) -> Iterator[Blow]:
    """Fill a disk but for ``free`` bytes, for so many seconds, or with None until the session ends."""
    session.look()
    phase, at = session.phase(), time.monotonic() - session.start
    filler = disk / "filler"
    try:
        _fill(filler, free)
        until = "to the end" if seconds is None else f"for {seconds:.1f} s"
        yield Blow(session.number, round(at, 2), phase, f"{disk.name} {until}, {free} bytes left", "ENOSPC")
        if seconds is None:
            session.wait()
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                session.process.wait(seconds)
    finally:
        filler.unlink(missing_ok=True)


def _fill(filler: Path, free: int) -> None:
    """Write a file until the disk is full, and then make it shorter by ``free`` bytes."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)) == 1 << 16:
            pass
    os.truncate(filler, max(0, filler.stat().st_size - free))
