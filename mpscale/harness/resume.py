"""Go on with a run that was stopped: what it has already, what must be the same, and what may differ and is noted."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpscale.core.case import Case
from mpscale.core.cause import Cause
from mpscale.core.columns import MEASURED, METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.device import VENDORS, Device
from mpscale.core.files.reading import RunError
from mpscale.core.invocation import RESUME, Invocation
from mpscale.core.machines import facts_of, machine, machine_words, same_machine
from mpscale.core.record import Record, values_of
from mpscale.core.run_folder import Journal, whole_lines
from mpscale.core.run_lock import RunIsHeld, RunLock
from mpscale.core.runs import Run, read_run
from mpscale.harness.supervisor import Options, Outcome
from mpscale.harness.without_xla import what_of
from mpscale.telemetry.client import Driver
from mpscale.telemetry.host import environment

_DECIDING_PACKAGES = ("mpscale", "keras", "tensorflow")
"""Packages whose version must be the same; with the last, TensorFlow under any of its names."""
_FREE_VARIABLES = ("CI", *(vendor.visible for vendor in VENDORS.values()))
"""Recorded variables that may differ: the device that they select is compared itself."""
_WRITTEN = ("journal.jsonl", "run.json", "steps", "gpu")
"""What a run that goes on adds to."""
FREE_SETTINGS = (
    "preset_reason", "workloads", "modes", "seeds", "repeats", "left_out", "set_apart", "timeout_s", "given_by",
)  # fmt: skip
"""Settings that follow from others, or from the tests that were chosen; the cases themselves are compared."""


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Args:
        journal: of the run, open.
        outcomes: of the cases that have a record, by id.
        settled: ids of those that are not run again.
        started: how many attempts there were.
        notes: what the user should know, one sentence each.
        finished: whether the run had ended.
        xla_refused: what XLA refused, by workload.
        added: ids of cases that gates have added to the plan and that have no result.
    """

    journal: Journal
    outcomes: Mapping[str, Outcome]
    settled: frozenset[str]
    started: int
    notes: Sequence[str]
    finished: bool
    xla_refused: Mapping[str, str] = field(default_factory=dict)
    added: Sequence[str] = ()


def refuse_other_versions(run: Run) -> None:
    """Check that this mpscale can go on with a run.

    Raises:
        RunError: it is of another version, lacks what is needed, or is none that goes on.
    """
    name, info = run.name, run.info
    if run.path.is_file() or run.path.parent.name != "runs":
        raise RunError(f"{RESUME}: {run.path} is not in a folder runs/, so it is kept as it is: make a run of your own")
    if "interleaved" in info:
        raise RunError(f"{RESUME}: {name} was made by `mpscale ab`, whose two runs take turns: neither can go on alone")
    if run.merged:
        raise RunError(f"{RESUME}: {name} was merged; go on with the run that lacks something, then merge again")
    for what, here in (("schema_version", SCHEMA_VERSION), ("method_version", METHOD_VERSION)):
        if info.get(what) != here:
            words = what.replace("_", " ")
            raise RunError(f"{RESUME}: {name} was measured with {words} {info.get(what)}, and this mpscale has {here}")
    there = {
        "invocation": Invocation.of(info),
        "planned": info.get("planned"),
        "settings": isinstance(info.get("settings"), dict) and info["settings"],
        "environment.packages": isinstance(run.environment.get("packages"), dict) and run.environment["packages"],
        "environment.device": run.device,
    }
    if missing := [name for name, value in there.items() if not value]:
        raise RunError(
            f"{RESUME}: run.json of {name} has no {', '.join(missing)}, which a run needs to go on; an older mpscale "
            "made it, or it was changed"
        )


def resume(path: Path, chosen: Sequence[Case], device: Device, driver: Driver, options: Options) -> Resumed:
    """Open a run to go on with it. The caller has checked it with :func:`refuse_other_versions`.

    Args:
        path: the run's folder.
        chosen: the cases of this session.
        device: where they run.
        driver: of the GPU.
        options: how they run.

    Raises:
        RunError: the run is still going on, or something that decides on its figures is not the same.
        OSError: its folder cannot be written.
    """
    try:
        lock = RunLock.take(path)
    except RunIsHeld as held:
        raise RunError(f"{RESUME}: {path.name} is still going on: {held}") from None
    try:
        if links := [name for name in _WRITTEN if (path / name).is_symlink()]:
            raise RunError(f"{RESUME}: {path / links[0]} is a link, and a run writes into its own folder only")
        # Read again: only now nobody else writes it.
        run = read_run(path)
        here = environment(device, driver, options.project)
        told = _Told.read(path)
        asked = json.loads(json.dumps(options.asked))
        if differing := [
            *_machines(run.environment, here, device),
            *(
                f"{what} is {now}, and was {then}"
                for what, now, then in (
                    *software_differences(here, run.environment),
                    *settings_differences(asked, run.info["settings"], asked["workloads"]),
                )
            ),
        ]:
            raise RunError(
                f"{RESUME}: {path.name} cannot go on here, because not everything is the same: {'; '.join(differing)}"
            )
        records = {str(record["case_id"]): record for record in run.records}
        without_xla = told.xla_refused if options.jit_fallback else {}
        settled = frozenset(
            case_id
            for case_id, record in records.items()
            if not record.may_pass and not (record["jit"] and record["workload"] in without_xla)
        )
        outcomes = {
            case_id: Outcome(record, told.step_s.get(case_id, []), told.phases.get(case_id, {}))
            for case_id, record in records.items()
        }
        noted = {
            "differs": dict(_noted(run.environment, here)),
            "apart": list(_apart(chosen, settled, records, told.ended)),
        }
        journal = Journal.reopen(path, run.info, run.records, noted, lock)
    except BaseException:
        lock.free()
        raise
    notes = list(run.problems)
    if not lock.works:
        notes.append(f"the file system of {path} has no locks: make sure that no other process writes this run")
    added = sorted(outcomes.keys() - settled - set(run.info["planned"]))
    return Resumed(journal, outcomes, settled, told.started, notes, run.finished, without_xla, added)


