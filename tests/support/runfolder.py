"""Write run folders as the harness does, from records with made-up figures."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mpscale.core.columns import METHOD_VERSION, SCHEMA_VERSION
from mpscale.core.journal import SWEPT
from mpscale.core.record import Record

CPU = {"kind": "cpu", "name": "Test CPU", "uuid": None, "compute_capability": None, "memory_mib": 8192.0}
GPU = {"kind": "gpu", "name": "Test GPU", "uuid": "GPU-1", "compute_capability": [8, 0], "memory_mib": 81920.0}
NAME = "20260102T030405Z-test-cpu-abcd"


def record(mode: str = "fp32", seed: int = 0, repeat: int = 0, workload: str = "toy", **values: Any) -> Record:
    """A record with its identity and whatever the test is about."""
    return Record(
        {
            "case_id": f"{workload}--{mode}--s{seed}--r{repeat}",
            "workload": workload,
            "mode": mode,
            "seed": seed,
            "repeat": repeat,
            "status": "ok",
            "device": "cpu",
            **values,
        }
    )


def finished(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The events of cases that ran one after the other."""
    events = []
    for order, one in enumerate(records):
        events += [
            started(one, order=order),
            {"event": "case_finished", "case_id": one["case_id"], "record": one.to_json()},
        ]
    return events


def started(one: Record, attempt: int = 1, order: int = 0) -> dict[str, Any]:
    """The event at the start of a case."""
    identity = {name: one[name] for name in ("workload", "mode", "seed", "repeat")}
    identity |= {name: one[name] for name in SWEPT if one[name] is not None}
    return {
        "event": "case_started",
        "case_id": one["case_id"],
        "attempt": attempt,
        "case": {**identity, "order": order},
    }


def write_run(
    results: Path,
    events: Iterable[Mapping[str, Any]] = (),
    *,
    name: str = NAME,
    device: Mapping[str, Any] = CPU,
    torn: bytes = b"",
    finish: bool = True,
    **info: Any,
) -> Path:
    """Write a run and return its folder.

    Args:
        results: the results folder, in which it is ``runs/<name>``.
        events: of the journal, between the start and the end of the run.
        name: of the run.
        device: in the environment of run.json.
        torn: what a killed writer left of its last line.
        finish: whether the run ended.
        info: entries of run.json that are added or replaced.
    """
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    events = list(events)
    planned = dict.fromkeys(event["case_id"] for event in events if "case_id" in event)
    contents = {
        "run": name,
        "schema_version": SCHEMA_VERSION,
        "method_version": METHOD_VERSION,
        "started": "2026-01-02T03:04:05+00:00",
        "environment": {"device": dict(device), "packages": {"tensorflow": "2.21.0", "keras": None}},
        "settings": {"jit": "auto", "seeds": 2},
        "planned": list(planned),
        **info,
    }
    (folder / "run.json").write_text(json.dumps(contents))
    lines = [{"event": "run_started"}, *events, *([{"event": "run_finished"}] if finish else [])]
    journal = "".join(json.dumps({"time": "2026-01-02T03:04:05+00:00", **line}) + "\n" for line in lines)
    (folder / "journal.jsonl").write_bytes(journal.encode() + torn)
    return folder


def write_steps(folder: Path, case_id: str, text: str) -> None:
    """Write the log of steps of a case."""
    (folder / "steps").mkdir(exist_ok=True)
    with gzip.open(folder / "steps" / f"{case_id}.csv.gz", "wt") as file:
        file.write(text)
