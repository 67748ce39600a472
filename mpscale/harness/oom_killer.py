"""Whether the kernel's out-of-memory killer killed a process: what the kernel counts and logs before and after."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from mpscale.telemetry.cgroup import ROOT, kills_in, memory_group
from mpscale.telemetry.host import available_mib

_FIRST_NAMESPACE = "pid:[4026531836]"
"""The PID namespace of the kernel itself. In another, a process has other ids than in the kernel's log."""
_KILLED = re.compile(r"[Oo]ut of memory: Kill(?:ed)? process (\d+) ")
_MOST_RECORDS = 10_000
_MOSTLY = 0.8
"""The share of the memory that was free from which on a killed process is said to have used it up."""


@dataclass(frozen=True)
class Evidence:
    """Why a process may have been killed for lack of memory.

    Args:
        text: what was seen, in one line.
        certain: whether it shows that this very process was; False if it only makes that likely.
    """

    text: str
    certain: bool


class OomKiller:
    """Watches what the kernel tells about its out-of-memory killer, in a ``with`` block around the life of a process.

    The kernel's log names the process, but only root may read it. The counter of a memory cgroup is about all
    processes in it, that of the machine about all there are.

    Args:
        pids: the processes of a case, which must be alive.
        root: where ``/proc`` and ``/dev`` are; another folder in tests.
    """

    def __init__(self, *pids: int, root: Path = ROOT) -> None:
        self._pids, self._root = set(pids), root
        self._group = memory_group(pids[0], root)
        self._before = self._kills()
        self._free_mib = available_mib()
        self._log: int | None = None

    def __enter__(self) -> Self:
        """Begin to listen to the kernel's log, if it may be read and tells process ids of this namespace."""
        with contextlib.suppress(OSError):
            if str((self._root / "proc/self/ns/pid").readlink()) == _FIRST_NAMESPACE:
                self._log = os.open(self._root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                os.lseek(self._log, 0, os.SEEK_END)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def evidence(self, peak_mib: float | None) -> Evidence | None:
        """What shows that a process that ended with SIGKILL was killed for lack of memory; None if nothing does.

        Args:
            peak_mib: the largest resident memory of the process, and of those beside it, that was seen.
        """
        if self._pids & self._victims():
            return Evidence("the kernel killed it because memory ran out (kernel log)", certain=True)
        group, machine = self._kills()
        if _rose(self._before[0], group):
            return Evidence(
                "the kernel killed a process of its memory cgroup because the cgroup's or the machine's memory ran out",
                certain=True,
            )
        if _rose(self._before[1], machine):
            text = "meanwhile the kernel killed a process of this machine because memory ran out, probably this one"
            return Evidence(text, certain=False)
        if peak_mib is not None and self._free_mib is not None and peak_mib >= _MOSTLY * self._free_mib:
            text = (
                f"probably because memory ran out: it used {peak_mib:,.0f} of the {self._free_mib:,.0f} MiB that were "
                "free when it started"
            )
            return Evidence(text, certain=False)
        return None

    def _kills(self) -> tuple[int | None, int | None]:
        """How many processes the kernel has killed so far, in the process's memory cgroup and on the machine."""
        of_group = None if self._group is None else self._group.oom_kills()
        return of_group, kills_in(self._root / "proc/vmstat")

    def _victims(self) -> set[int]:
        """The processes that the kernel's log has named as killed since the start."""
        found: set[int] = set()
        if self._log is None:
            return found
        for _ in range(_MOST_RECORDS):
            try:
                record = os.read(self._log, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # older records were overwritten; the next read gets the oldest that is left
            except OSError:
                break
            if not record:
                break
            found |= {int(pid) for pid in _KILLED.findall(record.decode(errors="replace"))}
        return found


def _rose(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after > before
