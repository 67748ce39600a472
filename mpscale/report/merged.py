"""What a reader must know of a run that is one part of a plan, or that was merged from several runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from mpscale.analysis.quantities import COSTS
from mpscale.core.machines import facts_of
from mpscale.core.record import Record, grouped
from mpscale.core.runs import Run
from mpscale.core.shard import Share
from mpscale.report.table import DASH, Heading, Table, plural, text

_NAMED = 8
"""Most facts or parts that a cell or a sentence names; more are counted."""
_LONGEST = 80


def in_short(run: Run) -> str:
    """Say in a few words that the run is a part, or was merged; empty if it is a run of its own."""
    if run.merged:
        return f"merged from {plural(len(run.merged), 'run')}"
    share = Share.of_run(run.info)
    return "" if share is None else f"part {share.shard.part} of {share.shard.of}"


def sentences(run: Run) -> Iterator[str]:
    """Yield what the figures of such a run are of, one sentence each."""
    parts = run.merged
    share = Share.of_run(run.info)
    if share is not None and not parts:
        yield f"This run is {share.words()}; mpscale merge makes one run of all parts."
    if not parts:
        return
    found = run.info["merged"]
    gpus = {uuid for part in parts if (uuid := _uuid(_environment(part)))}
    on = f" on {plural(len(gpus), 'GPU')}" if gpus else ""
    yield f"The run was merged from {plural(len(parts), 'run')}{on} (see Parts)."
    if found.get("accuracy_only") is True:
        yield (
            "They were on different devices, so there are no step times, memory and energy: over several devices those "
            "are no one figure."
        )
    else:
        yield (
            "All modes of a workload and seed are from one of them, so speed-ups compare what ran side by side. Step "
            "times, memory and energy of a row are over all of their machines, which are of one kind; an interval also "
            "holds how much these machines differ."
        )
        if len(ratios := _against_the_others(run)) > 1:
            slowest = max(ratios.values()) / min(ratios.values())
            yield f"Steps of the slowest part took {slowest:.2f} times as long as those of the fastest."
    missing = found.get("missing_parts")
    numbers = [number for number in missing if type(number) is int] if isinstance(missing, list) else []
    if numbers:
        named = ", ".join(map(str, numbers[:_NAMED])) + (" and more" if len(numbers) > _NAMED else "")
        one = len(numbers) == 1
        yield f"Part{'' if one else 's'} {named} {'is' if one else 'are'} missing: use --mp-shard, and merge again."


def parts(run: Run) -> Table:
    """List what a run was merged from, with what differs; empty if it was not."""
    if not run.merged:
        return Table([], [])
    environments = [_environment(part) for part in run.merged]
    facts = [dict(facts_of(one)) for one in environments]
    for own, one in zip(facts, environments, strict=True):
        if uuid := _uuid(one):
            own["device uuid"] = uuid
    names = dict.fromkeys(name for own in facts for name in own)
    differing = [name for name in names if len({own.get(name) for own in facts}) > 1]
    slower = _against_the_others(run)
    rows = []
    for part, own in zip(run.merged, facts, strict=True):
        shard, cases = part.get("shard"), part.get("cases")
        told = [f"{name} {own.get(name, 'unknown')[:_LONGEST]}" for name in differing]
        rest = len(told) - _NAMED
        rows.append(
            [
                f"{shard.get('part')} of {shard.get('of')}" if isinstance(shard, dict) else DASH,
                text(part.get("run")),
                text(str(part.get("started"))[:16].replace("T", " ")),
                str(len(cases)) if isinstance(cases, list) else DASH,
                DASH if (ratio := slower.get(str(part.get("run")))) is None else f"{ratio:.2f}",
                "; ".join([*map(text, told[:_NAMED]), *([f"{rest} more in run.json"] if rest > 0 else [])]) or DASH,
            ]
        )
    headers = [
        Heading("part", "Which part of the plan it is, if the plan was divided."),
        "run",
        "started (UTC)",
        "cases",
        Heading(
            "step time against the others",
            "Geometric mean over workloads and modes of the step time in this part, divided by the mean of all parts. "
            "Above 1: its machine was slower.",
        ),
        Heading("what differs", "Facts about its machine and software that not all parts share."),
    ]
    return Table(headers, rows).without_blank()


def _against_the_others(run: Run) -> dict[str, float]:
    """How slow each part was, from the rows that several parts have; by the name of its run."""
    of_case = {
        case_id: str(part.get("run"))
        for part in run.merged
        if isinstance(part.get("cases"), list)
        for case_id in part["cases"]
        if isinstance(case_id, str)
    }
    ratios: dict[str, list[float]] = {}
    for records in grouped(run.records).values():
        means: dict[str, float] = {}
        by_part: dict[str, list[Record]] = {}
        for record in records:
            by_part.setdefault(of_case.get(str(record["case_id"]), ""), []).append(record)
        for name, own in by_part.items():
            if times := list(COSTS["step_time"].by_process(own).values()):
                means[name] = statistics.fmean(map(math.log, times))
        if len(means) > 1:
            centre = statistics.fmean(means.values())
            for name, value in means.items():
                ratios.setdefault(name, []).append(value - centre)
    return {name: math.exp(statistics.fmean(values)) for name, values in ratios.items()}


def _environment(part: Mapping[str, Any]) -> Mapping[str, Any]:
    found = part.get("environment")
    return found if isinstance(found, Mapping) else {}


def _uuid(environment: Mapping[str, Any]) -> str:
    device = environment.get("device")
    return str(device.get("uuid") or "") if isinstance(device, Mapping) else ""
