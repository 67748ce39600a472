"""The device that a run would use, and the state it is in now."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpscale.core.device import HIDDEN, Device, find_device
from mpscale.doctor.cures import cure
from mpscale.doctor.findings import Answer, Examination, Measured, Precision, Problem
from mpscale.telemetry import host
from mpscale.telemetry.client import Driver
from mpscale.telemetry.fingerprint import VARIABLES
from mpscale.telemetry.gpu_state import EVENT_REASONS, THROTTLED
from mpscale.telemetry.host import busy_words
from mpscale.telemetry.nvidia import GARBLED

SIGNS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))
"""Files that NVIDIA's kernel module makes: one of them is there where a GPU is, whatever its library says."""

_NO_GPU = ("no NVIDIA driver library", "driver is not loaded", "finds no GPU")
"""Reasons that a machine without a GPU gives, too."""
_NEAR_SLOWDOWN_C = 20.0
_HOST_NAMESPACE = "pid:[4026531836]"
"""The first PID namespace of every Linux has this number (PROC_PID_INIT_INO)."""


def find(
    found: Examination, driver: Driver, environ: Mapping[str, str], signs: Sequence[Path] = SIGNS
) -> tuple[Device | None, str | None]:
    """The device, None where no run can begin; and why it is no GPU.

    Args:
        found: takes problems and notes.
        driver: knows the GPUs.
        environ: the environment to look in.
        signs: files that are there where NVIDIA's driver is loaded.
    """
    try:
        device = find_device(driver.devices, environ, host.cpu())
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
    reason = str(driver.reason or "the NVIDIA driver works and finds no GPU")
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


# What around a run changes its figures: environment variables, and who else keeps the machine busy.

_OFF = ("", "0", "false", "False", "FALSE")
_WORDS = {
    "CUDA_VISIBLE_DEVICES": "the first GPU that it names is used; -1 is the CPU",
    "KERAS_BACKEND": "a run uses tensorflow whatever this says",
    "NVIDIA_TF32_OVERRIDE": "NVIDIA's libraries follow it, and not what the modes fp32 and tf32 ask for",
    "ONEDNN_MAX_CPU_ISA": "oneDNN uses no newer instructions than these",
    "TF_CUDNN_DETERMINISTIC": "cuDNN is kept to deterministic kernels, which may be slower",
    "TF_DETERMINISTIC_OPS": "TensorFlow is kept to deterministic kernels, which may be slower",
    "TF_ENABLE_ONEDNN_OPTS": "0 turns oneDNN's kernels off, those for bfloat16 among them",
    "TF_FORCE_GPU_ALLOW_GROWTH": "overrides that a run lets TensorFlow's memory grow",
    "TF_GPU_ALLOCATOR": "--mp-gpu-allocator auto keeps to it",
    "TF_XLA_FLAGS": "may have XLA compile what --mp-jit off leaves alone",
    "XLA_FLAGS": "changes what XLA compiles, in every mode",
}
_IDLE = {
    "TF_ENABLE_XLA_JIT": "TensorFlow does not read it; steps are compiled with XLA unless --mp-jit off",
    "TF_ENABLE_AUTO_MIXED_PRECISION": "TensorFlow 2 does not read it; its rewrite to float16 is the mode graph-rewrite",
}


def examine_surroundings(found: Examination, device: Device | None, environ: Mapping[str, str]) -> None:
    """Notes on variables that are set and on the load, and a problem for what makes figures wrong.

    Args:
        found: takes problems and notes.
        device: where a run would train, None where that is unknown.
        environ: the environment to look in.
    """
    wrong = {name: problem for name, problem in _wrong(device, environ).items() if name in environ}
    found.problems += [Problem(f"{name}={environ[name]}: {words}", f"unset {name}") for name, words in wrong.items()]
    for name in VARIABLES:
        if name in environ and name not in wrong:
            words = f" ({_WORDS[name]})" if name in _WORDS else ""
            found.notes.append(f"{name}={environ[name]} is set and written down with each run{words}")
    found.notes += [f"{name} does nothing: {words}" for name, words in _IDLE.items() if name in environ]
    busy = busy_words()
    found.notes += [busy] if busy else []


