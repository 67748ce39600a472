"""The GPU: why there is none, its settings and state, and which figures of a run it can tell."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpscale.core.device import NVIDIA, Device, vendor_of
from mpscale.core.reason import Code, Reason
from mpscale.doctor.precision import Answer
from mpscale.telemetry import host
from mpscale.telemetry.client import Driver, NoDriver
from mpscale.telemetry.samples import THROTTLING, Reading

SIGNS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""Files of NVIDIA's kernel module: one of them exists if there is a GPU, whatever the driver's library says."""

_NORMAL_WITHOUT_GPU = (Code.NO_LIBRARY, Code.DRIVER_NOT_LOADED, Code.NO_DEVICE)
_NEAR_SLOWDOWN_C = 20.0
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_HOST_NAMESPACE = "pid:[4026531836]"
"""The first PID namespace of every Linux has this number (PROC_PID_INIT_INO)."""


# The absence of a GPU, its settings and its state.


def why_no_gpu(driver: Driver | NoDriver, environ: Mapping[str, str]) -> Reason:
    """Return why a run would use the CPU."""
    if driver.devices:
        visible = vendor_of(driver.devices).visible
        names = ", ".join(gpu.name for gpu in driver.devices if gpu.parent_uuid is None)
        return Reason(Code.HIDDEN, f"{visible}={environ.get(visible)!r} hides {names}")
    return driver.reason or Reason(Code.NO_DEVICE, "the driver works and finds no GPU")


def check_absence(why: Reason, environ: Mapping[str, str], signs: Sequence[Path] = SIGNS) -> Iterator[Reason | str]:
    """Check whether the machine has a GPU although a run would use the CPU.

    Args:
        why: from :func:`why_no_gpu`.
        environ: the environment to look in.
        signs: files that exist while NVIDIA's driver is loaded.
    """
    if why.code is Code.HIDDEN:
        yield f"{why}, so the CPU is measured"
        return
    has_gpu = why.code not in _NORMAL_WITHOUT_GPU or any(sign.exists() for sign in signs)
    if has_gpu and not NVIDIA.hides(environ):
        yield replace(
            why,
            text=f"NVIDIA's driver is on this machine, but no GPU can be used: {why}",
            cure=f"{why.cure or 'see what nvidia-smi says'}; or measure the CPU with {NVIDIA.visible}=-1",
        )


def check_gpu(device: Device, facts: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Reason | str]:
    """Check who else uses the GPU, and its settings and state.

    Args:
        device: the GPU.
        facts: its properties, from :meth:`Driver.facts`.
        now: its state, from :meth:`Driver.look`.
    """
    if now["lost"]:
        yield Reason(
            Code.GPU_LOST, "the GPU stopped answering just now", "reset it with nvidia-smi --gpu-reset, or reboot"
        )
    if now["processes"]:
        yield Reason(
            Code.BUSY,
            f"{_others(now['processes'])} computed on the GPU just now. Rows would be invalid, since memory and energy "
            "include theirs",
            f"end them (nvidia-smi lists them), name another GPU in {vendor_of([device]).visible}, or keep such rows "
            "with --mp-keep-suspect",
        )
    yield from _settings(device, facts)
    yield from _state(facts, now)