def with_allocator(options: Options, settled: Sequence[Record]) -> Options:
    """The options of a run that goes on: it must not mix figures of two allocators, whichever was to be tried first."""
    known = set(values_of(settled, "gpu_allocator")) & {"cuda_malloc_async", "bfc"}
    if options.gpu_allocator != "auto" or len(known) != 1 or os.environ.get("TF_GPU_ALLOCATOR"):
        return options
    return dataclasses.replace(options, gpu_allocator=known.pop())


def _machines(there: Mapping[str, Any], here: Mapping[str, Any], device: Device) -> Iterator[str]:
    """Say that the machine is another one."""
    known = _dict(there.get("device"))
    ours = machine(device.kind, device.name, here)
    theirs = machine(known.get("kind"), known.get("name"), there)
    if not same_machine(theirs, ours):
        yield f"the machine is {machine_words(ours)}, and was {machine_words(theirs)}"


Difference = tuple[str, str, str]
"""What is not the same, and its two values in words."""


def software_differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the versions and variables of two environments, as in run.json, that decide on figures and differ."""
    packages = [_dict(side.get("packages")) for side in (one, two)]
    for name in sorted({*packages[0], *packages[1]}):
        values = [side.get(name) for side in packages]
        if values[0] != values[1] and (name in _DECIDING_PACKAGES or name.startswith(("tensorflow-", "tf-"))):
            yield name, str(values[0] or "missing"), str(values[1] or "missing")
    variables = [_dict(side.get("variables")) for side in (one, two)]
    for name in sorted({*variables[0], *variables[1]} - {*_FREE_VARIABLES}):
        values = [side.get(name) for side in variables]
        if values[0] != values[1]:
            yield f"the environment variable {name}", _value(values[0]), _value(values[1])


def settings_differences(
    one: Mapping[str, Any], two: Mapping[str, Any], workloads: Iterable[str], free: Sequence[str] = FREE_SETTINGS
) -> Iterator[Difference]:
    """Yield the settings of two runs, as in run.json, that decide on figures and differ.

    Args:
        one: the settings of a run.
        two: those of the other.
        workloads: whose own settings count.
        free: settings that may differ.
    """
    for name in dict.fromkeys([*one, *two]):
        if name not in free and one.get(name) != two.get(name):
            yield f"the setting {name}", _value(one.get(name)), _value(two.get(name))
    own = [_dict(side.get("set_apart")) for side in (one, two)]
    for workload in workloads:
        values = [side.get(workload) for side in own]
        if values[0] != values[1]:
            yield f"what is set for {workload} alone", _value(values[0]), _value(values[1])


def _dict(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _value(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def _noted(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield what differs and may: its name, and its values now and then."""
    # What only a worker knows is not known here yet.
    now, then = (dict(facts_of(side)) for side in (here, {name: there[name] for name in here if name in there}))
    uuids = [_dict(side.get("device")).get("uuid") for side in (here, there)]
    now["device uuid"], then["device uuid"] = map(str, uuids)
    for name in dict.fromkeys([*now, *then]):
        if now.get(name) != then.get(name):
            yield name, [now.get(name, ""), then.get(name, "")]


def _apart(
    chosen: Sequence[Case], settled: frozenset[str], records: Mapping[str, Record], ended: Mapping[str, datetime]
) -> Iterator[dict[str, Any]]:
    """Yield the groups of which some modes were measured before the run was stopped, and others are now."""
    groups: dict[tuple[str, int, int], list[datetime]] = {}
    for record in records.values():
        case_id = str(record["case_id"])
        if case_id in settled and case_id in ended and record["status"] in MEASURED:
            groups.setdefault((record.place[0], *record.key), []).append(ended[case_id])
    for group in dict.fromkeys(case.group for case in chosen if case.id not in settled):
        if times := groups.get(group):
            seconds = round((datetime.now(UTC) - max(times)).total_seconds())
            yield dict(zip(("workload", "seed", "repeat"), group, strict=True)) | {"seconds": seconds}


@dataclass
class _Told:
    """What only the journal says of its cases."""

    step_s: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    ended: dict[str, datetime] = field(default_factory=dict)
    started: int = 0
    xla_refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> _Told:
        """Read the journal of the run in ``path``, as far as its lines can be read."""
        found = cls()
        for line in whole_lines((path / "journal.jsonl").read_bytes())[0].split(b"\n"):
            try:
                event = json.loads(line)
                kind = event["event"]
                if kind == "case_started":
                    found.started += 1
                elif kind == "case_finished":
                    found._take(str(event["case_id"]), event)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue  # whoever reads the run says so
        return found

    def _take(self, case_id: str, event: Mapping[str, Any]) -> None:
        blocks, phases = event.get("step_s"), event.get("phases")
        if isinstance(blocks, list) and all(type(one) in (int, float) for one in blocks):
            self.step_s[case_id] = [float(one) for one in blocks]
        self.phases[case_id] = phases if isinstance(phases, dict) else {}
        self.ended[case_id] = datetime.fromisoformat(event["time"]).astimezone(UTC)
        if event["record"]["cause"] == Cause.XLA_REFUSED:
            record = Record.from_json(event["record"])
            self.xla_refused.setdefault(str(record["workload"]), what_of(record))
