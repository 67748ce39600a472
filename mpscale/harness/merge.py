"""Makes one run of several: of the parts that ``--mp-shard`` has made of a plan, or of runs with different cases.

What is compared with each other was measured by one session on one machine: the modes of a workload and a seed or
repeat are never in two parts. The parts stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpscale.core.case import CaseId
from mpscale.core.columns import MEASURED, Topic, measured_columns
from mpscale.core.files.reading import JOURNAL, RunError, parse_json, read_lines
from mpscale.core.machines import hardware, machine_words, same_machine
from mpscale.core.reason import Code, Reason
from mpscale.core.record import Record, values_of
from mpscale.core.runs import Run, read_run
from mpscale.core.shard import Share, group_of
from mpscale.harness.resume import FREE_SETTINGS, settings_differences, software_differences

_FREE = (*FREE_SETTINGS, "cores")
"""Settings that may differ: which cores a session used is about its machine, and how many is compared as such."""
_OWN_FILES = ("run.json", "journal.jsonl", "steps", "gpu")
LINK = "is a link, and a run is merged from the files of its own folder only"
_NAMED = 3
"""Most cases or runs that a message names; more are counted."""
_TOPICS = (Topic.STEP_TIME, Topic.ARITHMETIC, Topic.HOST_NOISE, Topic.MEMORY, Topic.ENERGY, Topic.GPU_STATE)
COSTS = {name for topic in _TOPICS for name in measured_columns(topic)} | {"train_wall_time_s", "time_to_target_s"}
"""What depends on the device, and is no property of a training."""
_ELSEWHERE = Reason(
    Code.NOT_COMPARABLE, "the run was merged from different devices, whose costs are no one figure; its parts have them"
)


@dataclass(frozen=True)
class Part:
    """A run that is merged with others, and the part of a plan that it has, if it has one."""

    run: Run
    share: Share | None
    workloads: Sequence[str]

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.run.name

    @property
    def planned(self) -> list[str]:
        """Ids of the cases that it should have, and of those that it has besides."""
        return list(dict.fromkeys([*self.run.info["planned"], *(str(one["case_id"]) for one in self.run.records)]))

    def case(self, case_id: str) -> CaseId:
        """Which case it is.

        Raises:
            RunError: the id is that of no case.
        """
        if (found := CaseId.parse(case_id, self.workloads)) is None:
            raise RunError(f"{self.run.path / 'run.json'}: plans {case_id!r:.80}, which is no case; take another copy")
        return found

    def lacking(self) -> list[str]:
        """Ids of the cases of the plan that have no result, because they were not started or were interrupted."""
        stopped = {str(one["case_id"]) for one in self.run.records if one["status"] == "interrupted"}
        waiting = {*self.run.not_started, *stopped}
        return [case_id for case_id in self.planned if case_id in waiting]


@dataclass(frozen=True)
class Merger:
    """Several runs that can be one.

    Args:
        parts: in the order of a plan, if they are parts of one, else as they were named.
        planned: ids of all cases, in the order of the rows.
        missing_parts: numbers of the parts of the plan that are not there, although they have cases.
        different: whether the devices differ, so that the run has no costs.
    """

    parts: Sequence[Part]
    planned: Sequence[str]
    missing_parts: Sequence[int]
    different: bool

    @classmethod
    def of(cls, paths: Sequence[Path], allow_missing: bool = False, accuracy_only: bool = False) -> Merger:
        """Read runs, and check that they can be one.

        Args:
            paths: of their folders.
            allow_missing: accept that cases have no result.
            accuracy_only: accept different devices.

        Raises:
            RunError: a run cannot be read, or they cannot be merged. The message names the runs and what differs.
        """
        parts = [_read(path) for path in paths]
        for one, two in itertools.combinations(parts, 2):
            if one.name == two.name:
                raise RunError(f"{one.name} is named twice: {one.run.path} and {two.run.path}; leave out one")
        shares = [part.share for part in parts]
        if any(shares) and not all(shares):
            whole = next(part.name for part in parts if part.share is None)
            some = next(part.name for part in parts if part.share is not None)
            raise RunError(f"{some} is a part of a plan (--mp-shard), and {whole} is not; merge parts of one plan")
        for part in parts[1:]:
            _refuse_differences(parts[0], part)
        _refuse_other_workloads(parts)
        _refuse_shared_cases(parts)
        different = _different_devices(parts, accuracy_only)
        if all(shares):
            parts.sort(key=lambda part: part.share.shard.part if part.share else 0)
            planned, missing = _plan(parts)
        else:
            planned, missing = [case_id for part in parts for case_id in part.planned], []
        found = cls(parts, planned, missing, different)
        if (lacking := found._lacking()) and not allow_missing:
            raise RunError(f"not complete: {lacking}. Or use --allow-missing, and the report says what is missing")
        return found

    def _lacking(self) -> str:
        """Say what is missing, and what to do; empty if nothing is."""
        parts = []
        of = self.parts[0].share.shard.of if self.parts[0].share is not None else 0
        for number in self.missing_parts:
            parts.append(f"part {number} of {of} is missing: run it with --mp-shard {number}/{of}, or name its run")
        there = {case_id for part in self.parts for case_id in part.planned}
        for part in self.parts:
            if lacking := part.lacking():
                parts.append(f"{part.name} has no result of {_some(lacking)}: go on with it, --mp-resume {part.name}")
        out = [one for one in self.planned if one not in there] if not self.missing_parts else []
        if out:
            parts.append(f"no run plans {_some(out)}: tests were left out of a part")
        return "; ".join(parts)

    def started(self) -> datetime | None:
        """When the last part was started; a run that was merged comes right after it. None if none says so."""
        return max((when for part in self.parts if (when := _started(part.run)) is not None), default=None)

    def info(self) -> dict[str, Any]:
        """What run.json holds, without the name and the start."""
        first = self.parts[0].run
        environment, settings = first.environment, dict(first.info["settings"])
        for part in self.parts[1:]:
            environment = common(environment, part.run.environment)
        workloads = list(dict.fromkeys(name for part in self.parts for name in part.workloads))
        cases = [case for one in self.planned if (case := CaseId.parse(one, workloads))]
        for name in ("workload", "mode", "seed", "repeat"):
            settings[f"{name}s"] = list(dict.fromkeys(getattr(case, name) for case in cases))
        each = [part.run.info["settings"] for part in self.parts]
        apart = [one["set_apart"] for one in each if isinstance(one.get("set_apart"), dict)]
        settings["set_apart"] = {name: value for one in apart for name, value in one.items()} or None
        left_out = [one["left_out"] for one in each if isinstance(one.get("left_out"), list)]
        settings["left_out"] = list(dict.fromkeys(str(text) for one in left_out for text in one)) or None
        if any(one.get("cores") != settings.get("cores") for one in each):
            settings["cores"] = None
        return {
            "schema_version": first.info.get("schema_version"),
            "method_version": first.info.get("method_version"),
            "environment": environment,
            "settings": settings,
            "planned": list(self.planned),
            "merged": {
                "missing_parts": list(self.missing_parts),
                "accuracy_only": self.different,
                "parts": [_about(part) for part in self.parts],
            },
            **self._resumed(),
        }

    def _resumed(self) -> dict[str, Any]:
        """What the report says of parts that were stopped and went on."""
        found = [part.run.info.get("resumed") for part in self.parts]
        times = [one for resumed in found if isinstance(resumed, list) for one in resumed if isinstance(one, dict)]
        return {"resumed": sorted(times, key=lambda one: str(one.get("time")))} if times else {}

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what the journals say of cases, every attempt of each."""
        for part in self.parts:
            for event in _events(part.run.path / "journal.jsonl"):
                yield self.without_costs(event) if self.different else event

    def without_costs(self, event: dict[str, Any]) -> dict[str, Any]:
        """Return an event without the figures that depend on the device, if it is the end of a case."""
        row = event.get("record")
        if not isinstance(row, dict):
            return event
        reasons = row.get("unavailable")
        told = {**(reasons if isinstance(reasons, dict) else {}), **dict.fromkeys(sorted(COSTS), _ELSEWHERE.to_json())}
        kept = {name: value for name, value in row.items() if name not in COSTS}
        return {**event, "record": {**kept, "unavailable": told}, "step_s": [], "phases": {}}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The records that the run must have, as plain values by case."""
        found = {}
        for part in self.parts:
            for record in part.run.records:
                event = {"record": record.to_json()}
                row = self.without_costs(event)["record"] if self.different else event["record"]
                found[str(record["case_id"])] = Record.from_json(row).to_json()
        return found


def common(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that two environments have in common."""
    found: dict[str, Any] = {}
    for name in one:
        if name in two:
            mine, theirs = one[name], two[name]
            if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
                found[name] = common(mine, theirs)
            elif mine == theirs:
                found[name] = mine
    return found


