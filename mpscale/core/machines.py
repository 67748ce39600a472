"""The machine of a run, and what differs between the environments of two runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpscale.core.runs import Run, RunError

_MACHINE_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "TF_ENABLE_ONEDNN_OPTS", "TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")
"""Environment variables that limit which cores or instructions of a CPU are used."""
_NOT_FACTS = ("load_average_at_start", "memory_mib", "memory_limit_mib", "uuid", "vendor")
"""Keys of an environment that differ between runs on one machine, or repeat what another key says."""


def hardware(run: Run) -> dict[str, Any]:
    """The facts that identify the machine of a run, as far as they are known.

    A run that was merged from different devices has no costs, and its machine is all of them.
    """
    found = _joined if run.merged else _one_device
    kind, name = (found(run, column) for column in ("device", "device_name"))
    if run.merged and kind and name:
        return machine(kind, name, run.environment)
    return machine(run.device.get("kind") or kind, run.device.get("name") or name, run.environment)


def _one_device(run: Run, column: str) -> str | None:
    known = _known(run, column)
    if len(known) > 1:
        raise RunError(f"{run.path}: holds cases of {known[0]} and of {known[1]}; compare runs of one device each")
    return known[0] if known else None


def _joined(run: Run, column: str) -> str | None:
    return " and ".join(sorted(map(str, _known(run, column)))) or None


def _known(run: Run, column: str) -> list[str]:
    return list(dict.fromkeys(record[column] for record in run.records if record[column] is not None))


def machine(kind: str | None, name: str | None, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that identify a machine, from a device and an environment as in run.json."""
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
    """Whether both ran on the same kind of machine. A cases.csv has only the kind and name of the device."""
    return same_machine(hardware(baseline), hardware(other))


def same_machine(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two results of :func:`hardware` agree in the facts that both have."""
    known = ("kind", "name") if "cores" not in one or "cores" not in two else one.keys() | two.keys()
    return all(one.get(name) == two.get(name) for name in known)


def machine_words(facts: Mapping[str, Any]) -> str:
    """The machine in one line, for people."""
    parts = [f"{facts['name'] or 'unknown'} ({facts['kind'] or 'unknown'})"]
    for name, value in facts.items():
        if name == "cores" and value is not None:
            parts.append(f"{value} core" if value == 1 else f"{value} cores")
        elif name not in ("kind", "name", "cores"):
            parts.append(f"{name}={value}")
    return ", ".join(parts)


def environment_differences(baseline: Run, other: Run) -> list[tuple[str, str, str]]:
    """What differs between the environments of two runs: name, value in the baseline, value in the other run."""
    one, two = (dict(environment_facts(run)) for run in (baseline, other))
    names = list(dict.fromkeys([*one, *two])) if one and two else []
    return [(name, one.get(name, ""), two.get(name, "")) for name in names if one.get(name) != two.get(name)]


def environment_facts(run: Run) -> list[tuple[str, str]]:
    """What :func:`environment_differences` compares: name and value; empty for a cases.csv."""
    return facts_of(run.environment)


def facts_of(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same of an environment as in run.json."""
    return list(_facts(environment))


def _facts(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{above} {key}".strip()
        if isinstance(value, Mapping):
            yield from _facts(value, name)
        elif key not in _NOT_FACTS:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
