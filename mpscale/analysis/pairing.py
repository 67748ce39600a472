"""Which rows of two runs belong together, and whether the two runs may be compared at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpscale.analysis.runs import Run, RunError
from mpscale.analysis.series_labels import key_facts
from mpscale.analysis.summary import plain_rows
from mpscale.analysis.trainings import MEASURED, NO_SUCH_ROW, NOT_STARTED, Key, Row, Trainings, trainings
from mpscale.columns import FAILED
from mpscale.modes import MODES

State = Literal["paired", "missing", "new", "not-comparable"]

_HOW_TO_FORCE = "use --force to compare them all the same"
_MACHINE_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "TF_ENABLE_ONEDNN_OPTS", "TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
"""Environment variables that make a smaller machine of a CPU."""


class NotComparable(RunError):
    """Two runs were measured in different ways. The message says in which, and what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The cases of one workload and mode in two runs.

    Args:
        workload: its name.
        mode: its name.
        state: ``paired``; ``missing``, measured in the baseline alone; ``new``, in the other run alone; or
            ``not-comparable``: in both, of different series.
        reason: why it is not paired, or what is odd although it is.
        baseline: cases of the baseline.
        other: cases of the other run.
        not_started: processes that were planned and not started, of the baseline and of the other run.
        plan_known: whether the plans of both are known, likewise.
    """

    workload: str
    mode: str
    state: State
    reason: str | None
    baseline: Sequence[Row]
    other: Sequence[Row]
    not_started: tuple[Sequence[Key], Sequence[Key]] = ((), ())
    plan_known: tuple[bool, bool] = (False, False)

    @property
    def place(self) -> tuple[str, str]:
        """Workload and mode."""
        return self.workload, self.mode

    @property
    def seeds(self) -> tuple[Trainings, Trainings]:
        """What became of the trainings of the baseline, and of the other run."""
        sides = zip((self.baseline, self.other), self.not_started, self.plan_known, strict=True)
        before, after = (trainings(*side) for side in sides)
        return before, after

    @property
    def newly_failed(self) -> list[str]:
        """Cases that failed or were not started in the other run, and did not fail in the baseline, with the reason."""
        before = {(case["seed"], case["repeat"]) for case in self.baseline if case["status"] in FAILED}
        before |= set(self.not_started[0])
        failed = [
            f"{case['case_id']} {case['status']}"
            for case in self.other
            if case["status"] in FAILED and (case["seed"], case["repeat"]) not in before
        ]
        waiting = [key for key in self.not_started[1] if key not in before]
        return failed + [f"seed {seed} repeat {repeat} {NOT_STARTED}" for seed, repeat in waiting]


def pair_rows(baseline: Run, other: Run, force: bool = False) -> list[Pair]:
    """Pairs rows by their series key: those of the baseline first, in its order; none is left out.

    Args:
        baseline: what is compared with.
        other: what is compared.
        force: pair rows of one workload and mode whatever their series.

    Raises:
        NotComparable: the runs were measured by different methods, or no row of one has its series in the other;
            not with ``force``.
        RunError: a run holds a workload and mode in several series.
    """
    before, after = _rows(baseline), _rows(other)
    pairs = [
        _pair(name, before.get(name, []), after.get(name, []), baseline, other, force)
        for name in [*before, *(name for name in after if name not in before)]
    ]
    apart = [pair for pair in pairs if pair.state == "not-comparable"]
    if apart and not any(pair.state == "paired" for pair in pairs):
        reasons = "; ".join(dict.fromkeys(str(pair.reason) for pair in apart))
        raise NotComparable(f"{other.name} was not measured as {baseline.name} was: {reasons}; {_HOW_TO_FORCE}")
    return pairs


def hardware(run: Run) -> dict[str, Any]:
    """What makes the machine of a run this one and no other, as far as the run says."""
    kind, name = (_one_device(run, column) for column in ("device", "device_name"))
    environment = run.info.get("environment")
    return machine(
        run.device.get("kind") or kind,
        run.device.get("name") or name,
        environment if isinstance(environment, dict) else {},
    )


def _one_device(run: Run, column: str) -> str | None:
    known = list(dict.fromkeys(record[column] for record in run.records if record[column] is not None))
    if len(known) > 1:
        raise RunError(f"{run.path}: holds cases of {known[0]} and of {known[1]}; compare runs of one device each")
    return known[0] if known else None


def machine(kind: str | None, name: str | None, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a device and an environment as run.json holds them."""
    facts: dict[str, Any] = {"kind": kind, "name": name}
    if kind == "cpu" and environment:
        cpu, variables = environment.get("cpu"), environment.get("variables")
        facts["cores"] = cpu.get("logical_cores") if isinstance(cpu, dict) else None
        if isinstance(variables, Mapping):
            facts |= {variable: variables[variable] for variable in _MACHINE_VARIABLES if variable in variables}
            limit = re.search(r"--xla_cpu_max_isa=(\S+)", str(variables.get("XLA_FLAGS", "")))
            if limit:
                facts["xla_cpu_max_isa"] = limit[1]
    return facts