def _read(path: Path) -> Part:
    if path.is_file():
        raise RunError(f"{path}: a cases.csv has no journal, so it cannot be merged; name the folder of its run")
    if links := [path / name for name in _OWN_FILES if (path / name).is_symlink()]:
        raise RunError(f"{links[0]}: {LINK}")
    run = read_run(path)
    info = run.info
    if run.merged:
        origins = _some([str(part.get("run")) for part in run.merged])
        raise RunError(f"{run.name} was merged itself; name what it was merged from: {origins}")
    if "interleaved" in info:
        raise RunError(f"{run.name} was made by `mpscale ab`, whose two runs take turns: it is no part of another run")
    settings = info.get("settings")
    if not run.plan_known or not isinstance(settings, dict) or not run.environment:
        raise RunError(f"{run.path / 'run.json'}: has no plan, settings or environment, which a run needs to be merged")
    share = Share.of_run(info)
    if share is None and "shard" in info:
        raise RunError(f"{run.path / 'run.json'}: does not say which part of which plan it is; take another copy")
    workloads = settings.get("workloads")
    names = [name for name in workloads if isinstance(name, str)] if isinstance(workloads, list) else []
    return Part(run, share, names)


def _refuse_differences(one: Part, two: Part) -> None:
    """Refuse runs that measured something else, or in another way."""
    infos = [part.run.info for part in (one, two)]
    differing = [
        (name.replace("_", " "), str(infos[0].get(name)), str(infos[1].get(name)))
        for name in ("schema_version", "method_version")
        if infos[0].get(name) != infos[1].get(name)
    ]
    environments = one.run.environment, two.run.environment
    differing += software_differences(*environments)
    commits = [(of.get("git") or {}).get("commit") for of in environments]
    if commits[0] != commits[1]:
        differing.append(("the git commit", str(commits[0] or "unknown"), str(commits[1] or "unknown")))
    both = [name for name in one.workloads if name in two.workloads]
    differing += settings_differences(infos[0]["settings"], infos[1]["settings"], both, _FREE)
    if differing:
        words = "; ".join(f"{what} is {mine} and {theirs}" for what, mine, theirs in differing)
        raise RunError(f"{one.name} and {two.name} were not measured in the same way, so they are no one run: {words}")
    if one.share is None or two.share is None:
        return
    if one.share.shard.of != two.share.shard.of:
        raise RunError(
            f"{one.name} is part {one.share.shard} of a plan, and {two.name} is part {two.share.shard}; all parts must "
            "be of one number"
        )
    if list(one.share.plan) != list(two.share.plan):
        odd = sorted({*one.share.plan} ^ {*two.share.plan})
        said = f"only one plans {_some(odd)}" if odd else "their order differs"
        raise RunError(
            f"{one.name} and {two.name} are parts of different plans: {said}. Use the same options, and name workloads "
            "and modes if the devices differ"
        )


