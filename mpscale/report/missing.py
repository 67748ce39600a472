"""What a run that was stopped lacks, and the command that goes on with it; what going on did to its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpscale.core.case import Place
from mpscale.core.invocation import resume_command
from mpscale.core.runs import Run
from mpscale.report.table import plural

_SIDE_BY_SIDE_S = 60
"""An interruption that is not longer, in seconds, is like the time between two cases."""

_NAMED = 5
"""Most rows that a sentence names; more are counted."""


def lacks(run: Run) -> str:
    """Say how many cases of which workload and mode a run lacks, as a sentence; empty if it has all."""
    planned = set(run.info.get("planned", []))
    unsettled = [record for record in run.records if record.may_pass]
    again = [record for record in unsettled if record["case_id"] in planned]
    added = [record.place for record in unsettled if record["case_id"] not in planned] if planned else []
    stopped = [record.place for record in again if record["status"] == "interrupted"]
    failed = [record.place for record in again if record["status"] != "interrupted"]
    without = [place for place, keys in run.waiting.items() for _ in keys] + stopped
    parts = [f"No result yet: {_counted(without)}"] if without else []
    parts += [f"{'f' if parts else 'F'}ailed for a reason that may pass: {_counted(failed)}"] if failed else []
    if added:
        parts.append(f"{'n' if parts else 'N'}ot measured again for a gate: {_counted(added)}")
    return f"{'; '.join(parts)}." if parts else ""


def go_on(run: Run, here: Path | None = None) -> str:
    """Return the command that runs what a run lacks; empty if it lacks nothing or cannot go on.

    Args:
        run: the run.
        here: see :func:`mpscale.core.invocation.resume_command`.
    """
    return (resume_command(run, here) or "") if lacks(run) else ""


def _counted(places: Iterable[Place]) -> str:
    found = Counter(places)
    named = [f"{number} of {workload} in {mode}" for (workload, mode), number in found.most_common(_NAMED)]
    rest = sum(found.values()) - sum(number for _, number in found.most_common(_NAMED))
    return ", ".join([*named, f"{rest} of other rows"] if rest else named)


def interruptions(run: Run) -> Iterator[str]:
    """Yield what a reader must know of a run that was stopped and went on, one sentence each."""
    resumed = _dicts(run.info.get("resumed"))
    if not resumed:
        return
    times = ", ".join(str(one.get("time"))[:16].replace("T", " ") for one in resumed)
    yield f"The run was stopped and went on {plural(len(resumed), 'time')} ({times} UTC)."
    differs = (one.get("differs") for one in resumed)
    differing = list(dict.fromkeys(str(name) for found in differs if isinstance(found, dict) for name in found))
    if differing:
        named = ", ".join(differing[:_NAMED]) + (f" and {len(differing) - _NAMED} more" if differing[_NAMED:] else "")
        yield f"Not the same as before: {named} (run.json has the values)."
    # Of a group that several interruptions fell into, the last one knows when its first modes were measured.
    apart = {
        tuple(str(group.get(name)) for name in ("workload", "seed", "repeat")): seconds
        for one in resumed
        for group in _dicts(one.get("apart"))
        if isinstance(seconds := group.get("seconds"), int | float) and _SIDE_BY_SIDE_S < seconds < 1e12
    }
    if apart:
        longest = max(apart, key=lambda group: apart[group])
        workload, seed, repeat = longest
        which = f"seed {seed}" if repeat == "0" else f"repeat {repeat}"
        more = f", and between those of {plural(len(apart) - 1, 'other seed')}" if len(apart) > 1 else ""
        yield (
            f"An interruption of {_duration(apart[longest])} fell between the modes of {workload}, {which}{more}. What "
            "changed on the machine in that time is part of that pair of processes, and of its speed-up's interval."
        )


def _dicts(found: Any) -> list[dict[str, Any]]:
    """The dicts in a list from JSON; none if it is no list."""
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
