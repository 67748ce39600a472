"""The memory cgroup of a process, of version 1 or 2: its limit, what is left of it, and its count of kills."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Where ``/proc`` and ``/sys`` are; another folder in tests."""

_UNLIMITED = 2**62
"""Version 1 has no word for that: it gives the largest number of bytes in whole pages."""


@dataclass(frozen=True)
class MemoryGroup:
    """A memory cgroup.

    Args:
        folder: holds its files.
        top: the uppermost folder that this process sees. The limits of all groups on the way there hold.
        version: 1 or 2.
    """

    folder: Path
    top: Path
    version: int

    def limit_mib(self) -> float | None:
        """The lowest limit in MiB of this group and those above it; None without one."""
        return min((limit for limit, _ in self._limits()), default=None)

    def left_mib(self) -> float | None:
        """The memory in MiB that its processes can still take before a limit is reached; None without a limit."""
        return min((max(limit - used, 0.0) for limit, used in self._limits()), default=None)

    def oom_kills(self) -> int | None:
        """How many processes the kernel has killed here for lack of memory; None if it does not count them."""
        return kills_in(self.folder / ("memory.oom_control" if self.version == 1 else "memory.events"))

    def _limits(self) -> list[tuple[float, float]]:
        """The limit of each group that has one, and what its processes use, in MiB."""
        names = ("limit_in_bytes", "usage_in_bytes") if self.version == 1 else ("max", "current")
        found = []
        for folder in (self.folder, *self.folder.parents):
            most, now = (_read(folder / f"memory.{name}").strip() for name in names)
            if most.isdecimal() and now.isdecimal() and int(most) < _UNLIMITED:
                found.append((int(most) / 2**20, int(now) / 2**20))
            if folder == self.top:
                break
        return found


def memory_group(pid: int | str, root: Path) -> MemoryGroup | None:
    """The memory cgroup of a process, by its id or ``self``; None if it has none that can be read."""
    mounted: dict[int, tuple[str, Path]] = {}
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # ID, parent, device, root of the mount, mount point, options, optional fields, -, type, source, options.
        before, _, after = line.partition(" - ")
        fields, source = before.split(), after.split()
        if len(fields) < 5 or len(source) < 3:
            continue
        if source[0] == "cgroup2" or (source[0] == "cgroup" and "memory" in source[2].split(",")):
            version = 2 if source[0] == "cgroup2" else 1
            mounted.setdefault(version, (fields[3], root / fields[4].lstrip("/")))
    for line in _read(root / f"proc/{pid}/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 1 if "memory" in controllers.split(",") else 2
        if version not in mounted or (version == 2 and controllers):
            continue
        seen_from, top = mounted[version]
        # In a container the mount may show only a part of the tree, from `seen_from` on, or be that of the group.
        inside = os.path.relpath(path, seen_from) if path.startswith(seen_from) else "."
        folder = top if inside == "." else top / inside
        name = "memory.usage_in_bytes" if version == 1 else "memory.current"
        # The group at the root of version 2 has no such file, and no limit either.
        if (folder / name).is_file() or (folder / "memory.events").is_file():
            return MemoryGroup(folder, top, version)
    return None


def kills_in(file: Path) -> int | None:
    """The line ``oom_kill N`` of a file of the kernel, None if it has none."""
    found = re.search(r"^oom_kill (\d+)$", _read(file), re.MULTILINE)
    return None if found is None else int(found[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