def _refuse_other_workloads(parts: Sequence[Part]) -> None:
    """Refuse parts in which a workload was another model, had other data, as its digests show, or other compilers."""
    first: dict[str, tuple[str, set[Any]]] = {}
    compiled: dict[str, tuple[str, bool]] = {}
    for part in parts:
        found: dict[str, set[Any]] = {}
        for record in part.run.records:
            if record["status"] not in MEASURED:
                continue
            workload = record.place[0]
            found.setdefault(workload, set()).update(values_of([record], "workload_digest"))
            name, jit = compiled.setdefault(workload, (part.name, record["jit"]))
            if jit != record["jit"]:
                with_xla, without = (name, part.name) if jit else (part.name, name)
                raise RunError(
                    f"{workload} was compiled with XLA in {with_xla} and not in {without}; run both parts again with "
                    "--mp-jit off"
                )
        for workload, digests in found.items():
            name, known = first.setdefault(workload, (part.name, digests))
            # Several digests: the workload depends on the seed.
            if len(known) == len(digests) == 1 and known != digests:
                said = " and ".join(map(str, (*known, *digests)))
                raise RunError(
                    f"{workload} is not the same in {name} and in {part.name}: model, data or optimizer were changed, "
                    f"as its digests show: {said}"
                )


def _refuse_shared_cases(parts: Sequence[Part]) -> None:
    """Refuse runs that have the same case, or that divide what must stay on one machine."""
    seen: dict[str, str] = {}
    groups: dict[tuple[str, int, int], str] = {}
    for part in parts:
        for case_id in part.planned:
            if case_id in seen:
                raise RunError(f"{case_id} is in {seen[case_id]} and in {part.name}; leave out one of the two")
            seen[case_id] = part.name
        for group in dict.fromkeys(group_of(part.case(case_id)) for case_id in part.planned):
            if group in groups:
                workload, seed, repeat = group
                which = f"repeat {repeat}" if repeat else f"seed {seed}"
                raise RunError(
                    f"{workload}, {which}: some modes are in {groups[group]} and others in {part.name}, and modes are "
                    "only compared with each other if one session ran them side by side; measure them in one run"
                )
            groups[group] = part.name