def _settings(device: Device, facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["persistence"] is False:
        yield (
            "persistence mode is off: the first call to an idle GPU takes seconds, and settings may be lost between "
            "runs (turn it on with nvidia-smi -pm 1, as root)"
        )
    limit, default = facts["power_limit_w"], facts.get("power_limit_default_w")
    if limit is not None and default is not None and limit < default:
        yield f"the power limit is {limit:g} W, below the default of {default:g} W: steps may be slower than elsewhere"
    if device.parent_uuid is not None:
        yield "a MIG instance: what the driver tells only of the whole GPU is left empty, since others share it"
    if _has_own_namespace():
        yield (
            "this process has its own PID namespace. If the driver lists processes by the host's numbers, peak memory "
            "is the rise of the whole GPU's, which is right as long as nobody else uses it"
        )


def _state(facts: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if now["graphics_processes"]:
        yield f"{_others(now['graphics_processes'])} drew with the GPU just now: step times may vary more"
    temperature, slowdown = now["temperature_c"], facts.get("slowdown_c")
    if temperature is not None and slowdown is not None and temperature > slowdown - _NEAR_SLOWDOWN_C:
        yield f"the GPU is at {temperature:g} °C and slows down at {slowdown:g} °C: let it cool first"
    events = [event for event in now["clock_events"] if event in THROTTLING]
    if events:
        yield f"the GPU is throttled just now ({', '.join(events)}): rows would be invalid meanwhile"


def _has_own_namespace() -> bool:
    """Whether this process has its own PID namespace, as in most containers."""
    try:
        return str(_PID_NAMESPACE.readlink()) != _HOST_NAMESPACE
    except OSError:
        return False


def _others(count: int) -> str:
    return f"{count} other process{'' if count == 1 else 'es'}"


# The figures.


@dataclass(frozen=True, slots=True)
class Figure:
    """Whether a run would have a figure.

    Args:
        name: in plain words.
        answer: whether it can be measured.
        way: how; None if it cannot.
        reason: why not, or not fully; None if it can.
    """

    name: str
    answer: Answer
    way: str | None = None
    reason: Reason | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {
            "figure": self.name,
            "answer": self.answer,
            "way": self.way,
            "reason": self.reason and self.reason.text,
            "do": self.reason and self.reason.cure,
        }


_GPU_FIGURES = {
    "peak GPU memory": Reading.PROCESSES,
    "reserved memory": Reading.RESERVED_MEMORY,
    "energy": Reading.ENERGY,
    "power": Reading.POWER,
    "clocks": Reading.SM_CLOCK,
    "temperature": Reading.TEMPERATURE,
    "throttling": Reading.CLOCK_EVENTS,
    "utilisation": Reading.UTILIZATION,
}
"""Figures of the GPU and the reading that each needs first of all."""


def figures_without_gpu(why: Reason) -> list[Figure]:
    """Return every figure of a run without a GPU, or with one that cannot be watched."""
    return _with_the_others([Figure(name, "no", reason=why) for name in _GPU_FIGURES])


def figures_of_gpu(ways: Mapping[str, str], reasons: Mapping[str, Reason]) -> list[Figure]:
    """Return every figure of a run on a GPU.

    Args:
        ways: how each reading is taken.
        reasons: why a reading is not taken.
    """
    figures = {name: _figure(name, reading, ways, reasons) for name, reading in _GPU_FIGURES.items()}
    memory, energy, clocks = figures["peak GPU memory"], figures["energy"], figures["clocks"]
    if memory.reason is None:
        figures["peak GPU memory"] = replace(memory, way="process: the driver's list of processes")
    elif Reading.MEMORY in ways:
        way = "device-minus-idle: right if nobody else uses the GPU"
        figures["peak GPU memory"] = replace(memory, answer="in part", way=way)
    if energy.reason is not None and Reading.POWER in ways:
        reason = energy.reason.worded(f"no counter: {energy.reason}")
        figures["energy"] = Figure("energy", "in part", "power: its integral over the timed steps", reason)
    memory_clock = _figure("clocks", Reading.MEMORY_CLOCK, ways, reasons)
    for name, missing, known in (("sm", clocks, memory_clock), ("memory", memory_clock, clocks)):
        if missing.reason is not None and known.reason is None:
            reason = missing.reason.worded(f"not of {name}: {missing.reason}")
            figures["clocks"] = replace(known, answer="in part", reason=reason)
    return _with_the_others(list(figures.values()))


def _figure(name: str, reading: Reading, ways: Mapping[str, str], reasons: Mapping[str, Reason]) -> Figure:
    if reading in ways:
        return Figure(name, "yes", ways[reading])
    return Figure(name, "no", reason=reasons.get(reading) or Reason(Code.NOT_TOLD, "the driver does not tell"))


def check_figures(figures: Sequence[Figure]) -> Iterator[Reason]:
    """Find the figures that the user can make measurable, one problem for all of one reason."""
    together: dict[Reason, list[str]] = {}
    for figure in figures:
        if figure.reason is not None and figure.reason.cure is not None:
            together.setdefault(figure.reason, []).append(figure.name)
    for reason, names in together.items():
        yield reason.worded(f"not or not fully measured: {', '.join(names)}: {reason}")


def _with_the_others(of_gpu: Sequence[Figure]) -> list[Figure]:
    memory = Figure("host memory", "yes", "VmHWM of the process")
    if host.peak_resident_mib(os.getpid()) is None:
        memory = Figure("host memory", "no", reason=Reason(Code.HOST_SILENT, "this system has no /proc"))
    return [
        Figure("step time", "yes", "blocks of compiled steps in steady state"),
        *of_gpu,
        memory,
        Figure("overflow", "yes", "every gradient is checked, in modes with a loss scale"),
        Figure("accuracy", "yes", "on the test set, after the last step"),
    ]
