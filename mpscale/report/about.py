"""What is known of a run besides its figures: its device, when it started, its environment and settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mpscale.core.runs import Run
from mpscale.report.table import DASH, Table, escape, text, yes_no


def when(info: Mapping[str, Any]) -> str:
    """Say when a run started, and by which versions of schema and method; empty if ``info`` has none of them."""
    names = {"started": "Started", "schema_version": "schema version", "method_version": "method version"}
    known = [f"{label} {escape(info[name])}" for name, label in names.items() if info.get(name) is not None]
    # Fractions of a second only tell runs apart.
    known = [re.sub(r"(:\d\d)\.\d+", r"\1", words) for words in known]
    return ", ".join(known) + "." if known else ""


def facts(found: Any) -> Table:
    """Show nested facts, each named by its path; an empty table if they are not a mapping."""
    return Table(["what", "value"], list(_flat(found)) if isinstance(found, Mapping) else [])


def _flat(facts: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested facts as rows, each named by its path."""
    for key, value in facts.items():
        name = f"{above} {key}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, list | tuple):
            yield name, ", ".join(_fact(item) for item in value) or DASH
        else:
            yield name, _fact(value)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return yes_no(value)
    return f"{value:.6g}" if isinstance(value, float) else text(value)


def device_kind(run: Run) -> str | None:
    """Return ``cpu`` or ``gpu``; None if neither run.json nor a record has it. A merged run may have both."""
    return _of_device(run, "kind", "device")


def device_name(run: Run) -> str | None:
    """Return the name of the device; None if neither run.json nor a record has it."""
    return _of_device(run, "name", "device_name")


def _of_device(run: Run, key: str, column: str) -> str | None:
    known = (value for value in (run.device.get(key), *(record[column] for record in run.records)) if value is not None)
    if run.merged:
        return " and ".join(dict.fromkeys(map(str, known))) or None
    return next(map(str, known), None)


def without_xla(refused: str | None) -> str:
    """Say that a trial ran without XLA, and what XLA refused, as a sentence to append; empty if it refused nothing."""
    return "" if refused is None else f"\n\nXLA was not used, because it cannot compile {escape(refused)}."