def same_hardware(baseline: Run, other: Run) -> bool:
    """Whether both ran on the same kind of device. A cases.csv by itself knows only the device's name."""
    return same_machine(hardware(baseline), hardware(other))


def same_machine(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two answers of :func:`hardware` agree in what both know."""
    known = ("kind", "name") if "cores" not in one or "cores" not in two else one.keys() | two.keys()
    return all(one.get(name) == two.get(name) for name in known)


def machine_words(facts: Mapping[str, Any]) -> str:
    """The machine in one line."""
    parts = [f"{facts['name'] or 'unknown'} ({facts['kind'] or 'unknown'})"]
    for name, value in facts.items():
        if name == "cores" and value is not None:
            parts.append(f"{value} core" if value == 1 else f"{value} cores")
        elif name not in ("kind", "name", "cores"):
            parts.append(f"{name}={value}")
    return ", ".join(parts)


def environment_differences(baseline: Run, other: Run) -> list[tuple[str, str, str]]:
    """What differs between the environments of two runs: name, value of the baseline, value of the other."""
    one, two = (dict(_facts(run.info.get("environment"))) for run in (baseline, other))
    names = list(dict.fromkeys([*one, *two])) if one and two else []
    return [(name, one.get(name, ""), two.get(name, "")) for name in names if one.get(name) != two.get(name)]


def _rows(run: Run) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for case in plain_rows(run.cases):
        found.setdefault((case["workload"], case["mode"]), []).append(case)
    workloads = list(dict.fromkeys(workload for workload, _ in found))
    places = {mode: place for place, mode in enumerate(MODES)}
    # sorted() keeps modes that are not known here in the order in which they came.
    return {
        name: found[name]
        for name in sorted(found, key=lambda name: (workloads.index(name[0]), places.get(name[1], len(places))))
    }


def _pair(
    name: tuple[str, str], before: Sequence[Row], after: Sequence[Row], baseline: Run, other: Run, force: bool
) -> Pair:
    state: State = "paired"
    reason = None
    measured_before, measured_after = (
        [case for case in cases if case["status"] in MEASURED] for cases in (before, after)
    )
    if not measured_before and not measured_after:
        # Not run in the baseline either, as a mode that the device does not have.
        state = "paired" if before and after else "missing" if before else "new"
        reason = _why_not(after or before, name, other)
    elif not measured_after:
        state, reason = "missing", _why_not(after, name, other)
    elif not measured_before:
        state, reason = "new", f"in the baseline: {_why_not(before, name, baseline)}"
    else:
        reason = _apart(_series(measured_before, baseline), _series(measured_after, other))
        state = "not-comparable" if reason and not force else "paired"
    waiting = [[key for *place, key in run.places_not_started if tuple(place) == name] for run in (baseline, other)]
    plans = (baseline.plan_known, other.plan_known)
    return Pair(*name, state, reason, before, after, (waiting[0], waiting[1]), plans)


def _why_not(cases: Sequence[Row], name: tuple[str, str], run: Run) -> str:
    if cases:
        return "; ".join(dict.fromkeys(f"{case['status']}: {case['status_reason']}" for case in cases))
    start = f"{name[0].replace(':', '+')}--{name[1]}--"
    if any(case_id.startswith(start) for case_id in run.not_started):
        return NOT_STARTED
    return NO_SUCH_ROW


def _series(cases: Sequence[Row], run: Run) -> str | None:
    keys = list(dict.fromkeys(case["series_key"] for case in cases if case["series_key"] is not None))
    if len(keys) > 1:
        raise RunError(
            f"{run.path}: {cases[0]['workload']} {cases[0]['mode']} is there in {len(keys)} series "
            f"({keys[0]} and {keys[1]}); compare one run at a time"
        )
    return keys[0] if keys else None


def _apart(before: str | None, after: str | None) -> str | None:
    """What tells two series apart, None where they are one."""
    if before == after and before is not None:
        return None
    if before is None or after is None:
        return "a series key is missing"
    one, two = key_facts(before), key_facts(after)
    differing = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
    found = []
    for name in differing:
        what = "the model, its training or its data differ: " if name == "digest" else ""
        sides = (f"{name} {facts[name]}" if name in facts else f"no {name}" for facts in (one, two))
        found.append(what + " against ".join(sides))
    # Two keys that differ are two series, also where nothing that is known here says why.
    return "; ".join(found) or f"series {before} against {after}"


_NOT_FACTS = ("load_average_at_start", "memory_mib", "uuid")


def _facts(facts: Any, above: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(facts, Mapping):
        return
    for key, value in facts.items():
        name = f"{above} {key}".strip()
        if isinstance(value, Mapping):
            yield from _facts(value, name)
        elif key not in _NOT_FACTS:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
