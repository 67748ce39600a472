"""Which figures of a run will be there, by which way, and why not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mpscale.doctor.cures import cure
from mpscale.doctor.findings import Measured, Problem
from mpscale.telemetry import host
from mpscale.telemetry.gpu import GARBLED

_POWER = {"instant": "of this moment", "nvmlDeviceGetPowerUsage": "mean of up to a second"}
_COUNTER = {"nvmlDeviceGetTotalEnergyConsumption": "counter", "field 83": "counter (field 83)"}
_PLAIN = (
    ("temperature", "temperature_c"),
    ("throttling", "event_reasons"),
    ("utilisation", "utilization"),
)
_GPU_FIGURES = ("peak GPU memory", "reserved memory", "energy", "power", "clocks", *(name for name, _ in _PLAIN))


def without_gpu(reason: str) -> list[Measured]:
    """Every figure of a run on a CPU.

    Args:
        reason: why there is no GPU.
    """
    return [_step_time(), *(Measured(name, "no", reason=reason) for name in _GPU_FIGURES), *_of_the_training()]


def on_gpu(told: Mapping[str, Any]) -> list[Measured]:
    """Every figure of a run on a GPU.

    Args:
        told: the driver's ``ways`` of readings, and its ``reasons`` for those that it does not give.
    """
    ways, reasons = told["ways"], told["reasons"]
    return [
        _step_time(),
        _memory(ways, reasons),
        _reserved(ways, reasons),
        _energy(ways, reasons),
        _reading("power", "power_mw", ways, reasons, _POWER),
        _clocks(ways, reasons),
        *(_reading(name, reading, ways, reasons) for name, reading in _PLAIN),
        *_of_the_training(),
    ]


def problems(figures: list[Measured]) -> list[Problem]:
    """What would have to be done for the figures that could be had; one problem for all of one reason."""
    together: dict[tuple[str, str], list[str]] = {}
    for each in figures:
        if each.do is not None:
            together.setdefault((str(each.reason), each.do), []).append(each.figure)
    return [
        Problem(f"not or not fully measured: {', '.join(names)}: {reason}", do)
        for (reason, do), names in together.items()
    ]


def _step_time() -> Measured:
    return Measured("step time", "yes", "blocks of compiled steps in steady state")


def _of_the_training() -> list[Measured]:
    memory = Measured("host memory", "yes", "VmHWM of the process")
    if host.peak_resident_mib(os.getpid()) is None:
        memory = Measured("host memory", "no", reason="this system has no /proc")
    return [
        memory,
        Measured("overflow", "yes", "every gradient is checked, in modes with a loss scale"),
        Measured("accuracy", "yes", "on the test set, after the last step"),
    ]


def _memory(ways: Mapping[str, str], reasons: Mapping[str, str]) -> Measured:
    """The driver's list of processes is the headline, and the rise of the whole GPU's memory its stand-in."""
    name = "peak GPU memory"
    listed = "Compute" in ways and reasons.get("Compute") != GARBLED
    if listed:
        return Measured(name, "yes", "process: the driver's list of processes")
    why = reasons.get("Compute", "the driver gives no list of processes")
    if "memory" in ways:
        return Measured(name, "in part", "device-minus-idle: right while nobody else uses the GPU", why, cure(why))
    return _missing(name, why)


def _reserved(ways: Mapping[str, str], reasons: Mapping[str, str]) -> Measured:
    name, way = "reserved memory", ways.get("memory")
    if way is None:
        return _missing(name, reasons.get("memory"))
    if way != "nvmlDeviceGetMemoryInfo":
        return Measured(name, "yes", way)
    why = "the installed NVIDIA driver is too old to tell reserved memory apart"
    return _missing(name, why)


def _energy(ways: Mapping[str, str], reasons: Mapping[str, str]) -> Measured:
    name = "energy"
    if "energy_mj" in ways:
        return Measured(name, "yes", _COUNTER.get(ways["energy_mj"], ways["energy_mj"]))
    why = reasons.get("energy_mj")
    if "power_mw" not in ways:
        return _missing(name, why)
    return Measured(name, "in part", "power: its integral over the timed steps", f"no counter: {why}", cure(why))


def _clocks(ways: Mapping[str, str], reasons: Mapping[str, str]) -> Measured:
    parts = [_reading(word, f"{word}_clock_mhz", ways, reasons) for word in ("sm", "memory")]
    there = [part for part in parts if part.answer == "yes"]
    if len(there) == len(parts):
        return Measured("clocks", "yes", parts[0].way)
    gone = next(part for part in parts if part.answer == "no")
    if not there:
        return Measured("clocks", "no", reason=gone.reason, do=gone.do)
    return Measured("clocks", "in part", there[0].way, f"not of {gone.figure}: {gone.reason}", gone.do)


def _reading(
    name: str,
    reading: str,
    ways: Mapping[str, str],
    reasons: Mapping[str, str],
    words: Mapping[str, str] | None = None,
) -> Measured:
    if reading not in ways:
        return _missing(name, reasons.get(reading))
    return Measured(name, "yes", (words or {}).get(ways[reading], ways[reading]))


def _missing(name: str, reason: str | None) -> Measured:
    return Measured(name, "no", reason=reason or "NVML does not tell", do=cure(reason))
