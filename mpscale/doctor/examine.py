"""One examination: what is here, what a run would measure of it, and what speaks against it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mpscale.doctor import gpu, measured, precision, software, surroundings
from mpscale.doctor.cures import cure
from mpscale.doctor.findings import Examination, Problem
from mpscale.telemetry import host
from mpscale.telemetry.device import Device
from mpscale.telemetry.driver import Driver, NoDriver, SilentDriver, open_driver


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


def _examine(found: Examination, driver: Driver | NoDriver, environ: Mapping[str, str], train: bool) -> None:
    software.examine(found, driver)
    device, no_gpu = gpu.find(found, driver, environ)
    surroundings.examine(found, device, environ)
    if device is not None:
        found.device = device.to_json()
    if device is not None and device.kind == "gpu" and isinstance(driver, Driver):
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
    from mpscale.doctor import train as training

    training.examine(found, device, driver)


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
    found.measured = measured.on_gpu(told)
    found.problems += measured.problems(found.measured)
    gpu.examine(found, device, facts, now)
