"""What a run that was stopped lacks, and the command that goes on with it; what going on did to its figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpscale.core.case import Place
from mpscale.core.invocation import resume_command
from mpscale.core.runs import Run
from mpscale.report.table import plural

_NAMED = 5
"""Most rows that a sentence names; more are counted."""


def lacks(run: Run) -> str:
    """Say how many cases of which workload and mode a run lacks, as a sentence; empty if it has all."""
    planned = set(run.info.get("planned", []))
    again = [record for record in run.records if record.may_pass and record["case_id"] in planned]
    stopped = [record.place for record in again if record["status"] == "interrupted"]
    failed = [record.place for record in again if record["status"] != "interrupted"]
    without = [place for place, keys in run.waiting.items() for _ in keys] + stopped
    parts = [f"No result yet: {_counted(without)}"] if without else []
    parts += [f"{'f' if parts else 'F'}ailed for a reason that may pass: {_counted(failed)}"] if failed else []
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
    resumed = [one for one in run.info.get("resumed") or () if isinstance(one, dict)]
    if not resumed:
        return
    times = ", ".join(str(one.get("time"))[:16].replace("T", " ") for one in resumed)
    yield f"The run was stopped and went on {plural(len(resumed), 'time')} ({times} UTC)."
    differing = list(dict.fromkeys(name for one in resumed for name in one.get("differs") or ()))
    if differing:
        named = ", ".join(differing[:_NAMED]) + (f" and {len(differing) - _NAMED} more" if differing[_NAMED:] else "")
        yield f"Not the same as before: {named} (run.json has the values)."
    # Of a group that several interruptions fell into, the last one knows when its first modes were measured.
    apart = {
        (str(group.get("workload")), group.get("seed"), group.get("repeat")): group.get("seconds")
        for one in resumed
        for group in one.get("apart") or ()
        if isinstance(group, dict) and isinstance(group.get("seconds"), int | float)
    }
    if apart:
        workload, seed, repeat = max(apart, key=lambda group: apart[group] or 0)
        which = f"repeat {repeat}" if repeat else f"seed {seed}"
        longest = _duration(apart[workload, seed, repeat] or 0)
        yield (
            f"{plural(len(apart), 'pair')} of processes {'was' if len(apart) == 1 else 'were'} not measured side by "
            f"side: an interruption fell between the modes, of {longest} at most ({workload}, {which}). A drift of the "
            "machine in that time is part of the ratios of those pairs, and of their intervals."
        )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