def _wrong(device: Device | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables under which figures on a GPU are not what their columns say."""
    if device is None or device.kind != "gpu":
        return {}
    wrong = {}
    if environ.get("CUDA_LAUNCH_BLOCKING") not in _OFF:
        wrong["CUDA_LAUNCH_BLOCKING"] = "every kernel is waited for, so step times are those of another program"
    if environ.get("TF_FORCE_GPU_ALLOW_GROWTH") in _OFF:
        wrong["TF_FORCE_GPU_ALLOW_GROWTH"] = "TensorFlow takes the GPU's memory at once, so its peak says nothing"
    if device.has_tf32:
        wrong["NVIDIA_TF32_OVERRIDE"] = "one of the modes fp32 and tf32 is then not what its name says"
    return wrong


# Whether the arithmetic of mixed precision is fast on a device. What a model gains from that only a run tells.

_ADVICE = (
    "For Tensor Cores choose batch, units and channels in multiples of 8.",
    "mpscale compiles steps with XLA; a user's own program needs jit_compile=True for the same speed.",
    "Small steps wait for Python and not for the GPU: where a report says dispatch_bound, take a larger batch.",
)
_CHECKS = (
    "Figures here show whether training works: overflow, loss scale, accuracy. They tell no speed of another device."
)


def on_gpu(device: Device) -> Precision:
    """What NVIDIA's generation of a GPU computes fast.

    Args:
        device: a GPU.
    """
    capability = device.compute_capability
    if capability is None:
        return Precision(None, None, False, ("NVML does not tell the compute capability, so nothing is known.",))
    mine = f"Compute capability {'.'.join(map(str, capability))}"
    if capability >= (8, 0):
        fast = f"{mine}: float16, bfloat16 and TF32 run on Tensor Cores."
        baseline = (
            "TensorFlow rounds float32 products to TF32 by default here, so compare mixed modes with tf32, and fp32 "
            "with tf32 to see what TF32 alone gives."
        )
        return Precision("yes", "yes", True, (fast, baseline, *_ADVICE))
    converted = "bfloat16 is converted to float32 and back, and TF32 does not exist before 8.0."
    if capability >= (7, 0) and not _without_tensor_cores(device):
        return Precision("yes", "no", False, (f"{mine}: float16 runs on Tensor Cores. {converted}", *_ADVICE))
    if capability in ((5, 3), (6, 0), (6, 2), (7, 5)):
        twice = f"{mine}, no Tensor Cores: float16 runs at up to twice the speed of float32. {converted}"
        return Precision("in part", "no", False, (twice, *_ADVICE[1:]))
    slow = "float16 is computed far slower than float32" if capability == (6, 1) else "float16 is not computed as such"
    nothing = f"{mine}: {slow}, so mixed precision saves memory at most. {converted}"
    return Precision("no", "no", False, (nothing, _CHECKS))


def on_cpu(flags: Sequence[str] | None) -> Precision:
    """What a CPU computes fast.

    Args:
        flags: its features that matter for precision, None where the system does not tell them.
    """
    if flags is None:
        unknown = "This system does not tell what its CPU computes in float16 and bfloat16."
        return Precision(None, None, False, (unknown, _CHECKS))
    float16: Answer = "yes" if "amx_fp16" in flags else "in part" if "avx512_fp16" in flags else "no"
    bfloat16: Answer = "yes" if "amx_bf16" in flags else "in part" if "avx512_bf16" in flags else "no"
    units = [name for name, there in (("bfloat16", bfloat16), ("float16", float16)) if there != "no"]
    words = []
    if units:
        words.append(
            f"This CPU has instructions for {' and '.join(units)}. TensorFlow uses them through oneDNN, so in what XLA "
            "does not compile: try --mp-jit off."
        )
    if not words:
        words.append("This CPU has no instructions for float16 or bfloat16, so mixed precision saves no time here.")
    if float16 == "no":
        words.append("float16 is emulated; without XLA it may be many times slower than float32.")
    return Precision(float16, bfloat16, False, (*words, _CHECKS))


def _without_tensor_cores(device: Device) -> bool:
    # The one generation in which the number does not tell: 7.5 is both Turing with and without them.
    return device.compute_capability == (7, 5) and "GTX 16" in device.name


# Which figures of a run will be there, by which way, and why not.

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


def measured_on_gpu(told: Mapping[str, Any]) -> list[Measured]:
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
