"""The device that a run would use, and the state it is in now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscale.doctor.cures import cure
from mpscale.doctor.findings import Examination, Problem
from mpscale.telemetry.device import HIDDEN, Device, find_device
from mpscale.telemetry.driver import Driver, NoDriver
from mpscale.telemetry.gpu_state import EVENT_REASONS, THROTTLED

SIGNS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""Files that NVIDIA's kernel module makes: one of them is there where a GPU is, whatever its library says."""

_NO_GPU = ("no NVIDIA driver library", "driver is not loaded", "finds no GPU")
"""Reasons that a machine without a GPU gives, too."""
_NEAR_SLOWDOWN_C = 20.0
_HOST_NAMESPACE = "pid:[4026531836]"
"""The first PID namespace of every Linux has this number (PROC_PID_INIT_INO)."""


def find(
    found: Examination, driver: Driver | NoDriver, environ: Mapping[str, str], signs: Sequence[Path] = SIGNS
) -> tuple[Device | None, str | None]:
    """The device, None where no run can begin; and why it is no GPU.

    Args:
        found: takes problems and notes.
        driver: knows the GPUs.
        environ: the environment to look in.
        signs: files that are there where NVIDIA's driver is loaded.
    """
    try:
        device = find_device(driver.devices, environ)
    except ValueError as error:
        problem, _, do = str(error).partition("; ")
        found.problems.append(Problem(problem, f"name one of them: {do}" if do.startswith("there is") else do))
        return None, problem
    if device.kind == "gpu":
        return device, None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.split(",")[0].strip() in HIDDEN
    if driver.devices:
        names = ", ".join(gpu.name for gpu in driver.devices if gpu.parent_uuid is None)
        reason = f"CUDA_VISIBLE_DEVICES={visible!r} hides {names}"
        found.notes.append(f"{reason}: the CPU is measured")
        return device, reason
    reason = driver.reason or "the NVIDIA driver works and finds no GPU"
    expected = any(sign.exists() for sign in signs) or not any(words in reason for words in _NO_GPU)
    if expected and not hidden:
        do = cure(reason) or "see what nvidia-smi says"
        found.problems.append(
            Problem(
                f"NVIDIA's driver is on this machine, but no GPU can be used: {reason}",
                f"{do}; or measure the CPU with CUDA_VISIBLE_DEVICES=-1",
            )
        )
    return device, reason


def examine(found: Examination, device: Device, facts: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Who else is on the GPU, and which of its settings and readings are worth a word.

    Args:
        found: takes problems and notes.
        device: the GPU.
        facts: of it.
        now: what it is like at this moment.
    """
    if now["lost"]:
        reason = "the GPU is lost: it fell off the bus or was reset"
        found.problems.append(Problem(reason, cure(reason) or "reboot"))
    if now["processes"]:
        others = _number(now["processes"], "process", "processes")
        found.problems.append(
            Problem(
                f"{others} computed on the GPU just now, so rows would be invalid: memory and energy are theirs too",
                "end them (nvidia-smi lists them), name another GPU in CUDA_VISIBLE_DEVICES, or keep such rows with "
                "--mp-keep-suspect",
            )
        )
    found.notes += [*_settings(device, facts), *_state(facts, now)]


def in_namespace(link: Path = Path("/proc/self/ns/pid")) -> bool:
    """Whether this process has numbers of its own for processes, as in most containers.

    Args:
        link: names the namespace.
    """
    try:
        return str(link.readlink()) != _HOST_NAMESPACE
    except OSError:
        return False


def _settings(device: Device, facts: Mapping[str, Any]) -> list[str]:
    notes = []
    if facts["persistence"] is False:
        notes.append(
            "persistence mode is off: the first call to an idle GPU takes seconds, and settings may be lost in between "
            "(nvidia-smi -pm 1, as root)"
        )
    limit, default = facts["power_limit_w"], facts["power_limit_default_w"]
    if None not in (limit, default) and limit < default:
        notes.append(
            f"the power limit is {limit:g} W and by default {default:g} W: steps may be slower than others' on this GPU"
        )
    if device.parent_uuid is not None:
        notes.append("a MIG instance: what NVML tells of the whole GPU only is left empty, since others share it")
    if in_namespace():
        notes.append(
            "this runs in a PID namespace of its own: where the driver lists processes by the host's numbers, peak "
            "memory is what the whole GPU's rose by, which is right while nobody else uses it"
        )
    return notes


def _state(facts: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    notes = []
    if now["graphics_processes"]:
        others = _number(now["graphics_processes"], "process", "processes")
        notes.append(f"{others} drew with the GPU just now: step times may vary more")
    temperature, slowdown = now["temperature_c"], facts["slowdown_c"]
    if None not in (temperature, slowdown) and temperature > slowdown - _NEAR_SLOWDOWN_C:
        notes.append(f"the GPU has {temperature:g} °C and slows down from {slowdown:g} °C on: let it cool first")
    bits = (now["event_reasons"] or 0) & THROTTLED
    if bits:
        names = ", ".join(name for bit, name in EVENT_REASONS.items() if bits & bit)
        notes.append(f"the GPU's clocks are held down just now ({names}): rows would be invalid while they are")
    return notes


def _number(count: int, one: str, several: str) -> str:
    return f"{count} other {one if count == 1 else several}"
