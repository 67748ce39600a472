"""Runs that a nightly job would make: five processes a row, a day apart, each with a commit."""

from __future__ import annotations

from support.runfolder import CPU, finished, record, write_run

from mpscale.core.case import Settings, series_key
from mpscale.core.columns import METHOD_VERSION
from mpscale.core.mode import MODES

QUIET = (0.998, 1.0, 1.002, 0.999, 1.001)


def row(mode="fp32", ms=2.0, *, workload="toy", spread=QUIET, metric=0.9, digest="sha256:1", batch=20, **values):
    """One record per process: two trainings, then repeats that only time steps."""
    found = []
    for number, factor in enumerate(spread):
        place = {"seed": number, "repeat": 0} if number < 2 else {"seed": 0, "repeat": number}
        trained = {"metric_value": metric, "metric_margin": 0.01, "metric_higher_is_better": True}
        trained |= {"metric_name": "accuracy"}
        if mode.startswith("mixed-") and mode != "mixed-bf16":
            trained |= {"attempted_steps": 40, "overflow_steps": 1, "skipped_steps": 1}
        known = {
            "series_key": series_key(MODES[mode], workload, digest, batch, 30, Settings()),
            "method_version": METHOD_VERSION,
            "device_name": "Test CPU",
            "step_time_ms_median": None if ms is None else ms * factor,
            "host_memory_peak_mib": 600.0,
        }
        found.append(record(mode, workload=workload, **place, **(known | (trained if number < 2 else {}) | values)))
    return found


def night(results, day, *rows, device=CPU, commit=None, preset="small", name=None, **info):
    """Write the run of a day and return its folder."""
    git = {"commit": commit or f"{day:02d}" * 20, "dirty": False}
    return write_run(
        results,
        finished(case for cases in rows for case in cases),
        name=name or f"202601{day:02d}T000000Z-test-cpu-{day:04x}",
        device=device,
        started=f"2026-01-{day:02d}T00:00:00+00:00",
        environment={"device": dict(device), "git": git},
        settings={"preset": preset},
        **info,
    )
