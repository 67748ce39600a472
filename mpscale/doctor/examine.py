"""One examination: what is here, what a run would measure of it, and what speaks against it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpscale.core.case import Case, Settings
from mpscale.core.columns import COLUMNS, FAILED
from mpscale.core.device import Device
from mpscale.core.record import Record
from mpscale.doctor import gpu, software
from mpscale.doctor import gpu as measured
from mpscale.doctor import gpu as precision
from mpscale.doctor import gpu as surroundings
from mpscale.doctor.cures import cure
from mpscale.doctor.findings import Examination, Problem, Trained
from mpscale.harness.run import BenchmarkRun
from mpscale.harness.supervisor import Options
from mpscale.telemetry import gpu_memory, host
from mpscale.telemetry import gpu_state as gpu_energy
from mpscale.telemetry.client import Driver, SilentDriver, open_driver


def examine(train: bool) -> Examination:
    """Looks at this machine as a run would find it.

    Whatever goes wrong in it is a problem among the others, so that the rest still gets told.

    Args:
        train: trains on the GPU for a moment, too.
    """
    found = Examination()
    driver = open_driver()
    try:
        _examine(found, driver, os.environ, train)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        found.problems.append(Problem(f"this examination stopped early ({words})", "report this line to mpscale"))
    finally:
        driver.close()
    return found


def _examine(found: Examination, driver: Driver, environ: Mapping[str, str], train: bool) -> None:
    software.examine(found, driver)
    device, no_gpu = gpu.find(found, driver, environ)
    surroundings.examine_surroundings(found, device, environ)
    if device is not None:
        found.device = device.to_json()
    if device is not None and device.kind == "gpu":
        _gpu(found, device, driver)
    elif device is not None:
        found.device = {**device.to_json(), "cpu": host.cpu_facts()}
        found.measured = measured.without_gpu(f"no GPU: {no_gpu}")
        found.precision = precision.on_cpu(host.cpu_facts()["flags"])
    if not train:
        return
    if device is None or device.kind != "gpu":
        found.problems.append(
            Problem(f"--gpu found no GPU to train on: {no_gpu}", "leave --gpu out to examine the CPU, or add a GPU")
        )
        return
    # Here and not above: the rest of the page needs none of the harness.
    pass

    try_training(found, device, driver)


def _gpu(found: Examination, device: Device, driver: Driver) -> None:
    """What a GPU tells; its figures stay empty where NVML has stopped answering."""
    found.precision = precision.on_gpu(device)
    software.examine_for_gpu(found, device, driver.cuda_version)
    try:
        told = driver.facts(device)
        now = driver.look(device)
    except SilentDriver as error:
        found.measured = measured.without_gpu(str(error))
        do = cure(str(error)) or "see what nvidia-smi says"
        found.problems.append(Problem(f"the GPU cannot be watched: {error}", do))
        return
    facts: dict[str, Any] = told["facts"]
    found.device = {**facts, "now": {name: value for name, value in now.items() if name != "id"}}
    found.measured = measured.measured_on_gpu(told)
    found.problems += measured.problems(found.measured)
    gpu.examine(found, device, facts, now)


# A short training, by the same way that a run's cases take.

_TIMEOUT_S = 600.0
"""A GPU that is newer than TensorFlow's package compiles kernels for minutes when it is first used."""

_SETTINGS = Settings(train_steps=2, timing_s=0.3, timing_blocks=10, energy_s=0.0)


_ENERGY = frozenset(gpu_energy.ENERGY_COLUMNS)
_SHOWN = frozenset(
    name
    for name in COLUMNS
    if (name.startswith("gpu_") and name not in _ENERGY) or name in ("step_time_ms_median", "host_memory_peak_mib")
)
"""What the device decides on. Energy takes ten seconds of steps, so it is left out here."""


def try_training(found: Examination, device: Device, driver: Driver) -> None:
    """Trains for a moment, and tells how that went.

    Args:
        found: takes it, and a problem if it failed.
        device: the GPU.
        driver: tells of it.
    """
    case = Case("mnist1d-mlp", "mixed-dynamic", 0, 0, 0, _SETTINGS)
    with tempfile.TemporaryDirectory(prefix="mpscale-doctor-") as folder:
        options = Options(Path(folder), Path(folder), "fresh", _TIMEOUT_S, asked={}, gpu_retries=0)
        run = BenchmarkRun([case], device, driver, options, lambda case, event: None)
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
    empty = {column: str(reason) for column, reason in record.unavailable.items() if column in _SHOWN}
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
