"""A short training, by the same way that a run's cases take."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mpscale.columns import COLUMNS, FAILED
from mpscale.doctor.findings import Examination, Problem, Trained
from mpscale.harness.case import Case, Settings
from mpscale.harness.run import BenchmarkRun, Options
from mpscale.records import Record
from mpscale.telemetry import gpu_energy, gpu_memory
from mpscale.telemetry.device import Device
from mpscale.telemetry.driver import Driver, NoDriver

_TIMEOUT_S = 600.0
"""A GPU that is newer than TensorFlow's package compiles kernels for minutes when it is first used."""

_SETTINGS = Settings(train_steps=2, timing_s=0.3, timing_blocks=10, energy_s=0.0)


_ENERGY = frozenset(gpu_energy.COLUMNS)
_SHOWN = frozenset(
    name
    for name in COLUMNS
    if (name.startswith("gpu_") and name not in _ENERGY) or name in ("step_time_ms_median", "host_memory_peak_mib")
)
"""What the device decides on. Energy takes ten seconds of steps, so it is left out here."""


def examine(found: Examination, device: Device, driver: Driver | NoDriver) -> None:
    """Trains for a moment, and tells how that went.

    Args:
        found: takes it, and a problem if it failed.
        device: the GPU.
        driver: tells of it.
    """
    case = Case("mnist1d-mlp", "mixed-dynamic", 0, 0, 0, _SETTINGS)
    with tempfile.TemporaryDirectory(prefix="mpscale-doctor-") as folder:
        options = Options(Path(folder), Path(folder), "fresh", _TIMEOUT_S, asked={}, gpu_retries=0)
        run = BenchmarkRun([case], device, driver, options, lambda case, event, fields: None)
        try:
            record = run.run(case).record
        finally:
            run.finish(0)
    found.trained = _trained(record, device)
    if record["status"] in FAILED or record["status"] == "unsupported":
        found.problems.append(
            Problem(
                f"a short training on {device.name} ended as {record['status']}: {record['status_reason']}",
                _cure(str(record["status"]), str(record["output_tail"] or "")),
            )
        )
    elif gpu_memory.HEADLINE in found.trained.empty:
        reason = found.trained.empty[gpu_memory.HEADLINE]
        found.notes.append(f"the short training left peak GPU memory empty, and so would a run: {reason}")


def _trained(record: Record, device: Device) -> Trained:
    empty = {column: reason for column, reason in record.unavailable.items() if column in _SHOWN}
    return Trained(
        status=str(record["status"]),
        reason=record["status_reason"],
        device_name=record["device_name"] or device.name,
        step_time_ms=record["step_time_ms_median"],
        gpu_memory_mib=record[gpu_memory.HEADLINE],
        gpu_memory_method=record["gpu_memory_method"],
        gpu_allocator=record["gpu_allocator"],
        wall_time_s=record["case_wall_time_s"],
        empty=empty,
    )


def _cure(status: str, tail: str) -> str:
    if status == "invalid":
        return "change what the reason names, and try again"
    last = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), None)
    said = f"; its last line was: {last}" if last else ""
    return f"the reason names the cause, and a run would end in the same way{said}"