def _different_devices(parts: Sequence[Part], accuracy_only: bool) -> bool:
    """Whether the machines differ so that their costs are no one figure; refuse that unless it is accepted."""
    machines = [hardware(part.run) for part in parts]
    other = next((n for n, one in enumerate(machines) if not same_machine(machines[0], one)), None)
    allocators = [{*values_of(part.run.records, "gpu_allocator")} for part in parts]
    if other is not None:
        words = [f"{parts[n].name} on {machine_words(machines[n])}" for n in (0, other)]
    elif len(set().union(*allocators)) > 1 and all(len(one) <= 1 for one in allocators):
        words = [f"{part.name} with {one.copy().pop()}" for part, one in zip(parts, allocators, strict=True) if one]
    else:
        return False
    if accuracy_only:
        return True
    raise RunError(
        f"measured on different devices: {', '.join(words[:_NAMED])}; over those, step times, memory and energy are no "
        "one figure. Use --accuracy-only for a run without them; or merge the parts of each device by themselves, with "
        "--allow-missing, and compare those runs"
    )


def _plan(parts: Sequence[Part]) -> tuple[list[str], list[int]]:
    """The cases of a plan in the order of an undivided run, and the numbers of the parts that are not there."""
    share = parts[0].share
    assert share is not None  # the caller has checked it
    rank = {case_id: place for place, case_id in enumerate(share.plan)}
    groups: dict[tuple[str, int, int], int] = {}
    cases: dict[str, tuple[str, int, int]] = {}
    for case_id in share.plan:
        cases[case_id] = group = group_of(parts[0].case(case_id))
        groups.setdefault(group, len(groups))
    # Within a group, as the session that ran it had shuffled the modes.
    order = {case_id: place for part in parts for place, case_id in enumerate(part.planned)}
    if extra := [case_id for case_id in order if case_id not in rank]:
        raise RunError(f"{_some(extra)}: not in the plan of which these runs are parts; take the original runs")
    planned = sorted(rank, key=lambda case_id: (groups[cases[case_id]], order.get(case_id, rank[case_id])))
    there = {part.share.shard.part for part in parts if part.share is not None}
    of_cases = share.parts()
    needed = {of_cases[case_id] for case_id in rank if case_id not in order}
    return planned, sorted(needed - there)


def _about(part: Part) -> dict[str, Any]:
    run, share = part.run, part.share
    shard = {} if share is None else {"shard": {"part": share.shard.part, "of": share.shard.of}}
    return {
        "run": run.name,
        "started": run.info.get("started"),
        **shard,
        "environment": run.environment,
        "cases": part.planned,
    }


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of cases in a journal; a line that cannot be read is left out, as its reader says."""
    for line, whole in read_lines(path, JOURNAL):
        try:
            event = parse_json(line.decode("utf-8")) if whole else None
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") in ("case_started", "case_finished"):
            yield event


def _started(run: Run) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(run.info.get("started")))
        found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        # A name has four digits for the year, and something is added.
        return found if 1000 <= found.year < 9999 else None
    except (ValueError, OverflowError):
        return None


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
